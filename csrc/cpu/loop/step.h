// Shared by the forward and the backward loop step: tiles of channels, and parameters packed tile by tile.
//
// A tile is two accumulator vectors wide: one vector of bf16 or fp16. For each tile the pack holds the rows of `Row`,
// in accumulator precision and zero-padded: one contiguous stream, so that only loads and stores of (N, D) tensors deal
// with the ragged end of a row.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <memory>

#include "common/loop_arguments.h"
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

// Loads n <= width elements; the others are zero. A constant n removes the branches.
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

// Prefetches a tile; the address may be out of bounds.
template <typename T>
inline void fetch_tile(const T* p) {
  for (int64_t i = 0; i < width<T>; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(p + i, 0, 2);
}

// As store_tile; bypasses the caches if `streamed`, which needs aligned rows (see stream.h).
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

// The tile rounded to T.
template <typename T>
inline Tile<T> rounded(const Tile<T>& t) {
  if constexpr (widens<T>) {
    auto [lo, hi] = at::vec::convert_to_float<T>(at::vec::convert_from_float<T>(t.lo, t.hi));
    return {lo, hi};
  } else {
    return t;
  }
}

// Loads and stores a whole tile of accumulators: packed parameters, partial sums, scratch.
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

// sums + a * b, folded into one vector.
template <typename T>
inline AccVec<T> fold(const Tile<T>& a, const Tile<T>& b, const AccVec<T>& sums) {
  return at::vec::fmadd(a.hi, b.hi, at::vec::fmadd(a.lo, b.lo, sums));
}

// The sum of a vector's lanes, as a tree. ATen's generic reduction goes through memory at each level.
template <typename A>
inline A lane_sum(const at::vec::Vectorized<A>& v) {
  A x[at::vec::Vectorized<A>::size()];
  v.store(x);
  for (int64_t n = at::vec::Vectorized<A>::size() / 2; n > 0; n /= 2) {
    for (int64_t i = 0; i < n; ++i) x[i] += x[i + n];
  }
  return x[0];
}

// Calls body(tile, first channel, number of channels) for tiles [begin, end) of a row of D channels. For whole tiles
// the number is a std::integral_constant.
template <typename T, typename Body>
inline void for_tiles(int64_t D, int64_t begin, int64_t end, const Body& body) {
  const int64_t whole = std::min(end, D / width<T>);
  for (int64_t t = begin; t < whole; ++t) body(t, t * width<T>, std::integral_constant<int64_t, width<T>>());
  if (whole < end) body(whole, whole * width<T>, D - whole * width<T>);
}

// Rows of the pack: decay A, B, halt_weight, norm_weight, emb; from kLora on the rows of lora_B.
enum Row : int64_t { kA, kB, kHalt, kNorm, kEmb, kLora };

template <typename T>
class Channels {
 public:
  explicit Channels(const StepWeights& weights)
      : D(weights.B.numel()),
        rank(weights.lora_B.size(0)),
        tiles((D + width<T> - 1) / width<T>),
        data_(new acc_t<T>[tiles * (kLora + rank) * width<T>]) {
    const T *log_A = weights.log_A.const_data_ptr<T>(), *B = weights.B.const_data_ptr<T>();
    const T *halt = weights.halt_weight.const_data_ptr<T>(), *norm = weights.norm_weight.const_data_ptr<T>();
    const T *emb = weights.emb.const_data_ptr<T>(), *lora_B = weights.lora_B.const_data_ptr<T>();
    const acc_t<T> log_dt = *weights.log_dt.const_data_ptr<T>();
    const int64_t embedded = weights.emb.numel();
    for_tiles<T>(D, 0, tiles, [&](int64_t t, int64_t c, auto n) {
      acc_t<T>* decays = at(t, kA);
      for (int64_t i = 0; i < n; ++i) decays[i] = lti::decay<acc_t<T>>(log_dt, log_A[c + i]).value;
      for (int64_t i = n; i < width<T>; ++i) decays[i] = 0;
      store_acc<T>(at(t, kB), load_tile(B + c, n));
      store_acc<T>(at(t, kHalt), load_tile(halt + c, n));
      store_acc<T>(at(t, kNorm), load_tile(norm + c, n));
      const int64_t left = std::clamp<int64_t>(embedded - c, 0, width<T>);
      store_acc<T>(at(t, kEmb), left ? load_tile(emb + c, left) : splat<T>(0));
      for (int64_t k = 0; k < rank; ++k) store_acc<T>(at(t, kLora + k), load_tile(lora_B + k * D + c, n));
    });
  }

  // Tile t of row `row` of the pack.
  acc_t<T>* at(int64_t t, int64_t row) const { return data_.get() + (t * (kLora + rank) + row) * width<T>; }
  Tile<T> tile(int64_t t, int64_t row) const { return load_acc<T>(at(t, row)); }

  const int64_t D, rank, tiles;

 private:
  std::unique_ptr<acc_t<T>[]> data_;
};

// Rows of (N, D) walked together, so that a tile of lora_B is loaded once for all of them. They advance by chunks of
// tiles, row by row inside a chunk: few memory streams at a time, and a chunk's parameters and partial sums stay in the
// L1 cache. Sums along a row have two levels, chunks and then their sums, so that rounding errors stay small even with
// short vectors.
constexpr int64_t kRows = 4;
constexpr int64_t kChunkTiles = 8;

}  // namespace openmythos::loop
