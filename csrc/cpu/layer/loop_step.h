// What the ops that run loops share: the loop step's parameters, and the loops' embeddings.
#pragma once

#include "cpu/layer/weights.h"
#include "cpu/loop/loop.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/clamp_max.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/mul.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <optional>

namespace openmythos::layer {

// The loop step's parameters, checked.
struct Step {
  StepWeights weights;
  std::optional<LoraWeights> lora;
  at::Tensor lora_B;  // of rank 0 without LoRA

  Step(at::TensorList step, at::TensorList lora_list, const at::Tensor& h) : weights(checked(step)) {
    kLora.check(lora_list.size(), " or none");
    const int64_t D = h.size(1);
    const auto dtype = h.scalar_type();
    mla::fits("log_A", weights.log_A, {D}, dtype);
    mla::fits("log_dt", weights.log_dt, {1}, dtype);
    mla::fits("B", weights.B, {D}, dtype);
    mla::fits("halt_weight", weights.halt_weight, {1, D}, dtype);
    mla::fits("halt_bias", weights.halt_bias, {1}, dtype);
    mla::fits("norm_weight", weights.norm_weight, {D}, dtype);
    if (lora_list.empty()) {
      lora_B = at::empty({0, D}, h.options());
      return;
    }
    const auto& [down, scale, B] = lora.emplace(lora_list);
    const int64_t rank = down.dim() == 2 ? down.size(0) : 0, depths = scale.dim() == 2 ? scale.size(0) : 0;
    TORCH_CHECK_VALUE(depths > 0, "lora scale: got ", scale.sizes(), ", must be (loops, rank)");
    mla::fits("lora down", down, {rank, D}, dtype);
    mla::fits("lora scale", scale, {depths, rank}, dtype);
    mla::fits("lora B", B, {rank, D}, dtype);
    lora_B = B;
  }

  static at::TensorList checked(at::TensorList step) {
    kStep.check(step.size());
    return step;
  }

  // Of rows that are all in loop t. Loops past the last scale use it.
  at::Tensor lora_hidden(const at::Tensor& f, int64_t t) const {
    if (!lora) return at::empty({f.size(0), 0}, f.options());
    const at::Tensor& scale = lora->scale;
    return at::mul(loop::loop_down(f, lora->down), scale.select(0, std::min(t, scale.size(0) - 1)));
  }

  // Of rows that are each in loop t[n].
  at::Tensor lora_hidden_rows(const at::Tensor& f, const at::Tensor& t) const {
    if (!lora) return at::empty({f.size(0), 0}, f.options());
    const at::Tensor& scale = lora->scale;
    const at::Tensor each = at::index_select(scale, 0, at::clamp_max(t, scale.size(0) - 1));
    return at::mul(loop::loop_down(f, lora->down), each);
  }

  loop::StepWeights with(const at::Tensor& emb) const {
    const auto& w = weights;
    return {lora_B, w.log_A, w.log_dt, w.B, w.halt_weight, w.norm_weight, emb};
  }
};

// ValueError unless each embeds a loop's number in the first channels of h.
inline void check_embeddings(at::TensorList embeddings, const at::Tensor& h) {
  for (const at::Tensor& emb : embeddings) {
    TORCH_CHECK_VALUE(
        emb.dim() == 1 && emb.size(0) <= h.size(1) && emb.scalar_type() == h.scalar_type() && emb.is_contiguous(),
        "embeddings: got ", emb.scalar_type(), " ", emb.sizes(), ", must be ", h.scalar_type(), " of no more than ",
        h.size(1), " channels");
  }
}

}  // namespace openmythos::layer
