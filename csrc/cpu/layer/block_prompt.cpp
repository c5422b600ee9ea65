// openmythos::block_prompt: prompts through a transformer block without gradients. Sequences are independent, so each
// thread takes some of them through the whole block: its data stays in its caches, and it waits for the other threads
// once a block instead of twenty times.
#include "cpu/layer/weights.h"
#include "cpu/moe/swiglu.h"
#include "cpu/norm/norm.h"
#include "cpu/runtime/allocator.h"
#include "cpu/simd/gemm.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <functional>
#include <optional>
#include <tuple>

namespace openmythos::layer {
namespace {

using mla::linear;

// Threads share the sequences only if the largest share exceeds an even one by at most 1 / kUneven; a more uneven split
// costs more than it saves.
constexpr int64_t kUneven = 20;
// Each thread reads all weights: tokens of a thread, times the number of threads, from which this pays.
constexpr int64_t kTokens = 4;

struct PromptBlock {
  AttentionWeights attention;
  std::optional<FfnWeights> ffn;  // none if the caller runs the layer after the attention
  mla::HeadSizes sizes;
  Eps eps;
  bool causal;
};

PromptBlock block_of(
    at::TensorList attention, at::TensorList ffn, const mla::HeadSizes& sizes, c10::ArrayRef<double> eps, bool causal) {
  kAttention.check(attention.size());
  kFfn.check(ffn.size(), " or none");
  kEps.check(eps.size());
  std::optional<FfnWeights> dense;
  if (!ffn.empty()) dense.emplace(ffn);
  return {AttentionWeights(attention), dense, sizes, Eps(eps), causal};
}

void check_input(const at::Tensor& x) {
  TORCH_CHECK_VALUE(
      x.dim() == 3 && x.scalar_type() == at::kFloat, "x must be (B, T, D) float32, got ", x.sizes(), " ",
      x.scalar_type());
}

void check(const at::Tensor& x, const at::Tensor& freqs, const PromptBlock& block) {
  const auto& attention = block.attention;
  const int64_t B = x.size(0), T = x.size(1), D = x.size(2);
  const auto type = x.scalar_type();
  mla::check_weights(D, attention.mla.kv_norm.numel(), type, attention.mla, block.sizes);
  const bool shared = freqs.dim() == 4 && freqs.size(0) == 1;
  mla::fits("freqs", freqs, {shared ? 1 : B, T, block.sizes.rope / 2, 2}, type);
  mla::fits("attn_norm", attention.attn_norm, {D}, type);
  mla::fits("ffn_norm", attention.ffn_norm, {D}, type);
  if (block.ffn) check_ffn(*block.ffn, D, type);
}

// (x + attention(norm(x)), its norm) of some sequences.
std::tuple<at::Tensor, at::Tensor> attend(const at::Tensor& x, const at::Tensor& freqs, const PromptBlock& block) {
  const auto& [attn_norm, w, ffn_norm] = block.attention;
  const auto [heads, nope, rope, v] = block.sizes;
  const Eps& eps = block.eps;
  const int64_t B = x.size(0), T = x.size(1);
  const at::Tensor normed = std::get<1>(norm::rms_norm(x, std::nullopt, attn_norm, eps.attn_norm));
  const at::Tensor c_q = std::get<0>(mla::norm_rope(linear(normed, w.q_down), freqs, w.q_norm, eps.latent_norms));
  const at::Tensor q_rope =
      std::get<1>(mla::norm_rope(linear(c_q, w.q_up_rope), freqs, at::empty({0}, x.options()), 0));
  const auto [latent, k_rope] = mla::norm_rope(linear(normed, w.kv_down), freqs, w.kv_norm, eps.latent_norms);
  const auto counts = x.options().dtype(at::kLong);
  const at::Tensor keys = at::full({B}, T, counts), start = block.causal ? at::full({B}, 0, counts) : keys;
  const at::Tensor attended = std::get<0>(mla::mla_attention(
      linear(c_q, w.q_up_nope).view({B, T, heads, nope}), q_rope.view({B, T, heads, rope}),
      linear(latent, w.kv_up).view({B, T, heads, nope + v}), k_rope, start, keys));
  const auto [sum, behind, _] =
      norm::rms_norm(x, linear(attended.view({B, T, heads * v}), w.wo), ffn_norm, eps.ffn_norm);
  return {sum, behind};
}

// A dense feed-forward layer.
at::Tensor feed_forward(const at::Tensor& x, const FfnWeights& ffn) {
  at::Tensor hidden = linear(x, ffn.gate);
  const at::Tensor up = linear(x, ffn.up);
  float* const g = hidden.mutable_data_ptr<float>();
  const float* const u = up.const_data_ptr<float>();
  at::parallel_for(0, hidden.numel(), 1 << 14, [&](int64_t begin, int64_t end) {
    swiglu(g + begin, u + begin, g + begin, end - begin);
  });
  return linear(hidden, ffn.down);
}

// The op as Python declares it.
std::tuple<at::Tensor, at::Tensor> block_prompt(
    const at::Tensor& x, const at::Tensor& freqs, at::TensorList attention, at::TensorList ffn, int64_t heads,
    int64_t nope, int64_t rope, int64_t v, c10::ArrayRef<double> eps, bool causal) {
  check_input(x);
  const PromptBlock block = block_of(attention, ffn, {heads, nope, rope, v}, eps, causal);
  check(x, freqs, block);
  const bool whole = block.ffn.has_value();
  at::Tensor y = empty(x.sizes(), x.options()), normed = empty(whole ? at::IntArrayRef{0} : x.sizes(), x.options());
  if (x.numel() == 0) return {y, normed};
  const int64_t B = x.size(0), size = x.size(1) * x.size(2);
  const auto some = [&](int64_t begin, int64_t end) {
    // Dispatch keys and grad mode are thread-local; the pool's threads start with autograd on.
    at::AutoDispatchBelowADInplaceOrView below;
    at::NoGradGuard no_grad;
    const auto [sum, behind] = attend(
        x.narrow(0, begin, end - begin), freqs.size(0) == 1 ? freqs : freqs.narrow(0, begin, end - begin), block);
    const float *from = sum.const_data_ptr<float>(), *last = from + sum.numel();
    float* const to = y.mutable_data_ptr<float>() + begin * size;
    if (whole) {
      const at::Tensor added = feed_forward(behind, *block.ffn);
      std::transform(from, last, added.const_data_ptr<float>(), to, std::plus<float>());
    } else {
      std::copy(from, last, to);
      std::copy_n(behind.const_data_ptr<float>(), behind.numel(), normed.mutable_data_ptr<float>() + begin * size);
    }
  };
  const int64_t threads = at::get_num_threads(), share = (B + threads - 1) / threads;
  const bool even = share * threads * kUneven <= B * (kUneven + 1), enough = share * x.size(1) >= kTokens * threads;
  if (even && enough) {
    at::parallel_for(0, B, share, some);
  } else {
    some(0, B);  // one call, whose products use all threads
  }
  return {y, normed};
}

}  // namespace
}  // namespace openmythos::layer

TORCH_LIBRARY_IMPL(openmythos, CPU, m) { m.impl("block_prompt", openmythos::layer::block_prompt); }
