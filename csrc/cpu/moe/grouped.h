// What the grouped forward and backward share: work items, their schedule, gathering and combining rows.
#pragma once

#include "cpu/moe/experts.h"
#include "cpu/runtime/work_queue.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <utility>

namespace openmythos::moe {

// One expert's work. A routed expert owns rows of the plan, a shared one has all tokens.
struct Work {
  bool routed;
  int64_t expert;
  int64_t rows;
  int64_t cost;  // rows * inner width
};

inline std::vector<Work> work_items(const Plan& plan, const Experts& routed) {
  std::vector<Work> items;
  for (int64_t e = 0; e < routed.size(); ++e) {
    if (plan.rows(e) > 0) items.push_back({true, e, plan.rows(e), plan.rows(e) * routed.inner});
  }
  return items;
}

inline std::vector<Work> work_items(int64_t tokens, const Experts& shared) {
  std::vector<Work> items;
  for (int64_t s = 0; s < shared.size(); ++s) items.push_back({false, s, tokens, tokens * shared.inner});
  return items;
}

// Items, longest first. An item that would keep one thread busy beyond its fair share runs alone, on all threads; the
// others run one to a thread, from a work queue.
struct Schedule {
  std::vector<Work> items;
  size_t alone = 0;  // how many items, from the front, run alone

  explicit Schedule(std::vector<Work> work) : items(std::move(work)) {
    std::stable_sort(items.begin(), items.end(), [](const Work& a, const Work& b) { return a.cost > b.cost; });
    const int64_t threads = at::get_num_threads();
    int64_t left = 0;
    for (const auto& item : items) left += item.cost;
    for (; alone < items.size() && threads > 1 && items[alone].cost * threads > left; ++alone)
      left -= items[alone].cost;
  }

  // Calls f(item, worker) for every item. worker: -1 for an item that runs alone, else unique to the thread, in [0,
  // threads). Which thread runs an item must change no bit of its result.
  template <typename F>
  void run(F f) const {
    at::AutoDispatchBelowADInplaceOrView below;
    at::NoGradGuard no_grad;
    for (size_t i = 0; i < alone; ++i) f(items[i], -1);
    run_tasks(items.size() - alone, [&](int64_t worker, auto next) {
      // Dispatch keys and grad mode are thread-local; the pool's threads start with autograd on.
      at::AutoDispatchBelowADInplaceOrView thread_below;
      at::NoGradGuard thread_no_grad;
      for (int64_t i = next(); i >= 0; i = next()) f(items[alone + i], worker);
    });
  }
};

// The dtype GEMMs run in. Without bf16 instructions PyTorch's bf16 GEMM is up to 80 times slower than float32, so
// operands are widened, an expert at a time.
at::ScalarType compute_type(at::ScalarType dtype);

// Whether routed experts, whose numbers of rows vary from call to call, use the library too.
inline bool routed_by_library(at::ScalarType compute) { return compute == at::kBFloat16; }

// dst[i] = src[row_of(i)]; src (·, D), dst (rows, D).
at::Tensor gather_rows(const at::Tensor& src, const Plan& plan, int64_t begin, int64_t end);

// y[n] = sum_k scale[n, k] * routed[row of (n, k)] + sum_s shared[s, n]; topk_weights undefined: scale 1. Fixed order.
at::Tensor combine(
    const Plan& plan, const at::Tensor& topk_weights, const at::Tensor& routed, const at::Tensor& shared,
    int64_t tokens, int64_t dim);

}  // namespace openmythos::moe
