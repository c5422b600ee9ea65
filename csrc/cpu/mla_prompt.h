// What the forward and the backward of per-head latent attention share: strided inputs, which keys a query sees, tiles.
#pragma once

#include "cpu/vec.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

namespace openmythos::mla {

// A tile of scores stays in the second-level cache.
constexpr int64_t kQueryTile = 128, kKeyTile = 128;

// (B, tokens, heads, width) or (B, tokens, width) at any strides but a dense last dimension.
template <typename T>
struct View {
  const T* data;
  int64_t batch, token, head;

  explicit View(const at::Tensor& x)
      : data(x.const_data_ptr<T>()), batch(x.stride(0)), token(x.stride(1)), head(x.dim() == 4 ? x.stride(2) : 0) {}
  const T* row(int64_t b, int64_t t, int64_t h) const { return data + b * batch + t * token + h * head; }
};

inline at::Tensor dense_rows(const at::Tensor& x) { return x.stride(-1) == 1 || x.size(-1) == 1 ? x : x.contiguous(); }

// The problem: inputs, sizes and what is visible.
template <typename T>
struct Prompt {
  View<T> q_nope, q_rope, kv, k_rope;
  int64_t B, queries, S, heads, nope, rope, v;
  const int64_t *start, *lengths;

  int64_t width() const { return nope + rope; }
  float scale() const { return float(1 / std::sqrt(double(width()))); }
  // From products to exponents of 2. It enters by a fused multiply-add: scores are not rounded again before exp2.
  float exponent() const { return float(1.44269504088896340736 / std::sqrt(double(width()))); }
  // Keys of row b that are there at all; nothing behind them is read.
  int64_t held(int64_t b) const { return std::clamp<int64_t>(lengths[b], 0, S); }
  // Query i sees the first `seen` of them.
  int64_t seen(int64_t b, int64_t i) const { return std::clamp<int64_t>(start[b] + i + 1, 0, held(b)); }

  void load_queries(int64_t b, int64_t h, int64_t i, int64_t rows, float* out) const {
    for (int64_t t = 0; t < rows; ++t, out += width()) {
      widen(q_nope.row(b, i + t, h), out, nope);
      widen(q_rope.row(b, i + t, h), out + nope, rope);
    }
  }
  // The tile's keys, whose rotary part all heads share, and its values.
  void load_keys(int64_t b, int64_t h, int64_t j, int64_t rows, float* keys, float* values) const {
    for (int64_t t = 0; t < rows; ++t, keys += width(), values += v) {
      const T *k = kv.row(b, j + t, h), *r = k_rope.row(b, j + t, 0);
      widen(k, keys, nope);
      widen(r, keys + nope, rope);
      widen(k + nope, values, v);
    }
  }
};

// A matrix in float32 of at most as many rows and columns.
struct Tile {
  at::Tensor whole;
  float* data;
  int64_t ld;

  Tile(int64_t rows, int64_t cols)
      : whole(at::empty({rows, cols}, at::kFloat)), data(whole.mutable_data_ptr<float>()), ld(cols) {}
  at::Tensor part(int64_t begin, int64_t rows, int64_t cols) const {
    return whole.as_strided({rows, cols}, {ld, 1}, begin * ld);
  }
  at::Tensor part(int64_t rows) const { return rows == whole.size(0) ? whole : part(0, rows, ld); }
  float* row(int64_t i) const { return data + i * ld; }
};

// out (+)= a @ b by the library that PyTorch ships.
inline void product(at::Tensor out, const at::Tensor& a, const at::Tensor& b, bool accumulate) {
  if (accumulate) {
    at::addmm_out(out, out, a, b);
  } else {
    at::mm_out(out, a, b);
  }
}

// Runs work(next) on every thread; next() hands out tasks until it returns -1. Who runs a task changes no bit of it.
template <typename F>
void share_out(int64_t tasks, F work) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), tasks), 1, [&](int64_t, int64_t) {
    at::AutoDispatchBelowADInplaceOrView below;  // thread local, as is grad mode: the pool's threads start with them on
    at::NoGradGuard no_grad;
    work([&]() -> int64_t {
      const int64_t task = next++;
      return task < tasks ? task : -1;
    });
  });
}

}  // namespace openmythos::mla
