// Atomics, relaxed like CUDA's: they order nothing else.
#pragma once

namespace cuda_on_cpu {

template <class T, class Change>
T modify(T* p, Change change) {
  maybe_switch();
  T old, changed;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do {
    changed = change(old);
  } while (!__atomic_compare_exchange(p, &old, &changed, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

}  // namespace cuda_on_cpu

template <class T>
T atomicAdd(T* p, std::common_type_t<T> x) {
  return cuda_on_cpu::modify(p, [&](T old) { return T(old + x); });
}
template <class T>
T atomicMax(T* p, std::common_type_t<T> x) {
  return cuda_on_cpu::modify(p, [&](T old) { return old > x ? old : x; });
}
template <class T>
T atomicExch(T* p, std::common_type_t<T> x) {
  return cuda_on_cpu::modify(p, [&](T) { return x; });
}
template <class T>
T atomicCAS(T* p, std::common_type_t<T> expected, std::common_type_t<T> x) {
  return cuda_on_cpu::modify(p, [&](T old) { return old == expected ? x : old; });
}
