#include <cassert>

#include "../../common/cuda_convert.cuh"
#include "rows.cuh"
#include "state_update.h"

namespace mamba {
namespace {

constexpr int kThreads = 128;
constexpr int kMaxBlocks = 1 << 20;  // a loop over rows covers the rest, so no grid ever overflows

// One of the four tensors read at every state element. With kStatic the type is T and the stride
// along the state is 1; otherwise both are looked up at run time. The first serves the usual mixes
// of dtypes in a few instantiations, the second serves every other one.
template <typename T, bool kStatic>
struct Row {
  const void* data;
  int64_t offset, stride;
  DType dtype;

  __device__ Row(const TensorArg& t, int64_t start, int last)
      : data(t.data), offset(start), stride(t.stride[last]), dtype(t.dtype) {}
  __device__ float load(int64_t i) const {
    if constexpr (kStatic) return to_float(static_cast<const T*>(data)[offset + i]);
    return load_float(data, dtype, offset + i * stride);
  }
  __device__ void store(int64_t i, float v) const {
    if constexpr (kStatic) {
      static_cast<T*>(const_cast<void*>(data))[offset + i] = from_float<T>(v);
    } else {
      store_float(const_cast<void*>(data), dtype, offset + i * stride, v);
    }
  }
};

// Lanes of a warp that share a row: `lanes` is a power of two, at most 32. The sum over the state
// goes through shuffles in a fixed order, so results do not depend on the launch.
template <typename TState, typename TInput, bool kStatic>
__global__ void __launch_bounds__(kThreads)
    state_update_kernel(const __grid_constant__ StateUpdateParams p, int lanes) {
  const int lane = threadIdx.x % lanes;
  const int64_t rows = p.batch * p.heads * p.head_dim;
  const int64_t rows_per_block = kThreads / lanes;
  const int64_t step = rows_per_block * gridDim.x;
  const int64_t first = rows_per_block * blockIdx.x + threadIdx.x / lanes;
  // Every lane runs the same number of turns (the shuffles need the whole warp); the ones past the
  // end work on nothing.
  for (int64_t base = rows_per_block * blockIdx.x; base < rows; base += step) {
    const int64_t row = first + (base - rows_per_block * blockIdx.x);
    const bool in_range = row < rows;
    int64_t ib = 0, ih = 0, ip = 0, slot = -1;
    if (in_range) {
      ip = row % p.head_dim;
      ih = row / p.head_dim % p.heads;
      ib = row / p.head_dim / p.heads;
      slot = p.indices ? p.indices[ib * p.indices_stride] : ib;
      assert(slot < p.state_rows && "state_batch_indices names a row that the state does not have");
    }
    float sum = 0.0f, x = 0.0f;
    if (slot >= 0) {
      float dt = load_at(p.dt, ib, ih, ip);
      if (p.dt_bias.data) dt += load_at(p.dt_bias, ih, ip);
      if (p.dt_softplus && dt <= 20.0f) dt = log1pf(expf(dt));
      x = load_at(p.x, ib, ih, ip);
      const int64_t group = ih / (p.heads / p.groups);
      const Row<TState, kStatic> s(
          p.state, slot * p.state.stride[0] + ih * p.state.stride[1] + ip * p.state.stride[2], 3);
      const Row<float, kStatic> A(p.A, ih * p.A.stride[0] + ip * p.A.stride[1], 2);
      const Row<TInput, kStatic> B(p.B, ib * p.B.stride[0] + group * p.B.stride[1], 2);
      const Row<TInput, kStatic> C(p.C, ib * p.C.stride[0] + group * p.C.stride[1], 2);
      for (int64_t i = lane; i < p.state_dim; i += lanes) {
        const float next = s.load(i) * expf(dt * A.load(i)) + dt * x * B.load(i);
        s.store(i, next);
        sum += next * C.load(i);
      }
    }
    for (int width = lanes / 2; width > 0; width /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, width);
    }
    if (in_range && lane == 0) {
      float y = 0.0f;
      if (slot >= 0) {
        y = sum;
        if (p.D.data) y += x * load_at(p.D, ih, ip);
        if (p.z.data) {
          const float z = load_at(p.z, ib, ih, ip);
          y *= z / (1.0f + expf(-z));
        }
      }
      store_float(p.out.data, p.out.dtype, row, y);
    }
  }
}

template <typename TState, typename TInput, bool kStatic>
void launch(const StateUpdateParams& p, cudaStream_t stream) {
  int lanes = 1;
  while (lanes < 32 && lanes < p.state_dim) lanes *= 2;
  const int64_t rows_per_block = kThreads / lanes;
  const int64_t rows = p.batch * p.heads * p.head_dim;
  const int64_t blocks = (rows + rows_per_block - 1) / rows_per_block;
  const unsigned grid = static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
  state_update_kernel<TState, TInput, kStatic><<<grid, kThreads, 0, stream>>>(p, lanes);
}

template <typename TState>
void launch_for_input(const StateUpdateParams& p, cudaStream_t stream) {
  switch (p.B.dtype) {
    case DType::kFloat16:
      return launch<TState, __half, true>(p, stream);
    case DType::kBFloat16:
      return launch<TState, __nv_bfloat16, true>(p, stream);
    default:
      return launch<TState, float, true>(p, stream);
  }
}

}  // namespace

const char* state_update_cuda(const StateUpdateParams& p, void* stream_handle) {
  if (p.batch * p.heads * p.head_dim == 0) return nullptr;
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const bool usual = p.A.dtype == DType::kFloat32 && p.B.dtype == p.C.dtype &&
                     p.state.stride[3] == 1 && p.A.stride[2] == 1 && p.B.stride[2] == 1 &&
                     p.C.stride[2] == 1;
  // Rows of the grid's second dimension are limited; so large a batch is no decode step.
  if (state_rows_fit(p) && p.batch <= int64_t{kRowsAtOnce} * 65535) {
    switch (p.x.dtype) {
      case DType::kFloat16:
        launch_state_rows<__half>(p, stream);
        break;
      case DType::kBFloat16:
        launch_state_rows<__nv_bfloat16>(p, stream);
        break;
      default:
        launch_state_rows<float>(p, stream);
    }
  } else if (!usual) {
    launch<float, float, false>(p, stream);
  } else if (p.state.dtype == DType::kFloat16) {
    launch_for_input<__half>(p, stream);
  } else if (p.state.dtype == DType::kBFloat16) {
    launch_for_input<__nv_bfloat16>(p, stream);
  } else {
    launch_for_input<float>(p, stream);
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace mamba
