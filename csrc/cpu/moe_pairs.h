// Many tokens in bfloat16, where the processor multiplies it in pairs: products with the weights as they lie.
#pragma once

#include "cpu/moe.h"

namespace openmythos::moe {

// Whether `panels_of_pairs` can run: on this processor, with these sizes and addresses.
bool takes_pairs(const at::Tensor& x, const Experts& routed, const Experts& shared);

// y_routed (N * K, D), rows in the plan's order, and y_shared (S, N, D) of x (N, D), all bfloat16; gate and up to
// saved_routed (2, N * K, I) and saved_shared (2, S, N, Is) unless those are empty.
void panels_of_pairs(
    const at::Tensor& x, const Plan& plan, const Experts& routed, const Experts& shared, const at::Tensor& y_routed,
    const at::Tensor& y_shared, const at::Tensor& saved_routed, const at::Tensor& saved_shared);

}  // namespace openmythos::moe
