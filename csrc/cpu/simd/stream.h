// Non-temporal stores, which bypass the caches. A plain store first reads the line that it overwrites. For outputs
// larger than the caches, which are evicted before anything reads them, that read is a third of the traffic.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace openmythos {

// Stream from this many bytes written by a call: about a core's share of the last-level cache.
constexpr int64_t kStreamBytes = 8 << 20;

// Stores one vector; p is aligned to its size.
template <typename T>
inline void stream(T* p, const at::vec::Vectorized<T>& v) {
#if defined(CPU_CAPABILITY_AVX512)
  __m512i raw;
  std::memcpy(&raw, &v, sizeof(raw));
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), raw);
#elif defined(CPU_CAPABILITY_AVX2)
  __m256i raw;
  std::memcpy(&raw, &v, sizeof(raw));
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), raw);
#else
  v.store(p);
#endif
}

// A fence: call it before another thread may read what was streamed.
inline void finish_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Whether consecutive rows of D elements from `p` are aligned for `stream`.
template <typename T>
inline bool streamable(const T* p, int64_t D) {
  constexpr int64_t bytes = sizeof(at::vec::Vectorized<T>);
  return reinterpret_cast<uintptr_t>(p) % bytes == 0 && D * int64_t(sizeof(T)) % bytes == 0;
}

}  // namespace openmythos
