// Experts of many tokens in bfloat16, by the processor's bf16 dot product; the weights are read in place.
//
// It walks as panels.cpp does, with another balance: weights move in half as many bytes, so sums are rounded kSumRows
// rows at a time and panels hold two bf16 a lane; and shared experts run here too, where float32 has the library.
#pragma once

#include "cpu/moe/experts.h"

namespace openmythos::moe {

// Some experts applied to x (N, D), and where their results go. `saved`, unless empty, gets gate and up before the
// activation.
struct Bf16Experts {
  const Experts& experts;
  // Routed: y (N * K, D) and saved (2, N * K, I), rows in the plan's order. Shared, nullptr: (S, N, D), (2, S, N, I).
  const Plan* plan;
  at::Tensor y, saved;

  // Whether the processor, the dtypes, sizes and addresses allow it.
  bool supported(const at::Tensor& x) const;
};

// Runs `first`, while the calling thread runs `prepare`; then `then`, if `prepare` returned true. Nothing of `then`
// need be known before. Returns what `prepare` returned. All in bfloat16.
bool bf16_dot_experts(
    const at::Tensor& x, const Bf16Experts& first, const Bf16Experts& then, const std::function<bool()>& prepare);

}  // namespace openmythos::moe
