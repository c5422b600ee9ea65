// Rotary embedding of adjacent channels, two by two.
#pragma once

#include "cpu/simd/vec.h"

namespace openmythos {

// Rotates n channels by phasors (cos, sin), or rotates them back with `sign` -1, and scales them.
template <typename T>
inline void rotate(const T* in, const float* phasor, int64_t n, acc_t<T> scale, T* out, acc_t<T> sign = 1) {
  using A = acc_t<T>;
  for (int64_t i = 0; i < n; i += 2) {
    const A cos = phasor[i], sin = sign * phasor[i + 1], even = in[i], odd = in[i + 1];
    out[i] = T((even * cos - odd * sin) * scale);
    out[i + 1] = T((even * sin + odd * cos) * scale);
  }
}

}  // namespace openmythos
