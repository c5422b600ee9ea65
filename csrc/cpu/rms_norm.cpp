// openmythos::rms_norm and its backward: y = s * rsqrt(mean(s^2) + eps) * weight with s = x, or x + add.
//
// Forward reads a row once from memory, backward twice from cache. The weight's gradient is a sum over
// rows, taken by blocks of them (`RowBlocks`).
#include "cpu/norm.h"

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

#include "cpu/row_blocks.h"
#include "cpu/vec.h"

namespace openmythos::norm {
namespace {

// A thread is worth waking for this many elements.
constexpr int64_t kThreadElements = 1 << 14;

// s[0:D] = x (+ add), as it reads back from T; returns the sum of its squares.
template <typename T>
acc_t<T> enter(const T* x, const T* add, T* sum, acc_t<T>* s, int64_t D) {
  using A = acc_t<T>;
  using V = AccVec<T>;
  V squares(0), more(0);
  A tail = 0;
  const int64_t whole = D - D % step<T>;
  for (int64_t i = 0; i < whole; i += step<T>) {
    Pair<T> v = openmythos::load(x + i);
    if (add) {
      const Pair<T> a = openmythos::load(add + i);
      v.first = v.first + a.first;
      if constexpr (widens<T>) v.second = v.second + a.second;
      openmythos::store(sum + i, v);
      if constexpr (widens<T>) v = openmythos::load(sum + i);
    }
    squares = at::vec::fmadd(v.first, v.first, squares);
    v.first.store(s + i);
    if constexpr (widens<T>) {
      more = at::vec::fmadd(v.second, v.second, more);
      v.second.store(s + i + V::size());
    }
  }
  for (int64_t i = whole; i < D; ++i) {
    T value = x[i];
    if (add) sum[i] = value = T(A(value) + A(add[i]));
    s[i] = A(value);
    tail += s[i] * s[i];
  }
  return openmythos::sum<A>(squares + more) + tail;
}

template <typename T>
void leave(const acc_t<T>* s, const acc_t<T>* weight, acc_t<T> scale, T* y, int64_t D) {
  using V = AccVec<T>;
  const V by(scale);
  const int64_t whole = D - D % step<T>;
  for (int64_t i = 0; i < whole; i += step<T>) {
    Pair<T> v{V::loadu(s + i) * by * V::loadu(weight + i), V(0)};
    if constexpr (widens<T>) v.second = V::loadu(s + i + V::size()) * by * V::loadu(weight + i + V::size());
    openmythos::store(y + i, v);
  }
  for (int64_t i = whole; i < D; ++i) y[i] = T(s[i] * scale * weight[i]);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> rms_norm(const at::Tensor& x, const std::optional<at::Tensor>& add, const at::Tensor& weight, double eps) {
  const int64_t D = weight.numel(), N = D ? x.numel() / D : 0;
  auto y = at::empty_like(x), sum = add ? at::empty_like(x) : at::empty({0}, x.options());
  auto rstd = at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(at::toOpMathType(x.scalar_type())));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "rms_norm", [&] {
    using T = scalar_t;
    using A = acc_t<T>;
    std::vector<A> wide(D);
    widen(weight.const_data_ptr<T>(), wide.data(), D);
    const T *from = x.const_data_ptr<T>(), *adds = add ? add->const_data_ptr<T>() : nullptr;
    T *to = y.mutable_data_ptr<T>(), *sums = sum.mutable_data_ptr<T>();
    A* scales = rstd.mutable_data_ptr<A>();
    at::parallel_for(0, N, std::max<int64_t>(1, kThreadElements / std::max<int64_t>(D, 1)), [&](int64_t begin, int64_t end) {
      std::vector<A> s(D);
      for (int64_t n = begin; n < end; ++n) {
        const A squares = enter<T>(from + n * D, adds ? adds + n * D : nullptr, adds ? sums + n * D : nullptr, s.data(), D);
        scales[n] = A(1) / std::sqrt(squares / A(D) + A(eps));
        leave<T>(s.data(), wide.data(), scales[n], to + n * D, D);
      }
    });
  });
  return {sum, y, rstd};
}

namespace {

// One row: ds = grad_sum + rstd * (dy * weight - s * rstd^2 * mean(dy * weight * s)); adds dy * s * rstd to dweight.
template <typename T>
void row_backward(
    const T* grad_sum, const T* dy, const T* s, const acc_t<T>* weight, acc_t<T> scale, T* ds, acc_t<T>* dweight, int64_t D) {
  using A = acc_t<T>;
  using V = AccVec<T>;
  const int64_t whole = D - D % step<T>;
  V dot(0), more(0);
  A tail = 0;
  for (int64_t i = 0; i < whole; i += step<T>) {
    const Pair<T> g = openmythos::load(dy + i), x = openmythos::load(s + i);
    dot = at::vec::fmadd(g.first * V::loadu(weight + i), x.first, dot);
    if constexpr (widens<T>) more = at::vec::fmadd(g.second * V::loadu(weight + i + V::size()), x.second, more);
  }
  for (int64_t i = whole; i < D; ++i) tail += A(dy[i]) * weight[i] * A(s[i]);
  const A shrink = -(openmythos::sum<A>(dot + more) + tail) / A(D) * scale * scale * scale;
  const V by(scale), shrinks(shrink);
  auto lane = [&](V g, V x, V base, int64_t i) {
    const V scaled = g * by;
    at::vec::fmadd(scaled, x, V::loadu(dweight + i)).store(dweight + i);
    return at::vec::fmadd(shrinks, x, at::vec::fmadd(scaled, V::loadu(weight + i), base));
  };
  for (int64_t i = 0; i < whole; i += step<T>) {
    const Pair<T> g = openmythos::load(dy + i), x = openmythos::load(s + i);
    Pair<T> base{V(0), V(0)};
    if (grad_sum) base = openmythos::load(grad_sum + i);
    base.first = lane(g.first, x.first, base.first, i);
    if constexpr (widens<T>) base.second = lane(g.second, x.second, base.second, i + V::size());
    openmythos::store(ds + i, base);
  }
  for (int64_t i = whole; i < D; ++i) {
    const A scaled = A(dy[i]) * scale, x = A(s[i]);
    dweight[i] += scaled * x;
    ds[i] = T((grad_sum ? A(grad_sum[i]) : A(0)) + scaled * weight[i] + shrink * x);
  }
}

std::tuple<at::Tensor, at::Tensor> rms_norm_backward(
    const std::optional<at::Tensor>& grad_sum, const at::Tensor& dy, const at::Tensor& s, const at::Tensor& weight,
    const at::Tensor& rstd) {
  const int64_t D = weight.numel(), N = rstd.numel();
  auto ds = at::empty_like(s), dweight = at::empty_like(weight);
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
        for (int64_t n = blocks.begin(b); n < blocks.end(b); ++n) {
          row_backward<T>(
              gp ? gp + n * D : nullptr, dyp + n * D, sp + n * D, wide.data(), scales[n], dsp + n * D,
              slabs.data() + b * D, D);
        }
      }
    });
    std::vector<A> total(D, A(0));
    for (int64_t b = 0; b < blocks.count; ++b) {
      for (int64_t i = 0; i < D; ++i) total[i] += slabs[b * D + i];
    }
    std::copy_n(total.data(), D, dweight.mutable_data_ptr<T>());
  });
  return {ds, dweight};
}

}  // namespace

TORCH_LIBRARY_IMPL(openmythos, CPU, m) {
  m.impl("rms_norm", rms_norm);
  m.impl("rms_norm_backward", rms_norm_backward);
}

}  // namespace openmythos::norm
