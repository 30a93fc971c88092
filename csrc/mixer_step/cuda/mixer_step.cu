#include "mixer_step.h"

#include "project.cuh"

namespace mamba {
namespace {

// Beyond, the convolution's kernel and cuBLAS's product are as fast.
constexpr int64_t kMostProjectChannels = 2048;

// As many blocks share eight rows as whole stretches of channels can be given to.
int cluster_size(int64_t channels) {
  int blocks = kProjectBlocks;
  while (blocks > 1 && channels % (32 * blocks) != 0) blocks /= 2;
  return blocks;
}

int multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

template <typename T, typename TState, bool kMany>
void launch_update(const MixerStepParams& p, int64_t groups, int each, cudaStream_t stream) {
  const auto kernel = step_update_kernel<T, TState, kMany>;
  const size_t bytes = UpdateShared<T>(nullptr, p.rank).bytes();
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       static_cast<int>(bytes));
  const dim3 grid(static_cast<unsigned>(p.channels / kUpdateChannels),
                  static_cast<unsigned>((groups + each - 1) / each));
  launch_chained(kernel, grid, kUpdateThreads, bytes, Link{}, stream, p, each);
}

template <typename T, typename TState>
void launch_update(const MixerStepParams& p, int64_t groups, cudaStream_t stream) {
  const int64_t columns = p.channels / kUpdateChannels, resident = int64_t{3} * multiprocessors();
  int each = 1;
  while (each < 4 && columns * groups > resident * each) each *= 2;
  if (each == 1) return launch_update<T, TState, false>(p, groups, each, stream);
  launch_update<T, TState, true>(p, groups, each, stream);
}

template <typename T>
void launch_update(const MixerStepParams& p, cudaStream_t stream) {
  const int64_t groups = (p.batch + kStepRows - 1) / kStepRows;
  if (p.state_dtype == DType::kFloat32) return launch_update<T, float>(p, groups, stream);
  launch_update<T, T>(p, groups, stream);
}

template <typename T>
void launch_project(const MixerStepParams& p, cudaStream_t stream) {
  const int blocks = cluster_size(p.channels);
  const size_t bytes = ProjectShared<T>(nullptr, p.projected, p.channels, blocks).bytes();
  const int64_t groups = (p.batch + kStepRows - 1) / kStepRows;
  cudaFuncSetAttribute(step_project_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       static_cast<int>(bytes));
  launch_chained(step_project_kernel<T>,
                 dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(groups)),
                 kProjectThreads, bytes, Link{false, blocks}, stream, p);
}

const char* launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* mixer_step_refusal(const MixerStepParams& p) {
  constexpr int64_t kMostStates = int64_t{1} << 31;
  if (p.channels % kUpdateChannels != 0) return "the channels are no multiple of 64";
  if (p.rank % 16 != 0 || p.rank == 0) return "the rank of dt is no multiple of 16";
  if (p.projected > kMostProjected) return "x_proj has too many outputs";
  if (p.batch * p.channels * kStepStates >= kMostStates) return "there are too many states";
  return nullptr;
}

bool step_project_serves(const MixerStepParams& p) {
  return p.channels <= kMostProjectChannels && chains_work();
}

const char* step_project_cuda(const MixerStepParams& p, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  p.dtype == DType::kFloat16 ? launch_project<__half>(p, stream)
                             : launch_project<__nv_bfloat16>(p, stream);
  return launched();
}

const char* step_update_cuda(const MixerStepParams& p, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  p.dtype == DType::kFloat16 ? launch_update<__half>(p, stream)
                             : launch_update<__nv_bfloat16>(p, stream);
  return launched();
}

}  // namespace mamba
