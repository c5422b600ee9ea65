// Matrix times few vectors: every weight is read once, for all the vectors.
#pragma once

#include "cpu/vec.h"

namespace openmythos {

// y[m * ldy + r] = sum_c W[r * cols + c] * x[m * cols + c]  for r in [begin, end), m in [0, M).
// Runs on the calling thread; callers split rows over threads.
template <typename T>
inline void matvec(
    const T* W, int64_t cols, int64_t begin, int64_t end, const acc_t<T>* x, int64_t M, acc_t<T>* y, int64_t ldy) {
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t m = 0; m < M; ++m) y[m * ldy + r] = dot<T>(W + r * cols, x + m * cols, cols);
  }
}

}  // namespace openmythos
