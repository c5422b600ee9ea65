// A team: the threads of a block with the same threadIdx.y, which work on the same rows. blockDim = (threads of a team,
// teams). A team is one warp, or else the whole block.
#pragma once

#include <cuda_runtime.h>

namespace openmythos::cuda {

__device__ __forceinline__ void team_sync() {
  if (blockDim.x == 32) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// The sum over a warp, in every lane. Deterministic.
template <typename A>
__device__ __forceinline__ A warp_sum(A x) {
#pragma unroll
  for (int other = 16; other > 0; other /= 2) x += __shfl_xor_sync(0xffffffffu, x, other);
  return x;
}

__device__ __forceinline__ int team_warps() { return blockDim.x / 32; }

// The number, in the block, of this thread's warp, and of the first warp of its team.
__device__ __forceinline__ int warp_in_block() { return threadIdx.y * team_warps() + threadIdx.x / 32; }
__device__ __forceinline__ int first_warp_of_team() { return threadIdx.y * team_warps(); }

}  // namespace openmythos::cuda
