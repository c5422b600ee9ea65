// Kernels into which test_faults.py seeds faults, to show that the harness finds them.
#include <cuda_runtime.h>

// Shared and global atomics, dynamic shared memory.
__global__ void histogram_kernel(const int* values, int n, int bins, int* out) {
  extern __shared__ int counts[];
  for (int i = threadIdx.x; i < bins; i += blockDim.x) counts[i] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    atomicAdd(&counts[values[i]], 1);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < bins; i += blockDim.x) atomicAdd(&out[i], counts[i]);
}

// Reverses each block's part.
template <int Threads>
__global__ void reverse_kernel(const int* x, int* out) {
  __shared__ int part[Threads];
  part[threadIdx.x] = x[blockIdx.x * Threads + threadIdx.x];
  __syncthreads();
  out[blockIdx.x * Threads + threadIdx.x] = part[Threads - 1 - threadIdx.x];
}

// The sum over each warp, in every lane.
__global__ void warp_sum_kernel(const int* x, int* out) {
  int sum = x[threadIdx.x];
  for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
  out[threadIdx.x] = sum;
}

extern "C" {
int histogram(const int* values, int n, int bins, int* out) {
  histogram_kernel<<<3, 64, bins * sizeof(int)>>>(values, n, bins, out);
  return cudaGetLastError();
}
int reverse64(const int* x, int blocks, int* out) {
  reverse_kernel<64><<<blocks, 64>>>(x, out);
  return cudaGetLastError();
}
int warp_sum(const int* x, int* out) {
  warp_sum_kernel<<<1, 64>>>(x, out);
  return cudaGetLastError();
}
}
