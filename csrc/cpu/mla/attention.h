// Shared by forward and backward of per-head latent attention: strided inputs, and which keys a query sees.
#pragma once

#include "cpu/runtime/work_queue.h"
#include "cpu/simd/panel.h"

#include <ATen/core/Tensor.h>

#include <cmath>
#include <limits>
#include <vector>

namespace openmythos::mla {

// Scores have a row per key and queries along vectors: the softmax runs down the rows. A block of kKeys rows and
// kQueries columns stays in a core's caches.
constexpr int64_t kQueries = 64, kKeys = 64;

using Vec = panel::Vec<float>;
constexpr int64_t kVectors = kQueries / Vec::size();
constexpr float kNone = -std::numeric_limits<float>::infinity();

// 2^x within an ulp, in fewer instructions than the library's; 2^-inf = 0, NaN stays NaN.
inline Vec exp2(Vec x) {
#if defined(CPU_CAPABILITY_AVX512)
  // Below -150 the result is 0 anyway, and -inf has no fraction.
  const __m512 bounded = _mm512_max_ps(_mm512_set1_ps(-150), x);
  const __m512 whole = _mm512_roundscale_ps(bounded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(bounded, whole);
  // 1 + f * p(f), minimax in relative error on [-1/2, 1/2]: 2e-9 before rounding.
  __m512 p = _mm512_set1_ps(1.5353362e-4f);
  for (const float c : {1.3398875e-3f, 9.618437e-3f, 5.5503324e-2f, 2.4022648e-1f, 6.931472e-1f, 1.0f}) {
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
  }
  return Vec(_mm512_scalef_ps(p, whole));
#else
  return x.exp2();
#endif
}

// Columns rounded up to whole vectors.
inline int64_t padded(int64_t cols) { return (cols + Vec::size() - 1) / Vec::size() * Vec::size(); }

// (B, tokens, heads, width) or (B, tokens, width), at any strides with a dense last dimension.
template <typename W>
struct View {
  const W* data;
  int64_t batch, token, head;

  explicit View(const at::Tensor& x)
      : data(x.const_data_ptr<W>()), batch(x.stride(0)), token(x.stride(1)), head(x.dim() == 4 ? x.stride(2) : 0) {}
  const W* row(int64_t b, int64_t t, int64_t h) const { return data + b * batch + t * token + h * head; }
};

inline at::Tensor dense_rows(const at::Tensor& x) { return x.stride(-1) == 1 || x.size(-1) == 1 ? x : x.contiguous(); }

// The problem: inputs, sizes, and which keys a query sees.
template <typename W>
struct Prompt {
  View<W> q_nope, q_rope, kv, k_rope;
  int64_t B, queries, S, heads, nope, rope, v;
  const int64_t *start, *lengths;

  int64_t width() const { return nope + rope; }
  float scale() const { return float(1 / std::sqrt(double(width()))); }
  // scale * log2(e), the factor from products to exponents of 2. Applied by a fused multiply-add, so that scores are
  // not rounded again before exp2.
  float exponent() const { return float(1.44269504088896340736 / std::sqrt(double(width()))); }
  // Keys of sequence b; nothing past them is read.
  int64_t held(int64_t b) const { return std::clamp<int64_t>(lengths[b], 0, S); }
  // Query i sees the first `seen` keys.
  int64_t seen(int64_t b, int64_t i) const { return std::clamp<int64_t>(start[b] + i + 1, 0, held(b)); }
  // Of the queries from i on, how many at the front do not see key j.
  int64_t blind(int64_t b, int64_t i, int64_t j) const { return std::clamp<int64_t>(j - start[b] - i, 0, kQueries); }

  // Loads queries [i, i + rows), zero-padded to kQueries rows and padded(width()) columns.
  void load_queries(int64_t b, int64_t h, int64_t i, int64_t rows, float* to) const {
    const int64_t ld = padded(width());
    std::fill_n(to, kQueries * ld, 0.0f);
    for (int64_t t = 0; t < rows; ++t, to += ld) {
      widen(q_nope.row(b, i + t, h), to, nope);
      widen(q_rope.row(b, i + t, h), to + nope, rope);
    }
  }
  Strided<W> keys(int64_t b, int64_t h, int64_t j) const { return {kv.row(b, j, h), kv.token, 1}; }
  Strided<W> rotary_keys(int64_t b, int64_t j) const { return {k_rope.row(b, j, 0), k_rope.token, 1}; }
  Strided<W> values(int64_t b, int64_t h, int64_t j) const { return {kv.row(b, j, h) + nope, kv.token, 1}; }

  // Calls f(first key, number of keys, first query) for parts of the first `last` keys, in order, for queries [i, i +
  // kQueries). Where not all queries see a key, a part has one vector of keys and skips the vectors of queries that see
  // none of them.
  template <typename F>
  void each_part(int64_t b, int64_t i, int64_t last, F f) const {
    const int64_t all = std::min(last, seen(b, i));
    for (int64_t j = 0; j < all; j += kKeys) f(j, std::min(kKeys, all - j), int64_t{0});
    for (int64_t j = all; j < last; j += Vec::size()) {
      f(j, std::min<int64_t>(Vec::size(), last - j), blind(b, i, j) / Vec::size() * Vec::size());
    }
  }

  // out (n, kQueries) = keys [j, j + n) times queries (width, kQueries), for the first `vectors` vectors. All heads
  // share the rotary part of a key.
  void products(int64_t b, int64_t h, int64_t j, int64_t n, const float* queries, int64_t vectors, float* out) const {
    multiply(keys(b, h, j), queries, kQueries, out, kQueries, n, nope, vectors, false);
    multiply(rotary_keys(b, j), queries + nope * kQueries, kQueries, out, kQueries, n, rope, vectors, true);
  }
};

template <typename W>
Prompt<W> prompt(
    const at::Tensor& q_nope, const at::Tensor& q_rope, const at::Tensor& kv, const at::Tensor& k_rope,
    const at::Tensor& start, const at::Tensor& lengths) {
  return {
      View<W>(q_nope),
      View<W>(q_rope),
      View<W>(kv),
      View<W>(k_rope),
      q_nope.size(0),
      q_nope.size(1),
      kv.size(1),
      q_nope.size(2),
      q_nope.size(3),
      q_rope.size(3),
      kv.size(3) - q_nope.size(3),
      start.const_data_ptr<int64_t>(),
      lengths.const_data_ptr<int64_t>()};
}

// to (cols, kQueries) = rows^T, both padded.
inline void transpose_rows(const float* rows, int64_t ld, int64_t cols, float* to) {
  transpose_in([&](int64_t r) { return rows + r * ld; }, kQueries, cols, to, kQueries);
}

}  // namespace openmythos::mla
