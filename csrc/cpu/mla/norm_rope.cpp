// openmythos::mla_norm_rope and its backward: RMSNorm of a row's first channels, rotary embedding of the others.
#include "cpu/mla/mla.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "cpu/mla/rope.h"
#include "cpu/norm/norm_row.h"
#include "cpu/runtime/allocator.h"
#include "cpu/runtime/row_blocks.h"

namespace openmythos::mla {
namespace {

// Sizes of a call, and the phasors (cos, sin) of each row, which its heads share.
struct Rows {
  int64_t count, tokens, r, rotated, half;
  const float* phasors;
  bool per_row;  // whether each sequence has phasors of its own

  Rows(const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& weight)
      : count(x.size(0) * x.size(1)),
        tokens(x.size(1)),
        r(weight.size(0)),
        rotated(x.size(2) - r),
        half(freqs.size(2)),
        phasors(freqs.const_data_ptr<float>()),
        per_row(freqs.size(0) > 1) {}
  int64_t width() const { return r + rotated; }
  const float* phasor(int64_t n) const { return phasors + (per_row ? n : n % tokens) * 2 * half; }
  int64_t grain() const { return std::max<int64_t>(1, norm::kThreadElements / std::max<int64_t>(width(), 1)); }
};

// The weight in accumulator precision. Under autocast it may be wider than x already.
template <typename A>
at::Tensor widened(const at::Tensor& weight) {
  return weight.to(c10::CppTypeToScalarType<A>::value).contiguous();
}

// Rotates all heads of a row, or rotates them back with `sign` -1.
template <typename T>
void rotate_heads(const T* from, const float* phasor, const Rows& rows, acc_t<T> sign, T* to) {
  const int64_t rope = 2 * rows.half;
  for (int64_t c = 0; c < rows.rotated; c += rope) rotate<T>(from + c, phasor, rope, 1, to + c, sign);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> norm_rope(
    const at::Tensor& x_, const at::Tensor& freqs, const at::Tensor& weight, double eps) {
  const at::Tensor x = x_.contiguous();
  const Rows rows(x, freqs, weight);
  at::Tensor normed = empty({x.size(0), x.size(1), rows.r}, x.options());
  at::Tensor rotated = empty({x.size(0), x.size(1), rows.rotated}, x.options());
  AT_DISPATCH_SWITCH(
      x.scalar_type(), "mla_norm_rope", AT_DISPATCH_CASE_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, [&] {
        using T = scalar_t;
        using A = acc_t<T>;
        const at::Tensor wide = widened<A>(weight);
        const A* const w = wide.const_data_ptr<A>();
        const T* const from = x.const_data_ptr<T>();
        T *const to = normed.mutable_data_ptr<T>(), *const turned = rotated.mutable_data_ptr<T>();
        at::parallel_for(0, rows.count, rows.grain(), [&](int64_t begin, int64_t end) {
          std::vector<A> s(rows.r);
          for (int64_t n = begin; n < end; ++n) {
            const T* const row = from + n * rows.width();
            if (rows.r) {
              const A squares = norm::enter<T>(row, nullptr, nullptr, s.data(), rows.r);
              const A scale = A(1) / std::sqrt(squares / A(rows.r) + A(eps));
              norm::leave<T>(s.data(), w, scale, to + n * rows.r, rows.r);
            }
            rotate_heads<T>(row + rows.r, rows.phasor(n), rows, 1, turned + n * rows.rotated);
          }
        });
      }));
  return {normed, rotated};
}

namespace {

std::tuple<at::Tensor, at::Tensor> norm_rope_backward(
    const at::Tensor& grad_normed, const at::Tensor& grad_rotated, const at::Tensor& x_, const at::Tensor& freqs,
    const at::Tensor& weight, double eps) {
  const at::Tensor x = x_.contiguous();
  const Rows rows(x, freqs, weight);
  at::Tensor dx = empty(x.sizes(), x.options()), dweight;
  const RowBlocks blocks(rows.count);
  AT_DISPATCH_SWITCH(
      x.scalar_type(), "mla_norm_rope_backward", AT_DISPATCH_CASE_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, [&] {
        using T = scalar_t;
        using A = acc_t<T>;
        const int64_t r = rows.r;
        const at::Tensor wide = widened<A>(weight);
        const A* const w = wide.const_data_ptr<A>();
        std::vector<A> slabs(blocks.count * r, A(0));
        const T *const from = x.const_data_ptr<T>(), *const dn = grad_normed.const_data_ptr<T>();
        const T* const dr = grad_rotated.const_data_ptr<T>();
        T* const to = dx.mutable_data_ptr<T>();
        at::parallel_for(0, blocks.count, 1, [&](int64_t begin, int64_t end) {
          std::vector<A> s(r);
          for (int64_t b = begin; b < end; ++b) {
            norm::RowSum<A> sum(slabs.data() + b * r, r);
            for (int64_t n = blocks.begin(b); n < blocks.end(b); ++n, sum.next()) {
              const T* const row = from + n * rows.width();
              T* const out = to + n * rows.width();
              if (r) {
                const A squares = norm::enter<T>(row, nullptr, nullptr, s.data(), r);
                const A scale = A(1) / std::sqrt(squares / A(r) + A(eps));
                norm::row_backward<T>(nullptr, dn + n * r, row, w, scale, out, sum.partial(), r);
              }
              rotate_heads<T>(dr + n * rows.rotated, rows.phasor(n), rows, -1, out + r);
            }
            sum.finish();
          }
        });
        dweight = at::empty({r}, wide.options());
        norm::add_slabs<A>(slabs, r, dweight.mutable_data_ptr<A>());
      }));
  return {dx, dweight.to(weight.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(openmythos, CPU, m) {
  m.impl("mla_norm_rope", norm_rope);
  m.impl("mla_norm_rope_backward", norm_rope_backward);
}

}  // namespace openmythos::mla
