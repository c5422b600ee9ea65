// Blocks of rows for sums over rows: each block sums into a slab of its own, then the slabs are added in order. The
// blocks depend on the number of rows alone, so the bits of a sum do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

namespace openmythos {

struct RowBlocks {
  explicit RowBlocks(int64_t N)
      : N(N),
        rows(std::max(kFewest, ((N + kMost - 1) / kMost + kGroup - 1) / kGroup * kGroup)),
        count((N + rows - 1) / rows) {}

  int64_t begin(int64_t block) const { return block * rows; }
  int64_t end(int64_t block) const { return std::min((block + 1) * rows, N); }

  const int64_t N, rows, count;

 private:
  static constexpr int64_t kMost = 64;    // blocks, hence slabs to add
  static constexpr int64_t kFewest = 32;  // rows of a block; a slab does not pay for fewer
  static constexpr int64_t kGroup = 4;    // kernels are faster on whole groups of rows
};

}  // namespace openmythos
