// Shared by the bindings: device and stream of a call, element types.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cstdlib>
#include <string_view>

#include "cuda/launch.h"

namespace openmythos::cuda {

// Makes x's device current for its lifetime. `stream`: that device's current stream.
struct On {
  explicit On(const at::Tensor& x) : guard(x.device()), stream(c10::cuda::getCurrentCUDAStream()) {}
  c10::cuda::OptionalCUDAGuard guard;
  cudaStream_t stream;
};

// The switch OPENMYTHOS_UNPROVEN=1: kernels that pass every check without a GPU, but that no GPU has run yet.
inline bool unproven() {
  const char* const value = std::getenv("OPENMYTHOS_UNPROVEN");
  return value && std::string_view(value) == "1";
}

inline Element element_of(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return Element::f32;
    case at::kDouble:
      return Element::f64;
    case at::kBFloat16:
      return Element::bf16;
    case at::kHalf:
      return Element::f16;
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(false, "no CUDA kernel for ", x.scalar_type());
  }
}

}  // namespace openmythos::cuda
