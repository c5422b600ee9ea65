// What host code and kernels agree on. Nothing here needs torch or nvcc.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace openmythos::cuda {

// Element type of the tensors whose pointers are passed as void*.
enum class Element { f32, f64, bf16, f16 };

// Threads of the largest block: half of what the hardware allows, so that each may use 128 registers.
constexpr int kMaxThreads = 512;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace openmythos::cuda
