// RMSNorm of one row: y = s * rsqrt(mean(s^2) + eps) * weight with s = x, or x + add.
#pragma once

#include "cpu/simd/vec.h"

#include <vector>

namespace openmythos::norm {

// Elements that pay for waking a thread.
constexpr int64_t kThreadElements = 1 << 14;

// s[0:D] = x (+ add), rounded to T; returns the sum of its squares.
template <typename T>
inline acc_t<T> enter(const T* x, const T* add, T* sum, acc_t<T>* s, int64_t D) {
  using A = acc_t<T>;
  using V = AccVec<T>;
  V squares(0), more(0);
  A tail = 0;
  const int64_t whole = D - D % step<T>;
  for (int64_t i = 0; i < whole; i += step<T>) {
    WideVec<T> v = openmythos::load(x + i);
    if (add) {
      const WideVec<T> a = openmythos::load(add + i);
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
    WideVec<T> v{V::loadu(s + i) * by * V::loadu(weight + i), V(0)};
    if constexpr (widens<T>) v.second = V::loadu(s + i + V::size()) * by * V::loadu(weight + i + V::size());
    openmythos::store(y + i, v);
  }
  for (int64_t i = whole; i < D; ++i) y[i] = T(s[i] * scale * weight[i]);
}

// One row: ds = grad_sum + rstd * (dy * weight - s * rstd^2 * mean(dy * weight * s)); dweight += dy * s * rstd.
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
    const WideVec<T> g = openmythos::load(dy + i), x = openmythos::load(s + i);
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
    const WideVec<T> g = openmythos::load(dy + i), x = openmythos::load(s + i);
    WideVec<T> base{V(0), V(0)};
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

// A sum over rows in two levels, of a few rows and then of these sums, so that rounding errors stay small.
template <typename A>
class RowSum {
 public:
  RowSum(A* total, int64_t D) : total_(total), partial_(D, A(0)) {}
  // Where the caller adds the next row, before it calls `next`.
  A* partial() { return partial_.data(); }
  void next() {
    if (++rows_ % kRows == 0) finish();
  }
  void finish() {
    for (size_t i = 0; i < partial_.size(); ++i) {
      total_[i] += partial_[i];
      partial_[i] = 0;
    }
  }

 private:
  static constexpr int64_t kRows = 8;
  A* const total_;
  std::vector<A> partial_;
  int64_t rows_ = 0;
};

// The weight's gradient: the sum of slabs of D, one for each block of rows, in order.
template <typename T>
inline void add_slabs(const std::vector<acc_t<T>>& slabs, int64_t D, T* out) {
  std::vector<acc_t<T>> total(D, acc_t<T>(0));
  for (size_t i = 0; i < slabs.size(); ++i) total[i % D] += slabs[i];
  std::copy(total.begin(), total.end(), out);
}

}  // namespace openmythos::norm
