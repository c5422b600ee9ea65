// `openmythos::loop_step` and its backward for CUDA tensors: allocate, describe, launch. Schemas and shapes are
// checked in Python, where the ops are declared.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "cuda/loop_step.h"
#include "cuda/torch.h"

namespace openmythos::cuda {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

const void* data_or_null(const OptionalTensor& x) { return x ? x->const_data_ptr() : nullptr; }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> step(
    const Tensor& h, const Tensor& e, const Tensor& f, const Tensor& lora_hidden, const Tensor& h_out,
    const Tensor& cumulative_p, const Tensor& running, const Tensor& ponder, const Tensor& lora_B, const Tensor& log_A,
    const Tensor& log_dt, const Tensor& B, const Tensor& halt_weight, const Tensor& halt_bias,
    const Tensor& norm_weight, const Tensor& emb, int64_t loop, double threshold, bool spend_remainder, bool enter,
    double eps) {
  const On on(h);
  const int64_t zero = 0;
  const at::IntArrayRef none(zero);
  Tensor h_next = at::empty_like(h), h_out_next = at::empty_like(h), cumulative_p_next = at::empty_like(cumulative_p);
  Tensor running_next = at::empty_like(running), ponder_next = at::empty_like(cumulative_p),
         p = at::empty_like(cumulative_p);
  Tensor u = enter ? at::empty_like(h) : at::empty(none, h.options());
  Tensor rstd = enter ? at::empty_like(cumulative_p) : at::empty(none, cumulative_p.options());
  const LoopStepShape shape{
      element_of(h),
      cumulative_p.numel(),
      static_cast<int>(B.numel()),
      static_cast<int>(lora_B.size(0)),
      lora_B.const_data_ptr(),
      log_A.const_data_ptr(),
      log_dt.const_data_ptr(),
      B.const_data_ptr(),
      halt_weight.const_data_ptr(),
      norm_weight.const_data_ptr(),
      emb.const_data_ptr(),
      static_cast<int>(emb.numel()),
      threshold,
      spend_remainder};
  const LoopStep x{
      h.const_data_ptr(),
      e.const_data_ptr(),
      f.const_data_ptr(),
      lora_hidden.const_data_ptr(),
      h_out.const_data_ptr(),
      cumulative_p.const_data_ptr(),
      ponder.const_data_ptr(),
      running.const_data_ptr<bool>(),
      halt_bias.const_data_ptr(),
      h_next.mutable_data_ptr(),
      h_out_next.mutable_data_ptr(),
      enter ? u.mutable_data_ptr() : nullptr,
      cumulative_p_next.mutable_data_ptr(),
      ponder_next.mutable_data_ptr(),
      p.mutable_data_ptr(),
      enter ? rstd.mutable_data_ptr() : nullptr,
      running_next.mutable_data_ptr<bool>(),
      static_cast<int>(loop),
      eps};
  C10_CUDA_CHECK(loop_step(shape, x, on.stream));
  return {h_next, h_out_next, cumulative_p_next, running_next, ponder_next, u, p, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
step_backward(
    const OptionalTensor& grad_h, const OptionalTensor& grad_out, const OptionalTensor& grad_cumulative_p,
    const OptionalTensor& grad_ponder, const OptionalTensor& grad_u, const Tensor& h, const Tensor& e,
    const Tensor& lora_hidden, const Tensor& cumulative_p, const Tensor& running, const Tensor& h_next, const Tensor& p,
    const Tensor& rstd, const Tensor& lora_B, const Tensor& log_A, const Tensor& log_dt, const Tensor& B,
    const Tensor& halt_weight, const Tensor& norm_weight, const Tensor& emb, double threshold, bool spend_remainder) {
  const On on(h);
  const int64_t N = cumulative_p.numel(), D = B.numel(), rank = lora_B.size(0);
  Tensor dh = at::empty_like(h), de = at::empty_like(h), df = at::empty_like(h);
  Tensor dcumulative_p = at::empty_like(cumulative_p), dponder = at::empty_like(cumulative_p);
  Tensor dlog_A = at::empty_like(log_A), dlog_dt = at::empty_like(log_dt), dB = at::empty_like(B);
  Tensor dhalt_weight = at::empty_like(halt_weight), dhalt_bias = at::empty({1}, halt_weight.options());
  Tensor dnorm_weight = at::empty_like(norm_weight);
  const int channels = static_cast<int>(D);
  Tensor scratch = at::empty({loop_step_scratch(N, channels)}, cumulative_p.options());
  const LoopStepShape shape{
      element_of(h),
      N,
      channels,
      static_cast<int>(rank),
      lora_B.const_data_ptr(),
      log_A.const_data_ptr(),
      log_dt.const_data_ptr(),
      B.const_data_ptr(),
      halt_weight.const_data_ptr(),
      norm_weight.const_data_ptr(),
      emb.const_data_ptr(),
      static_cast<int>(emb.numel()),
      threshold,
      spend_remainder};
  const LoopStepBackward x{
      data_or_null(grad_h),
      data_or_null(grad_out),
      data_or_null(grad_u),
      data_or_null(grad_cumulative_p),
      data_or_null(grad_ponder),
      h.const_data_ptr(),
      e.const_data_ptr(),
      h_next.const_data_ptr(),
      cumulative_p.const_data_ptr(),
      p.const_data_ptr(),
      rstd.const_data_ptr(),
      running.const_data_ptr<bool>(),
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
      scratch.mutable_data_ptr()};
  C10_CUDA_CHECK(loop_step_backward(shape, x, on.stream));
  const Tensor rows = df.view({N, D});
  Tensor dlora_hidden = at::mm(rows, lora_B.t()).view(lora_hidden.sizes()),
         dlora_B = at::mm(lora_hidden.view({N, rank}).t(), rows);
  return {dh,     de,      df, dlora_hidden, dcumulative_p, dponder,     dlora_B,
          dlog_A, dlog_dt, dB, dhalt_weight, dhalt_bias,    dnorm_weight};
}

}  // namespace

TORCH_LIBRARY_IMPL(openmythos, CUDA, m) {
  m.impl("loop_step", step);
  m.impl("loop_step_backward", step_backward);
}

}  // namespace openmythos::cuda
