// The second stage of the loop step's parameter gradients: adds the blocks' slabs of column sums in a fixed order.
#pragma once

#include "common/lti.h"
#include "cuda/pack.cuh"

namespace openmythos::cuda {

// Rows of a slab: for each channel, sums over a block's rows for decay, B, halt_weight, norm_weight.
enum Sum { kSumDecay, kSumB, kSumHalt, kSumNorm, kSums };

constexpr int kReduceChannels = 32, kReduceGroups = 16;

template <typename T>
struct ParameterGrads {
  const T *log_A, *log_dt;
  T *dlog_A, *dlog_dt, *dB, *dhalt_weight, *dhalt_bias, *dnorm_weight;
};

// Adds the slabs in order. Grid: (channels / kReduceChannels, kSums); each group of a block adds a run of slabs.
// `rates` gets the gradients of the channels' log rates, whose sum is that of log_dt.
template <typename T>
__global__ void columns_kernel(const acc_t<T>* slabs, int64_t blocks, int D, ParameterGrads<T> grads, acc_t<T>* rates) {
  using A = acc_t<T>;
  __shared__ A runs[kReduceGroups][kReduceChannels];
  const int d = blockIdx.x * kReduceChannels + threadIdx.x, which = blockIdx.y;
  const int64_t run = (blocks + kReduceGroups - 1) / kReduceGroups, begin = threadIdx.y * run;
  const int64_t end = begin + run < blocks ? begin + run : blocks;
  A sum = 0;
  if (d < D) {
    for (int64_t b = begin; b < end; ++b) {
      sum += slabs[(b * kSums + which) * D + d];
      OPENMYTHOS_COUNT(loaded, sizeof(A));
    }
  }
  runs[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || d >= D) return;
  for (int g = 1; g < kReduceGroups; ++g) sum += runs[g][threadIdx.x];
  switch (which) {
    case kSumDecay:
      rates[d] = sum * lti::decay<A>(widen(*grads.log_dt), widen(grads.log_A[d])).slope;
      grads.dlog_A[d] = narrow<T>(rates[d]);
      break;
    case kSumB:
      grads.dB[d] = narrow<T>(sum);
      break;
    case kSumHalt:
      grads.dhalt_weight[d] = narrow<T>(sum);
      break;
    default:
      grads.dnorm_weight[d] = narrow<T>(sum);
  }
}

// The sum of n numbers, in double, by one block. Deterministic.
template <typename A>
__device__ double block_total(const A* x, int64_t n, double* shared) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) sum += x[i];
  __syncthreads();
  shared[threadIdx.x] = sum;
  __syncthreads();
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  return shared[0];
}

constexpr int kTotalThreads = 256;

// One block: the gradients of the two scalar parameters, log_dt and halt_bias.
template <typename T>
__global__ void totals_kernel(
    const acc_t<T>* rates, int D, const acc_t<T>* bias, int64_t blocks, ParameterGrads<T> grads) {
  __shared__ double shared[kTotalThreads];
  const double rate = block_total(rates, D, shared), logits = block_total(bias, blocks, shared);
  if (threadIdx.x == 0) {
    *grads.dlog_dt = narrow<T>(static_cast<acc_t<T>>(rate));
    *grads.dhalt_bias = narrow<T>(static_cast<acc_t<T>>(logits));
  }
}

}  // namespace openmythos::cuda
