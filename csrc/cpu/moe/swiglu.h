// SwiGLU of rows, forward and backward, vectorized.
#pragma once

#include "common/activation.h"
#include "cpu/simd/vec.h"

namespace openmythos {

template <typename V>
inline V sigmoid(const V& g) {
  return V(1) / (V(1) + g.neg().exp());
}

// Calls f(i, count) for pieces of [0, n) of one vector each; the last may be partial.
template <typename T, typename F>
inline void for_pieces(int64_t n, F f) {
  for (int64_t i = 0; i < n; i += step<T>) f(i, std::min<int64_t>(step<T>, n - i));
}

// Loads and stores a piece of at most one vector. A partial one goes through a zeroed buffer.
template <typename T>
inline WideVec<T> load(const T* p, int64_t count) {
  if (count == step<T>) return openmythos::load(p);
  T buffer[step<T>] = {};
  std::copy_n(p, count, buffer);
  return openmythos::load(buffer);
}

template <typename T>
inline void store(T* p, const WideVec<T>& v, int64_t count) {
  if (count == step<T>) return openmythos::store(p, v);
  T buffer[step<T>];
  openmythos::store(buffer, v);
  std::copy_n(buffer, count, p);
}

// a = silu(g) * u
template <typename T>
inline void swiglu(const T* g, const T* u, T* a, int64_t n) {
  auto f = [](auto g, auto u) { return silu(g, sigmoid(g)) * u; };
  for_pieces<T>(n, [&](int64_t i, int64_t count) {
    const auto gv = openmythos::load(g + i, count), uv = openmythos::load(u + i, count);
    WideVec<T> av{f(gv.first, uv.first), {}};
    if constexpr (widens<T>) av.second = f(gv.second, uv.second);
    openmythos::store(a + i, av, count);
  });
}

// Backward of weight * a with a = silu(g) * u, whose gradient is da:
//   dg = weight * da * u * silu'(g), du = weight * da * silu(g); scaled = weight * a.
// Returns the weight's gradient, sum(da * a).
template <typename T>
inline acc_t<T> swiglu_backward(
    const T* g, const T* u, const T* da, acc_t<T> weight, T* dg, T* du, T* scaled, int64_t n) {
  using V = AccVec<T>;
  V total(0);
  const V w(weight);
  auto f = [&](V gv, V uv, V dv, V& dgv, V& duv, V& av) {
    const V s = sigmoid(gv), act = silu(gv, s);
    av = act * uv;
    total = at::vec::fmadd(dv, av, total);
    dv = dv * w;
    dgv = dv * uv * silu_grad(gv, s);
    duv = dv * act;
    av = av * w;
  };
  for_pieces<T>(n, [&](int64_t i, int64_t count) {
    const auto gv = openmythos::load(g + i, count), uv = openmythos::load(u + i, count),
               dv = openmythos::load(da + i, count);
    WideVec<T> dgv, duv, av;
    f(gv.first, uv.first, dv.first, dgv.first, duv.first, av.first);
    if constexpr (widens<T>) f(gv.second, uv.second, dv.second, dgv.second, duv.second, av.second);
    openmythos::store(dg + i, dgv, count);
    openmythos::store(du + i, duv, count);
    openmythos::store(scaled + i, av, count);
  });
  return sum(total);
}

}  // namespace openmythos
