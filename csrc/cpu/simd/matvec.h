// A matrix times a few vectors (gemv): each weight is read once for all vectors.
#pragma once

#include "cpu/simd/vec.h"

#include <c10/util/Unroll.h>

#include <algorithm>
#include <vector>

namespace openmythos {

// Rows computed together: as many as a vector has lanes, so that one vector holds their totals.
template <typename T>
constexpr int kMatvecRows = AccVec<T>::size();

// Lane r of the result is the sum of rows[r], by pairwise additions.
template <typename V, int R>
inline V row_sums(V (&rows)[R]) {
  if constexpr (R == 1) {
    return rows[0];
  } else {
    V half[R / 2];
    c10::ForcedUnroll<R / 2>{}([&](auto i) {
      auto [even, odd] = at::vec::deinterleave2(rows[2 * i], rows[2 * i + 1]);
      half[i] = even + odd;
    });
    return row_sums<V, R / 2>(half);
  }
}

// Widening the even and the odd elements of a bf16 vector takes one instruction each; keeping their order takes three
// times as many. So bf16 rows are widened that way, and x is rearranged to match (`split_even_odd`).
template <typename T>
constexpr bool even_odd = std::is_same_v<T, c10::BFloat16>;

template <typename T>
inline WideVec<T> weights(const T* p) {
  if constexpr (even_odd<T>) {
    using I = at::vec::Vectorized<int32_t>;
    const I both = I::loadu(p);  // little-endian: the even element is the lower half
    return {at::vec::cast<float>(both << I(16)), at::vec::cast<float>(both & I(int32_t(0xffff0000)))};
  } else {
    return openmythos::load(p);
  }
}

// Rearranges each full step of x: even elements first, then odd ones.
inline void split_even_odd(const float* x, int64_t cols, float* out) {
  using V = at::vec::Vectorized<float>;
  constexpr int64_t S = step<c10::BFloat16>;
  int64_t c = 0;
  for (; c + S <= cols; c += S) {
    auto [even, odd] = at::vec::deinterleave2(V::loadu(x + c), V::loadu(x + c + V::size()));
    even.store(out + c);
    odd.store(out + c + V::size());
  }
  std::copy(x + c, x + cols, out + c);
}

// A row of W times x, summed lane by lane over whole steps; the caller adds the last cols % step<T> columns. One sum,
// as in `tile_times`, so that a vector has the same bits alone and among others: processors overlap the rows' sums. No
// prefetches: processors foresee a linear stream, and a prefetch 1 KiB ahead made it slower.
template <typename T>
inline AccVec<T> row_times(const T* row, int64_t cols, const acc_t<T>* x) {
  using V = AccVec<T>;
  V sum(0);
#pragma GCC unroll 4
  for (int64_t c = 0; c + step<T> <= cols; c += step<T>) {
    const auto w = weights(row + c);
    sum = at::vec::fmadd(w.first, V::loadu(x + c), sum);
    if constexpr (widens<T>) sum = at::vec::fmadd(w.second, V::loadu(x + c + V::size()), sum);
  }
  return sum;
}

// y[0:count] = the first `count` <= kMatvecRows rows of W times x. All rows share one horizontal sum.
template <typename T>
inline void matvec_block(const T* W, int64_t cols, int64_t count, const acc_t<T>* x, acc_t<T>* y) {
  using V = AccVec<T>;
  constexpr int R = kMatvecRows<T>;
  V sums[R];
  for (int r = 0; r < R; ++r) sums[r] = r < count ? row_times<T>(W + r * cols, cols, x) : V(0);
  acc_t<T> total[R];
  row_sums<V, R>(sums).store(total);
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t c = cols - cols % step<T>; c < cols; ++c) total[r] += acc_t<T>(W[r * cols + c]) * x[c];
    y[r] = total[r];
  }
}

// Vectors and rows of a tile of `tile_times`: each weight and each number of x is loaded once for several products.
template <typename T>
constexpr int kTileVectors = sizeof(AccVec<T>) == 64 ? 4 : 2;
constexpr int kTileRows = 4;

// sums[m][r] = row r of W times vector m, lane by lane over whole steps. Each step also prefetches `Lines` lines of the
// rows after the next ones, from `first_line` of every R on.
template <typename T, int R, int M, int Lines>
inline void tile_times(
    const T* W, int64_t cols, const acc_t<T>* x, AccVec<T> (*sums)[kMatvecRows<T>], int64_t first_line) {
  using V = AccVec<T>;
  V total[M * R];
  c10::ForcedUnroll<M * R>{}([&](auto i) { total[i] = V(0); });
  for (int64_t c = 0; c + step<T> <= cols; c += step<T>) {
    WideVec<T> w[R];

    c10::ForcedUnroll<R>{}([&](auto r) { w[r] = weights(W + r * cols + c); });
#pragma GCC unroll 4
    for (int i = 0; i < Lines; ++i) __builtin_prefetch(W + 2 * R * cols + R * c + (first_line + i) * step<T>, 0, 2);
    // Unrolled in one level: with nested ones GCC keeps the totals in memory.
    V first[M], second[M];
    c10::ForcedUnroll<M>{}([&](auto m) {
      first[m] = V::loadu(x + m * cols + c);
      if constexpr (widens<T>) second[m] = V::loadu(x + m * cols + c + V::size());
    });
    c10::ForcedUnroll<M * R>{}([&](auto i) { total[i] = at::vec::fmadd(w[i % R].first, first[i / R], total[i]); });
    if constexpr (widens<T>) {
      c10::ForcedUnroll<M * R>{}([&](auto i) { total[i] = at::vec::fmadd(w[i % R].second, second[i / R], total[i]); });
    }
  }
  c10::ForcedUnroll<M * R>{}([&](auto i) { sums[i / R][i % R] = total[i]; });
}

// tile_times for any number of vectors. The passes over the same rows share the prefetches, in address order: if the
// first pass issued all of them, memory would idle during the others.
template <typename T, int R>
inline void rows_times(
    const T* W, int64_t cols, const acc_t<T>* x, int64_t M, AccVec<T> (*sums)[kMatvecRows<T>], bool prefetch) {
  constexpr int S = kTileVectors<T>;
  const int64_t passes = (M + S - 1) / S, lines = prefetch ? (R + passes - 1) / passes : 0;
  for (int64_t m = 0, line = 0; m < M; m += S, line += lines) {
    const auto tile = [&]<int N, int Lines>() { tile_times<T, R, N, Lines>(W, cols, x + m * cols, sums + m, line); };
    const auto fetching = [&]<int N>() {
      if (line >= R || lines == 0) return tile.template operator()<N, 0>();
      if (lines == 1) return tile.template operator()<N, 1>();
      if (lines == 2) return tile.template operator()<N, std::min(2, R)>();
      tile.template operator()<N, R>();
    };
    switch (std::min<int64_t>(S, M - m)) {
      case 1:
        fetching.template operator()<1>();
        break;
      case 2:
        fetching.template operator()<2>();
        break;
      case 3:
        fetching.template operator()<std::min(3, S)>();
        break;
      default:
        fetching.template operator()<S>();
    }
  }
}

// y[m * ldy + r] for r < count <= kMatvecRows and m < M <= kMatvecVectors.
constexpr int kMatvecVectors = 16;

template <typename T>
inline void matvecs_block(
    const T* W, int64_t cols, int64_t count, const acc_t<T>* x, int64_t M, acc_t<T>* y, int64_t ldy, bool prefetch) {
  using V = AccVec<T>;
  constexpr int R = kMatvecRows<T>;
  V sums[kMatvecVectors][R];
  int64_t r = 0;
  for (; r + kTileRows <= count; r += kTileRows) {
    rows_times<T, kTileRows>(W + r * cols, cols, x, M, reinterpret_cast<V(*)[R]>(&sums[0][r]), prefetch);
  }
  for (; r < count; ++r) rows_times<T, 1>(W + r * cols, cols, x, M, reinterpret_cast<V(*)[R]>(&sums[0][r]), false);
  for (int64_t m = 0; m < M; ++m) {
    std::fill(sums[m] + count, sums[m] + R, V(0));
    acc_t<T> total[R];
    row_sums<V, R>(sums[m]).store(total);
    for (r = 0; r < count; ++r) {
      for (int64_t c = cols - cols % step<T>; c < cols; ++c) total[r] += acc_t<T>(W[r * cols + c]) * x[m * cols + c];
      y[m * ldy + r] = total[r];
    }
  }
}

// y[m * ldy + r] = sum_c W[r * cols + c] * x[m * cols + c] for r in [begin, end), m in [0, M). Runs on the calling
// thread; callers split rows among threads, which changes no bit of the result.
//
// One vector reads row after row: memory delivers one linear stream faster than several short ones. With more vectors,
// a few rows stay in the L1 cache while the vectors pass over them.
template <typename T>
inline void matvec(
    const T* W, int64_t cols, int64_t begin, int64_t end, const acc_t<T>* x, int64_t M, acc_t<T>* y, int64_t ldy) {
  if (M == 0) return;
  std::vector<acc_t<T>> ordered;
  if constexpr (even_odd<T>) {
    ordered.resize(M * cols);
    for (int64_t m = 0; m < M; ++m) split_even_odd(x + m * cols, cols, ordered.data() + m * cols);
    x = ordered.data();
  }
  for (int64_t r = begin; r < end; r += kMatvecRows<T>) {
    const int64_t count = std::min<int64_t>(kMatvecRows<T>, end - r);
    const T* rows = W + r * cols;
    if (M == 1) {
      matvec_block<T>(rows, cols, count, x, y + r);
      continue;
    }
    for (int64_t m = 0; m < M; m += kMatvecVectors) {
      const int64_t vectors = std::min<int64_t>(kMatvecVectors, M - m);
      matvecs_block<T>(rows, cols, count, x + m * cols, vectors, y + m * ldy + r, ldy, m == 0);
    }
  }
}

}  // namespace openmythos
