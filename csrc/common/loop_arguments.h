// Arguments of the loop step by name, for the bindings of every device. Shapes, dtypes and meaning are those of
// `openmythos_kernels/ops/loop/step.py`, where they are checked.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace openmythos::loop {

// What a step reads of each position.
struct StepInputs {
  const at::Tensor &h, &e, &f, &h_out, &cumulative_p, &running, &ponder;
};

// Parameters with a number for each channel, and log_dt; emb embeds the number of the next loop.
struct StepWeights {
  const at::Tensor &lora_B, &log_A, &log_dt, &B, &halt_weight, &norm_weight, &emb;
};

struct StepOptions {
  int64_t loop;
  double threshold;
  bool spend_remainder, enter;
  double eps;
};

// Gradients of a step's results; an absent one is zero. Without `u` the step did not enter the next loop.
struct StepGrads {
  const std::optional<at::Tensor>&h, &h_out, &cumulative_p, &ponder, &u;
};

// What backward reads of each position besides.
struct StepSaved {
  const at::Tensor &h, &e, &cumulative_p, &running, &h_next, &p, &rstd;
};

}  // namespace openmythos::loop
