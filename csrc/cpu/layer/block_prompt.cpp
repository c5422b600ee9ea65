// openmythos::block_prompt: prompts through a transformer block without gradients. Sequences do not look at each other,
// so every thread takes some of them all the way: its numbers stay in its caches, and it waits for the others once a
// block instead of twenty times.
#include "cpu/mla/mla.h"
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
#include <tuple>

namespace openmythos::prompt {
namespace {

using mla::fits;
using mla::linear;

// A share of the sequences that is larger than the others by more than 1 / kUneven costs more than it saves.
constexpr int64_t kUneven = 20;
// Every thread reads all weights, which pays from this many tokens a thread for each thread on.
constexpr int64_t kTokens = 4;

struct Block {
  at::TensorList attention, ffn;  // of the op
  int64_t heads, nope, rope, v;
  c10::ArrayRef<double> eps;
  bool causal;
};

void check(const at::Tensor& x, const at::Tensor& freqs, const Block& block) {
  const auto [a, ffn, heads, nope, rope, v, eps, _] = block;
  TORCH_CHECK_VALUE(
      x.dim() == 3 && x.scalar_type() == at::kFloat, "x must be (B, T, D) float32, got ", x.sizes(), " ",
      x.scalar_type());
  TORCH_CHECK_VALUE(a.size() == 10, "attention: got ", a.size(), " tensors, must be 10");
  TORCH_CHECK_VALUE(ffn.empty() || ffn.size() == 3, "ffn: got ", ffn.size(), " tensors, must be 3 or none");
  TORCH_CHECK_VALUE(eps.size() == 3, "eps: got ", eps.size(), " numbers, must be 3");
  const int64_t B = x.size(0), T = x.size(1), D = x.size(2);
  const auto type = x.scalar_type();
  mla::check_weights(D, a[6].numel(), type, a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], heads, nope, rope, v);
  fits("freqs", freqs, {freqs.dim() == 4 && freqs.size(0) == 1 ? 1 : B, T, rope / 2, 2}, type);
  fits("attn_norm", a[0], {D}, type);
  fits("ffn_norm", a[9], {D}, type);
  if (ffn.empty()) return;
  const int64_t inner = ffn[0].dim() == 2 ? ffn[0].size(0) : 0;
  fits("gate", ffn[0], {inner, D}, type);
  fits("up", ffn[1], {inner, D}, type);
  fits("down", ffn[2], {D, inner}, type);
}

// (x + attention(norm(x)), its norm) of some sequences.
std::tuple<at::Tensor, at::Tensor> attend(const at::Tensor& x, const at::Tensor& freqs, const Block& block) {
  const auto [a, ffn, heads, nope, rope, v, eps, causal] = block;
  const int64_t B = x.size(0), T = x.size(1);
  const at::Tensor normed = std::get<1>(norm::rms_norm(x, std::nullopt, a[0], eps[0]));
  const at::Tensor c_q = std::get<0>(mla::norm_rope(linear(normed, a[1]), freqs, a[2], eps[1]));
  const at::Tensor q_rope = std::get<1>(mla::norm_rope(linear(c_q, a[4]), freqs, at::empty({0}, x.options()), 0));
  const auto [latent, k_rope] = mla::norm_rope(linear(normed, a[5]), freqs, a[6], eps[1]);
  const auto counts = x.options().dtype(at::kLong);
  const at::Tensor keys = at::full({B}, T, counts), start = causal ? at::full({B}, 0, counts) : keys;
  const at::Tensor attended = std::get<0>(mla::mla_attention(
      linear(c_q, a[3]).view({B, T, heads, nope}), q_rope.view({B, T, heads, rope}),
      linear(latent, a[7]).view({B, T, heads, nope + v}), k_rope, start, keys));
  const auto [sum, behind, _] = norm::rms_norm(x, linear(attended.view({B, T, heads * v}), a[8]), a[9], eps[2]);
  return {sum, behind};
}

// x's dense feed-forward layer.
at::Tensor feed_forward(const at::Tensor& x, at::TensorList ffn) {
  at::Tensor hidden = linear(x, ffn[0]);
  const at::Tensor up = linear(x, ffn[1]);
  float* const g = hidden.mutable_data_ptr<float>();
  const float* const u = up.const_data_ptr<float>();
  at::parallel_for(0, hidden.numel(), 1 << 14, [&](int64_t begin, int64_t end) {
    swiglu(g + begin, u + begin, g + begin, end - begin);
  });
  return linear(hidden, ffn[2]);
}

std::tuple<at::Tensor, at::Tensor> block_prompt(
    const at::Tensor& x, const at::Tensor& freqs, at::TensorList attention, at::TensorList ffn, int64_t heads,
    int64_t nope, int64_t rope, int64_t v, c10::ArrayRef<double> eps, bool causal) {
  const Block block{attention, ffn, heads, nope, rope, v, eps, causal};
  check(x, freqs, block);
  const bool whole = !ffn.empty();
  at::Tensor y = empty(x.sizes(), x.options()), normed = empty(whole ? at::IntArrayRef{0} : x.sizes(), x.options());
  if (x.numel() == 0) return {y, normed};
  const int64_t B = x.size(0), size = x.size(1) * x.size(2);
  const auto some = [&](int64_t begin, int64_t end) {
    // Dispatch keys and grad mode are thread local; the pool's threads start with autograd on.
    at::AutoDispatchBelowADInplaceOrView below;
    at::NoGradGuard no_grad;
    const auto [sum, behind] = attend(
        x.narrow(0, begin, end - begin), freqs.size(0) == 1 ? freqs : freqs.narrow(0, begin, end - begin), block);
    const float *from = sum.const_data_ptr<float>(), *last = from + sum.numel();
    float* const to = y.mutable_data_ptr<float>() + begin * size;
    if (whole) {
      const at::Tensor added = feed_forward(behind, ffn);
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
    some(0, B);  // its products on all threads
  }
  return {y, normed};
}

}  // namespace
}  // namespace openmythos::prompt

TORCH_LIBRARY_IMPL(openmythos, CPU, m) { m.impl("block_prompt", openmythos::prompt::block_prompt); }
