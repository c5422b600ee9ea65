// openmythos::loop_decode: one token per row through all loops of a recurrent block.
#include "cpu/layer/block_decode.h"
#include "cpu/loop/loop.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

namespace openmythos::decode {
namespace {

// log(rate) at which A = exp(-exp(.)) is exactly 0.
constexpr double kNoMemory = 20;

// The step's parameters, checked: log_A, log_dt, B, halt_weight, halt_bias, norm_weight.
struct Step {
  at::TensorList weights;
  at::Tensor down, scale, up;  // the LoRA; of rank 0 without

  Step(at::TensorList step, at::TensorList lora, const at::Tensor& h) : weights(step) {
    const int64_t D = h.size(1);
    TORCH_CHECK_VALUE(step.size() == 6, "step: got ", step.size(), " tensors, must be 6");
    TORCH_CHECK_VALUE(lora.empty() || lora.size() == 3, "lora: got ", lora.size(), " tensors, must be 3 or none");
    const auto dtype = h.scalar_type();
    fits("log_A", step[0], {D}, dtype);
    fits("log_dt", step[1], {1}, dtype);
    fits("B", step[2], {D}, dtype);
    fits("halt_weight", step[3], {1, D}, dtype);
    fits("halt_bias", step[4], {1}, dtype);
    fits("norm_weight", step[5], {D}, dtype);
    if (lora.empty()) {
      up = at::empty({0, D}, h.options());
      return;
    }
    down = lora[0], scale = lora[1], up = lora[2];
    const int64_t rank = down.dim() == 2 ? down.size(0) : 0, depths = scale.dim() == 2 ? scale.size(0) : 0;
    TORCH_CHECK_VALUE(depths > 0, "lora scale: got ", scale.sizes(), ", must be (loops, rank)");
    fits("lora down", down, {rank, D}, dtype);
    fits("lora scale", scale, {depths, rank}, dtype);
    fits("lora B", up, {rank, D}, dtype);
  }

  at::Tensor lora_hidden(const at::Tensor& f, int64_t t) const {
    if (!down.defined()) return at::empty({f.size(0), 0}, f.options());
    return at::mul(loop::loop_down(f, down), scale.select(0, std::min(t, scale.size(0) - 1)));
  }
};

// RMSNorm(h + emb + e): the step with everything else switched off.
at::Tensor enter(
    const at::Tensor& h, const at::Tensor& e, const at::Tensor& zero, const Step& step, const at::Tensor& emb,
    double eps) {
  const at::Tensor none = at::zeros_like(step.weights[0]);
  return std::get<5>(loop::loop_step(
      h, e, h, at::empty({h.size(0), 0}, h.options()), h, zero,
      at::zeros(zero.sizes(), zero.options().dtype(at::kBool)), zero, at::empty({0, h.size(1)}, h.options()),
      at::full(none.sizes(), kNoMemory, none.options()), none.slice(0, 0, 1), none, none.unsqueeze(0),
      none.slice(0, 0, 1), step.weights[5], emb, 0, 1.0, false, true, eps));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> loop_decode(
    const at::Tensor& h0, const at::Tensor& e, const at::Tensor& freqs, const at::Tensor& lengths,
    at::TensorList latent_caches, at::TensorList rope_caches, at::TensorList attention, at::TensorList router,
    at::TensorList gate, at::TensorList up, at::TensorList down, at::TensorList shared_gate, at::TensorList shared_up,
    at::TensorList shared_down, int64_t topk, int64_t heads, int64_t nope, int64_t rope, int64_t v,
    c10::ArrayRef<double> eps, at::TensorList lora, at::TensorList step_weights, at::TensorList embeddings,
    double norm_eps, double threshold, bool spend_remainder, bool residual) {
  const Blocks blocks(
      attention, router, gate, up, down, shared_gate, shared_up, shared_down, eps, {topk, heads, nope, rope, v});
  const int64_t loops = embeddings.size();
  const size_t caches = loops * blocks.count();
  TORCH_CHECK_VALUE(
      loops > 0 && latent_caches.size() == caches && rope_caches.size() == caches, "latent_caches, rope_caches: got ",
      latent_caches.size(), " and ", rope_caches.size(), " tensors, must be ", caches, ", one for each of ", loops,
      " loops (embeddings) and ", blocks.count(), " blocks");
  for (size_t i = 0; i < caches; ++i) {
    blocks[i % blocks.count()].check(h0, freqs, latent_caches[i], rope_caches[i], lengths);
  }
  fits("e", e, h0.sizes(), h0.scalar_type());
  for (const at::Tensor& emb : embeddings) {
    TORCH_CHECK_VALUE(
        emb.dim() == 1 && emb.size(0) <= h0.size(1) && emb.scalar_type() == h0.scalar_type() && emb.is_contiguous(),
        "embeddings: got ", emb.scalar_type(), " ", emb.sizes(), ", must be ", h0.scalar_type(), " of no more than ",
        h0.size(1), " channels");
  }
  const Step step(step_weights, lora, h0);
  const at::TensorList w = step.weights;

  const auto positions = h0.options().dtype(at::toOpMathType(h0.scalar_type()));
  at::Tensor cumulative_p = at::zeros({h0.size(0)}, positions), ponder = cumulative_p;
  at::Tensor running = at::ones({h0.size(0)}, positions.dtype(at::kBool));
  at::Tensor h = h0, h_out = at::zeros_like(h0), u = enter(h0, e, cumulative_p, step, embeddings[0], norm_eps);
  std::vector<at::Tensor> chosen;
  for (int64_t t = 0; t < loops; ++t) {
    at::Tensor f = u;
    for (int64_t i = 0; i < blocks.count(); ++i) {
      const size_t at = t * blocks.count() + i;
      at::Tensor expert_idx;
      std::tie(f, expert_idx) = blocks[i](f, freqs, latent_caches[at], rope_caches[at], lengths);
      chosen.push_back(expert_idx);
    }
    const at::Tensor lora_hidden = step.lora_hidden(f, t);
    const bool last = t == loops - 1;
    std::tie(h, h_out, cumulative_p, running, ponder, u, std::ignore, std::ignore) = loop::loop_step(
        h, e, residual ? at::sub(f, u) : f, lora_hidden, h_out, cumulative_p, running, ponder, step.up, w[0], w[1],
        w[2], w[3], w[4], w[5], embeddings[last ? t : t + 1], t, threshold, last && spend_remainder, !last, norm_eps);
  }
  return {h_out, ponder, at::stack(chosen)};
}

}  // namespace
}  // namespace openmythos::decode

TORCH_LIBRARY_IMPL(openmythos, CPU, m) { m.impl("loop_decode", openmythos::decode::loop_decode); }
