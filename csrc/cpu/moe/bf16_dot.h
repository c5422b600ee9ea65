// Many tokens in bfloat16, where the processor multiplies it in pairs: products with the weights as they lie.
#pragma once

#include "cpu/moe/experts.h"

namespace openmythos::moe {

// What becomes of x (N, D) in some experts: y and, unless `saved` is empty, gate and up.
struct InPairs {
  const Experts& experts;
  const Plan*
      plan;  // routed: y (N * K, D) and saved (2, N * K, I), rows in its order; nullptr: (S, N, D), (2, S, N, I)
  at::Tensor y, saved;

  // Whether this processor, these sizes and these addresses allow it.
  bool possible(const at::Tensor& x) const;
};

// Does `first` and, if `prepare` returns true, `then`, of which nothing need be known before that; returns the same.
// All in bfloat16.
bool panels_of_pairs(
    const at::Tensor& x, const InPairs& first, const InPairs& then, const std::function<bool()>& prepare);

}  // namespace openmythos::moe
