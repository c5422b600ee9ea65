// Replaces c10's header, so that csrc/cuda/bindings*.cpp compile against a PyTorch without CUDA.
#pragma once

#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

#define C10_CUDA_CHECK(call)                                                        \
  do {                                                                              \
    const cudaError_t error_ = (call);                                              \
    TORCH_CHECK(error_ == cudaSuccess, "CUDA error: ", cudaGetErrorString(error_)); \
  } while (0)
