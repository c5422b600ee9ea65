// openmythos::loop_step and its backward for CUDA tensors: allocate, describe, launch. Python, which declares the ops,
// checks shapes and dtypes.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "common/loop_arguments.h"
#include "cuda/loop_step.h"
#include "cuda/torch.h"

namespace openmythos::cuda {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

const void* data_or_null(const OptionalTensor& x) { return x ? x->const_data_ptr() : nullptr; }

LoopStepShape shape_of(
    const Tensor& h, const Tensor& cumulative_p, const loop::StepWeights& weights, double threshold,
    bool spend_remainder) {
  return {
      element_of(h),
      cumulative_p.numel(),
      static_cast<int>(weights.B.numel()),
      static_cast<int>(weights.lora_B.size(0)),
      weights.lora_B.const_data_ptr(),
      weights.log_A.const_data_ptr(),
      weights.log_dt.const_data_ptr(),
      weights.B.const_data_ptr(),
      weights.halt_weight.const_data_ptr(),
      weights.norm_weight.const_data_ptr(),
      weights.emb.const_data_ptr(),
      static_cast<int>(weights.emb.numel()),
      threshold,
      spend_remainder};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> run_step(
    const loop::StepInputs& in, const Tensor& lora_hidden, const loop::StepWeights& weights, const Tensor& halt_bias,
    const loop::StepOptions& options) {
  const On on(in.h);
  const bool enter = options.enter;
  const int64_t zero = 0;
  const at::IntArrayRef none(zero);
  Tensor h = at::empty_like(in.h), h_out = at::empty_like(in.h), cumulative_p = at::empty_like(in.cumulative_p);
  Tensor running = at::empty_like(in.running), ponder = at::empty_like(cumulative_p), p = at::empty_like(cumulative_p);
  Tensor u = enter ? at::empty_like(in.h) : at::empty(none, in.h.options());
  Tensor rstd = enter ? at::empty_like(cumulative_p) : at::empty(none, cumulative_p.options());
  const LoopStep x{
      in.h.const_data_ptr(),
      in.e.const_data_ptr(),
      in.f.const_data_ptr(),
      lora_hidden.const_data_ptr(),
      in.h_out.const_data_ptr(),
      in.cumulative_p.const_data_ptr(),
      in.ponder.const_data_ptr(),
      in.running.const_data_ptr<bool>(),
      halt_bias.const_data_ptr(),
      h.mutable_data_ptr(),
      h_out.mutable_data_ptr(),
      enter ? u.mutable_data_ptr() : nullptr,
      cumulative_p.mutable_data_ptr(),
      ponder.mutable_data_ptr(),
      p.mutable_data_ptr(),
      enter ? rstd.mutable_data_ptr() : nullptr,
      running.mutable_data_ptr<bool>(),
      static_cast<int>(options.loop),
      options.eps};
  const LoopStepShape shape = shape_of(in.h, in.cumulative_p, weights, options.threshold, options.spend_remainder);
  C10_CUDA_CHECK(loop_step(shape, x, on.stream));
  return {h, h_out, cumulative_p, running, ponder, u, p, rstd};
}

using Gradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients run_step_backward(
    const loop::StepGrads& grads, const loop::StepSaved& saved, const Tensor& lora_hidden,
    const loop::StepWeights& weights, double threshold, bool spend_remainder) {
  const Tensor &h = saved.h, &cumulative_p = saved.cumulative_p;
  const On on(h);
  const LoopStepShape shape = shape_of(h, cumulative_p, weights, threshold, spend_remainder);
  Tensor dh = at::empty_like(h), de = at::empty_like(h), df = at::empty_like(h);
  Tensor dcumulative_p = at::empty_like(cumulative_p), dponder = at::empty_like(cumulative_p);
  Tensor dlog_A = at::empty_like(weights.log_A), dlog_dt = at::empty_like(weights.log_dt);
  Tensor dB = at::empty_like(weights.B), dhalt_weight = at::empty_like(weights.halt_weight);
  Tensor dhalt_bias = at::empty({1}, weights.halt_weight.options()), dnorm_weight = at::empty_like(weights.norm_weight);
  Tensor scratch = at::empty({loop_step_scratch(shape.N, shape.D)}, cumulative_p.options());
  const LoopStepBackward x{
      data_or_null(grads.h),
      data_or_null(grads.h_out),
      data_or_null(grads.u),
      data_or_null(grads.cumulative_p),
      data_or_null(grads.ponder),
      h.const_data_ptr(),
      saved.e.const_data_ptr(),
      saved.h_next.const_data_ptr(),
      cumulative_p.const_data_ptr(),
      saved.p.const_data_ptr(),
      saved.rstd.const_data_ptr(),
      saved.running.const_data_ptr<bool>(),
      dh.mutable_data_ptr(),
      de.mutable_data_ptr(),
      df.mutable_data_ptr(),
      dcumulative_p.mutable_data_ptr(),
      dponder.mutable_data_ptr(),
      dlog_A.mutable_data_ptr(),
      dlog_dt.mutable_data_ptr(),
      dB.mutable_data_ptr(),
      dhalt_weight.mutable_data_ptr(),
      dhalt_bias.mutable_data_ptr(),
      dnorm_weight.mutable_data_ptr(),
      scratch.mutable_data_ptr(),
      unproven()};
  C10_CUDA_CHECK(loop_step_backward(shape, x, on.stream));
  const Tensor rows = df.view({shape.N, shape.D});
  Tensor dlora_hidden = at::mm(rows, weights.lora_B.t()).view(lora_hidden.sizes());
  Tensor dlora_B = at::mm(lora_hidden.view({shape.N, shape.rank}).t(), rows);
  return {dh,     de,      df, dlora_hidden, dcumulative_p, dponder,     dlora_B,
          dlog_A, dlog_dt, dB, dhalt_weight, dhalt_bias,    dnorm_weight};
}

// The ops as Python declares them.
auto step(
    const Tensor& h, const Tensor& e, const Tensor& f, const Tensor& lora_hidden, const Tensor& h_out,
    const Tensor& cumulative_p, const Tensor& running, const Tensor& ponder, const Tensor& lora_B, const Tensor& log_A,
    const Tensor& log_dt, const Tensor& B, const Tensor& halt_weight, const Tensor& halt_bias,
    const Tensor& norm_weight, const Tensor& emb, int64_t loop, double threshold, bool spend_remainder, bool enter,
    double eps) {
  return run_step(
      {h, e, f, h_out, cumulative_p, running, ponder}, lora_hidden,
      {lora_B, log_A, log_dt, B, halt_weight, norm_weight, emb}, halt_bias,
      {loop, threshold, spend_remainder, enter, eps});
}

auto step_backward(
    const OptionalTensor& grad_h, const OptionalTensor& grad_out, const OptionalTensor& grad_cumulative_p,
    const OptionalTensor& grad_ponder, const OptionalTensor& grad_u, const Tensor& h, const Tensor& e,
    const Tensor& lora_hidden, const Tensor& cumulative_p, const Tensor& running, const Tensor& h_next, const Tensor& p,
    const Tensor& rstd, const Tensor& lora_B, const Tensor& log_A, const Tensor& log_dt, const Tensor& B,
    const Tensor& halt_weight, const Tensor& norm_weight, const Tensor& emb, double threshold, bool spend_remainder) {
  return run_step_backward(
      {grad_h, grad_out, grad_cumulative_p, grad_ponder, grad_u}, {h, e, cumulative_p, running, h_next, p, rstd},
      lora_hidden, {lora_B, log_A, log_dt, B, halt_weight, norm_weight, emb}, threshold, spend_remainder);
}

}  // namespace

TORCH_LIBRARY_IMPL(openmythos, CUDA, m) {
  m.impl("loop_step", step);
  m.impl("loop_step_backward", step_backward);
}

}  // namespace openmythos::cuda
