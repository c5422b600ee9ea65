// The grouped path, backward. No expert output is saved: a routing weight's gradient is the inner product of the hidden
// activation with its gradient (as in SonicMoE, arXiv 2512.14080), and activations are recomputed from what forward
// saved.
#include "cpu/moe/grouped.h"

#include "cpu/moe/panels.h"
#include "cpu/moe/swiglu.h"
#include "cpu/runtime/allocator.h"
#include "cpu/simd/gemm.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>

namespace openmythos::moe {
namespace {

// out (+)= a^T @ b in a's dtype, stored in out's.
void weight_gradient(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool add, bool recurring) {
  if (out.scalar_type() == a.scalar_type()) return gemm(out, a.t(), b, add, recurring);
  at::Tensor wide = empty(out.sizes(), a.options());
  gemm(wide, a.t(), b, false, recurring);
  add ? out.add_(wide) : out.copy_(wide);
}

}  // namespace

Backward grouped_backward(
    const at::Tensor& dy, const at::Tensor& x, const Plan& plan, const at::Tensor& topk_weights, const Experts& routed,
    const Experts& shared, const at::Tensor& saved_routed, const at::Tensor& saved_shared, const Wanted& wanted) {
  const auto type = compute_type(x.scalar_type()), acc = at::toOpMathType(type);
  const auto options = x.options().dtype(type);
  const int64_t N = x.size(0), D = x.size(1), pairs = N * plan.slots, S = shared.size();
  const at::Tensor xc = x.to(type), dyc = dy.to(type), weights_acc = topk_weights.to(acc);
  at::Tensor dx_routed = empty({wanted.x ? pairs : 0, D}, options);
  at::Tensor dx_shared = empty({wanted.x ? S : 0, N, D}, options);
  at::Tensor dtopk_weights = at::empty(topk_weights.sizes(), weights_acc.options());
  Backward out;

  const auto by_library = [&](const Work& item, int64_t) {
    const Experts& experts = item.routed ? routed : shared;
    const Experts& grads = item.routed ? wanted.routed : wanted.shared;
    const bool need_weights = wanted.weights(item.routed);
    const int64_t e = item.expert, begin = item.routed ? plan.offset[e] : 0, rows = item.rows, I = experts.inner;
    if (!item.routed && !wanted.x && !need_weights) return;
    const at::Tensor d = item.routed ? gather_rows(dyc, plan, begin, begin + rows) : dyc;
    const at::Tensor kept = (item.routed ? saved_routed.narrow(1, begin, rows) : saved_shared.select(1, e));
    const at::Tensor g = kept.select(0, 0).to(type), u = kept.select(0, 1).to(type);
    at::Tensor da = empty({rows, I}, options), du = empty({rows, I}, options);
    at::Tensor dg = empty({rows, I}, options), a = da;
    gemm(da, d, experts.down[e].to(type), false, !item.routed);
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, type, "moe_swiglu_backward", [&] {
      using A = acc_t<scalar_t>;
      const scalar_t *gp = g.const_data_ptr<scalar_t>(), *up = u.const_data_ptr<scalar_t>();
      scalar_t *dap = da.mutable_data_ptr<scalar_t>(), *dgp = dg.mutable_data_ptr<scalar_t>();
      scalar_t* dup = du.mutable_data_ptr<scalar_t>();
      const A* weights = weights_acc.const_data_ptr<A>();
      A* dweights = dtopk_weights.mutable_data_ptr<A>();
      at::parallel_for(0, rows, 16, [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r) {
          const int64_t pair = item.routed ? plan.pair[begin + r] : 0, i = r * I;
          const A weight = item.routed ? weights[pair] : A(1);
          const A sum = swiglu_backward(gp + i, up + i, dap + i, weight, dgp + i, dup + i, dap + i, I);
          if (item.routed) dweights[pair] = sum;
        }
      });
    });
    if (item.routed && wanted.kept.act.defined()) {
      wanted.kept.dgate.narrow(0, begin, rows).copy_(dg);
      wanted.kept.dup.narrow(0, begin, rows).copy_(du);
      wanted.kept.act.narrow(0, begin, rows).copy_(a);
    }
    if (need_weights) {
      const at::Tensor input = item.routed ? gather_rows(xc, plan, begin, begin + rows) : xc;
      weight_gradient(grads.down[e], d, a, wanted.add, !item.routed);
      weight_gradient(grads.gate[e], dg, input, wanted.add, !item.routed);
      weight_gradient(grads.up[e], du, input, wanted.add, !item.routed);
    }
    if (wanted.x) {
      const at::Tensor dx = item.routed ? dx_routed.narrow(0, begin, rows) : dx_shared.select(0, e);
      gemm(dx, dg, experts.gate[e].to(type), false, !item.routed);
      gemm(dx, du, experts.up[e].to(type), true, !item.routed);
    }
  };
  Schedule(work_items(N, shared)).run(by_library);
  if (routed_by_library(type)) {
    Schedule(work_items(plan, routed)).run(by_library);
  } else {
    panels_backward(dyc, xc, plan, weights_acc, routed, saved_routed.to(type), wanted, dx_routed, dtopk_weights);
  }
  out.dx = wanted.x ? combine(plan, {}, dx_routed, dx_shared, N, D).to(x.scalar_type()) : at::empty({0}, x.options());
  out.dtopk_weights = dtopk_weights.to(topk_weights.scalar_type());
  return out;
}

}  // namespace openmythos::moe
