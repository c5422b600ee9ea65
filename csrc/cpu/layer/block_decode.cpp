// openmythos::block_decode. At one token a block is a dozen small calls, most of which take less time than Python
// spends between them; here C++ makes them.
#include "cpu/layer/block_decode.h"

#include "cpu/moe/experts.h"
#include "cpu/norm/norm.h"
#include "cpu/simd/matvec.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

namespace openmythos::layer {
namespace {

// Weights that pay for waking a thread.
constexpr int64_t kThreadWeights = 1 << 15;

// Block i's part of a list of `count` blocks.
template <typename T>
c10::ArrayRef<T> part(c10::ArrayRef<T> all, size_t i, size_t count) {
  const size_t each = all.size() / count;
  return all.slice(i * each, each);
}

moe::ExpertLists part(const moe::ExpertLists& all, size_t i, size_t count) {
  return {part(all.gate, i, count), part(all.up, i, count), part(all.down, i, count)};
}

// x (B, D) @ weight^T, as torch.nn.functional.linear.
at::Tensor logits(const at::Tensor& x, const at::Tensor& weight) {
  const int64_t rows = x.size(0), D = x.size(1), E = weight.size(0);
  at::Tensor out = at::empty({rows, E}, x.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "router", [&] {
    using T = scalar_t;
    std::vector<acc_t<T>> wide(rows * D), sums(rows * E);
    widen(x.const_data_ptr<T>(), wide.data(), rows * D);
    at::parallel_for(
        0, E, std::max<int64_t>(1, kThreadWeights / std::max<int64_t>(D, 1)), [&](int64_t begin, int64_t end) {
          matvec<T>(weight.const_data_ptr<T>(), D, begin, end, wide.data(), rows, sums.data(), E);
        });
    std::copy(sums.begin(), sums.end(), out.mutable_data_ptr<T>());
  });
  return out;
}

}  // namespace

std::vector<Block> split(const BlockLists& lists) {
  const auto& [attention, router, routed, shared, eps, sizes] = lists;
  const size_t count = attention.size() / kAttention.names.size();
  TORCH_CHECK_VALUE(
      count > 0 && attention.size() % kAttention.names.size() == 0, "attention: got ", attention.size(),
      " tensors, must be ", kAttention.names.size(), " for each block");
  TORCH_CHECK_VALUE(
      router.empty() || router.size() == kRouter.names.size() * count, "router: got ", router.size(),
      " tensors, must be ", kRouter.names.size(), " for each of ", count, " blocks, or none");
  TORCH_CHECK_VALUE(
      eps.size() == kEps.names.size() * count, "eps: got ", eps.size(), " numbers, must be ", kEps.names.size(),
      " for each block");
  for (const moe::ExpertLists& experts : {routed, shared}) {
    for (const at::TensorList& list : {experts.gate, experts.up, experts.down}) {
      TORCH_CHECK_VALUE(
          list.size() % count == 0, "experts: got a list of ", list.size(), " tensors for ", count,
          " blocks: each block must have as many as the others");
    }
  }
  TORCH_CHECK_VALUE(
      router.empty() ? routed.gate.empty() && shared.gate.size() == count : !routed.gate.empty(), "router: got ",
      router.size(), " tensors with ", routed.gate.size(), " routed and ", shared.gate.size(),
      " shared experts; a dense layer is one shared expert, without router");
  std::vector<Block> blocks;
  blocks.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    std::optional<RouterWeights> own_router;
    if (!router.empty()) own_router.emplace(part(router, i, count));
    blocks.push_back(
        {AttentionWeights(part(attention, i, count)), own_router, part(routed, i, count), part(shared, i, count),
         Eps(part(eps, i, count)), sizes});
  }
  return blocks;
}

void Block::check(
    const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& latent_cache, const at::Tensor& rope_cache,
    const at::Tensor& lengths) const {
  mla::check_decode(x, freqs, latent_cache, rope_cache, lengths, attention.mla, sizes.heads);
  const int64_t D = x.size(1);
  const auto dtype = x.scalar_type();
  mla::fits("attn_norm", attention.attn_norm, {D}, dtype);
  mla::fits("ffn_norm", attention.ffn_norm, {D}, dtype);
  if (!router) {
    TORCH_CHECK_VALUE(
        shared.up.size() == 1 && shared.down.size() == 1, "shared_up, shared_down: got ", shared.up.size(), " and ",
        shared.down.size(), " tensors, must be 1 for each dense layer");
    return check_ffn(FfnWeights(shared), D, dtype);
  }
  const int64_t experts = routed.gate.size();
  const at::Tensor& bias = router->bias;
  mla::fits("router", router->weight, {experts, D}, dtype);
  mla::fits("router_bias", bias, {experts}, bias.scalar_type() == at::kFloat ? at::kFloat : dtype);
  TORCH_CHECK_VALUE(
      0 < sizes.topk && sizes.topk <= experts, "topk = ", sizes.topk, ": must be in [1, ", experts,
      "], the number of experts");
}

std::tuple<at::Tensor, at::Tensor> Block::operator()(
    const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& latent_cache, const at::Tensor& rope_cache,
    const at::Tensor& lengths) const {
  if (x.numel() == 0) return {at::empty_like(x), at::empty({x.size(0), router ? sizes.topk : 0}, lengths.options())};
  const at::Tensor normed = std::get<1>(norm::rms_norm(x, std::nullopt, attention.attn_norm, eps.attn_norm));
  const at::Tensor attended =
      mla::mla_decode(normed, freqs, latent_cache, rope_cache, lengths, attention.mla, sizes.heads, eps.latent_norms);
  auto [sum, behind, _] = norm::rms_norm(x, attended, attention.ffn_norm, eps.ffn_norm);
  if (!router) {
    const FfnWeights ffn(shared);
    at::Tensor y = std::get<0>(moe::swiglu_ffn(behind, ffn.gate, ffn.up, ffn.down, false));
    return {y.add_(sum), at::empty({x.size(0), 0}, lengths.options())};
  }
  const auto [topk_weights, expert_idx, load] =
      moe::moe_route(logits(behind, router->weight), router->bias, sizes.topk);
  at::Tensor y = std::get<0>(moe::moe_experts(behind, expert_idx, topk_weights, routed, shared, false));
  return {y.add_(sum), expert_idx};
}

namespace {

// The op as Python declares it.
std::tuple<at::Tensor, at::Tensor> block_decode(
    const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& lengths, at::Tensor latent_cache,
    at::Tensor rope_cache, at::TensorList attention, at::TensorList router, at::TensorList gate, at::TensorList up,
    at::TensorList down, at::TensorList shared_gate, at::TensorList shared_up, at::TensorList shared_down, int64_t topk,
    int64_t heads, int64_t nope, int64_t rope, int64_t v, c10::ArrayRef<double> eps) {
  const std::vector<Block> blocks = split(
      {attention,
       router,
       {gate, up, down},
       {shared_gate, shared_up, shared_down},
       eps,
       {topk, {heads, nope, rope, v}}});
  blocks[0].check(x, freqs, latent_cache, rope_cache, lengths);
  return blocks[0](x, freqs, latent_cache, rope_cache, lengths);
}

}  // namespace
}  // namespace openmythos::layer

TORCH_LIBRARY_IMPL(openmythos, CPU, m) { m.impl("block_decode", openmythos::layer::block_decode); }
