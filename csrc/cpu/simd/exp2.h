// 2^x of vectors.
#pragma once

#include <ATen/cpu/vec/vec.h>

namespace openmythos {

// Within an ulp; 2^-inf = 0, NaN stays NaN.
template <typename T>
inline at::vec::Vectorized<T> exp2(at::vec::Vectorized<T> x) {
  return x.exp2();
}

#if defined(CPU_CAPABILITY_AVX512)
// In fewer instructions than the library's.
inline at::vec::Vectorized<float> exp2(at::vec::Vectorized<float> x) {
  // Below -150 the result is 0 anyway, and -inf has no fraction.
  const __m512 bounded = _mm512_max_ps(_mm512_set1_ps(-150), x);
  const __m512 whole = _mm512_roundscale_ps(bounded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(bounded, whole);
  // 1 + f * p(f), minimax in relative error on [-1/2, 1/2]: 2e-9 before rounding.
  __m512 p = _mm512_set1_ps(1.5353362e-4f);
  for (const float c : {1.3398875e-3f, 9.618437e-3f, 5.5503324e-2f, 2.4022648e-1f, 6.931472e-1f, 1.0f}) {
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
  }
  return at::vec::Vectorized<float>(_mm512_scalef_ps(p, whole));
}
#endif

}  // namespace openmythos
