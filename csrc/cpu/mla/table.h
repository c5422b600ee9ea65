// The table of a ragged cache: which row of a pool holds what a loop reads of a token. See `openmythos.ragged`.
#pragma once

#include <algorithm>
#include <cstdint>

namespace openmythos::mla {

// Independent tokens: token n is number position[n] of sequence[n], in loop[n].
struct Table {
  const int32_t *first, *last;                // (S, C)
  int64_t first_stride, last_stride;          // elements from one sequence to the next
  const int64_t *sequence, *position, *loop;  // (N)
  int64_t keep;                               // slots of a token; 0: one for each of its loops

  int64_t slot(int64_t t) const { return keep == 0 || t < keep ? t : t % keep; }
  // Where token n's latent of its loop goes.
  int64_t own(int64_t n) const { return first[sequence[n] * first_stride + position[n]] + slot(loop[n]); }
  // What token n reads of token j of its sequence.
  int64_t row(int64_t n, int64_t j) const {
    const int64_t ran = last[sequence[n] * last_stride + j];
    return first[sequence[n] * first_stride + j] + slot(std::min(loop[n], ran));
  }
};

}  // namespace openmythos::mla
