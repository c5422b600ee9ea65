// Matrix products whose right operand is a panel: dense rows, a few vectors wide. The left operand is read in place, at
// any strides and in any type, so that weights are neither packed nor transposed first.
#pragma once

#include "cpu/simd/vec.h"

#include <c10/util/Unroll.h>

#include <algorithm>

namespace openmythos {

// Vectors of a tile's row. Its sums, one row of the panel and a factor fit the registers (16 of 32 bytes, or 32 of 64).
template <typename T>
constexpr int kPanelVectors = sizeof(at::vec::Vectorized<T>) == 32 ? 2 : 4;
template <typename T>
constexpr int64_t kPanelWidth = kPanelVectors<T> * at::vec::Vectorized<T>::size();
constexpr int kTileRows = 6;
// One wide tile is faster than two narrow ones. With fewer rows, its sums fit the registers too.
template <typename T>
constexpr int kMostVectors = kPanelVectors<T> * 3 / 2;
template <typename T>
constexpr int tile_rows(int vectors) {
  return vectors > kPanelVectors<T> ? 4 : kTileRows;
}
constexpr int64_t kBlockRows = 8 * kTileRows;
// Rows of a panel that stay in cache while all rows of the left operand pass.
constexpr int64_t kPanelDepth = 256;

// a(i, k) = data[i * row + k * col]
template <typename W>
struct Strided {
  const W* data;
  int64_t row, col;
  Strided at(int64_t i, int64_t k) const { return {data + i * row + k * col, row, col}; }
};

namespace panel {

template <typename T>
using Vec = at::vec::Vectorized<T>;

// The multiply-add of a lane; bf16_dot.h has another.
struct Fma {
  static constexpr bool kHalves = false;
  template <typename V>
  static V add_product(V factor, V row, V total) {
    return at::vec::fmadd(factor, row, total);
  }
};

// What a tile prefetches: data[(k & 7) * near + (k >> 3) * far] at its k-th step.
template <typename W>
struct Prefetch {
  const W* data;
  int64_t near, far;
};

// c[i, :] (+)= sum_k a(i, k) * b[k, :] for R rows and N vectors. Half: of the last vector only the lower half.
template <typename Product, typename T, int R, int N, bool Half = false, typename W>
inline void tile(Strided<T> a, const T* b, int64_t ldb, T* c, int64_t ldc, int64_t depth, bool add, Prefetch<W> ahead) {
  constexpr int64_t S = Vec<T>::size();
  Vec<T> total[R][N];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) total[i][j] = Vec<T>(0);
  }
  for (int64_t k = 0; k < depth; ++k, b += ldb, a.data += a.col) {
    __builtin_prefetch(ahead.data + (k & 7) * ahead.near + (k >> 3) * ahead.far, 0, 2);
    Vec<T> row[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) row[j] = Vec<T>::loadu(b + j * S);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const Vec<T> factor(a.data[i * a.row]);
#pragma GCC unroll 8
      for (int j = 0; j < N - Half; ++j) total[i][j] = Product::add_product(factor, row[j], total[i][j]);
      if constexpr (Half) total[i][N - 1] = Product::add_half_product(factor, row[N - 1], total[i][N - 1]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      T* const to = c + i * ldc + j * S;
      (add ? Vec<T>::loadu(to) + total[i][j] : total[i][j]).store(to);
    }
  }
}

// Calls f(std::integral_constant<int, n>) for n in [1, Most].
template <int Most, typename F>
inline void dispatch(int64_t n, F f) {
  if constexpr (Most > 1) {
    if (n < Most) return dispatch<Most - 1>(n, f);
  }
  f(std::integral_constant<int, Most>{});
}

}  // namespace panel

// Copies a block of the left operand to `memory`, widened to T and with close rows, dense along the same dimension.
template <typename T, typename W>
Strided<T> copy_block(Strided<W> a, int64_t rows, int64_t depth, T* memory) {
  if (a.row == 1) {
    for (int64_t k = 0; k < depth; ++k) widen(a.data + k * a.col, memory + k * kBlockRows, rows);
    return {memory, 1, kBlockRows};
  }
  for (int64_t i = 0; i < rows; ++i) widen(a.data + i * a.row, memory + i * kPanelDepth, depth);
  return {memory, kPanelDepth, 1};
}

// c[i, 0:width] (+)= sum_k a(i, k) * b[k, 0:width] for i in [0, rows), k in [0, depth). The width is `vectors` vectors;
// `a` is dense along i or k. The order of a sum depends on `depth` alone. `half`: only the lower half of the last
// vector is needed; the upper half is undefined.
template <typename Product = panel::Fma, typename T, typename W>
void multiply(
    Strided<W> a, const T* b, int64_t ldb, T* c, int64_t ldc, int64_t rows, int64_t depth, int64_t vectors, bool add,
    bool half = false) {
  constexpr int64_t S = panel::Vec<T>::size();
  if (depth == 0 && !add) {
    for (int64_t i = 0; i < rows; ++i) std::fill_n(c + i * ldc, vectors * S, T(0));
  }
  const int64_t strips = (vectors + kMostVectors<T> - 1) / kMostVectors<T>;  // columns of tiles, nearly equally wide
  alignas(64) T memory[kBlockRows * kPanelDepth];
  for (int64_t k = 0; k < depth; k += kPanelDepth) {
    const int64_t part = std::min(kPanelDepth, depth - k);
    for (int64_t block = 0; block < rows; block += kBlockRows) {
      const int64_t end = std::min(rows, block + kBlockRows), next = end < rows ? end : block;
      Strided<T> left;
      // Strided rows are copied: at a power-of-two distance they would fall into few cache sets.
      if constexpr (std::is_same_v<T, W>) {
        left = a.col == 1 ? a.at(block, k) : copy_block(a.at(block, k), end - block, part, memory);
      } else {
        left = copy_block(a.at(block, k), end - block, part, memory);
      }
      for (int64_t strip = 0; strip < strips; ++strip) {
        const int64_t first = vectors * strip / strips, last = vectors * (strip + 1) / strips;
        panel::dispatch<kMostVectors<T>>(last - first, [&](auto n) {
          constexpr int R = tile_rows<T>(n);
          for (int64_t i = block; i < end; i += R) {
            panel::dispatch<R>(std::min<int64_t>(R, end - i), [&](auto r) {
              const int64_t share = kPanelDepth / (kBlockRows / R);
              const panel::Prefetch<W> ahead =
                  a.row == 1
                      ? panel::Prefetch<W>{a.at(next, std::min(k + (i - block) / R * share, depth)).data, 8, a.col}
                      : panel::Prefetch<W>{a.at(i + R < rows ? i + R : i, k).data, a.row, 8};
              const auto run = [&](auto halved) {
                panel::tile<Product, T, r, n, halved>(
                    left.at(i - block, 0), b + k * ldb + first * S, ldb, c + i * ldc + first * S, ldc, part,
                    add || k > 0, ahead);
              };
              Product::kHalves && half && last == vectors ? run(std::bool_constant<Product::kHalves>{})
                                                          : run(std::false_type{});
            });
          }
        });
      }
    }
  }
}

// The same for a left operand already in cache, at any strides.
template <typename T>
void multiply_cached(
    Strided<T> a, const T* b, int64_t ldb, T* c, int64_t ldc, int64_t rows, int64_t depth, int64_t vectors, bool add) {
  constexpr int64_t S = panel::Vec<T>::size();
  const int64_t strips = (vectors + kPanelVectors<T> - 1) / kPanelVectors<T>;
  for (int64_t strip = 0; strip < strips; ++strip) {
    const int64_t first = vectors * strip / strips, last = vectors * (strip + 1) / strips;
    panel::dispatch<kPanelVectors<T>>(last - first, [&](auto n) {
      for (int64_t i = 0; i < rows; i += kTileRows) {
        panel::dispatch<kTileRows>(std::min<int64_t>(kTileRows, rows - i), [&](auto r) {
          panel::tile<panel::Fma, T, r, n>(
              a.at(i, 0), b + first * S, ldb, c + i * ldc + first * S, ldc, depth, add, panel::Prefetch<T>{b, 0, 0});
        });
      }
    });
  }
}

// panel[c * ld + r] = row(r)[c] for r in [0, rows), c in [0, cols); zeros for r in [rows, ld). ld: whole vectors.
template <typename T, typename Row>
void transpose_in(Row row, int64_t rows, int64_t cols, T* panel, int64_t ld) {
  constexpr int64_t S = panel::Vec<T>::size();
  alignas(64) T block[S * S];
  const int64_t whole = cols - cols % S;
  for (int64_t r = 0; r < ld; r += S) {
    const int64_t m = std::clamp<int64_t>(rows - r, 0, S);
    std::fill(block + m * S, block + S * S, T(0));
    for (int64_t c = 0; c < whole; c += S) {
      for (int64_t i = 0; i < m; ++i) panel::Vec<T>::loadu(row(r + i) + c).store(block + i * S);
      at::vec::transpose_mxn<T, S, S>(block, S, panel + c * ld + r, ld);
    }
    for (int64_t c = whole; c < cols; ++c) {
      T* const to = panel + c * ld + r;
      for (int64_t i = 0; i < S; ++i) to[i] = i < m ? row(r + i)[c] : T(0);
    }
  }
}

// row(r)[c] = panel[c * ld + r] for r in [0, rows), c in [0, cols).
template <typename T, typename Row>
void transpose_out(const T* panel, int64_t ld, int64_t rows, int64_t cols, Row row) {
  constexpr int64_t S = panel::Vec<T>::size();
  alignas(64) T block[S * S];
  const int64_t whole = cols - cols % S;
  for (int64_t r = 0; r < rows; r += S) {
    const int64_t m = std::min(S, rows - r);
    for (int64_t c = 0; c < whole; c += S) {
      at::vec::transpose_mxn<T, S, S>(panel + c * ld + r, ld, block, S);
      for (int64_t i = 0; i < m; ++i) panel::Vec<T>::loadu(block + i * S).store(row(r + i) + c);
    }
    for (int64_t i = 0; i < m; ++i) {
      T* const to = row(r + i);
      for (int64_t c = whole; c < cols; ++c) to[c] = panel[c * ld + r + i];
    }
  }
}

}  // namespace openmythos
