#include <cuda_runtime.h>

#include "../cuda_reduce.h"

namespace mamba {
namespace {

constexpr int kColumns = 32, kParts = 16;  // a block's columns, and how many threads share each

__global__ void __launch_bounds__(kColumns* kParts)
    sum_rows_kernel(const float* rows, int64_t count, int64_t pitch, int64_t size, float* to,
                    int64_t second_size, float* second) {
  __shared__ double parts[kParts][kColumns + 1];
  const int column = threadIdx.x % kColumns, part = threadIdx.x / kColumns;
  const int64_t i = int64_t{blockIdx.x} * kColumns + column, all = size + second_size;
  double sum = 0.0;  // of as many rows as a long sequence has pieces
  if (i < all) {
#pragma unroll 4
    for (int64_t row = part; row < count; row += kParts) sum += rows[row * pitch + i];
  }
  parts[part][column] = sum;
  __syncthreads();
  if (part != 0 || i >= all) return;
#pragma unroll
  for (int k = 1; k < kParts; ++k) sum += parts[k][column];
  *(i < size ? to + i : second + (i - size)) = static_cast<float>(sum);
}

}  // namespace

const char* sum_rows_cuda(const float* rows, int64_t count, int64_t pitch, int64_t size, float* to,
                          int64_t second_size, float* second, void* stream) {
  const int64_t columns = size + second_size;
  if (columns == 0) return nullptr;
  const auto blocks = static_cast<unsigned>((columns + kColumns - 1) / kColumns);
  sum_rows_kernel<<<blocks, kColumns * kParts, 0, static_cast<cudaStream_t>(stream)>>>(
      rows, count, pitch, size, to, second_size, second);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace mamba
