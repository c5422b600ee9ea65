// The LoRA's down-projection: (N, D) by a handful of rows. A library GEMM is made for wider outputs and
// runs at a fraction of the memory's speed here; this reads f once, row group by row group.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/loop.h"

namespace openmythos::loop {
namespace {

constexpr int64_t kOutputs = 4;  // dot products of a row made at once

// Outputs [k, k + K) of rows [row, row + R); `down` is (rank, tiles, width) in accumulator precision.
template <typename T, int64_t R, int64_t K>
inline void dots(const T* f, const acc_t<T>* down, T* out, int64_t row, int64_t k, int64_t D, int64_t tiles, int64_t rank) {
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

at::Tensor loop_down(const at::Tensor& f, const at::Tensor& down) {
  const int64_t rank = down.size(0), D = down.size(1), N = D ? f.numel() / D : 0;
  auto sizes = f.sizes().vec();
  sizes.back() = rank;
  auto out = at::empty(sizes, f.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, f.scalar_type(), "loop_down", [&] {
    using T = scalar_t;
    const int64_t tiles = (D + width<T> - 1) / width<T>;
    std::unique_ptr<acc_t<T>[]> packed(new acc_t<T>[rank * tiles * width<T>]);
    const T* weights = down.const_data_ptr<T>();
    for (int64_t k = 0; k < rank; ++k) {
      for_tiles<T>(D, 0, tiles, [&](int64_t t, int64_t c, auto n) {
        store_acc<T>(packed.get() + (k * tiles + t) * width<T>, load_tile(weights + k * D + c, n));
      });
    }
    const T* x = f.const_data_ptr<T>();
    T* y = out.mutable_data_ptr<T>();
    const int64_t groups = (N + kRows - 1) / kRows;
    const int64_t grain = std::max<int64_t>(1, 16384 / (kRows * std::max<int64_t>(D, 1)));
    at::parallel_for(0, groups, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin * kRows; row < std::min(end * kRows, N);) {
        if (row + kRows <= N) {
          project_rows<T, kRows>(x, packed.get(), y, row, D, tiles, rank);
          row += kRows;
        } else {
          project_rows<T, 1>(x, packed.get(), y, row, D, tiles, rank);
          row += 1;
        }
      }
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(openmythos, CPU, m) {
  m.impl("loop_down", loop_down);
}

}  // namespace openmythos::loop
