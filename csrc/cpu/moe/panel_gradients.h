// The gradients of an expert's weights, from panels of its rows.
#pragma once

#include "cpu/moe/experts.h"
#include "cpu/moe/panels.h"
#include "cpu/runtime/work_queue.h"
#include "cpu/simd/panel.h"

#include <vector>

namespace openmythos::moe {

// What the weights' gradients need of a piece. Matrices with a row per token are stored as panels of columns.
template <typename T>
struct Held {
  int64_t rows, width;
  T *dgate, *dup;  // (I, width): gradients before the activation
  T* dy;           // (D, width)
  T *hidden, *x;   // (rows, I) times the routing weights and (rows, D), in panels of columns, zero-padded

  static int64_t padded(int64_t cols) { return (cols + kPanelWidth<T> - 1) / kPanelWidth<T> * kPanelWidth<T>; }
  static int64_t size(const Piece& p, int64_t D, int64_t I) {
    return p.width<T>() * (2 * I + D + padded(I) + padded(D));
  }
  Held(T* memory, const Piece& p, int64_t D, int64_t I) : rows(p.rows), width(p.width<T>()) {
    dgate = memory;
    dup = dgate + I * width;
    dy = dup + I * width;
    hidden = dy + D * width;
    x = hidden + padded(I) * width;
  }
};

// What the pieces of an expert take, and their places in so much memory.
template <typename T>
int64_t held_size(const std::vector<Piece>& pieces, int64_t D, int64_t I) {
  int64_t size = 0;
  for (const Piece& piece : pieces) size += Held<T>::size(piece, D, I);
  return size;
}
template <typename T>
std::vector<Held<T>> hold(T* memory, const std::vector<Piece>& pieces, int64_t D, int64_t I) {
  std::vector<Held<T>> held;
  for (const Piece& piece : pieces) {
    held.emplace_back(memory, piece, D, I);
    memory += Held<T>::size(piece, D, I);
  }
  return held;
}

// to[p][r, :] = row(r)[p * kPanelWidth : (p + 1) * kPanelWidth], zero-padded past `cols`.
template <typename T, typename Row>
void split_columns(Row row, int64_t rows, int64_t cols, T* to) {
  for (int64_t c = 0; c < cols; c += kPanelWidth<T>) {
    const int64_t n = std::min(kPanelWidth<T>, cols - c);
    for (int64_t r = 0; r < rows; ++r, to += kPanelWidth<T>) {
      std::copy_n(row(r) + c, n, to);
      std::fill(to + n, to + kPanelWidth<T>, T(0));
    }
  }
}

// Rows [first, last) of a weight's gradient (·, cols): the sum over pieces of a(piece) (·, width) @ b(piece) (rows,
// cols), the latter in panels of columns. `add`: to what is in `out`.
template <typename T, typename W, typename A, typename B>
void weight_gradient(
    W* out, int64_t cols, int64_t first, int64_t last, const std::vector<Held<T>>& pieces, bool add, A a, B b) {
  alignas(64) T sums[kBlockRows * kPanelWidth<T>];
  for (int64_t c = 0; c < cols; c += kPanelWidth<T>) {
    bool more = false;
    for (const Held<T>& piece : pieces) {
      for (int64_t i = first; i < last; i += kTileRows) {
        const Strided<T> left{a(piece) + i * piece.width, piece.width, 1};
        const panel::Prefetch<W> written_next{out + i * cols + c, cols, 8};
        panel::dispatch<kTileRows>(std::min<int64_t>(kTileRows, last - i), [&](auto r) {
          panel::tile<panel::Fma, T, r, kPanelVectors<T>>(
              left, b(piece) + c * piece.rows, kPanelWidth<T>, sums + (i - first) * kPanelWidth<T>, kPanelWidth<T>,
              piece.rows, more, written_next);
        });
      }
      more = true;
    }
    for (int64_t r = first; r < last; ++r) {
      const T* const from = sums + (r - first) * kPanelWidth<T>;
      W* const to = out + r * cols + c;
      const int64_t n = std::min(kPanelWidth<T>, cols - c);
      if (add) {
        for (int64_t i = 0; i < n; ++i) to[i] = W(T(to[i]) + from[i]);
      } else {
        for (int64_t i = 0; i < n; ++i) to[i] = W(from[i]);
      }
    }
  }
}

// The gradients of expert e's gate, up and down, in blocks of rows that threads share; `pieces` must not be empty.
template <typename W, typename T>
void weight_gradients(
    const Experts& to, int64_t e, const std::vector<Held<T>>& pieces, int64_t D, int64_t I, bool add) {
  const auto blocks = [](int64_t rows) { return (rows + kBlockRows - 1) / kBlockRows; };
  const int64_t inner_blocks = blocks(I);
  run_tasks(2 * inner_blocks + blocks(D), [&](int64_t, auto next) {
    for (int64_t block = next(); block >= 0; block = next()) {
      const int64_t matrix = std::min<int64_t>(block / inner_blocks, 2);
      const int64_t first = (block - matrix * inner_blocks) * kBlockRows;
      const int64_t last = std::min(first + kBlockRows, matrix == 2 ? D : I);
      if (matrix == 2) {
        weight_gradient<T>(
            to.down[e].mutable_data_ptr<W>(), I, first, last, pieces, add, [](const Held<T>& p) { return p.dy; },
            [](const Held<T>& p) { return p.hidden; });
      } else {
        weight_gradient<T>(
            (matrix == 0 ? to.gate : to.up)[e].template mutable_data_ptr<W>(), D, first, last, pieces, add,
            [&](const Held<T>& p) { return matrix == 0 ? p.dgate : p.dup; }, [](const Held<T>& p) { return p.x; });
      }
    }
  });
}

}  // namespace openmythos::moe
