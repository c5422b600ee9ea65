// Products with a few rows, for backward passes: the matrix is read or written once, in row order, for all of them.
#pragma once

#include "cpu/simd/matvec.h"

namespace openmythos {

// Vectors of a tile's row: with four rows of accumulators, weights and factors, a tile fits the registers.
template <typename T>
constexpr int kTileColumns = sizeof(AccVec<T>) == 64 ? 4 : 2;
template <typename T>
constexpr int64_t kTileWidth = kTileColumns<T> * AccVec<T>::size();
constexpr int64_t kStripRows = 16;  // rows of the matrix that stay in the L1 cache while the other rows pass

// Loads N vectors of accumulators from a row.
template <typename T, int N>
inline void load_row(const T* p, AccVec<T>* v) {
  if constexpr (widens<T>) {
    c10::ForcedUnroll<N / 2>{}([&](auto i) {
      const auto w = openmythos::load(p + i * step<T>);
      v[2 * i] = w.first;
      v[2 * i + 1] = w.second;
    });
  } else {
    c10::ForcedUnroll<N>{}([&](auto i) { v[i] = AccVec<T>::loadu(p + i * AccVec<T>::size()); });
  }
}

// sums[m][:] = sum_r factor[m * fm + r * fr] * W[r * ldw + :] for m < M <= 4, r < rows and a tile's columns. Prefetch:
// as many rows behind these.
//
// Unrolled in one level, and the sums returned by assignment: otherwise GCC keeps the totals in memory.
template <typename T, int M, bool Prefetch>
inline void tile_product(
    const T* W, int64_t ldw, int64_t rows, const acc_t<T>* factor, int64_t fm, int64_t fr, AccVec<T>* sums) {
  using V = AccVec<T>;
  constexpr int N = kTileColumns<T>;
  V total[M * N];
  c10::ForcedUnroll<M * N>{}([&](auto i) { total[i] = V(0); });
  for (int64_t r = 0; r < rows; ++r) {
    V w[N], f[M];
    load_row<T, N>(W + r * ldw, w);
    if constexpr (Prefetch) {
      for (int64_t i = 0; i < kTileWidth<T>; i += 64 / sizeof(T)) __builtin_prefetch(W + (r + rows) * ldw + i, 0, 2);
    }
    c10::ForcedUnroll<M>{}([&](auto m) { f[m] = V(factor[m * fm + r * fr]); });
    c10::ForcedUnroll<M * N>{}([&](auto i) { total[i] = at::vec::fmadd(w[i % N], f[i / N], total[i]); });
  }
  c10::ForcedUnroll<M * N>{}([&](auto i) { sums[i] = total[i]; });
}

// acc[m, :] += sums[m][:]
template <typename T>
inline void add_tile(const AccVec<T>* sums, int64_t M, acc_t<T>* acc, int64_t lda) {
  using V = AccVec<T>;
  for (int64_t i = 0; i < M * kTileColumns<T>; ++i) {
    acc_t<T>* p = acc + i / kTileColumns<T> * lda + i % kTileColumns<T> * V::size();
    (V::loadu(p) + sums[i]).store(p);
  }
}

// out[r, :] (+)= sums[r][:]
template <typename T>
inline void store_tile(const AccVec<T>* sums, int64_t R, T* out, int64_t ldo, bool add) {
  constexpr int64_t S = widens<T> ? 2 : 1, N = kTileColumns<T>;
  for (int64_t i = 0; i < R * N; i += S) {
    T* const to = out + i / N * ldo + i % N * AccVec<T>::size();
    WideVec<T> sum{sums[i], sums[i + S - 1]};
    if (add) {
      const WideVec<T> before = openmythos::load(to);
      sum.first = before.first + sum.first;
      if constexpr (widens<T>) sum.second = before.second + sum.second;
    }
    openmythos::store(to, sum);
  }
}

// Calls f(std::integral_constant<int, min(n, 4)>).
template <typename F>
inline void up_to_four(int64_t n, F f) {
  switch (n) {
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 3:
      return f(std::integral_constant<int, 3>{});
    default:
      return f(std::integral_constant<int, 4>{});
  }
}

// A narrow block of a matrix, zero-padded to a tile's width.
template <typename T>
inline std::vector<T> padded(const T* from, int64_t ld, int64_t rows, int64_t cols) {
  std::vector<T> to(rows * kTileWidth<T>);
  for (int64_t r = 0; r < rows; ++r) std::copy_n(from + r * ld, cols, to.data() + r * kTileWidth<T>);
  return to;
}

template <typename T>
inline void unpad(const std::vector<T>& from, T* to, int64_t ld, int64_t rows, int64_t cols) {
  for (int64_t r = 0; r < rows; ++r) std::copy_n(from.data() + r * kTileWidth<T>, cols, to + r * ld);
}

// acc[m, 0:cols] += sum_r factor[m * ldf + r] * W[r * ldw + 0:cols] for m in [0, M), r in [0, rows).
template <typename T>
inline void add_product(
    const T* W, int64_t ldw, int64_t rows, int64_t cols, const acc_t<T>* factor, int64_t ldf, int64_t M, acc_t<T>* acc,
    int64_t lda) {
  constexpr int64_t C = kTileWidth<T>;
  int64_t c = 0;
  for (; c + C <= cols; c += C) {
    for (int64_t m = 0; m < M; m += 4) {
      up_to_four(M - m, [&](auto n) {
        AccVec<T> sums[4 * kTileColumns<T>];
        if (m == 0) {
          tile_product<T, n, true>(W + c, ldw, rows, factor, ldf, 1, sums);
        } else {
          tile_product<T, n, false>(W + c, ldw, rows, factor + m * ldf, ldf, 1, sums);
        }
        add_tile<T>(sums, n, acc + m * lda + c, lda);
      });
    }
  }
  if (c == cols) return;
  const auto wide = padded(W + c, ldw, rows, cols - c);
  auto sums = padded(acc + c, lda, M, cols - c);
  add_product<T>(wide.data(), C, rows, C, factor, ldf, M, sums.data(), C);
  unpad(sums, acc + c, lda, M, cols - c);
}

// out[r, 0:cols] (+)= sum_m factor[m * ldf + r] * x[m, 0:cols] for r in [0, rows), m in [0, M).
template <typename T>
inline void outer(
    T* out, int64_t ldo, int64_t rows, int64_t cols, const acc_t<T>* factor, int64_t ldf, const acc_t<T>* x,
    int64_t ldx, int64_t M, bool add) {
  constexpr int64_t C = kTileWidth<T>;
  const int64_t full = cols - cols % C;
  for (int64_t r = 0; r < rows; r += 4) {
    up_to_four(rows - r, [&](auto n) {
      for (int64_t c = 0; c < full; c += C) {
        AccVec<T> sums[4 * kTileColumns<T>];
        tile_product<acc_t<T>, n, false>(x + c, ldx, M, factor + r, 1, ldf, sums);
        store_tile<T>(sums, n, out + r * ldo + c, ldo, add);
      }
    });
  }
  if (full == cols) return;
  const auto wide = padded(x + full, ldx, M, cols - full);
  std::vector<T> sums = padded(out + full, ldo, rows, cols - full);
  outer<T>(sums.data(), C, rows, C, factor, ldf, wide.data(), C, M, add);
  unpad(sums, out + full, ldo, rows, cols - full);
}

}  // namespace openmythos
