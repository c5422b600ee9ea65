// Shared by forward and backward of per-head latent attention: strided inputs, and blocks of queries.
#pragma once

#include "cpu/mla/mla.h"
#include "cpu/mla/queries.h"
#include "cpu/runtime/work_queue.h"
#include "cpu/simd/exp2.h"
#include "cpu/simd/panel.h"

#include <ATen/core/Tensor.h>

#include <cmath>
#include <limits>

namespace openmythos::mla {

// Scores have a row per key and queries along vectors: the softmax runs down the rows. A block of kKeys rows and
// kQueries columns stays in a core's caches.
constexpr int64_t kKeys = 64;

using Vec = panel::Vec<float>;
constexpr int64_t kVectors = kQueries / Vec::size();
constexpr float kNone = -std::numeric_limits<float>::infinity();

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

// The problem: inputs and sizes. The queries (N, heads, width) of all sequences lie one after the other.
template <typename W>
struct Prompt {
  const Queries& queries;
  View<W> q_nope, q_rope, kv, k_rope;
  int64_t B, S, heads, nope, rope, v;

  int64_t width() const { return nope + rope; }
  float scale() const { return float(1 / std::sqrt(double(width()))); }
  // scale * log2(e), the factor from products to exponents of 2. Applied by a fused multiply-add, so that scores are
  // not rounded again before exp2.
  float exponent() const { return float(mla::exponent(width())); }

  // Loads a block's queries, zero-padded to kQueries rows and padded(width()) columns.
  void load_queries(const Block& block, int64_t h, float* to) const {
    const int64_t ld = padded(width());
    std::fill_n(to, kQueries * ld, 0.0f);
    for (int64_t t = 0; t < block.rows; ++t, to += ld) {
      widen(q_nope.row(0, block.first + t, h), to, nope);
      widen(q_rope.row(0, block.first + t, h), to + nope, rope);
    }
  }
  Strided<W> keys(int64_t b, int64_t h, int64_t j) const { return {kv.row(b, j, h), kv.token, 1}; }
  Strided<W> rotary_keys(int64_t b, int64_t j) const { return {k_rope.row(b, j, 0), k_rope.token, 1}; }
  Strided<W> values(int64_t b, int64_t h, int64_t j) const { return {kv.row(b, j, h) + nope, kv.token, 1}; }

  // out (n, kQueries) = keys [j, j + n) times queries (width, kQueries), for the first `vectors` vectors. All heads
  // share the rotary part of a key.
  void products(int64_t b, int64_t h, int64_t j, int64_t n, const float* q, int64_t vectors, float* out) const {
    multiply(keys(b, h, j), q, kQueries, out, kQueries, n, nope, vectors, false);
    multiply(rotary_keys(b, j), q + nope * kQueries, kQueries, out, kQueries, n, rope, vectors, true);
  }
};

// q_nope and q_rope: (N, heads, width).
template <typename W>
Prompt<W> prompt(
    const Queries& queries, const at::Tensor& q_nope, const at::Tensor& q_rope, const at::Tensor& kv,
    const at::Tensor& k_rope) {
  return {
      queries,
      View<W>(q_nope.unsqueeze(0)),
      View<W>(q_rope.unsqueeze(0)),
      View<W>(kv),
      View<W>(k_rope),
      kv.size(0),
      kv.size(1),
      q_nope.size(1),
      q_nope.size(2),
      q_rope.size(2),
      kv.size(3) - q_nope.size(2)};
}

// Hides keys [j, j + n) from queries [q, kQueries) that do not see them: scores (n, kQueries) begin with query q.
inline void hide(const Block& block, int64_t j, int64_t n, int64_t q, float* scores) {
  for (int64_t t = 0, blind = q; t < n && block.seen(0) < j + n; ++t, scores += kQueries) {
    blind = block.blind(j + t, blind);
    std::fill_n(scores, blind - q, kNone);
  }
}

// Calls f(first key, number of keys, first query) for parts of the keys that a block's queries see, in order. Where not
// all queries see a key, a part skips the vectors of queries that see none of it, and ends where another vector could
// be skipped: after one vector of keys if every key has a query.
template <typename F>
void each_part(const Block& block, F f) {
  const int64_t all = block.seen(0), last = block.last();
  for (int64_t j = 0; j < all; j += kKeys) f(j, std::min(kKeys, all - j), int64_t{0});
  int64_t blind = 0;
  const auto skipped = [&](int64_t j) {
    blind = block.blind(j, blind);
    return blind / Vec::size() * Vec::size();
  };
  for (int64_t j = all, n; j < last; j += n) {
    const int64_t q = skipped(j);
    n = Vec::size();
    while (j + n < last && n < kKeys && skipped(j + n) == q) n += Vec::size();
    n = std::min(n, last - j);
    f(j, n, q);
  }
}

// to (cols, kQueries) = rows^T, both padded.
inline void transpose_rows(const float* rows, int64_t ld, int64_t cols, float* to) {
  transpose_in([&](int64_t r) { return rows + r * ld; }, kQueries, cols, to, kQueries);
}

}  // namespace openmythos::mla
