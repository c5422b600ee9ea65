// Packs: sixteen bytes of a row in registers, read as numbers in accumulator precision.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

// Counts bytes where tests run these kernels on the CPU (tests/cuda_on_cpu); empty under nvcc.
#ifndef OPENMYTHOS_COUNT
#define OPENMYTHOS_COUNT(what, bytes)
#endif

namespace openmythos::cuda {

template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// By intrinsics: PyTorch compiles with __CUDA_NO_HALF_OPERATORS__ and the like.
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T narrow(acc_t<T> x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

__device__ __forceinline__ float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return fma(a, b, c); }

template <typename T>
constexpr int kWidth = 16 / sizeof(T);

template <typename T>
struct alignas(16) Pack {
  T x[kWidth<T>];

  __device__ __forceinline__ acc_t<T> operator[](int i) const { return widen(x[i]); }
};

// The type of `vectors` below where it is known at compile time that packs are whole, too: `size` is a multiple of
// kWidth and `first` is below it. Then a load is one instruction; with a flag each stands in a branch of its own, and
// waits for the one before.
struct AlwaysVectors {};

// Elements [first, first + kWidth) of a row of `size`; zeros past its end.
// `vectors`: the row's address and `first` are multiples of 16 bytes.
template <typename T, typename Vectors>
__device__ __forceinline__ Pack<T> read(const T* __restrict__ row, int first, int size, Vectors vectors) {
  if constexpr (std::is_same_v<Vectors, AlwaysVectors>) {
    return *reinterpret_cast<const Pack<T>*>(row + first);
  } else {
    if (vectors && first + kWidth<T> <= size) return *reinterpret_cast<const Pack<T>*>(row + first);
    Pack<T> pack;
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) pack.x[i] = first + i < size ? row[first + i] : narrow<T>(0);
    return pack;
  }
}

// Reads from a tensor with a row per position; counts as memory traffic.
template <typename T, typename Vectors>
__device__ __forceinline__ Pack<T> load(const T* __restrict__ row, int first, int size, Vectors vectors) {
  OPENMYTHOS_COUNT(loaded, sizeof(T) * (first + kWidth<T> <= size ? kWidth<T> : size - first));
  return read(row, first, size, vectors);
}

// Reads from a parameter, which all positions share; all reads but the first hit a cache.
template <typename T, typename Vectors>
__device__ __forceinline__ Pack<T> parameter(const T* __restrict__ row, int first, int size, Vectors vectors) {
  OPENMYTHOS_COUNT(parameters, sizeof(T) * kWidth<T>);
  return read(row, first, size, vectors);
}

template <typename T>
__device__ __forceinline__ Pack<T> zeros() {
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < kWidth<T>; ++i) pack.x[i] = narrow<T>(0);
  return pack;
}

template <typename T, typename Vectors>
__device__ __forceinline__ void store(T* __restrict__ row, int first, int size, Vectors vectors, const Pack<T>& pack) {
  OPENMYTHOS_COUNT(stored, sizeof(T) * (first + kWidth<T> <= size ? kWidth<T> : size - first));
  if constexpr (std::is_same_v<Vectors, AlwaysVectors>) {
    const uint4 whole = *reinterpret_cast<const uint4*>(&pack);
#ifdef __CUDA_ARCH__
    __stwb(reinterpret_cast<uint4*>(row + first), whole);  // an assignment is compiled to stores of 2 or 4 bytes
#else
    *reinterpret_cast<uint4*>(row + first) = whole;
#endif
  } else if (vectors && first + kWidth<T> <= size) {
    *reinterpret_cast<Pack<T>*>(row + first) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) {
      if (first + i < size) row[first + i] = pack.x[i];
    }
  }
}

// Whether all of these addresses are aligned to 16 bytes. Null is; it is never read.
inline bool aligned(std::initializer_list<const void*> addresses) {
  for (const void* p : addresses) {
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) return false;
  }
  return true;
}

}  // namespace openmythos::cuda
