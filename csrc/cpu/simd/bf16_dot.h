// Products of bfloat16 in pairs. Two neighbours along the summed dimension share 32 bits, which travel as a float that
// nobody looks at: panels of pairs are laid out, transposed and multiplied (panel.h) as panels of float32 are, of half
// the depth, and the processor multiplies two numbers where it would multiply one.
#pragma once

#include "cpu/simd/vec.h"

#include <cstdint>

#if defined(CPU_CAPABILITY_AVX512)
#include <cpuid.h>
#endif

namespace openmythos {

#if defined(CPU_CAPABILITY_AVX512)

struct Bf16Pairs {
  using V = at::vec::Vectorized<float>;

  // Assembly, as the compiler is not told of an instruction that processors with AVX-512 may lack: `supported` asks.
  static V add_product(V factor, V row, V total) {
    __m512 sum = total;
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(__m512(row)), "v"(__m512(factor)));
    return sum;
  }

  // Lanes of the lower half only, in half the time where 512 bits take two turns.
  static constexpr bool kHalves = true;
  static V add_half_product(V factor, V row, V total) {
    __m512 sum = total;
    asm("vdpbf16ps %t2, %t1, %t0" : "+v"(sum) : "v"(__m512(row)), "v"(__m512(factor)));
    return sum;
  }

  // A pair in every lane, rounded to nearest.
  static V pack(V even, V odd) {
    alignas(64) static constexpr int16_t kLanes[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i apart = at::vec::convert_from_float<c10::BFloat16>(even, odd);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_load_si512(kLanes), apart));
  }

  // Where there are units for whole tiles of products (AMX), the library makes better use of them.
  static bool supported() {
    static const bool yes = [] {
      unsigned a = 0, b = 0, c = 0, d = 0;
      const bool tiles =
          __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 1);  // compilers differ in what they can ask for
      return __builtin_cpu_supports("avx512bf16") && !tiles;
    }();
    return yes;
  }
};

#endif

}  // namespace openmythos
