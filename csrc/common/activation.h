// SwiGLU's activation, silu(g) = g * sigmoid(g), given s = sigmoid(g). V is a scalar or a vector; CPU and CUDA share
// these formulas and differ only in exp.
#pragma once

#ifdef __CUDACC__
#define OM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define OM_HOST_DEVICE inline
#endif

namespace openmythos {

template <typename V>
OM_HOST_DEVICE V silu(V g, V s) {
  return g * s;
}

// d silu(g) / dg
template <typename V>
OM_HOST_DEVICE V silu_grad(V g, V s) {
  return s * (V(1) + g * (V(1) - s));
}

}  // namespace openmythos
