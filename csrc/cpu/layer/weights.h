// Weights of whole layers by name. An op gets a family of weights as one list of tensors. The order of these lists is
// written here and nowhere else in C++. `openmythos_kernels/ops/layer/weights.py` has the same names, and a test
// compares the two (`_C.layer_weight_names`).
#pragma once

#include "cpu/mla/mla.h"
#include "cpu/moe/experts.h"

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <array>
#include <stdexcept>
#include <string_view>

namespace openmythos::layer {

// The items of an op's list, in order.
template <size_t N>
struct Family {
  const char *argument, *items;
  std::array<std::string_view, N> names;

  // Where `name` is in the list; folded at compile time.
  constexpr size_t operator[](std::string_view name) const {
    for (size_t i = 0; i < N; ++i) {
      if (names[i] == name) return i;
    }
    throw std::out_of_range("no such weight");
  }
  // ValueError unless a list has this many items.
  void check(size_t got, const char* or_none = "") const {
    TORCH_CHECK_VALUE(
        got == N || (*or_none && got == 0), argument, ": got ", got, " ", items, ", must be ", N, or_none);
  }
};

inline constexpr Family<10> kAttention{
    "attention",
    "tensors",
    {"attn_norm", "q_down", "q_norm", "q_up_nope", "q_up_rope", "kv_down", "kv_norm", "kv_up", "wo", "ffn_norm"}};
inline constexpr Family<2> kRouter{"router", "tensors", {"weight", "bias"}};
inline constexpr Family<3> kFfn{"ffn", "tensors", {"gate", "up", "down"}};
inline constexpr Family<3> kLora{"lora", "tensors", {"down", "scale", "B"}};
inline constexpr Family<6> kStep{
    "step", "tensors", {"log_A", "log_dt", "B", "halt_weight", "halt_bias", "norm_weight"}};
inline constexpr Family<3> kEps{"eps", "numbers", {"attn_norm", "latent_norms", "ffn_norm"}};

// A block's attention and both its norms.
struct AttentionWeights {
  const at::Tensor& attn_norm;
  mla::Weights mla;
  const at::Tensor& ffn_norm;

  explicit AttentionWeights(at::TensorList list)
      : attn_norm(list[kAttention["attn_norm"]]),
        mla{list[kAttention["q_down"]],    list[kAttention["q_norm"]],  list[kAttention["q_up_nope"]],
            list[kAttention["q_up_rope"]], list[kAttention["kv_down"]], list[kAttention["kv_norm"]],
            list[kAttention["kv_up"]],     list[kAttention["wo"]]},
        ffn_norm(list[kAttention["ffn_norm"]]) {}
};

struct RouterWeights {
  const at::Tensor &weight, &bias;

  explicit RouterWeights(at::TensorList list) : weight(list[kRouter["weight"]]), bias(list[kRouter["bias"]]) {}
};

// A dense feed-forward layer.
struct FfnWeights {
  const at::Tensor &gate, &up, &down;

  explicit FfnWeights(at::TensorList list) : gate(list[kFfn["gate"]]), up(list[kFfn["up"]]), down(list[kFfn["down"]]) {}
  // Of a dense layer given as the only shared expert.
  explicit FfnWeights(const moe::ExpertLists& one) : gate(one.gate[0]), up(one.up[0]), down(one.down[0]) {}
};

struct LoraWeights {
  const at::Tensor &down, &scale, &B;

  explicit LoraWeights(at::TensorList list)
      : down(list[kLora["down"]]), scale(list[kLora["scale"]]), B(list[kLora["B"]]) {}
};

// The loop step's parameters, without the LoRA's.
struct StepWeights {
  const at::Tensor &log_A, &log_dt, &B, &halt_weight, &halt_bias, &norm_weight;

  explicit StepWeights(at::TensorList list)
      : log_A(list[kStep["log_A"]]),
        log_dt(list[kStep["log_dt"]]),
        B(list[kStep["B"]]),
        halt_weight(list[kStep["halt_weight"]]),
        halt_bias(list[kStep["halt_bias"]]),
        norm_weight(list[kStep["norm_weight"]]) {}
};

// Of the RMSNorms: `latent_norms` is that of q_norm and kv_norm.
struct Eps {
  double attn_norm, latent_norms, ffn_norm;

  explicit Eps(c10::ArrayRef<double> list)
      : attn_norm(list[kEps["attn_norm"]]),
        latent_norms(list[kEps["latent_norms"]]),
        ffn_norm(list[kEps["ffn_norm"]]) {}
};

// ValueError unless a dense FFN's weights fit D channels.
void check_ffn(const FfnWeights& ffn, int64_t D, at::ScalarType dtype);

}  // namespace openmythos::layer
