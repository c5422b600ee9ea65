// openmythos::rms_norm and its backward: y = s * rsqrt(mean(s^2) + eps) * weight with s = x, or x + add.
//
// Forward reads each row once from memory; backward reads it a second time, from cache. The weight's gradient is a sum
// over rows, by blocks (`RowBlocks`).
#include "cpu/norm/norm.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/norm/norm_row.h"
#include "cpu/runtime/allocator.h"
#include "cpu/runtime/row_blocks.h"

namespace openmythos::norm {

std::tuple<at::Tensor, at::Tensor, at::Tensor> rms_norm(
    const at::Tensor& x, const std::optional<at::Tensor>& add, const at::Tensor& weight, double eps) {
  const int64_t D = weight.numel(), N = D ? x.numel() / D : 0;
  auto y = empty(x.sizes(), x.options()), sum = add ? empty(x.sizes(), x.options()) : at::empty({0}, x.options());
  auto rstd = at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(at::toOpMathType(x.scalar_type())));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "rms_norm", [&] {
    using T = scalar_t;
    using A = acc_t<T>;
    std::vector<A> wide(D);
    widen(weight.const_data_ptr<T>(), wide.data(), D);
    const T *from = x.const_data_ptr<T>(), *adds = add ? add->const_data_ptr<T>() : nullptr;
    T *to = y.mutable_data_ptr<T>(), *sums = sum.mutable_data_ptr<T>();
    A* scales = rstd.mutable_data_ptr<A>();
    at::parallel_for(
        0, N, std::max<int64_t>(1, kThreadElements / std::max<int64_t>(D, 1)), [&](int64_t begin, int64_t end) {
          std::vector<A> s(D);
          for (int64_t n = begin; n < end; ++n) {
            const A squares =
                enter<T>(from + n * D, adds ? adds + n * D : nullptr, adds ? sums + n * D : nullptr, s.data(), D);
            scales[n] = A(1) / std::sqrt(squares / A(D) + A(eps));
            leave<T>(s.data(), wide.data(), scales[n], to + n * D, D);
          }
        });
  });
  return {sum, y, rstd};
}

namespace {

std::tuple<at::Tensor, at::Tensor> rms_norm_backward(
    const std::optional<at::Tensor>& grad_sum, const at::Tensor& dy, const at::Tensor& s, const at::Tensor& weight,
    const at::Tensor& rstd) {
  const int64_t D = weight.numel(), N = rstd.numel();
  auto ds = empty(s.sizes(), s.options()), dweight = at::empty_like(weight);
  const RowBlocks blocks(N);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, s.scalar_type(), "rms_norm_backward", [&] {
    using T = scalar_t;
    using A = acc_t<T>;
    std::vector<A> wide(D), slabs(blocks.count * D, A(0));
    widen(weight.const_data_ptr<T>(), wide.data(), D);
    const T *sp = s.const_data_ptr<T>(), *dyp = dy.const_data_ptr<T>();
    const T* gp = grad_sum ? grad_sum->const_data_ptr<T>() : nullptr;
    const A* scales = rstd.const_data_ptr<A>();
    T* dsp = ds.mutable_data_ptr<T>();
    at::parallel_for(0, blocks.count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        RowSum<A> sum(slabs.data() + b * D, D);
        for (int64_t n = blocks.begin(b); n < blocks.end(b); ++n, sum.next()) {
          row_backward<T>(
              gp ? gp + n * D : nullptr, dyp + n * D, sp + n * D, wide.data(), scales[n], dsp + n * D, sum.partial(),
              D);
        }
        sum.finish();
      }
    });
    add_slabs<T>(slabs, D, dweight.mutable_data_ptr<T>());
  });
  return {ds, dweight};
}

}  // namespace

TORCH_LIBRARY_IMPL(openmythos, CPU, m) {
  m.impl("rms_norm", rms_norm);
  m.impl("rms_norm_backward", rms_norm_backward);
}

}  // namespace openmythos::norm
