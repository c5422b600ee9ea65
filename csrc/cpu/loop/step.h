// Shared by the forward and the backward loop step: tiles of channels and the
// per-channel parameters packed tile after tile.
//
// A tile is two accumulator vectors wide, which is one vector of bf16 or fp16.
// For each tile the pack holds the rows A, B, halt weight, norm weight, loop
// embedding, lora_B[0], ..., lora_B[rank - 1]: one contiguous stream in
// accumulator precision, padded with zeros, so that only loads and stores of
// (N, D) tensors ever look at the ragged end of a row.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <memory>

#include "common/lti.h"
#include "cpu/simd/stream.h"
#include "cpu/simd/vec.h"

namespace openmythos::loop {

template <typename T>
constexpr int64_t width = 2 * AccVec<T>::size();

template <typename T>
struct Tile {
  AccVec<T> lo, hi;
};

// Loads n <= width elements; the others are zero. With a constant n the branches vanish.
template <typename T>
inline Tile<T> load_tile(const T* p, int64_t n) {
  if constexpr (widens<T>) {
    using V = at::vec::Vectorized<T>;
    auto [lo, hi] = at::vec::convert_to_float<T>(n == width<T> ? V::loadu(p) : V::loadu(p, n));
    return {lo, hi};
  } else {
    using V = AccVec<T>;
    if (n == width<T>) return {V::loadu(p), V::loadu(p + V::size())};
    const int64_t first = std::min<int64_t>(n, V::size());
    return {V::loadu(p, first), n > first ? V::loadu(p + first, n - first) : V(0)};
  }
}

template <typename T>
inline void store_tile(T* p, const Tile<T>& t, int64_t n) {
  if constexpr (widens<T>) {
    auto v = at::vec::convert_from_float<T>(t.lo, t.hi);
    n == width<T> ? v.store(p) : v.store(p, n);
  } else {
    constexpr int64_t half = AccVec<T>::size();
    if (n == width<T>) {
      t.lo.store(p);
      t.hi.store(p + half);
    } else {
      t.lo.store(p, std::min(n, half));
      if (n > half) t.hi.store(p + half, n - half);
    }
  }
}

// Asks memory for a tile that will be needed soon, while the core is busy with others; the address may lie outside.
template <typename T>
inline void fetch_tile(const T* p) {
  for (int64_t i = 0; i < width<T>; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(p + i, 0, 2);
}

// As store_tile; past the caches where `streamed`, which needs whole rows to be aligned (see stream.h).
template <typename T>
inline void put_tile(T* p, const Tile<T>& t, int64_t n, bool streamed) {
  if (!streamed || n != width<T>) return store_tile(p, t, n);
  if constexpr (widens<T>) {
    stream<T>(p, at::vec::convert_from_float<T>(t.lo, t.hi));
  } else {
    stream<T>(p, t.lo);
    stream<T>(p + AccVec<T>::size(), t.hi);
  }
}

// The tile as it reads back after store_tile.
template <typename T>
inline Tile<T> rounded(const Tile<T>& t) {
  if constexpr (widens<T>) {
    auto [lo, hi] = at::vec::convert_to_float<T>(at::vec::convert_from_float<T>(t.lo, t.hi));
    return {lo, hi};
  } else {
    return t;
  }
}

// A whole tile of accumulators: packed parameters, partial sums, scratch.
template <typename T>
inline Tile<T> load_acc(const acc_t<T>* p) {
  return {AccVec<T>::loadu(p), AccVec<T>::loadu(p + AccVec<T>::size())};
}

template <typename T>
inline void store_acc(acc_t<T>* p, const Tile<T>& t) {
  t.lo.store(p);
  t.hi.store(p + AccVec<T>::size());
}

template <typename T>
inline Tile<T> splat(acc_t<T> x) {
  return {AccVec<T>(x), AccVec<T>(x)};
}

template <typename T>
inline Tile<T> operator+(const Tile<T>& a, const Tile<T>& b) {
  return {a.lo + b.lo, a.hi + b.hi};
}

template <typename T>
inline Tile<T> operator*(const Tile<T>& a, const Tile<T>& b) {
  return {a.lo * b.lo, a.hi * b.hi};
}

template <typename T>
inline Tile<T> fma(const Tile<T>& a, const Tile<T>& b, const Tile<T>& c) {
  return {at::vec::fmadd(a.lo, b.lo, c.lo), at::vec::fmadd(a.hi, b.hi, c.hi)};
}

// sums += a * b, folded into one vector.
template <typename T>
inline AccVec<T> fold(const Tile<T>& a, const Tile<T>& b, const AccVec<T>& sums) {
  return at::vec::fmadd(a.hi, b.hi, at::vec::fmadd(a.lo, b.lo, sums));
}

// The sum of a vector's lanes, as a tree. ATen's generic reduction goes through memory once a level.
template <typename A>
inline A lane_sum(const at::vec::Vectorized<A>& v) {
  A x[at::vec::Vectorized<A>::size()];
  v.store(x);
  for (int64_t n = at::vec::Vectorized<A>::size() / 2; n > 0; n /= 2) {
    for (int64_t i = 0; i < n; ++i) x[i] += x[i + n];
  }
  return x[0];
}

// body(tile, its first channel, its number of channels) for tiles [begin, end) of a row of D
// channels; the number is a constant for whole tiles.
template <typename T, typename Body>
inline void for_tiles(int64_t D, int64_t begin, int64_t end, const Body& body) {
  const int64_t whole = std::min(end, D / width<T>);
  for (int64_t t = begin; t < whole; ++t) body(t, t * width<T>, std::integral_constant<int64_t, width<T>>());
  if (whole < end) body(whole, whole * width<T>, D - whole * width<T>);
}

enum Row : int64_t { kA, kB, kHalt, kNorm, kEmb, kLora };

template <typename T>
class Channels {
 public:
  Channels(
      const at::Tensor& lora_B, const at::Tensor& log_A, const at::Tensor& log_dt, const at::Tensor& B,
      const at::Tensor& halt_weight, const at::Tensor& norm_weight, const at::Tensor& emb)
      : D(B.numel()),
        rank(lora_B.size(0)),
        tiles((D + width<T> - 1) / width<T>),
        data_(new acc_t<T>[tiles * (kLora + rank) * width<T>]) {
    const auto *a = log_A.const_data_ptr<T>(), *b = B.const_data_ptr<T>(), *hw = halt_weight.const_data_ptr<T>(),
               *nw = norm_weight.const_data_ptr<T>(), *em = emb.const_data_ptr<T>(), *lb = lora_B.const_data_ptr<T>();
    const acc_t<T> dt = *log_dt.const_data_ptr<T>();
    const int64_t embedded = emb.numel();
    for_tiles<T>(D, 0, tiles, [&](int64_t t, int64_t c, auto n) {
      acc_t<T>* decays = at(t, kA);
      for (int64_t i = 0; i < n; ++i) decays[i] = lti::decay<acc_t<T>>(dt, a[c + i]).value;
      for (int64_t i = n; i < width<T>; ++i) decays[i] = 0;
      store_acc<T>(at(t, kB), load_tile(b + c, n));
      store_acc<T>(at(t, kHalt), load_tile(hw + c, n));
      store_acc<T>(at(t, kNorm), load_tile(nw + c, n));
      const int64_t left = std::clamp<int64_t>(embedded - c, 0, width<T>);
      store_acc<T>(at(t, kEmb), left ? load_tile(em + c, left) : splat<T>(0));
      for (int64_t k = 0; k < rank; ++k) store_acc<T>(at(t, kLora + k), load_tile(lb + k * D + c, n));
    });
  }

  // Channels of tile t in row `row` of the pack.
  acc_t<T>* at(int64_t t, int64_t row) const { return data_.get() + (t * (kLora + rank) + row) * width<T>; }
  Tile<T> tile(int64_t t, int64_t row) const { return load_acc<T>(at(t, row)); }

  const int64_t D, rank, tiles;

 private:
  std::unique_ptr<acc_t<T>[]> data_;
};

// Rows walked together, so that a tile of lora_B is loaded once for all of them. They advance by
// chunks, row after row inside a chunk: few streams at a time, and what a chunk needs of the pack
// and of partial sums stays in the L1 cache for all rows. Sums along a row are taken of a chunk and then of the chunks:
// rounding grows with neither number alone, where vectors are short, too.
constexpr int64_t kRows = 4;
constexpr int64_t kChunkTiles = 8;

}  // namespace openmythos::loop
