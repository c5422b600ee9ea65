// Latent attention of one query token over a range of cached keys, all heads at once.
//
// A cached token is one key (latent | rotary part) shared by all heads; its latent is also its value. Scores have heads
// in lanes, so that the softmax works lane by lane and no sum runs across a vector. Sums of values have latent channels
// in lanes.
#pragma once

#include "cpu/mla/decode_keys.h"
#include "cpu/simd/exp2.h"
#include "cpu/simd/vec.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

namespace openmythos::mla {

constexpr int64_t kKeys = 8;         // splits begin at multiples of it, for whole register blocks
constexpr int64_t kSplitKeys = 128;  // keys per split, before rounding
constexpr int64_t kMaxSplits = 64;   // bounds the cost of the merge

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

// The queries of one token: for each channel a row of heads, of which those past n_heads are zero. With `paired`, where
// the heads fill at most half a vector, a row holds two channels: lane 2 h + i is channel 2 c + i of head h.
template <typename A>
struct Query {
  static constexpr int64_t lanes = AccVec<A>::size();
  int64_t n_heads, r, rope;

  bool paired() const { return std::is_same_v<A, float> && 2 * n_heads <= lanes; }
  int64_t heads() const { return round_up(n_heads, lanes); }
  int64_t size() const { return (padded_rank(r) + rope) * heads(); }
  // Where the rotary channels begin.
  int64_t turned() const { return padded_rank(r) / (paired() ? 2 : 1) * heads(); }

  // From (n_heads, r + rope).
  void pack(const A* from, A* to) const {
    std::fill_n(to, size(), A(0));
    const auto put = [&](int64_t h, int64_t c, A* part, A x) {
      part[paired() ? c / 2 * lanes + 2 * h + c % 2 : c * heads() + h] = x;
    };
    for (int64_t h = 0; h < n_heads; ++h, from += r + rope) {
      for (int64_t c = 0; c < r; ++c) put(h, c, to, from[c]);
      for (int64_t c = 0; c < rope; ++c) put(h, c, to + turned(), from[r + c]);
    }
  }
};

// The two numbers at `from` in every pair of lanes.
inline AccVec<float> pairs(const float* from) {
  int64_t both;
  std::memcpy(&both, from, sizeof(both));
  typedef int64_t Lanes __attribute__((vector_size(sizeof(AccVec<float>))));
  const Lanes all = both - Lanes{};
  AccVec<float> v;
  std::memcpy(&v, &all, sizeof(v));
  return v;
}

// total[j * VECS + v] += sum_c q[c][v] * key[j][c] for KEYS keys and VECS vectors v, where row c of q begins at
// q + c * ld; `width` is even. Two channels at a time prefetch an even share of the keys `ahead`: keys read together
// are a few cache lines apart, which processors do not detect as a stream.
//
// Not inline: with the registers of a caller in use, GCC keeps addresses or totals in memory, which halves the speed.
template <int KEYS, int VECS, bool PAIRED, typename A, typename T>
[[gnu::noinline]] void add_scores(
    const A* const* keys, int64_t width, const A* q, int64_t ld, const T* const* ahead, AccVec<A>* total) {
  using V = AccVec<A>;
  V sum[KEYS][VECS];
#pragma GCC unroll 8
  for (int j = 0; j < KEYS; ++j)
#pragma GCC unroll 2
    for (int v = 0; v < VECS; ++v) sum[j][v] = V(0);
  const A* key[KEYS];
#pragma GCC unroll 8
  for (int j = 0; j < KEYS; ++j) key[j] = keys[j];
  for (int64_t c = 0; c < width; c += 2) {
    __builtin_prefetch(ahead[c / 2 % KEYS] + c / (2 * KEYS) * (2 * KEYS), 0, 3);
#pragma GCC unroll 2
    for (int u = 0; u < 2; u += PAIRED ? 2 : 1, q += ld) {
      V row[VECS];
#pragma GCC unroll 2
      for (int v = 0; v < VECS; ++v) row[v] = V::loadu(q + v * V::size());
#pragma GCC unroll 8
      for (int j = 0; j < KEYS; ++j) {
        V k;
        if constexpr (PAIRED) {
          k = pairs(key[j] + c);
        } else {
          k = V(key[j][c + u]);
        }
#pragma GCC unroll 2
        for (int v = 0; v < VECS; ++v) sum[j][v] = at::vec::fmadd(k, row[v], sum[j][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < KEYS; ++j)
#pragma GCC unroll 2
    for (int v = 0; v < VECS; ++v) total[j * VECS + v] = total[j * VECS + v] + sum[j][v];
}

// out[j * heads + h] = query . key j for a tile's first n keys and VECS vectors of heads from the h-th on; rows up to a
// multiple of KEYS are written.
template <int KEYS, int VECS, bool PAIRED, typename A, typename T>
inline void score_heads(
    const Query<A>& query, int64_t n, const KeyTile<A>& tile, const KeyTile<T>& ahead, const A* q, int64_t h, A* out) {
  using V = AccVec<A>;
  const int64_t heads = query.heads();
  for (int64_t i = 0; i < n; i += KEYS) {
    V total[KEYS * VECS];
    std::fill_n(total, KEYS * VECS, V(0));
    add_scores<KEYS, VECS, PAIRED>(tile.latent + i, padded_rank(query.r), q + h, heads, ahead.latent + i, total);
    add_scores<KEYS, VECS, PAIRED>(tile.rope + i, query.rope, q + query.turned() + h, heads, ahead.rope + i, total);
    A* const to = out + i * heads + h;
    if constexpr (PAIRED) {
      for (int j = 0; j < KEYS; j += 2) {
        const auto [even, odd] = at::vec::deinterleave2(total[j], total[j + 1]);
        A both[V::size()];
        (even + odd).store(both);
        std::copy_n(both, V::size() / 2, to + j * heads);
        std::copy_n(both + V::size() / 2, V::size() / 2, to + (j + 1) * heads);
      }
    } else {
      for (int s = 0; s < KEYS * VECS; ++s) total[s].store(to + s / VECS * heads + s % VECS * V::size());
    }
  }
}

// The same for all heads. A block has eight sums: enough to hide the latency of a multiply-add, few enough for sixteen
// registers.
template <typename A, typename T>
inline void scores(
    const Query<A>& query, int64_t n, const KeyTile<A>& tile, const KeyTile<T>& ahead, const A* q, A* out) {
  if constexpr (std::is_same_v<A, float>) {
    if (query.paired()) return score_heads<8, 1, true>(query, n, tile, ahead, q, 0, out);
  }
  constexpr int64_t lanes = Query<A>::lanes;
  int64_t h = 0;
  for (; h + 2 * lanes <= query.heads(); h += 2 * lanes) score_heads<4, 2, false>(query, n, tile, ahead, q, h, out);
  if (h < query.heads()) score_heads<8, 1, false>(query, n, tile, ahead, q, h, out);
}

// o[h][c] = o[h][c] * keep[h] + sum_j p[j * heads + h] * latent[j][c] for HEADS heads and VECS vectors of channels.
template <int HEADS, int VECS, typename A>
inline void value_block(
    int64_t n, const A* const* latent, int64_t c, const A* p, int64_t heads, const A* keep, A* o, int64_t ldo) {
  using V = AccVec<A>;
  V acc[HEADS][VECS];
#pragma GCC unroll 8
  for (int h = 0; h < HEADS; ++h)
#pragma GCC unroll 2
    for (int v = 0; v < VECS; ++v) acc[h][v] = V::loadu(o + h * ldo + v * V::size()) * V(keep[h]);
  for (int64_t j = 0; j < n; ++j) {
    V key[VECS];
#pragma GCC unroll 2
    for (int v = 0; v < VECS; ++v) key[v] = V::loadu(latent[j] + c + v * V::size());
#pragma GCC unroll 8
    for (int h = 0; h < HEADS; ++h) {
      const V weight(p[j * heads + h]);
#pragma GCC unroll 2
      for (int v = 0; v < VECS; ++v) acc[h][v] = at::vec::fmadd(weight, key[v], acc[h][v]);
    }
  }
#pragma GCC unroll 8
  for (int h = 0; h < HEADS; ++h)
#pragma GCC unroll 2
    for (int v = 0; v < VECS; ++v) acc[h][v].store(o + h * ldo + v * V::size());
}

// The same for all heads: as many together as the registers hold (16 of 32 bytes, or 32 of 64).
template <int VECS, typename A>
inline void value_columns(
    int64_t n, const A* const* latent, int64_t c, const A* p, int64_t n_heads, int64_t heads, const A* keep, A* o,
    int64_t ldo) {
  constexpr int most = sizeof(AccVec<A>) == 64 ? 8 : 4;
  int64_t h = 0;
  const auto block = [&](auto size) {
    for (; h + size <= n_heads; h += size) {
      value_block<size, VECS>(n, latent, c, p + h, heads, keep + h, o + h * ldo, ldo);
    }
  };
  block(std::integral_constant<int, most>{});
  block(std::integral_constant<int, 4>{});
  block(std::integral_constant<int, 2>{});
  block(std::integral_constant<int, 1>{});
}

// The same for all heads and channels. Channels are the outer loop: each column of keys is fetched once for all heads.
template <typename A>
inline void values(
    int64_t n, const A* const* latent, int64_t width, const A* p, int64_t n_heads, int64_t heads, const A* keep, A* o) {
  constexpr int64_t lanes = AccVec<A>::size();
  int64_t c = 0;
  for (; c + 2 * lanes <= width; c += 2 * lanes) {
    value_columns<2>(n, latent, c, p, n_heads, heads, keep, o + c, width);
  }
  for (; c + lanes <= width; c += lanes) value_columns<1>(n, latent, c, p, n_heads, heads, keep, o + c, width);
  for (; c < width; ++c) {
    for (int64_t h = 0; h < n_heads; ++h) {
      A sum = o[h * width + c] * keep[h];
      for (int64_t j = 0; j < n; ++j) sum += p[j * heads + h] * latent[j][c];
      o[h * width + c] = sum;
    }
  }
}

// Sizes of a thread's buffers, in elements of A.
template <typename T>
struct Scratch {
  int64_t weights, keep, tile;
  explicit Scratch(const Query<acc_t<T>>& query)
      : weights(kTile * query.heads()),
        keep(query.heads()),
        tile(in_place<T>(query.r) ? 0 : kTile * (padded_rank(query.r) + query.rope)) {}
  int64_t total() const { return weights + keep + tile; }
};

// Attends over keys [begin, end), begin < end.
//   q     the packed query, scaled: scores are exponents of 2
//   work  the buffers of Scratch
//   top   (heads): largest score
//   mass  (heads): sum of exp2(score - top)
//   o     (n_heads, r): sum of exp2(score - top) * latent
template <typename T, typename K>
inline void attend(
    const K& keys, int64_t begin, int64_t end, const Query<acc_t<T>>& query, const acc_t<T>* q, acc_t<T>* work,
    acc_t<T>* top, acc_t<T>* mass, acc_t<T>* o) {
  using A = acc_t<T>;
  using V = AccVec<A>;
  const Scratch<T> sizes(query);
  const int64_t n_heads = query.n_heads, heads = query.heads();
  A* const p = work;
  A* const keep = p + sizes.weights;
  A* const memory = keep + sizes.keep;
  std::fill_n(top, heads, -std::numeric_limits<A>::infinity());
  std::fill_n(mass, heads, A(0));
  std::fill_n(o, n_heads * keys.r, A(0));
  std::fill_n(p, sizes.weights, A(0));  // lanes past n_heads may stay unwritten
  KeyTile<T> next = cached<T>(keys, begin, std::min(kTile, end - begin));
  for (int64_t j = begin; j < end; j += kTile) {
    const int64_t n = std::min(kTile, end - j), behind = std::min(kTile, end - j - n);
    const KeyTile<A> tile = readable<T>(keys, next, n, memory);
    if (behind > 0) next = cached<T>(keys, j + n, behind);
    scores(query, n, tile, next, q, p);
    for (int64_t h = 0; h < heads; h += V::size()) {
      const V before = V::loadu(top + h);
      V now = before;
      for (int64_t i = 0; i < n; ++i) now = at::vec::maximum(now, V::loadu(p + i * heads + h));
      const V kept = exp2(before - now);
      V sum = V::loadu(mass + h) * kept;
      for (int64_t i = 0; i < n; ++i) {
        const V weight = exp2(V::loadu(p + i * heads + h) - now);
        weight.store(p + i * heads + h);
        sum = sum + weight;
      }
      now.store(top + h);
      kept.store(keep + h);
      sum.store(mass + h);
    }
    values(n, tile.latent, keys.r, p, n_heads, heads, keep, o);
  }
}

}  // namespace openmythos::mla
