// Shared by host code and kernels. Needs neither torch nor nvcc.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace openmythos::cuda {

// Element type of tensors passed as void*.
enum class Element { f32, f64, bf16, f16 };

// Most threads of a block: half of the hardware's limit, so that each may use 128 registers.
constexpr int kMaxThreads = 512;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace openmythos::cuda
