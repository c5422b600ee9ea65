// The grouped path: for each expert two GEMMs, SwiGLU and one GEMM; then the sums per token.
#include "cpu/moe/grouped.h"

#include "cpu/moe/bf16_dot.h"
#include "cpu/moe/panels.h"
#include "cpu/moe/swiglu.h"
#include "cpu/runtime/allocator.h"
#include "cpu/simd/gemm.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>

#include <cstring>

namespace openmythos::moe {

at::ScalarType compute_type(at::ScalarType dtype) {
  if (dtype == at::kHalf) return at::kFloat;
  if (dtype == at::kBFloat16) {
#if defined(__x86_64__) && defined(__GNUC__)
    static const bool native = __builtin_cpu_supports("avx512bf16");
    return native ? at::kBFloat16 : at::kFloat;
#else
    return at::kFloat;
#endif
  }
  return dtype;
}

at::Tensor gather_rows(const at::Tensor& src, const Plan& plan, int64_t begin, int64_t end) {
  at::Tensor dst = empty({end - begin, src.size(1)}, src.options());
  const int64_t bytes = src.size(1) * src.element_size();
  const char* from = static_cast<const char*>(src.const_data_ptr());
  char* to = static_cast<char*>(dst.mutable_data_ptr());
  at::parallel_for(begin, end, 64, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) std::memcpy(to + (r - begin) * bytes, from + plan.token(r) * bytes, bytes);
  });
  return dst;
}

at::Tensor combine(
    const Plan& plan, const at::Tensor& topk_weights, const at::Tensor& routed, const at::Tensor& shared,
    int64_t tokens, int64_t dim) {
  if (plan.slots == 0 && shared.size(0) == 1) return shared.select(0, 0);  // a sum of one term
  at::Tensor y = empty({tokens, dim}, routed.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, y.scalar_type(), "moe_combine", [&] {
    using T = scalar_t;
    using A = acc_t<T>;
    const T *r = routed.const_data_ptr<T>(), *s = shared.const_data_ptr<T>();
    const A* weights = topk_weights.defined() ? topk_weights.const_data_ptr<A>() : nullptr;
    T* out = y.mutable_data_ptr<T>();
    const int64_t K = plan.slots;
    at::parallel_for(0, tokens, 16, [&](int64_t begin, int64_t end) {
      std::vector<A> total(dim);
      for (int64_t n = begin; n < end; ++n) {
        std::fill(total.begin(), total.end(), A(0));
        for (int64_t k = n * K; k < (n + 1) * K; ++k) {
          axpy<T>(weights ? weights[k] : A(1), r + plan.row[k] * dim, total.data(), dim);
        }
        for (int64_t e = 0; e < shared.size(0); ++e) axpy<T>(A(1), s + (e * tokens + n) * dim, total.data(), dim);
        std::copy_n(total.data(), dim, out + n * dim);
      }
    });
  });
  return y;
}

Forward grouped(
    const at::Tensor& x, const Plan& plan, const at::Tensor& topk_weights, const Experts& routed, const Experts& shared,
    bool save, const Find& find) {
  const auto type = compute_type(x.scalar_type());
  const auto options = x.options().dtype(type);
  const int64_t N = x.size(0), D = x.size(1), S = shared.size();
  const at::Tensor xc = x.to(type), none = at::empty({0}, x.options());
  const Bf16Experts dense{
      shared, nullptr, empty({S, N, D}, options), save ? empty({2, S, N, shared.inner}, x.options()) : none};
  Bf16Experts chosen{routed, &plan, {}, {}};

  const auto by_library = [&](const Work& item, int64_t) {
    if (item.rows == 0) return;
    const Experts& experts = item.routed ? routed : shared;
    const int64_t e = item.expert, begin = item.routed ? plan.offset[e] : 0, rows = item.rows;
    const at::Tensor input = item.routed ? gather_rows(xc, plan, begin, begin + rows) : xc;
    const at::Tensor result = item.routed ? chosen.y.narrow(0, begin, rows) : dense.y.select(0, e);
    at::Tensor g = empty({rows, experts.inner}, options), u = empty({rows, experts.inner}, options);
    gemm(g, input, experts.gate[e].to(type).t(), false, !item.routed);
    gemm(u, input, experts.up[e].to(type).t(), false, !item.routed);
    if (save) {
      const at::Tensor kept = item.routed ? chosen.saved.narrow(1, begin, rows) : dense.saved.select(1, e);
      kept.select(0, 0).copy_(g);
      kept.select(0, 1).copy_(u);
    }
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, type, "moe_swiglu", [&] {
      const scalar_t* up = u.const_data_ptr<scalar_t>();
      scalar_t* gate = g.mutable_data_ptr<scalar_t>();
      at::parallel_for(0, rows * experts.inner, 1 << 14, [&](int64_t first, int64_t last) {
        swiglu(gate + first, up + first, gate + first, last - first);
      });
    });
    gemm(result, g, experts.down[e].to(type).t(), false, !item.routed);
  };
  const auto prepare = [&] {
    if (find) find();
    chosen.y = empty({N * plan.slots, D}, options);
    chosen.saved = save ? empty({2, N * plan.slots, routed.inner}, options) : none;
    return chosen.supported(xc);
  };
  bool done = false;
  if (dense.supported(xc)) {
    done = bf16_dot_experts(xc, dense, chosen, prepare);
  } else {
    Schedule(work_items(N, shared)).run(by_library);
    prepare();
  }
  if (!done && routed_by_library(type)) {
    Schedule(work_items(plan, routed)).run(by_library);
  } else if (!done) {
    panels(xc, plan, routed, chosen.y, chosen.saved);
  }
  const auto acc = at::toOpMathType(type);
  const at::Tensor y = combine(plan, topk_weights.to(acc), chosen.y, dense.y, N, D);
  return {y.to(x.scalar_type()), chosen.saved.to(x.scalar_type()), dense.saved};
}

}  // namespace openmythos::moe
