// The LoRA's down-projection, f (N, D) @ down^T (D, rank), a few rows at a time.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "cpu/loop/step.h"

namespace openmythos::loop {

// One element of lora_hidden: raw * scale, rounded as a product of tensors is.
template <typename T>
inline acc_t<T> scaled(T raw, T scale) {
  return acc_t<T>(T(acc_t<T>(raw) * acc_t<T>(scale)));
}

constexpr int64_t kOutputs = 4;  // dot products of a row computed together

// Outputs [k, k + K) of rows [row, row + R); `down` is (rank, tiles, width) in accumulator precision.
template <typename T, int64_t R, int64_t K>
inline void dots(
    const T* f, const acc_t<T>* down, T* out, int64_t row, int64_t k, int64_t D, int64_t tiles, int64_t rank) {
  AccVec<T> sums[R][K];
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t j = 0; j < K; ++j) sums[r][j] = AccVec<T>(0);
  }
  for_tiles<T>(D, 0, tiles, [&](int64_t t, int64_t c, auto n) {
    Tile<T> x[R];
    for (int64_t r = 0; r < R; ++r) x[r] = load_tile(f + (row + r) * D + c, n);
    for (int64_t j = 0; j < K; ++j) {
      const Tile<T> w = load_acc<T>(down + ((k + j) * tiles + t) * width<T>);
      for (int64_t r = 0; r < R; ++r) sums[r][j] = fold(x[r], w, sums[r][j]);
    }
  });
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t j = 0; j < K; ++j) out[(row + r) * rank + k + j] = T(lane_sum(sums[r][j]));
  }
}

template <typename T, int64_t R>
void project_rows(const T* f, const acc_t<T>* down, T* out, int64_t row, int64_t D, int64_t tiles, int64_t rank) {
  int64_t k = 0;
  for (; k + kOutputs <= rank; k += kOutputs) dots<T, R, kOutputs>(f, down, out, row, k, D, tiles, rank);
  for (; k < rank; ++k) dots<T, R, 1>(f, down, out, row, k, D, tiles, rank);
}

// `down` in accumulator precision, (rank, tiles, width).
template <typename T>
std::unique_ptr<acc_t<T>[]> packed_rows(const at::Tensor& down, int64_t rank, int64_t D, int64_t tiles) {
  std::unique_ptr<acc_t<T>[]> packed(new acc_t<T>[rank * tiles * width<T>]);
  const T* weights = down.const_data_ptr<T>();
  for (int64_t k = 0; k < rank; ++k) {
    for_tiles<T>(D, 0, tiles, [&](int64_t t, int64_t c, auto n) {
      store_acc<T>(packed.get() + (k * tiles + t) * width<T>, load_tile(weights + k * D + c, n));
    });
  }
  return packed;
}

}  // namespace openmythos::loop
