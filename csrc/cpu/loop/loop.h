// openmythos::loop_step and loop_down, for ops composed of others.
#pragma once

#include <ATen/core/Tensor.h>

#include "common/loop_arguments.h"

namespace openmythos::loop {

// u: empty without `enter`.
struct StepResults {
  at::Tensor h, h_out, cumulative_p, running, ponder, u, p, rstd;
};

// `loop` and `spend_remainder` of each position, instead of one for all of them.
struct StepRows {
  const int64_t* loop = nullptr;
  const bool* spend_remainder = nullptr;
};

// Shapes and dtypes are the caller's to check.
StepResults step(
    const StepInputs& inputs, const at::Tensor& lora_hidden, const StepWeights& weights, const at::Tensor& halt_bias,
    const StepOptions& options, const StepRows& rows = {});

at::Tensor loop_down(const at::Tensor& f, const at::Tensor& down);

}  // namespace openmythos::loop
