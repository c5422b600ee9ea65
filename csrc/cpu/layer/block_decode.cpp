// openmythos::block_decode. At one token a block is a dozen small calls, most of which take less time than Python
// spends between them; here C++ makes them.
#include "cpu/layer/block_decode.h"

#include "cpu/layer/linear_rows.h"
#include "cpu/moe/experts.h"
#include "cpu/norm/norm.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <vector>

namespace openmythos::layer {
namespace {

// Block i's part of a list of `count` blocks.
template <typename T>
c10::ArrayRef<T> part(c10::ArrayRef<T> all, size_t i, size_t count) {
  const size_t each = all.size() / count;
  return all.slice(i * each, each);
}

moe::ExpertLists part(const moe::ExpertLists& all, size_t i, size_t count) {
  return {part(all.gate, i, count), part(all.up, i, count), part(all.down, i, count)};
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
  check_rest(x.size(1), x.scalar_type());
}

void Block::check_rows(
    const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& latent, const at::Tensor& k_rope) const {
  mla::check_rows(x, freqs, latent, k_rope, attention.mla, sizes.heads);
  check_rest(x.size(1), x.scalar_type());
}

void Block::check_rest(int64_t D, at::ScalarType dtype) const {
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

template <typename Attend>
std::tuple<at::Tensor, at::Tensor, at::Tensor> Block::attended(const at::Tensor& x, const Attend& attend) const {
  const at::Tensor normed = std::get<1>(norm::rms_norm(x, std::nullopt, attention.attn_norm, eps.attn_norm));
  return norm::rms_norm(x, attend(normed), attention.ffn_norm, eps.ffn_norm);
}

std::tuple<at::Tensor, at::Tensor> Block::feed_forward(const at::Tensor& sum, const at::Tensor& behind) const {
  if (!router) {
    const FfnWeights ffn(shared);
    at::Tensor y = std::get<0>(moe::swiglu_ffn(behind, ffn.gate, ffn.up, ffn.down, false));
    return {y.add_(sum), no_experts(sum)};
  }
  const auto [topk_weights, expert_idx, load] =
      moe::moe_route(linear_rows(behind, router->weight), router->bias, sizes.topk);
  at::Tensor y = std::get<0>(moe::moe_experts(behind, expert_idx, topk_weights, routed, shared, false));
  return {y.add_(sum), expert_idx};
}

at::Tensor Block::no_experts(const at::Tensor& x) const {
  return at::empty({x.size(0), router ? sizes.topk : 0}, x.options().dtype(at::kLong));
}

std::tuple<at::Tensor, at::Tensor> Block::operator()(
    const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& latent_cache, const at::Tensor& rope_cache,
    const at::Tensor& lengths) const {
  if (x.numel() == 0) return {at::empty_like(x), no_experts(x)};
  const auto [sum, behind, _] = attended(x, [&](const at::Tensor& normed) {
    return mla::mla_decode(
        normed, freqs, latent_cache, rope_cache, lengths, attention.mla, sizes.heads, eps.latent_norms);
  });
  return feed_forward(sum, behind);
}

std::tuple<at::Tensor, at::Tensor> Block::rows(
    const at::Tensor& x, const at::Tensor& freqs, const mla::Places& places, const at::Tensor& latent,
    const at::Tensor& k_rope) const {
  if (x.numel() == 0) return {at::empty_like(x), no_experts(x)};
  const auto [sum, behind, _] = attended(x, [&](const at::Tensor& normed) {
    return mla::mla_rows(normed, freqs, places, latent, k_rope, attention.mla, sizes.heads, eps.latent_norms);
  });
  // More tokens together would be computed by library products, whose bits depend on their number.
  const int64_t N = x.size(0), most = moe::kGemvTokens;
  if (N <= most) return feed_forward(sum, behind);
  std::vector<at::Tensor> y, chosen;
  for (int64_t n = 0; n < N; n += most) {
    const int64_t count = std::min(most, N - n);
    const auto [part, idx] = feed_forward(sum.narrow(0, n, count), behind.narrow(0, n, count));
    y.push_back(part);
    chosen.push_back(idx);
  }
  return {at::cat(y), at::cat(chosen)};
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
