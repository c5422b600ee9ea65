// openmythos::loop_step and loop_down, for ops that are made of others.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace openmythos::loop {

// h', h_out', cumulative_p', running', ponder', u (empty without `enter`), p, rstd
using Step = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Shapes and dtypes are the caller's to check.
Step loop_step(
    const at::Tensor& h, const at::Tensor& e, const at::Tensor& f, const at::Tensor& lora_hidden,
    const at::Tensor& h_out, const at::Tensor& cumulative_p, const at::Tensor& running, const at::Tensor& ponder,
    const at::Tensor& lora_B, const at::Tensor& log_A, const at::Tensor& log_dt, const at::Tensor& B,
    const at::Tensor& halt_weight, const at::Tensor& halt_bias, const at::Tensor& norm_weight, const at::Tensor& emb,
    int64_t loop, double threshold, bool spend_remainder, bool enter, double eps);

// The same with lora_hidden = (f @ down^T) * scale made on the way; behind the step's results f @ down^T.
using LoraStep = std::tuple<
    at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

LoraStep loop_lora_step(
    const at::Tensor& h, const at::Tensor& e, const at::Tensor& f, const at::Tensor& down, const at::Tensor& scale,
    const at::Tensor& h_out, const at::Tensor& cumulative_p, const at::Tensor& running, const at::Tensor& ponder,
    const at::Tensor& lora_B, const at::Tensor& log_A, const at::Tensor& log_dt, const at::Tensor& B,
    const at::Tensor& halt_weight, const at::Tensor& halt_bias, const at::Tensor& norm_weight, const at::Tensor& emb,
    int64_t loop, double threshold, bool spend_remainder, bool enter, double eps);

at::Tensor loop_down(const at::Tensor& f, const at::Tensor& down);

}  // namespace openmythos::loop
