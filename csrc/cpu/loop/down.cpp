// openmythos::loop_down and its backward: the LoRA's down-projection. Library GEMMs are made for wider outputs and
// reach a fraction of the memory bandwidth here; this reads f once, a few rows at a time.
#include "cpu/loop/loop.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cstring>
#include <memory>
#include <tuple>

#include "cpu/loop/down.h"
#include "cpu/runtime/allocator.h"
#include "cpu/runtime/row_blocks.h"

namespace openmythos::loop {

at::Tensor loop_down(const at::Tensor& f, const at::Tensor& down) {
  const int64_t rank = down.size(0), D = down.size(1), N = D ? f.numel() / D : 0;
  auto sizes = f.sizes().vec();
  sizes.back() = rank;
  auto out = at::empty(sizes, f.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, f.scalar_type(), "loop_down", [&] {
    using T = scalar_t;
    const int64_t tiles = (D + width<T> - 1) / width<T>;
    const auto packed = packed_rows<T>(down, rank, D, tiles);
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

namespace {

// Rows [row, row + R): df = grad @ down, and sums (rank, tiles, width) += grad^T @ f.
template <typename T, int64_t R>
void unproject_rows(
    const T* grad, const T* f, const acc_t<T>* down, T* df, acc_t<T>* sums, int64_t row, int64_t D, int64_t tiles,
    int64_t rank, bool streamed) {
  for_tiles<T>(D, 0, tiles, [&](int64_t t, int64_t c, auto n) {
    Tile<T> x[R], back[R];
    for (int64_t r = 0; r < R; ++r) {
      x[r] = load_tile(f + (row + r) * D + c, n);
      back[r] = splat<T>(0);
    }
    for (int64_t k = 0; k < rank; ++k) {
      const int64_t at = (k * tiles + t) * width<T>;
      const Tile<T> w = load_acc<T>(down + at);
      Tile<T> sum = load_acc<T>(sums + at);
      for (int64_t r = 0; r < R; ++r) {
        const Tile<T> g = splat<T>(acc_t<T>(grad[(row + r) * rank + k]));
        back[r] = fma(g, w, back[r]);
        sum = fma(g, x[r], sum);
      }
      store_acc<T>(sums + at, sum);
    }
    for (int64_t r = 0; r < R; ++r) put_tile(df + (row + r) * D + c, back[r], n, streamed);
  });
}

std::tuple<at::Tensor, at::Tensor> loop_down_backward(
    const at::Tensor& grad, const at::Tensor& f, const at::Tensor& down) {
  const int64_t rank = down.size(0), D = down.size(1), N = D ? f.numel() / D : 0;
  auto df = empty(f.sizes(), f.options()), ddown = at::empty_like(down);
  const RowBlocks blocks(N);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, f.scalar_type(), "loop_down_backward", [&] {
    using T = scalar_t;
    using A = acc_t<T>;
    const int64_t tiles = (D + width<T> - 1) / width<T>, slab = rank * tiles * width<T>;
    const auto packed = packed_rows<T>(down, rank, D, tiles);
    std::unique_ptr<A[]> slabs(new A[blocks.count * slab]);
    const T *g = grad.const_data_ptr<T>(), *x = f.const_data_ptr<T>();
    T* dx = df.mutable_data_ptr<T>();
    const bool streamed = f.numel() * int64_t(sizeof(T)) >= kStreamBytes && streamable(df.const_data_ptr<T>(), D);
    at::parallel_for(0, blocks.count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        A* sums = slabs.get() + b * slab;
        std::memset(sums, 0, slab * sizeof(A));
        const int64_t last = blocks.end(b);
        for (int64_t row = blocks.begin(b); row < last;) {
          if (row + kRows <= last) {
            unproject_rows<T, kRows>(g, x, packed.get(), dx, sums, row, D, tiles, rank, streamed);
            row += kRows;
          } else {
            unproject_rows<T, 1>(g, x, packed.get(), dx, sums, row, D, tiles, rank, streamed);
            row += 1;
          }
        }
      }
      finish_streams();
    });
    T* dw = ddown.mutable_data_ptr<T>();
    at::parallel_for(0, rank * tiles, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t k = i / tiles, c = i % tiles * width<T>;
        Tile<T> total = splat<T>(0);
        for (int64_t b = 0; b < blocks.count; ++b) total = total + load_acc<T>(slabs.get() + b * slab + i * width<T>);
        store_tile(dw + k * D + c, total, std::min(D - c, width<T>));
      }
    });
  });
  return {df, ddown};
}

}  // namespace

TORCH_LIBRARY_IMPL(openmythos, CPU, m) {
  m.impl("loop_down", loop_down);
  m.impl("loop_down_backward", loop_down_backward);
}

}  // namespace openmythos::loop
