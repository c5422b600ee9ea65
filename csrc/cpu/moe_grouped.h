// What the grouped forward and backward share: work items, their schedule, library GEMMs on raw views.
#pragma once

#include "cpu/moe.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <atomic>

namespace openmythos::moe {

// One expert's work. Routed experts own rows of the plan; a shared expert has all tokens.
struct Work {
  bool routed;
  int64_t expert;
  int64_t rows;
  int64_t cost;  // rows * inner width
};

inline std::vector<Work> work_items(const Plan& plan, const Experts& routed, const Experts& shared, int64_t tokens) {
  std::vector<Work> items;
  for (int64_t s = 0; s < shared.size(); ++s) items.push_back({false, s, tokens, tokens * shared.inner});
  for (int64_t e = 0; e < routed.size(); ++e) {
    if (plan.rows(e) > 0) items.push_back({true, e, plan.rows(e), plan.rows(e) * routed.inner});
  }
  return items;
}

// Calls f(item) for every item. One that would keep a single thread busy for longer than its fair share runs alone,
// its GEMMs threaded by the library; the others are handed out one to a thread, longest first.
// Which thread runs an item has no influence on its result.
template <typename F>
void schedule(std::vector<Work> items, F f) {
  at::AutoDispatchBelowADInplaceOrView below;
  at::NoGradGuard no_grad;
  const int64_t threads = at::get_num_threads();
  std::stable_sort(items.begin(), items.end(), [](const Work& a, const Work& b) { return a.cost > b.cost; });
  int64_t left = 0;
  for (const auto& item : items) left += item.cost;
  size_t alone = 0;
  while (alone < items.size() && threads > 1 && items[alone].cost * threads > left) {
    left -= items[alone].cost;
    f(items[alone++]);
  }
  std::atomic<size_t> next{alone};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    // Dispatch keys and grad mode are thread local; the pool's threads start with autograd on.
    at::AutoDispatchBelowADInplaceOrView thread_below;
    at::NoGradGuard thread_no_grad;
    for (size_t i = next++; i < items.size(); i = next++) f(items[i]);
  });
}

// The type GEMMs run in. Where the processor has no bf16 products, PyTorch's bf16 GEMM is up to 80 times slower than
// the fp32 one, so operands are widened, an expert at a time.
at::ScalarType compute_type(at::ScalarType dtype);

// dst[i] = src[row_of(i)]; src (·, D), dst (rows, D).
at::Tensor gather_rows(const at::Tensor& src, const Plan& plan, int64_t begin, int64_t end);

// y[n] = sum_k scale[n, k] * routed[row of (n, k)] + sum_s shared[s, n]; gates undefined: scale 1. Fixed order.
at::Tensor combine(
    const Plan& plan, const at::Tensor& gates, const at::Tensor& routed, const at::Tensor& shared, int64_t tokens,
    int64_t dim);

}  // namespace openmythos::moe
