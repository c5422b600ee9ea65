// Stores that go to memory past the caches. A plain store first reads the line it overwrites; for
// outputs larger than the caches, which nobody reads before they are evicted, that read is a third
// of the traffic.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace openmythos {

// Bytes that a call writes from which on they are streamed: about where they push everything else out of a core's share
// of the last-level cache.
constexpr int64_t kStreamBytes = 8 << 20;

// One vector to an address that is a multiple of its size.
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

// Orders streamed stores before whatever tells another thread of them.
inline void finish_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Whether rows of D elements from `p` on may be streamed, vector by vector.
template <typename T>
inline bool streamable(const T* p, int64_t D) {
  constexpr int64_t bytes = sizeof(at::vec::Vectorized<T>);
  return reinterpret_cast<uintptr_t>(p) % bytes == 0 && D * int64_t(sizeof(T)) % bytes == 0;
}

}  // namespace openmythos
