// Where a query token's cached keys are: latents and rotary parts, a tile of keys at a time.
#pragma once

#include "cpu/mla/table.h"
#include "cpu/simd/vec.h"

#include <algorithm>

namespace openmythos::mla {

constexpr int64_t kTile = 16;  // keys whose scores are computed together: they stay in the L1 cache

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Latents and rotary parts of a tile's keys. Behind the last key it is repeated.
template <typename T>
struct KeyTile {
  const T *latent[kTile], *rope[kTile];
};

// Scores take two channels at a time, so keys of an odd width are copied and padded with a zero.
inline int64_t padded_rank(int64_t r) { return round_up(r, 2); }

// Whether keys are read where they are. Else they are copied in accumulator precision: a key is several cache lines and
// is read once for each head, so the copy costs little.
template <typename T>
inline bool in_place(int64_t r) {
  return !widens<T> && r == padded_rank(r);
}

// The cache of one row: keys of width r and rope, densely packed.
template <typename T>
struct Keys {
  const T* latent;
  const T* rope;
  int64_t r, rope_dim;

  int64_t row(int64_t j) const { return j; }
};

// The keys that token n of a table reads, wherever they are in the pool.
template <typename T>
struct PooledKeys {
  const T* latent;
  const T* rope;
  int64_t r, rope_dim;
  const Table& table;
  int64_t n;

  int64_t row(int64_t j) const { return table.row(n, j); }
};

// Keys [j, j + count) where the cache holds them.
template <typename T, typename K>
inline KeyTile<T> cached(const K& keys, int64_t j, int64_t count) {
  KeyTile<T> tile;
  for (int64_t i = 0; i < kTile; ++i) {
    const int64_t row = keys.row(j + std::min(i, count - 1));
    tile.latent[i] = keys.latent + row * keys.r;
    tile.rope[i] = keys.rope + row * keys.rope_dim;
  }
  return tile;
}

// The same keys as scores read them: where they are, or copied to `memory`.
template <typename T, typename K>
inline KeyTile<acc_t<T>> readable(const K& keys, const KeyTile<T>& tile, int64_t count, acc_t<T>* memory) {
  if constexpr (!widens<T>) {
    if (in_place<T>(keys.r)) return tile;
  }
  using A = acc_t<T>;
  const int64_t width = padded_rank(keys.r);
  A* const turned = memory + kTile * width;
  KeyTile<A> copy;
  for (int64_t i = 0; i < count; ++i) {
    widen(tile.latent[i], memory + i * width, keys.r);
    std::fill(memory + i * width + keys.r, memory + (i + 1) * width, A(0));
    widen(tile.rope[i], turned + i * keys.rope_dim, keys.rope_dim);
  }
  for (int64_t i = 0; i < kTile; ++i) {
    const int64_t at = std::min(i, count - 1);
    copy.latent[i] = memory + at * width;
    copy.rope[i] = turned + at * keys.rope_dim;
  }
  return copy;
}

}  // namespace openmythos::mla
