// openmythos::loop_decode: one token per row through all loops of a recurrent block.
#include "cpu/layer/block_decode.h"
#include "cpu/layer/loop_step.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

namespace openmythos::layer {
namespace {

using at::Tensor;

// log(rate) at which A = exp(-exp(.)) is exactly 0.
constexpr double kNoMemory = 20;

// RMSNorm(h + emb + e): the step with all else switched off.
Tensor enter(const Tensor& h, const Tensor& e, const Tensor& zero, const Step& step, const Tensor& emb, double eps) {
  const Tensor none = at::zeros_like(step.weights.log_A), one = none.slice(0, 0, 1);
  const Tensor no_memory = at::full(none.sizes(), kNoMemory, none.options()), halt_weight = none.unsqueeze(0);
  const Tensor no_lora = at::empty({0, h.size(1)}, h.options()), no_hidden = at::empty({h.size(0), 0}, h.options());
  const Tensor none_runs = at::zeros(zero.sizes(), zero.options().dtype(at::kBool));
  return loop::step(
             {h, e, h, h, zero, none_runs, zero}, no_hidden,
             {no_lora, no_memory, one, none, halt_weight, step.weights.norm_weight, emb}, one,
             {0, 1.0, false, true, eps})
      .u;
}

// All arguments of the op but the weights of the blocks.
struct Loops {
  const Tensor &h, &e, &freqs, &lengths;
  at::TensorList latent_caches, rope_caches, embeddings;
  double norm_eps, threshold;
  bool spend_remainder, residual, act;

  int64_t count() const { return embeddings.size(); }

  // ValueError naming what does not fit; nothing has been written then.
  void check(const std::vector<Block>& blocks) const {
    const size_t caches = count() * blocks.size();
    TORCH_CHECK_VALUE(
        count() > 0 && latent_caches.size() == caches && rope_caches.size() == caches,
        "latent_caches, rope_caches: got ", latent_caches.size(), " and ", rope_caches.size(), " tensors, must be ",
        caches, ", one for each of ", count(), " loops (embeddings) and ", blocks.size(), " blocks");
    for (size_t i = 0; i < caches; ++i) {
      blocks[i % blocks.size()].check(h, freqs, latent_caches[i], rope_caches[i], lengths);
    }
    mla::fits("e", e, h.sizes(), h.scalar_type());
    check_embeddings(embeddings, h);
  }

  // h_out, ponder, expert_idx; for checked arguments.
  std::tuple<Tensor, Tensor, Tensor> run(const std::vector<Block>& blocks, const Step& step) const {
    const auto positions = h.options().dtype(at::toOpMathType(h.scalar_type()));
    loop::StepResults state;
    state.cumulative_p = at::zeros({h.size(0)}, positions);
    state.ponder = state.cumulative_p;
    // Without halting no position runs, as far as the step knows: it adds nothing to h_out.
    state.running = at::full({h.size(0)}, act, positions.dtype(at::kBool));
    state.h = h;
    state.h_out = at::zeros_like(h);
    state.u = enter(h, e, state.cumulative_p, step, embeddings[0], norm_eps);
    std::vector<Tensor> chosen;
    for (int64_t t = 0; t < count(); ++t) {
      Tensor f = state.u;
      for (size_t i = 0; i < blocks.size(); ++i) {
        const size_t at = t * blocks.size() + i;
        Tensor expert_idx;
        std::tie(f, expert_idx) = blocks[i](f, freqs, latent_caches[at], rope_caches[at], lengths);
        chosen.push_back(expert_idx);
      }
      const Tensor lora_hidden = step.lora_hidden(f, t);
      if (residual) f = at::sub(f, state.u);
      const bool last = t == count() - 1;
      state = loop::step(
          {state.h, e, f, state.h_out, state.cumulative_p, state.running, state.ponder}, lora_hidden,
          step.with(embeddings[last ? t : t + 1]), step.weights.halt_bias,
          {t, threshold, last && spend_remainder, !last, norm_eps});
    }
    return {act ? state.h_out : state.h, state.ponder, at::stack(chosen)};
  }
};

// The op as Python declares it.
std::tuple<Tensor, Tensor, Tensor> loop_decode(
    const Tensor& h, const Tensor& e, const Tensor& freqs, const Tensor& lengths, at::TensorList latent_caches,
    at::TensorList rope_caches, at::TensorList attention, at::TensorList router, at::TensorList gate, at::TensorList up,
    at::TensorList down, at::TensorList shared_gate, at::TensorList shared_up, at::TensorList shared_down, int64_t topk,
    int64_t heads, int64_t nope, int64_t rope, int64_t v, c10::ArrayRef<double> eps, at::TensorList lora,
    at::TensorList step, at::TensorList embeddings, double norm_eps, double threshold, bool spend_remainder,
    bool residual, bool act) {
  const Loops loops{h,          e,        freqs,     lengths,         latent_caches, rope_caches,
                    embeddings, norm_eps, threshold, spend_remainder, residual,      act};
  const std::vector<Block> blocks = split(
      {attention,
       router,
       {gate, up, down},
       {shared_gate, shared_up, shared_down},
       eps,
       {topk, {heads, nope, rope, v}}});
  loops.check(blocks);
  return loops.run(blocks, Step(step, lora, h));
}

}  // namespace
}  // namespace openmythos::layer

TORCH_LIBRARY_IMPL(openmythos, CPU, m) { m.impl("loop_decode", openmythos::layer::loop_decode); }
