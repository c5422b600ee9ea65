// The bf16 dot product of AVX512-BF16 (vdpbf16ps) for panel.h. Two bf16 along K share a 32-bit lane, typed float for
// storage. Panels of such lanes are laid out and transposed like float32 panels of half the depth, and one instruction
// multiplies twice as many numbers.
#pragma once

#include "cpu/simd/vec.h"

#include <cstdint>

#if defined(CPU_CAPABILITY_AVX512)
#include <cpuid.h>
#endif

namespace openmythos {

#if defined(CPU_CAPABILITY_AVX512)

struct Bf16Dot {
  using V = at::vec::Vectorized<float>;

  // In assembly: the code is compiled for all AVX-512 processors, some of which lack the instruction (see `supported`).
  static V add_product(V factor, V row, V total) {
    __m512 sum = total;
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(__m512(row)), "v"(__m512(factor)));
    return sum;
  }

  // The lower half of the lanes only: half the time on processors that run 512 bits in two passes.
  static constexpr bool kHalves = true;
  static V add_half_product(V factor, V row, V total) {
    __m512 sum = total;
    asm("vdpbf16ps %t2, %t1, %t0" : "+v"(sum) : "v"(__m512(row)), "v"(__m512(factor)));
    return sum;
  }

  // Rounds to nearest and packs even[i], odd[i] into lane i.
  static V pack(V even, V odd) {
    alignas(64) static constexpr int16_t kLanes[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i apart = at::vec::convert_from_float<c10::BFloat16>(even, odd);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_load_si512(kLanes), apart));
  }

  // Not with AMX: the library makes better use of its tile units.
  static bool supported() {
    static const bool yes = [] {
      unsigned a = 0, b = 0, c = 0, d = 0;
      // By cpuid: not every compiler's __builtin_cpu_supports knows AMX.
      const bool amx = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 1);
      return __builtin_cpu_supports("avx512bf16") && !amx;
    }();
    return yes;
  }
};

#endif

}  // namespace openmythos
