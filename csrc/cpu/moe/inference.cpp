// A layer without gradients: routing, and experts, of which only the chosen ones are looked up.
#include "cpu/moe/experts.h"

#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/empty_like.h>
#include <ATen/record_function.h>
#include <c10/util/Exception.h>

#include <algorithm>

namespace openmythos::moe {
namespace {

// The dtype of a linear layer's input: that of autocast, if on.
at::ScalarType compute_type_of(const at::Tensor& x) {
  const bool cast = at::autocast::is_autocast_enabled(at::kCPU) && x.scalar_type() != at::kDouble;
  return cast ? at::autocast::get_autocast_dtype(at::kCPU) : x.scalar_type();
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> moe_inference(
    const at::Tensor& x, const Router& router, const at::Tensor& bias, int64_t k, const Lists& shared_weights,
    const Look& look) {
  RECORD_FUNCTION("openmythos::moe_inference", c10::ArrayRef<const c10::IValue>{});
  TORCH_CHECK_VALUE(x.dim() > 0, "x must be (..., D), got ", x.sizes());
  const int64_t dim = x.size(-1), E = bias.numel();
  const auto type = compute_type_of(x);
  const at::Tensor rounded = x.scalar_type() == type ? x : x.to(type);  // `to` would return x as well, but slowly
  const at::Tensor flat = rounded.reshape({-1, dim}).contiguous();
  Experts routed, shared;
  if (const auto& [gate, up, down] = shared_weights; !gate.empty()) {
    shared = checked_experts("shared_", {gate, up, down}, dim, weight_dtype(gate, flat));
  }

  at::Tensor topk_weights, expert_idx, load;
  Plan plan;
  std::vector<int64_t> used;
  const auto route = [&] {
    const at::Tensor logits = router(flat);
    TORCH_CHECK_VALUE(
        is_plain(logits) && logits.dim() == 2 && logits.size(0) == flat.size(0) && logits.size(1) == E && 0 < k &&
            k <= E,
        "the router's logits of x, bias and k must be (N, E), (E) and in [1, E], got ", logits.sizes(), " of ",
        flat.sizes(), ", ", bias.sizes(), " and ", k);
    TORCH_CHECK_VALUE(
        is_plain(bias) && (bias.scalar_type() == logits.scalar_type() || bias.scalar_type() == at::kFloat),
        "bias must be ", logits.scalar_type(), " or float32 on cpu, got ", bias.scalar_type(), " on ", bias.device());
    std::tie(topk_weights, expert_idx, load) = moe_route(logits.contiguous(), bias.contiguous(), k);

    // Renumber the experts among the chosen ones; the result is the same to the bit.
    std::vector<int64_t> place(E);
    for (int64_t e = 0; e < E; ++e) {
      if (load.const_data_ptr<int64_t>()[e] == 0) continue;
      place[e] = used.size();
      used.push_back(e);
    }
    const at::Tensor among = at::empty_like(expert_idx);
    const int64_t* const from = expert_idx.const_data_ptr<int64_t>();
    std::transform(
        from, from + expert_idx.numel(), among.mutable_data_ptr<int64_t>(), [&](int64_t e) { return place[e]; });
    plan = sort_by_expert(among, used.size());
  };
  // Route first, on all threads, if one thread would take longer for the router than the others for the shared experts.
  const bool early = flat.size(0) == 0 || E * at::get_num_threads() > 3 * shared.size() * shared.inner;
  if (early) route();
  if (flat.size(0) == 0) return {at::empty_like(x), expert_idx, load};
  const auto find = [&] {
    if (!early) route();
    const auto [gate, up, down] = look(used);
    const auto dtype = shared.size() > 0 ? shared.gate[0].scalar_type() : weight_dtype(gate, flat);
    routed = checked_experts("w_", {gate, up, down}, dim, dtype);
    TORCH_CHECK_VALUE(
        routed.size() == int64_t(used.size()), "got ", routed.size(), " of ", used.size(), " chosen experts");
  };
  const Forward out = forward(flat, plan, topk_weights, routed, shared, false, find);
  const at::Tensor y = out.y.view(x.sizes());
  return {type == x.scalar_type() ? y : y.to(x.scalar_type()), expert_idx, load};
}

}  // namespace openmythos::moe
