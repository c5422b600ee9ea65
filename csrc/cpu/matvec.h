// Matrix times few vectors: every weight is read once, for all the vectors.
#pragma once

#include "cpu/vec.h"

#include <algorithm>

namespace openmythos {

// R rows of W times MB vectors. Each (row, vector) pair has its own accumulators, filled in the
// same order for every R and MB, so the result does not depend on how callers block or split rows.
template <typename T, int R, int MB>
inline void matvec_block(const T* W, int64_t cols, const acc_t<T>* x, acc_t<T>* y, int64_t ldy) {
  using V = AccVec<T>;
  V sum_first[R][MB], sum_second[R][MB];
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < MB; ++m) sum_first[r][m] = sum_second[r][m] = V(0);
  }
  int64_t c = 0;
  for (; c + step<T> <= cols; c += step<T>) {
    V xs[MB][2];
    for (int m = 0; m < MB; ++m) {
      xs[m][0] = V::loadu(x + m * cols + c);
      if constexpr (widens<T>) xs[m][1] = V::loadu(x + m * cols + c + V::size());
    }
    for (int r = 0; r < R; ++r) {
      const auto w = openmythos::load(W + r * cols + c);
      for (int m = 0; m < MB; ++m) {
        sum_first[r][m] = at::vec::fmadd(w.first, xs[m][0], sum_first[r][m]);
        if constexpr (widens<T>) sum_second[r][m] = at::vec::fmadd(w.second, xs[m][1], sum_second[r][m]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < MB; ++m) {
      acc_t<T> total = widens<T> ? sum(sum_first[r][m] + sum_second[r][m]) : sum(sum_first[r][m]);
      for (int64_t i = c; i < cols; ++i) total += acc_t<T>(W[r * cols + i]) * x[m * cols + i];
      y[m * ldy + r] = total;
    }
  }
}

template <typename T, int R>
inline void matvec_rows(const T* W, int64_t cols, const acc_t<T>* x, int64_t M, acc_t<T>* y, int64_t ldy) {
  int64_t m = 0;
  for (; m + 2 <= M; m += 2) matvec_block<T, R, 2>(W, cols, x + m * cols, y + m * ldy, ldy);
  if (m < M) matvec_block<T, R, 1>(W, cols, x + m * cols, y + m * ldy, ldy);
}

// y[m * ldy + r] = sum_c W[r * cols + c] * x[m * cols + c]  for r in [begin, end), m in [0, M).
// Runs on the calling thread; callers split rows over threads.
template <typename T>
inline void matvec(
    const T* W, int64_t cols, int64_t begin, int64_t end, const acc_t<T>* x, int64_t M, acc_t<T>* y, int64_t ldy) {
  int64_t r = begin;
  for (; r + 4 <= end; r += 4) matvec_rows<T, 4>(W + r * cols, cols, x, M, y + r, ldy);
  for (; r < end; ++r) matvec_rows<T, 1>(W + r * cols, cols, x, M, y + r, ldy);
}

}  // namespace openmythos
