// RMSNorm of one row: y = s * rsqrt(mean(s^2) + eps) * weight with s = x, or x + add.
#pragma once

#include "cpu/simd/vec.h"

#include <vector>

namespace openmythos::norm {

// A thread is worth waking for this many elements.
constexpr int64_t kThreadElements = 1 << 14;

// s[0:D] = x (+ add), as it reads back from T; returns the sum of its squares.
template <typename T>
inline acc_t<T> enter(const T* x, const T* add, T* sum, acc_t<T>* s, int64_t D) {
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

// y = s * scale * weight
template <typename T>
inline void leave(const acc_t<T>* s, const acc_t<T>* weight, acc_t<T> scale, T* y, int64_t D) {
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

// One row: ds = grad_sum + rstd * (dy * weight - s * rstd^2 * mean(dy * weight * s)); adds dy * s * rstd to dweight.
template <typename T>
inline void row_backward(
    const T* grad_sum, const T* dy, const T* s, const acc_t<T>* weight, acc_t<T> scale, T* ds, acc_t<T>* dweight,
    int64_t D) {
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

// A sum over rows, taken of a few rows at a time and then of those sums: rounding grows with neither number alone.
template <typename A>
class RowSum {
 public:
  RowSum(A* total, int64_t D) : total_(total), few_(D, A(0)) {}
  // Where the next row is added; `add` once it has been.
  A* few() { return few_.data(); }
  void add() {
    if (++rows_ % kFew == 0) finish();
  }
  void finish() {
    for (size_t i = 0; i < few_.size(); ++i) {
      total_[i] += few_[i];
      few_[i] = 0;
    }
  }

 private:
  static constexpr int64_t kFew = 8;
  A* const total_;
  std::vector<A> few_;
  int64_t rows_ = 0;
};

// The weight's gradient: slabs of D, one a block of rows, added in order.
template <typename T>
inline void add_slabs(const std::vector<acc_t<T>>& slabs, int64_t D, T* out) {
  std::vector<acc_t<T>> total(D, acc_t<T>(0));
  for (size_t i = 0; i < slabs.size(); ++i) total[i % D] += slabs[i];
  std::copy(total.begin(), total.end(), out);
}

}  // namespace openmythos::norm
