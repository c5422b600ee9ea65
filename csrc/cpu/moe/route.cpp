// openmythos::moe_route and its backward: one pass over the logits chooses experts, weighs and counts them.
#include "cpu/moe/experts.h"
#include "cpu/simd/vec.h"

#include <ATen/Dispatch.h>
#include <ATen/NumericUtils.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

namespace openmythos::moe {
namespace {

// Tokens that pay for waking a thread.
constexpr int64_t kGrain = 64;

// Moves the k largest to the front, in descending order. The same calls as in at::topk, so that ties fall alike.
template <typename A>
void choose(std::vector<std::pair<A, int64_t>>& queue, int64_t k) {
  const auto larger = [](const auto& a, const auto& b) {
    return (at::_isnan(a.first) && !at::_isnan(b.first)) || a.first > b.first;
  };
  if (k * 64 <= static_cast<int64_t>(queue.size())) {
    std::partial_sort(queue.begin(), queue.begin() + k, queue.end(), larger);
  } else {
    std::nth_element(queue.begin(), queue.begin() + k - 1, queue.end(), larger);
    std::sort(queue.begin(), queue.begin() + k - 1, larger);
  }
}

// Routes tokens [begin, end). S: the dtype of logits + bias in PyTorch.
template <typename T, typename S>
void route(
    const T* logits, const S* bias, int64_t experts, int64_t k, int64_t begin, int64_t end, T* topk_weights,
    int64_t* expert_idx, int64_t* load) {
  using A = acc_t<T>;
  std::vector<std::pair<A, int64_t>> queue(experts);
  std::vector<A> weight(k);
  for (int64_t n = begin; n < end; ++n) {
    const T* row = logits + n * experts;
    for (int64_t e = 0; e < experts; ++e) queue[e] = {A(S(A(row[e]) + A(bias[e]))), e};
    choose(queue, k);
    A most = -std::numeric_limits<A>::infinity(), total = 0;
    for (int64_t j = 0; j < k; ++j) {
      const int64_t e = queue[j].second;
      expert_idx[n * k + j] = e;
      ++load[e];
      weight[j] = row[e];
      most = weight[j] > most || at::_isnan(weight[j]) ? weight[j] : most;
    }
    // If all are -inf, exp(-inf + inf) = NaN, as in PyTorch's softmax.
    for (auto& w : weight) total += w = std::exp(w - most);
    for (int64_t j = 0; j < k; ++j) topk_weights[n * k + j] = weight[j] / total;
  }
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> moe_route(const at::Tensor& logits, const at::Tensor& bias, int64_t k) {
  const int64_t N = logits.size(0), E = logits.size(1);
  const at::Tensor shift = logits.scalar_type() == at::kDouble ? bias.to(at::kDouble) : bias;
  at::Tensor topk_weights = at::empty({N, k}, logits.options());
  at::Tensor expert_idx = at::empty({N, k}, logits.options().dtype(at::kLong));
  // Each thread counts into its own row; sums of integers do not depend on the order.
  const int64_t threads = N > kGrain ? at::get_num_threads() : 1;
  at::Tensor load = at::zeros({threads, E}, expert_idx.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "moe_route", [&] {
    const auto run = [&](const auto* b) {
      at::parallel_for(0, N, kGrain, [&](int64_t begin, int64_t end) {
        const int64_t thread = threads > 1 ? at::get_thread_num() : 0;
        route(
            logits.const_data_ptr<scalar_t>(), b, E, k, begin, end, topk_weights.mutable_data_ptr<scalar_t>(),
            expert_idx.mutable_data_ptr<int64_t>(), load.mutable_data_ptr<int64_t>() + thread * E);
      });
    };
    if (shift.scalar_type() == logits.scalar_type()) {
      run(shift.const_data_ptr<scalar_t>());
    } else {
      run(shift.const_data_ptr<float>());
    }
  });
  return {topk_weights, expert_idx, threads > 1 ? load.sum(0) : load[0]};
}

namespace {

at::Tensor moe_route_backward(
    const at::Tensor& dtopk_weights, const at::Tensor& expert_idx, const at::Tensor& topk_weights, int64_t experts) {
  const int64_t N = topk_weights.size(0), K = topk_weights.size(1);
  at::Tensor dlogits = at::zeros({N, experts}, topk_weights.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, topk_weights.scalar_type(), "moe_route_backward", [&] {
    using A = acc_t<scalar_t>;
    const scalar_t *dw = dtopk_weights.const_data_ptr<scalar_t>(), *w = topk_weights.const_data_ptr<scalar_t>();
    const int64_t* expert = expert_idx.const_data_ptr<int64_t>();
    scalar_t* out = dlogits.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, N, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        A mean = 0;
        for (int64_t p = n * K; p < (n + 1) * K; ++p) mean += A(w[p]) * A(dw[p]);
        for (int64_t p = n * K; p < (n + 1) * K; ++p) out[n * experts + expert[p]] = A(w[p]) * (A(dw[p]) - mean);
      }
    });
  });
  return dlogits;
}

}  // namespace
}  // namespace openmythos::moe

TORCH_LIBRARY_IMPL(openmythos, CPU, m) {
  m.impl("moe_route", openmythos::moe::moe_route);
  m.impl("moe_route_backward", openmythos::moe::moe_route_backward);
}
