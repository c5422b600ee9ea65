// The queries of per-head latent attention: which sequence each belongs to, and which keys it sees.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace openmythos::mla {

constexpr int64_t kQueries = 64;

// Rows [first, first + rows) of the queries: at most kQueries, all of sequence b.
struct Block {
  int64_t b, first, rows;
  const int64_t* sees;  // of `first` and the rows behind it

  // Row t sees the first `seen` keys; rows that do not exist see none.
  int64_t seen(int64_t t) const { return t < rows ? sees[t] : 0; }
  // Keys that any row sees.
  int64_t last() const { return seen(rows - 1); }
  // How many rows at the front do not see key j, of which `least` are known.
  int64_t blind(int64_t j, int64_t least) const {
    while (least < rows && sees[least] <= j) ++least;
    return least;
  }
};

// The rows of sequence b are [first[b], first[b + 1]). Row n sees the first sees[n] keys; within a sequence later rows
// see no fewer. The log-sum-exp of row n and head h lies at b * lse_batch + h * lse_head + n.
struct Queries {
  std::vector<int64_t> first, sees;
  int64_t lse_batch, lse_head;

  int64_t lse_place(int64_t b, int64_t h, int64_t n) const { return b * lse_batch + h * lse_head + n; }
  // Keys of sequence b that any row sees; nothing past them is read.
  int64_t held(int64_t b) const { return first[b] < first[b + 1] ? sees[first[b + 1] - 1] : 0; }
  // The blocks of sequence b, in order.
  std::vector<Block> blocks(int64_t b) const {
    std::vector<Block> found;
    for (int64_t n = first[b]; n < first[b + 1]; n += kQueries) {
      found.push_back({b, n, std::min(kQueries, first[b + 1] - n), sees.data() + n});
    }
    return found;
  }
};

// T queries per sequence, of which query i sees the keys up to start + i, below `lengths`. lse: (B, heads, T).
// ValueError for a length outside [0, S].
inline Queries consecutive(const at::Tensor& start, const at::Tensor& lengths, int64_t T, int64_t S, int64_t heads) {
  const int64_t B = start.size(0);
  const int64_t *const from = start.const_data_ptr<int64_t>(), *const held = lengths.const_data_ptr<int64_t>();
  Queries found{std::vector<int64_t>(B + 1), std::vector<int64_t>(B * T), (heads - 1) * T, T};
  for (int64_t b = 0; b < B; ++b) {
    found.first[b + 1] = (b + 1) * T;
    TORCH_CHECK_VALUE(
        0 <= held[b] && held[b] <= S, "key_lengths: got ", held[b], " at [", b, "], must be in [0, ", S, "]");
    const int64_t begin = std::clamp<int64_t>(from[b], -T, S);  // the same result, and no sum overflows
    for (int64_t i = 0; i < T; ++i) found.sees[b * T + i] = std::clamp<int64_t>(begin + i + 1, 0, held[b]);
  }
  return found;
}

// Rows at positions of their own. lse: (heads, N). ValueError for numbers that do not fit B sequences of S keys.
inline Queries packed(const at::Tensor& position, const at::Tensor& offset, int64_t B, int64_t S) {
  const int64_t N = position.size(0);
  const int64_t *const at = position.const_data_ptr<int64_t>(), *const end = offset.const_data_ptr<int64_t>();
  for (int64_t b = 0; b <= B; ++b) {
    const int64_t least = b == 0 ? 0 : end[b - 1], most = b == 0 ? 0 : N;
    TORCH_CHECK_VALUE(
        least <= end[b] && end[b] <= most && (b < B || end[b] == N), "offset: got ", end[b], " at [", b,
        "], must ascend from 0 to N = ", N);
  }
  Queries found{{end, end + B + 1}, std::vector<int64_t>(N), 0, N};
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t n = end[b]; n < end[b + 1]; ++n) {
      const int64_t least = n == end[b] ? 0 : at[n - 1] + 1;
      TORCH_CHECK_VALUE(
          least <= at[n] && at[n] < S, "position: got ", at[n], " at [", n, "], must be in [", least, ", ", S,
          "): below S, and ascending in sequence ", b);
      found.sees[n] = at[n] + 1;
    }
  }
  return found;
}

}  // namespace openmythos::mla
