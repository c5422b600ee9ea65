// Stable compaction of the running positions, and gather and scatter of their rows. All pointers are device memory; the
// host reads nothing.
#pragma once

#include "cuda/launch.h"

namespace openmythos::cuda {

struct Compaction {
  const bool* running;  // (sequences, length)
  int64_t sequences, length;
  int64_t* index;    // (sequences * length): running positions in order, then -1
  int64_t* last;     // (sequences): the last running position of each, or -1
  int64_t* counts;   // (sequences)
  int64_t* total;    // (1)
  int64_t* scratch;  // compaction_scratch(sequences * length) elements, uninitialized
};

cudaError_t compact_active(const Compaction& x, cudaStream_t stream);
int64_t compaction_scratch(int64_t positions);

// out[i] = x[index[i]]; zeros where index[i] is outside [0, rows). Copies bytes, for any dtype.
cudaError_t gather_rows(
    const void* x, const int64_t* index, void* out, int64_t rows, int64_t selected, int64_t row_bytes,
    cudaStream_t stream);

// out[index[i]] = x[i] (zeros if x is null) where index[i] is inside [0, rows); indices are distinct.
cudaError_t scatter_rows(
    const void* x, const int64_t* index, void* out, int64_t rows, int64_t selected, int64_t row_bytes,
    cudaStream_t stream);

}  // namespace openmythos::cuda
