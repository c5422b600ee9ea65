// The part of the CUDA runtime that our host code calls. Device memory is host memory; streams run synchronously.
#include <cuda_runtime_api.h>

#include <cstring>

#include "control.h"

extern "C" {
cudaError_t cudaGetLastError() { return cuda_on_cpu::take_error(); }
cudaError_t cudaPeekAtLastError() { return cuda_on_cpu::error(); }
const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : cuda_on_cpu::message(); }
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind, cudaStream_t) {
  memcpy(to, from, n);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t n, cudaStream_t) {
  memset(to, value, n);
  return cudaSuccess;
}
}
