// openmythos::moe_experts and its backward: checks of the weights, choice of the path.
#include "cpu/moe/experts.h"

#include "cpu/moe/grouped.h"
#include "cpu/runtime/allocator.h"

#include <ATen/EmptyTensor.h>
#include <ATen/OpMathType.h>
#include <ATen/core/TensorBody.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

namespace openmythos::moe {

Forward forward(
    const at::Tensor& x, const Plan& plan, const at::Tensor& topk_weights, const Experts& routed, const Experts& shared,
    bool save, const Find& find) {
  if (find && shared.size() == 0) {  // nothing to start on meanwhile
    find();
    return forward(x, plan, topk_weights, routed, shared, save);
  }
  return (x.size(0) <= kGemvTokens ? gemv : grouped)(x, plan, topk_weights, routed, shared, save, find);
}

at::ScalarType kept_type(int64_t tokens, at::ScalarType x, at::ScalarType weights) {
  return tokens <= kGemvTokens ? at::toOpMathType(weights) : compute_type(x);
}

void check_rows(const char* name, const at::Tensor& rows, at::IntArrayRef sizes, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(
      rows.sizes() == sizes && rows.scalar_type() == dtype && rows.is_contiguous() && rows.is_cpu(), name,
      ": must be dense ", sizes, " ", dtype, ", got ", rows.sizes(), " ", rows.scalar_type());
}

Backward backward(
    const at::Tensor& dy, const at::Tensor& x, const Plan& plan, const at::Tensor& topk_weights, const Experts& routed,
    const Experts& shared, const at::Tensor& saved_routed, const at::Tensor& saved_shared, const Wanted& wanted) {
  const auto path = x.size(0) <= kGemvTokens ? gemv_backward : grouped_backward;
  return path(dy, x, plan, topk_weights, routed, shared, saved_routed, saved_shared, wanted);
}

Plan sort_by_expert(const at::Tensor& expert_idx, int64_t experts) {
  const int64_t pairs = expert_idx.numel();
  const int64_t* expert = expert_idx.const_data_ptr<int64_t>();
  Plan plan;
  plan.slots = expert_idx.size(1);
  plan.offset.assign(experts + 1, 0);
  plan.pair.resize(pairs);
  plan.row.resize(pairs);
  for (int64_t i = 0; i < pairs; ++i) {
    TORCH_CHECK_VALUE(
        expert[i] >= 0 && expert[i] < experts, "expert_idx must lie in [0, ", experts, "), got ", expert[i]);
    ++plan.offset[expert[i] + 1];
  }
  for (int64_t e = 0; e < experts; ++e) plan.offset[e + 1] += plan.offset[e];
  std::vector<int64_t> next(plan.offset.begin(), plan.offset.end() - 1);
  for (int64_t i = 0; i < pairs; ++i) {
    const int64_t row = next[expert[i]]++;
    plan.pair[row] = i;
    plan.row[i] = row;
  }
  return plan;
}

Experts gradients(const Experts& experts, bool needed, const Plan* plan, bool more) {
  Experts result;
  result.inner = experts.inner;
  if (!needed) return result;
  const auto is_idle = [&](int64_t e) { return plan && plan->rows(e) == 0; };
  // Zeros that no other call adds to need not be written. With `more` all gradients lie in one block, whose size does
  // not depend on the routing, so that the next step reuses it.
  const auto is_apart = [&](int64_t e) { return !more && is_idle(e); };
  std::vector<at::Tensor> used, idle;
  for (const auto e : c10::irange(experts.size())) {
    auto& like = is_apart(e) ? idle : used;
    like.insert(like.end(), {experts.gate[e], experts.up[e], experts.down[e]});
  }
  used = empty_together(used);
  idle = zeros_together(idle);
  auto next_used = used.begin(), next_idle = idle.begin();
  for (const auto e : c10::irange(experts.size())) {
    for (auto* to : {&result.gate, &result.up, &result.down}) {
      to->push_back(is_apart(e) ? *next_idle++ : *next_used++);
      if (more && is_idle(e)) to->back().zero_();
    }
  }
  return result;
}

bool is_plain(const at::Tensor& t) {
  if (!t.is_cpu() || t.layout() != at::kStrided || t.unsafeGetTensorImpl()->is_python_dispatch()) return false;
  const size_t end = at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.itemsize(), t.storage_offset());
  return t.storage().nbytes() >= end;
}

namespace {

std::vector<at::Tensor> checked(
    at::TensorList weights, const char* prefix, const char* name, int64_t rows, int64_t cols, at::ScalarType dtype) {
  std::vector<at::Tensor> result;
  result.reserve(weights.size());
  for (const auto i : c10::irange(weights.size())) {
    const at::Tensor& w = weights[i];
    TORCH_CHECK_VALUE(
        w.dim() == 2 && w.size(0) == rows && w.size(1) == cols && w.scalar_type() == dtype && is_plain(w), prefix, name,
        "[", i, "] must be (", rows, ", ", cols, ") ", dtype, " on cpu, got ", w.sizes(), " ", w.scalar_type(), " on ",
        w.device());
    result.push_back(w.contiguous());
  }
  return result;
}

}  // namespace

Experts checked_experts(const char* prefix, const ExpertLists& weights, int64_t dim, at::ScalarType dtype) {
  const auto& [gate, up, down] = weights;
  TORCH_CHECK_VALUE(
      gate.size() == up.size() && gate.size() == down.size(), prefix, "gate, ", prefix, "up and ", prefix,
      "down must be equally long, got ", gate.size(), ", ", up.size(), " and ", down.size());
  Experts e;
  if (gate.empty()) return e;
  e.inner = gate[0].dim() == 2 ? gate[0].size(0) : 0;
  e.gate = checked(gate, prefix, "gate", e.inner, dim, dtype);
  e.up = checked(up, prefix, "up", e.inner, dim, dtype);
  e.down = checked(down, prefix, "down", dim, e.inner, dtype);
  return e;
}

at::ScalarType weight_dtype(at::TensorList w_gate, const at::Tensor& x) {
  TORCH_CHECK_VALUE(!w_gate.empty(), "w_gate must not be empty");
  const bool master = w_gate[0].scalar_type() == at::kFloat && x.scalar_type() != at::kDouble;
  return master ? at::kFloat : x.scalar_type();
}

namespace {

// A layer's experts and routing, checked.
struct Layer {
  Experts routed, shared;
  Plan plan;

  Layer(const at::Tensor& x, const at::Tensor& expert_idx, const ExpertLists& w, const ExpertLists& shared_w) {
    const auto dtype = weight_dtype(w.gate, x);
    routed = checked_experts("w_", w, x.size(1), dtype);
    shared = checked_experts("shared_", shared_w, x.size(1), dtype);
    plan = sort_by_expert(expert_idx, routed.size());
  }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> moe_experts(
    const at::Tensor& x, const at::Tensor& expert_idx, const at::Tensor& topk_weights, const ExpertLists& routed,
    const ExpertLists& shared, bool save) {
  const Layer layer(x, expert_idx, routed, shared);
  Forward out = forward(x, layer.plan, topk_weights, layer.routed, layer.shared, save);
  return {out.y, out.saved_routed, out.saved_shared};
}

namespace {

// The ops as Python declares them.
std::tuple<at::Tensor, at::Tensor, at::Tensor> moe_experts_op(
    const at::Tensor& x, const at::Tensor& expert_idx, const at::Tensor& topk_weights, at::TensorList w_gate,
    at::TensorList w_up, at::TensorList w_down, at::TensorList shared_gate, at::TensorList shared_up,
    at::TensorList shared_down, bool save) {
  return moe_experts(x, expert_idx, topk_weights, {w_gate, w_up, w_down}, {shared_gate, shared_up, shared_down}, save);
}

using Tensors = std::vector<at::Tensor>;

// The tensors that gradients of these weights are added to: one for each weight, of its shape and dtype; or none.
Experts sums(const char* name, const Experts& weights, const ExpertLists& lists) {
  Experts result;
  result.inner = weights.inner;
  if (lists.gate.empty()) return result;
  for (auto [to, from, of] :
       {std::tuple{&result.gate, lists.gate, &weights.gate},
        {&result.up, lists.up, &weights.up},
        {&result.down, lists.down, &weights.down}}) {
    TORCH_CHECK_VALUE(from.size() == of->size(), name, ": got ", from.size(), " tensors for ", of->size(), " weights");
    for (const auto i : c10::irange(from.size())) {
      const at::Tensor &sum = from[i], &w = (*of)[i];
      TORCH_CHECK_VALUE(
          sum.sizes() == w.sizes() && sum.scalar_type() == w.scalar_type() && sum.is_contiguous() && sum.is_cpu(), name,
          "[", i, "] must be dense ", w.sizes(), " ", w.scalar_type(), ", got ", sum.sizes(), " ", sum.scalar_type());
      to->push_back(sum);
    }
  }
  return result;
}

std::tuple<at::Tensor, at::Tensor, Tensors, Tensors, Tensors, Tensors, Tensors, Tensors> moe_experts_backward(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& expert_idx, const at::Tensor& topk_weights,
    at::TensorList w_gate, at::TensorList w_up, at::TensorList w_down, at::TensorList shared_gate,
    at::TensorList shared_up, at::TensorList shared_down, const at::Tensor& saved_routed,
    const at::Tensor& saved_shared, bool need_x, bool need_routed, bool need_shared, bool more) {
  const auto [routed, shared, plan] =
      Layer(x, expert_idx, {w_gate, w_up, w_down}, {shared_gate, shared_up, shared_down});
  const Wanted wanted{need_x, gradients(routed, need_routed, &plan, more), gradients(shared, need_shared)};
  Backward g = backward(dy, x, plan, topk_weights, routed, shared, saved_routed, saved_shared, wanted);
  return {
      g.dx,
      g.dtopk_weights,
      wanted.routed.gate,
      wanted.routed.up,
      wanted.routed.down,
      wanted.shared.gate,
      wanted.shared.up,
      wanted.shared.down};
}

// The same, adding the weights' gradients to dw_gate, ..., dshared_down; empty lists if not wanted.
std::tuple<at::Tensor, at::Tensor> moe_experts_backward_add(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& expert_idx, const at::Tensor& topk_weights,
    at::TensorList w_gate, at::TensorList w_up, at::TensorList w_down, at::TensorList shared_gate,
    at::TensorList shared_up, at::TensorList shared_down, const at::Tensor& saved_routed,
    const at::Tensor& saved_shared, bool need_x, at::TensorList dw_gate, at::TensorList dw_up, at::TensorList dw_down,
    at::TensorList dshared_gate, at::TensorList dshared_up, at::TensorList dshared_down) {
  const auto [routed, shared, plan] =
      Layer(x, expert_idx, {w_gate, w_up, w_down}, {shared_gate, shared_up, shared_down});
  const Wanted wanted{
      need_x, sums("dw", routed, {dw_gate, dw_up, dw_down}),
      sums("dshared", shared, {dshared_gate, dshared_up, dshared_down}), true};
  Backward g = backward(dy, x, plan, topk_weights, routed, shared, saved_routed, saved_shared, wanted);
  return {g.dx, g.dtopk_weights};
}

// The same for shared experts alone, overwriting dshared_gate, ..., dshared_down unless `add`. Instead of the routed
// gradients come the rows that they are products of, and the plan that orders these.
std::tuple<at::Tensor, at::Tensor> moe_experts_backward_rows(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& expert_idx, const at::Tensor& topk_weights,
    at::TensorList w_gate, at::TensorList w_up, at::TensorList w_down, at::TensorList shared_gate,
    at::TensorList shared_up, at::TensorList shared_down, const at::Tensor& saved_routed,
    const at::Tensor& saved_shared, bool need_x, bool add, at::TensorList dshared_gate, at::TensorList dshared_up,
    at::TensorList dshared_down, const at::Tensor& dpre, const at::Tensor& act, const at::Tensor& offsets,
    const at::Tensor& pair) {
  const auto [routed, shared, plan] =
      Layer(x, expert_idx, {w_gate, w_up, w_down}, {shared_gate, shared_up, shared_down});
  const int64_t pairs = expert_idx.numel(), I = routed.inner;
  check_rows("dpre", dpre, {2 * pairs, I}, x.scalar_type());
  check_rows("act", act, {pairs, I}, x.scalar_type());
  check_rows("offsets", offsets, {routed.size() + 1}, at::kInt);
  check_rows("pair", pair, {pairs}, at::kInt);
  const auto type = kept_type(x.size(0), x.scalar_type(), routed.gate[0].scalar_type());
  const auto as_computed = [&](const at::Tensor& rows) {
    return type == rows.scalar_type() ? rows : empty(rows.sizes(), rows.options().dtype(type));
  };
  const std::array<at::Tensor, 3> rows{dpre.narrow(0, 0, pairs), dpre.narrow(0, pairs, pairs), act};
  const KeptRows kept{as_computed(rows[0]), as_computed(rows[1]), as_computed(rows[2])};
  const Wanted wanted{need_x, {}, sums("dshared", shared, {dshared_gate, dshared_up, dshared_down}), add, kept};
  Backward g = backward(dy, x, plan, topk_weights, routed, shared, saved_routed, saved_shared, wanted);
  if (type != x.scalar_type()) {
    rows[0].copy_(kept.dgate);
    rows[1].copy_(kept.dup);
    rows[2].copy_(kept.act);
  }
  std::copy(plan.offset.begin(), plan.offset.end(), offsets.mutable_data_ptr<int32_t>());
  std::copy(plan.pair.begin(), plan.pair.end(), pair.mutable_data_ptr<int32_t>());
  return {g.dx, g.dtopk_weights};
}

}  // namespace
}  // namespace openmythos::moe

TORCH_LIBRARY_IMPL(openmythos, CPU, m) {
  m.impl("moe_experts", openmythos::moe::moe_experts_op);
  m.impl("moe_experts_backward", openmythos::moe::moe_experts_backward);
  m.impl("moe_experts_backward_add", openmythos::moe::moe_experts_backward_add);
  m.impl("moe_experts_backward_rows", openmythos::moe::moe_experts_backward_rows);
}
