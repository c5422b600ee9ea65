// Row arithmetic on ATen's vector types, for elements T of float, double, c10::BFloat16 or c10::Half. Sums are in
// acc_t<T>: double for double, else float.
#pragma once

#include <ATen/OpMathType.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <type_traits>

namespace openmythos {

template <typename T>
using acc_t = at::opmath_type<T>;

template <typename T>
using AccVec = at::vec::Vectorized<acc_t<T>>;

// True where one vector of T widens into two vectors of acc_t<T>.
template <typename T>
constexpr bool widens = !std::is_same_v<T, acc_t<T>>;

// Elements of one vector of T.
template <typename T>
constexpr int64_t step = at::vec::Vectorized<T>::size();

// One vector of T, widened to accumulators. `second` is meaningful only where T widens.
template <typename T>
struct WideVec {
  AccVec<T> first, second;
};

template <typename T>
inline WideVec<T> load(const T* p) {
  auto v = at::vec::Vectorized<T>::loadu(p);
  if constexpr (widens<T>) {
    auto [a, b] = at::vec::convert_to_float<T>(v);
    return {a, b};
  } else {
    return {v, v};
  }
}

template <typename T>
inline void store(T* p, const WideVec<T>& v) {
  if constexpr (widens<T>) {
    at::vec::convert_from_float<T>(v.first, v.second).store(p);
  } else {
    v.first.store(p);
  }
}

// Of a vector's lanes. The overload that takes a size moves lane by lane through memory, most of the time of a norm.
template <typename A>
inline A sum(const at::vec::Vectorized<A>& v) {
  return at::vec::vec_reduce_all<A>(std::plus<at::vec::Vectorized<A>>(), v);
}

// Sum of a[i] * b[i]; b is in accumulator precision.
template <typename T>
inline acc_t<T> dot(const T* a, const acc_t<T>* b, int64_t n) {
  using V = AccVec<T>;
  V s0(0), s1(0), s2(0), s3(0);
  int64_t i = 0;
  if constexpr (widens<T>) {
    for (; i + 2 * step<T> <= n; i += 2 * step<T>) {
      auto x = openmythos::load(a + i), y = openmythos::load(a + i + step<T>);
      s0 = at::vec::fmadd(x.first, V::loadu(b + i), s0);
      s1 = at::vec::fmadd(x.second, V::loadu(b + i + V::size()), s1);
      s2 = at::vec::fmadd(y.first, V::loadu(b + i + 2 * V::size()), s2);
      s3 = at::vec::fmadd(y.second, V::loadu(b + i + 3 * V::size()), s3);
    }
  } else {
    for (; i + 4 * V::size() <= n; i += 4 * V::size()) {
      s0 = at::vec::fmadd(V::loadu(a + i), V::loadu(b + i), s0);
      s1 = at::vec::fmadd(V::loadu(a + i + V::size()), V::loadu(b + i + V::size()), s1);
      s2 = at::vec::fmadd(V::loadu(a + i + 2 * V::size()), V::loadu(b + i + 2 * V::size()), s2);
      s3 = at::vec::fmadd(V::loadu(a + i + 3 * V::size()), V::loadu(b + i + 3 * V::size()), s3);
    }
  }
  acc_t<T> total = sum((s0 + s1) + (s2 + s3));
  for (; i < n; ++i) total += acc_t<T>(a[i]) * b[i];
  return total;
}

// y[i] += alpha * a[i]
template <typename T>
inline void axpy(acc_t<T> alpha, const T* a, acc_t<T>* y, int64_t n) {
  using V = AccVec<T>;
  const V av(alpha);
  int64_t i = 0;
  for (; i + step<T> <= n; i += step<T>) {
    auto x = openmythos::load(a + i);
    at::vec::fmadd(av, x.first, V::loadu(y + i)).store(y + i);
    if constexpr (widens<T>) {
      at::vec::fmadd(av, x.second, V::loadu(y + i + V::size())).store(y + i + V::size());
    }
  }
  if (i == n) return;
  // The tail runs through the vector code, so that it rounds alike: results must not depend on where threads cut a row.
  T rest[step<T>] = {};
  acc_t<T> sums[step<T>] = {};
  std::copy(a + i, a + n, rest);
  std::copy(y + i, y + n, sums);
  axpy<T>(alpha, rest, sums, step<T>);
  std::copy_n(sums, n - i, y + i);
}

template <typename T>
inline void widen(const T* a, acc_t<T>* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = acc_t<T>(a[i]);
}

}  // namespace openmythos
