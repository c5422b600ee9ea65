// Stable stream compaction of any number of positions, without atomics: count per tile, turn counts into offsets in one
// block, then read each tile again and write its running positions at its offset.
#include "cuda/compaction.h"

#include <cuda_runtime.h>

namespace openmythos::cuda {
namespace {

constexpr int kTile = 1024, kWarps = kTile / 32;

// Exclusive prefix sum of `x` over a block of kTile threads, and the total.
__device__ int64_t exclusive_sum(int64_t x, int64_t& total) {
  __shared__ int64_t warp_sums[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t sum = x;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int64_t other = __shfl_up_sync(0xffffffffu, sum, distance);
    if (lane >= distance) sum += other;
  }
  __syncthreads();  // the sums of the last call have been read
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  int64_t before = 0;
  total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) before = total;
    total += warp_sums[w];
  }
  return before + sum - x;
}

// Grid: one block per tile.
__global__ void __launch_bounds__(kTile) count_kernel(const bool* running, int64_t positions, int64_t* tiles) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kTile + threadIdx.x;
  int64_t total;
  exclusive_sum(i < positions && running[i], total);
  if (threadIdx.x == 0) tiles[blockIdx.x] = total;
}

// One block: turns the tiles' counts into the offsets of their first positions.
__global__ void __launch_bounds__(kTile) offsets_kernel(int64_t* tiles, int64_t n, int64_t* total) {
  int64_t before = 0;
  for (int64_t first = 0; first < n; first += kTile) {
    const int64_t i = first + threadIdx.x;
    int64_t sum;
    const int64_t offset = exclusive_sum(i < n ? tiles[i] : 0, sum);
    if (i < n) tiles[i] = before + offset;
    before += sum;
  }
  if (threadIdx.x == 0) *total = before;
}

// Grid: one block per tile. Thread i also fills slot i of the tail with -1.
__global__ void __launch_bounds__(kTile)
    index_kernel(const bool* running, int64_t positions, const int64_t* tiles, const int64_t* total, int64_t* index) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kTile + threadIdx.x;
  const bool runs = i < positions && running[i];
  int64_t sum;
  const int64_t rank = exclusive_sum(runs, sum);
  if (runs) index[tiles[blockIdx.x] + rank] = i;
  if (i < positions && i >= *total) index[i] = -1;
}

constexpr int kSequencesPerBlock = 4;

// One warp per sequence.
__global__ void sequences_kernel(
    const bool* running, int64_t sequences, int64_t length, int64_t* last, int64_t* counts) {
  const int64_t s = static_cast<int64_t>(blockIdx.x) * kSequencesPerBlock + threadIdx.y;
  if (s >= sequences) return;
  int64_t latest = -1, count = 0;
  for (int64_t t = threadIdx.x; t < length; t += 32) {
    if (running[s * length + t]) {
      latest = t;
      ++count;
    }
  }
  for (int other = 16; other > 0; other /= 2) {
    const int64_t theirs = __shfl_xor_sync(0xffffffffu, latest, other);
    latest = theirs > latest ? theirs : latest;
    count += __shfl_xor_sync(0xffffffffu, count, other);
  }
  if (threadIdx.x == 0) {
    last[s] = latest;
    counts[s] = count;
  }
}

}  // namespace

int64_t compaction_scratch(int64_t positions) { return ceil_div(positions, kTile); }

cudaError_t compact_active(const Compaction& x, cudaStream_t stream) {
  const int64_t positions = x.sequences * x.length, tiles = ceil_div(positions, kTile);
  const auto grid = static_cast<unsigned>(tiles);
  if (tiles > 0) count_kernel<<<grid, kTile, 0, stream>>>(x.running, positions, x.scratch);
  offsets_kernel<<<1, kTile, 0, stream>>>(x.scratch, tiles, x.total);
  if (tiles > 0) index_kernel<<<grid, kTile, 0, stream>>>(x.running, positions, x.scratch, x.total, x.index);
  if (x.sequences > 0) {
    const auto blocks = static_cast<unsigned>(ceil_div(x.sequences, kSequencesPerBlock));
    sequences_kernel<<<blocks, dim3(32, kSequencesPerBlock), 0, stream>>>(
        x.running, x.sequences, x.length, x.last, x.counts);
  }
  return cudaGetLastError();
}

}  // namespace openmythos::cuda
