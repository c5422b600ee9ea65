// A team: the threads of one block with the same threadIdx.y, which work on the same rows.
// blockDim = (threads of a team, teams); a team is one warp, or else all of its block.
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

// The sum over a warp, in every lane; the same bits every time.
template <typename A>
__device__ __forceinline__ A warp_sum(A x) {
#pragma unroll
  for (int other = 16; other > 0; other /= 2) x += __shfl_xor_sync(0xffffffffu, x, other);
  return x;
}

__device__ __forceinline__ int team_warps() { return blockDim.x / 32; }

// Number of this thread's warp in its block, and of its team's first warp.
__device__ __forceinline__ int warp_in_block() { return threadIdx.y * team_warps() + threadIdx.x / 32; }
__device__ __forceinline__ int first_warp_of_team() { return threadIdx.y * team_warps(); }

}  // namespace openmythos::cuda
