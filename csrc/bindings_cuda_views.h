// Views of matrices, and their products without torch's dispatcher.
#pragma once

#include "bindings_cuda.h"

// Of torch's C interface of its CUDA operators, straight to cuBLAS.
extern "C" AOTITorchError aoti_torch_cuda_mm_out(AtenTensorHandle out, AtenTensorHandle self,
                                                 AtenTensorHandle mat2);

namespace mamba {

// A view by strides; `offset` counts from the first element of t.
inline Tensor view(const Tensor& t, const Shape& sizes, const Shape& strides, int64_t offset = 0) {
  int64_t start = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(t.get(), &start));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(t.get(), static_cast<int64_t>(sizes.size()), sizes.data,
                                     strides.data, start + offset, &handle));
  return Tensor(handle);
}

inline Tensor transposed(const Tensor& t) {
  return view(t, {t.size(1), t.size(0)}, {t.stride(1), t.stride(0)});
}

inline void multiply_into(const Tensor& out, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mm_out(out.get(), a.get(), b.get()));
}

}  // namespace mamba
