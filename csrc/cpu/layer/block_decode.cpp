// openmythos::block_decode. At one token a block is a dozen small calls, and what Python spends between them is more
// than most of them take; here they follow each other directly.
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

#include <vector>

namespace openmythos::decode {
namespace {

constexpr size_t kAttention = 10, kRouter = 2, kEps = 3;
// A thread is worth waking for this many weights.
constexpr int64_t kThreadWeights = 1 << 15;

at::TensorList part(at::TensorList all, int64_t i, int64_t count) {
  const size_t each = all.size() / count;
  return all.slice(i * each, each);
}

// x (B, D) times the rows of a weight, as torch.nn.functional.linear.
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

Blocks::Blocks(
    at::TensorList attention, at::TensorList router, at::TensorList gate, at::TensorList up, at::TensorList down,
    at::TensorList shared_gate, at::TensorList shared_up, at::TensorList shared_down, c10::ArrayRef<double> eps,
    Sizes sizes)
    : count_(attention.size() / kAttention),
      all_{attention, router, gate, up, down, shared_gate, shared_up, shared_down, eps, sizes} {
  TORCH_CHECK_VALUE(
      count_ > 0 && attention.size() % kAttention == 0, "attention: got ", attention.size(), " tensors, must be ",
      kAttention, " for each block");
  TORCH_CHECK_VALUE(
      router.empty() || router.size() == kRouter * count_, "router: got ", router.size(), " tensors, must be ", kRouter,
      " for each of ", count_, " blocks, or none");
  TORCH_CHECK_VALUE(
      eps.size() == kEps * count_, "eps: got ", eps.size(), " numbers, must be ", kEps, " for each block");
  for (const at::TensorList& list : {gate, up, down, shared_gate, shared_up, shared_down}) {
    TORCH_CHECK_VALUE(
        list.size() % count_ == 0, "experts: got a list of ", list.size(), " tensors for ", count_,
        " blocks: each must have as many");
  }
  TORCH_CHECK_VALUE(
      router.empty() ? gate.empty() && shared_gate.size() == size_t(count_) : !gate.empty(), "router: got ",
      router.size(), " tensors with ", gate.size(), " routed and ", shared_gate.size(),
      " shared experts; a dense layer is one shared expert, without router");
}

Block Blocks::operator[](int64_t i) const {
  const auto mine = [&](at::TensorList all) { return part(all, i, count_); };
  return {
      mine(all_.attention),
      mine(all_.router),
      mine(all_.gate),
      mine(all_.up),
      mine(all_.down),
      mine(all_.shared_gate),
      mine(all_.shared_up),
      mine(all_.shared_down),
      all_.eps.slice(i * kEps, kEps),
      all_.sizes};
}

void Block::check(
    const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& latent_cache, const at::Tensor& rope_cache,
    const at::Tensor& lengths) const {
  const auto [topk, heads, nope, rope, v] = sizes;
  const at::TensorList a = attention;
  mla::check_decode(
      x, freqs, latent_cache, rope_cache, lengths, a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], heads, nope, rope,
      v);
  const int64_t D = x.size(1);
  const auto dtype = x.scalar_type();
  fits("attn_norm", a[0], {D}, dtype);
  fits("ffn_norm", a[9], {D}, dtype);
  if (router.empty()) {
    const int64_t inner = shared_gate[0].dim() == 2 ? shared_gate[0].size(0) : 0;
    fits("gate", shared_gate[0], {inner, D}, dtype);
    fits("up", shared_up[0], {inner, D}, dtype);
    fits("down", shared_down[0], {D, inner}, dtype);
    return;
  }
  const int64_t experts = gate.size();
  fits("router", router[0], {experts, D}, dtype);
  fits("router_bias", router[1], {experts}, router[1].scalar_type() == at::kFloat ? at::kFloat : dtype);
  TORCH_CHECK_VALUE(
      0 < topk && topk <= experts, "topk = ", topk, ": must be in [1, ", experts, "], the number of experts");
}

std::tuple<at::Tensor, at::Tensor> Block::operator()(
    const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& latent_cache, const at::Tensor& rope_cache,
    const at::Tensor& lengths) const {
  const at::TensorList a = attention;
  if (x.numel() == 0)
    return {at::empty_like(x), at::empty({x.size(0), router.empty() ? 0 : sizes.topk}, lengths.options())};
  const at::Tensor normed = std::get<1>(norm::rms_norm(x, std::nullopt, a[0], eps[0]));
  const at::Tensor attended = mla::mla_decode(
      normed, freqs, latent_cache, rope_cache, lengths, a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], sizes.heads,
      sizes.nope, sizes.rope, sizes.v, eps[1]);
  auto [sum, behind, _] = norm::rms_norm(x, attended, a[9], eps[2]);
  if (router.empty()) {
    at::Tensor y = std::get<0>(moe::swiglu_ffn(behind, shared_gate[0], shared_up[0], shared_down[0], false));
    return {y.add_(sum), at::empty({x.size(0), 0}, lengths.options())};
  }
  const auto [topk_weights, expert_idx, load] = moe::moe_route(logits(behind, router[0]), router[1], sizes.topk);
  at::Tensor y = std::get<0>(
      moe::moe_experts(behind, expert_idx, topk_weights, gate, up, down, shared_gate, shared_up, shared_down, false));
  return {y.add_(sum), expert_idx};
}

namespace {

std::tuple<at::Tensor, at::Tensor> block_decode(
    const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& lengths, at::Tensor latent_cache,
    at::Tensor rope_cache, at::TensorList attention, at::TensorList router, at::TensorList gate, at::TensorList up,
    at::TensorList down, at::TensorList shared_gate, at::TensorList shared_up, at::TensorList shared_down, int64_t topk,
    int64_t heads, int64_t nope, int64_t rope, int64_t v, c10::ArrayRef<double> eps) {
  const Block block = Blocks(
      attention, router, gate, up, down, shared_gate, shared_up, shared_down, eps, {topk, heads, nope, rope, v})[0];
  block.check(x, freqs, latent_cache, rope_cache, lengths);
  return block(x, freqs, latent_cache, rope_cache, lengths);
}

}  // namespace
}  // namespace openmythos::decode

TORCH_LIBRARY_IMPL(openmythos, CPU, m) { m.impl("block_decode", openmythos::decode::block_decode); }
