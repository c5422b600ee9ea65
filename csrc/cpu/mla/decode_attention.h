// Latent attention of one query token over a range of cached keys, all heads at once.
//
// A cached token is one key (latent | rotary part) shared by all heads; its latent is also its value. Scores have one
// head per lane, so that the softmax works lane by lane and no sum runs across a vector. Sums of values have latent
// channels in lanes.
#pragma once

#include "cpu/mla/table.h"
#include "cpu/simd/vec.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace openmythos::mla {

constexpr int64_t kTile = 16;        // keys whose scores are computed together: they stay in the L1 cache
constexpr int64_t kKeys = 8;         // splits begin at multiples of it, for whole register blocks
constexpr int64_t kSplitKeys = 128;  // keys per split, before rounding
constexpr int64_t kMaxSplits = 64;   // bounds the cost of the merge

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// How a row's keys are split into tasks. It depends on the number of keys alone, so that the order of summation and
// every bit of the result are the same for any number of threads.
struct Splits {
  int64_t keys, size, count;

  explicit Splits(int64_t keys) : keys(keys) {
    int64_t wanted = 1;
    while (wanted < kMaxSplits && wanted * kSplitKeys < keys) wanted *= 2;
    size = round_up((keys + wanted - 1) / wanted, kKeys);
    count = (keys + size - 1) / size;
  }
};

// A matrix of keys in accumulator precision: row j at data + j * stride.
template <typename A>
struct Rows {
  const A* data;
  int64_t stride, width;
};

// Half a vector, for few remaining heads: many processors run a full one in two passes, one of which would be idle.
template <typename A>
struct HalfVec {
  static constexpr int size() { return at::vec::Vectorized<A>::size() / 2; }
  typedef A Lanes __attribute__((vector_size(size() * sizeof(A))));
  Lanes lanes;

  HalfVec() = default;
  explicit HalfVec(A value) : lanes(value - Lanes{}) {}
  static HalfVec loadu(const A* from) {
    HalfVec v;
    std::memcpy(&v.lanes, from, sizeof(Lanes));
    return v;
  }
  void store(A* to) const { std::memcpy(to, &lanes, sizeof(Lanes)); }
};

template <typename A>
inline HalfVec<A> fmadd(const HalfVec<A>& a, const HalfVec<A>& b, const HalfVec<A>& c) {
  HalfVec<A> v;
  v.lanes = a.lanes * b.lanes + c.lanes;
  return v;
}
using at::vec::fmadd;

// out[j * heads + h] = sum_c q[c * heads + h] * key[j][c] with key = (latent | rope), for VECS vectors V of heads and
// KEYS keys.
template <typename V, int KEYS, int VECS, typename A>
inline void score_block(Rows<A> latent, Rows<A> rope, const A* q, int64_t heads, A* out) {
  V acc[KEYS][VECS];
#pragma GCC unroll 8
  for (int j = 0; j < KEYS; ++j)
#pragma GCC unroll 2
    for (int v = 0; v < VECS; ++v) acc[j][v] = V(0);
  for (const Rows<A>& part : {latent, rope}) {
    const A* key[KEYS];
#pragma GCC unroll 8
    for (int j = 0; j < KEYS; ++j) key[j] = part.data + j * part.stride;
    for (int64_t c = 0; c < part.width; ++c, q += heads) {
      V qv[VECS];
#pragma GCC unroll 2
      for (int v = 0; v < VECS; ++v) qv[v] = V::loadu(q + v * V::size());
#pragma GCC unroll 8
      for (int j = 0; j < KEYS; ++j) {
        const V k(key[j][c]);
#pragma GCC unroll 2
        for (int v = 0; v < VECS; ++v) acc[j][v] = fmadd(k, qv[v], acc[j][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < KEYS; ++j)
#pragma GCC unroll 2
    for (int v = 0; v < VECS; ++v) acc[j][v].store(out + j * heads + v * V::size());
}

// score_block for n <= KEYS keys.
template <typename V, int KEYS, int VECS, typename A>
inline void score_some(int64_t n, Rows<A> latent, Rows<A> rope, const A* q, int64_t heads, A* out) {
  if (n == KEYS) return score_block<V, KEYS, VECS>(latent, rope, q, heads, out);
  if constexpr (KEYS > 1) score_some<V, KEYS - 1, VECS>(n, latent, rope, q, heads, out);
}

// Scores of n keys for VECS vectors of heads, KEYS keys at a time.
template <typename V, int KEYS, int VECS, typename A>
inline void score_rows(int64_t n, Rows<A> latent, Rows<A> rope, const A* q, int64_t heads, A* out) {
  for (int64_t j = 0; j < n; j += KEYS) {
    const Rows<A> l{latent.data + j * latent.stride, latent.stride, latent.width};
    const Rows<A> r{rope.data + j * rope.stride, rope.stride, rope.width};
    score_some<V, KEYS, VECS>(std::min<int64_t>(KEYS, n - j), l, r, q, heads, out + j * heads);
  }
}

// Scores of n keys for n_heads heads; `heads` is n_heads padded to whole vectors. A block has eight accumulators:
// enough to hide the latency of a multiply-add, few enough for sixteen registers.
template <typename A>
inline void scores(int64_t n, Rows<A> latent, Rows<A> rope, const A* q, int64_t n_heads, int64_t heads, A* out) {
  using V = at::vec::Vectorized<A>;
  int64_t h = 0;
  for (; h + 2 * V::size() <= heads; h += 2 * V::size()) score_rows<V, 4, 2>(n, latent, rope, q + h, heads, out + h);
  if (h == heads) return;
  if (n_heads - h > HalfVec<A>::size()) {
    score_rows<V, 8, 1>(n, latent, rope, q + h, heads, out + h);
  } else {
    score_rows<HalfVec<A>, 8, 1>(n, latent, rope, q + h, heads, out + h);
  }
}

// o[h][c] = o[h][c] * keep[h] + sum_j p[j * heads + h] * latent[j][c] for HEADS heads and VECS vectors of channels.
template <typename A, int HEADS, int VECS>
inline void value_block(int64_t n, Rows<A> latent, const A* p, int64_t heads, const A* keep, A* o, int64_t ldo) {
  using V = at::vec::Vectorized<A>;
  V acc[HEADS][VECS];
#pragma GCC unroll 4
  for (int h = 0; h < HEADS; ++h)
#pragma GCC unroll 2
    for (int v = 0; v < VECS; ++v) acc[h][v] = V::loadu(o + h * ldo + v * V::size()) * V(keep[h]);
  for (int64_t j = 0; j < n; ++j) {
    V key[VECS];
#pragma GCC unroll 2
    for (int v = 0; v < VECS; ++v) key[v] = V::loadu(latent.data + j * latent.stride + v * V::size());
#pragma GCC unroll 4
    for (int h = 0; h < HEADS; ++h) {
      const V weight(p[j * heads + h]);
#pragma GCC unroll 2
      for (int v = 0; v < VECS; ++v) acc[h][v] = at::vec::fmadd(weight, key[v], acc[h][v]);
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < HEADS; ++h)
#pragma GCC unroll 2
    for (int v = 0; v < VECS; ++v) acc[h][v].store(o + h * ldo + v * V::size());
}

// The same for all heads.
template <typename A, int VECS>
inline void value_columns(
    int64_t n, Rows<A> latent, const A* p, int64_t n_heads, int64_t heads, const A* keep, A* o, int64_t ldo) {
  int64_t h = 0;
  for (; h + 4 <= n_heads; h += 4) value_block<A, 4, VECS>(n, latent, p + h, heads, keep + h, o + h * ldo, ldo);
  for (; h + 2 <= n_heads; h += 2) value_block<A, 2, VECS>(n, latent, p + h, heads, keep + h, o + h * ldo, ldo);
  for (; h < n_heads; ++h) value_block<A, 1, VECS>(n, latent, p + h, heads, keep + h, o + h * ldo, ldo);
}

// The same for all heads and channels. Channels are the outer loop: each column of keys is fetched once for all heads.
template <typename A>
inline void values(int64_t n, Rows<A> latent, const A* p, int64_t n_heads, int64_t heads, const A* keep, A* o) {
  constexpr int64_t lanes = at::vec::Vectorized<A>::size();
  const int64_t width = latent.width;
  const auto from = [&](int64_t c) { return Rows<A>{latent.data + c, latent.stride, width}; };
  int64_t c = 0;
  for (; c + 2 * lanes <= width; c += 2 * lanes) {
    value_columns<A, 2>(n, from(c), p, n_heads, heads, keep, o + c, width);
  }
  for (; c + lanes <= width; c += lanes) value_columns<A, 1>(n, from(c), p, n_heads, heads, keep, o + c, width);
  for (; c < width; ++c) {
    for (int64_t h = 0; h < n_heads; ++h) {
      A sum = o[h * width + c] * keep[h];
      for (int64_t j = 0; j < n; ++j) sum += p[j * heads + h] * latent.data[j * latent.stride + c];
      o[h * width + c] = sum;
    }
  }
}

// Sizes of a thread's buffers, in elements of A. `heads` is padded to whole vectors.
struct Scratch {
  int64_t query, weights, keep, tile;
  Scratch(int64_t heads, int64_t r, int64_t rope, bool copied)
      : query((r + rope) * heads), weights(kTile * heads), keep(heads), tile(copied ? kTile * (r + rope) : 0) {}
  int64_t total() const { return query + weights + keep + tile; }
};

// Prefetches n elements. Keys read together are a few cache lines apart, which processors do not detect as a stream.
//
// Always inline, as every function that only prefetches: GCC takes one for a function without effects, and drops calls.
template <typename T>
[[gnu::always_inline]] inline void fetch(const T* from, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(from + i, 0, 2);
}

// Consecutive keys in accumulator precision.
template <typename A>
struct KeyRows {
  Rows<A> latent, rope;
};

// The cache of one row: keys of width r and rope, densely packed.
template <typename T>
struct Keys {
  static constexpr bool copied = widens<T>;
  const T* latent;
  const T* rope;
  int64_t r, rope_dim;

  [[gnu::always_inline]] void prefetch(int64_t j, int64_t n) const {
    fetch(latent + j * r, n * r);
    fetch(rope + j * rope_dim, n * rope_dim);
  }
  // Keys [j, j + n), in place or, if `copied`, in `tile`.
  KeyRows<acc_t<T>> load(int64_t j, int64_t n, acc_t<T>* tile) const {
    if constexpr (copied) {
      widen(latent + j * r, tile, n * r);
      widen(rope + j * rope_dim, tile + n * r, n * rope_dim);
      return {{tile, r, r}, {tile + n * r, rope_dim, rope_dim}};
    } else {
      return {{latent + j * r, r, r}, {rope + j * rope_dim, rope_dim, rope_dim}};
    }
  }
};

// The keys that token n of a table reads, wherever they are in the pool. They are copied together: a key is several
// cache lines and is read once for each head, so the copy costs little.
template <typename T>
struct PooledKeys {
  static constexpr bool copied = true;
  const T* latent;
  const T* rope;
  int64_t r, rope_dim;
  const Table& table;
  int64_t n;

  [[gnu::always_inline]] void prefetch(int64_t j, int64_t count) const {
    for (int64_t i = j; i < j + count; ++i) {
      const int64_t row = table.row(n, i);
      fetch(latent + row * r, r);
      fetch(rope + row * rope_dim, rope_dim);
    }
  }
  KeyRows<acc_t<T>> load(int64_t j, int64_t count, acc_t<T>* tile) const {
    acc_t<T>* const turned = tile + count * r;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = table.row(n, j + i);
      widen(latent + row * r, tile + i * r, r);
      widen(rope + row * rope_dim, turned + i * rope_dim, rope_dim);
    }
    return {{tile, r, r}, {turned, rope_dim, rope_dim}};
  }
};

// Attends over keys [begin, end), begin < end.
//   q     (r + rope, heads): scaled queries, one head per lane; lanes past n_heads are zero
//   work  the buffers weights, keep and tile of Scratch
//   top   (heads): largest score
//   mass  (heads): sum of exp(score - top)
//   o     (n_heads, r): sum of exp(score - top) * latent
template <typename T, typename K>
inline void attend(
    const K& keys, int64_t begin, int64_t end, const acc_t<T>* q, int64_t n_heads, int64_t heads, acc_t<T>* work,
    acc_t<T>* top, acc_t<T>* mass, acc_t<T>* o) {
  using A = acc_t<T>;
  using V = at::vec::Vectorized<A>;
  A* const p = work;
  A* const keep = p + kTile * heads;
  A* const tile = keep + heads;
  std::fill_n(top, heads, -std::numeric_limits<A>::infinity());
  std::fill_n(mass, heads, A(0));
  std::fill_n(o, n_heads * keys.r, A(0));
  std::fill_n(p, kTile * heads, A(0));  // lanes past n_heads may stay unwritten
  for (int64_t j = begin; j < end; j += kTile) {
    const int64_t n = std::min(kTile, end - j), ahead = std::min(kTile, end - j - n);
    keys.prefetch(j + n, ahead);
    const auto [latent, rope] = keys.load(j, n, tile);
    scores(n, latent, rope, q, n_heads, heads, p);
    for (int64_t h = 0; h < heads; h += V::size()) {
      const V before = V::loadu(top + h);
      V now = before;
      for (int64_t i = 0; i < n; ++i) now = at::vec::maximum(now, V::loadu(p + i * heads + h));
      const V kept = (before - now).exp();
      V sum = V::loadu(mass + h) * kept;
      for (int64_t i = 0; i < n; ++i) {
        const V weight = (V::loadu(p + i * heads + h) - now).exp();
        weight.store(p + i * heads + h);
        sum = sum + weight;
      }
      now.store(top + h);
      kept.store(keep + h);
      sum.store(mass + h);
    }
    values(n, latent, p, n_heads, heads, keep, o);
  }
}

}  // namespace openmythos::mla
