// The gemv path: up to 128 tokens. It is memory-bound, so each weight of each chosen expert is read once, in row order.
#include "cpu/moe/experts.h"
#include "cpu/moe/swiglu.h"
#include "cpu/runtime/allocator.h"
#include "cpu/runtime/work_queue.h"
#include "cpu/simd/matvec.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <memory>

namespace openmythos::moe {
namespace {

// Rows of a weight matrix between two activations or combinations; their results fit the L1 cache.
constexpr int64_t kRows = 64;
// Bytes of weights that pay for waking a thread.
constexpr int64_t kThreadBytes = 1 << 16;

// One expert and the tokens that chose it.
template <typename T>
struct Job {
  const T *gate, *up, *down;
  int64_t inner;           // I
  int64_t tokens;          // M
  const int64_t* pair;     // M entries token * K + slot; nullptr: a shared expert, with all tokens and weight 1
  const acc_t<T>* x;       // (M, D)
  acc_t<T>* hidden;        // (M, I)
  T *kept_gate, *kept_up;  // (M, I) before the activation, for the backward; or nullptr
};

// hidden[:, r0:r1] = silu(x @ gate^T) * (x @ up^T), at most kRows columns.
template <typename T>
void gate_up(const Job<T>& job, int64_t dim, int64_t r0, int64_t r1, acc_t<T>* scratch) {
  const int64_t n = r1 - r0;
  acc_t<T>*g = scratch, *u = scratch + job.tokens * kRows;
  matvec<T>(job.gate + r0 * dim, dim, 0, n, job.x, job.tokens, g, kRows);
  matvec<T>(job.up + r0 * dim, dim, 0, n, job.x, job.tokens, u, kRows);
  for (int64_t m = 0; m < job.tokens; ++m) {
    if (job.kept_gate) {
      std::copy_n(g + m * kRows, n, job.kept_gate + m * job.inner + r0);
      std::copy_n(u + m * kRows, n, job.kept_up + m * job.inner + r0);
    }
    swiglu(g + m * kRows, u + m * kRows, job.hidden + m * job.inner + r0, n);
  }
}

// y[token, r0:r1] += weight * (hidden @ down^T)[:, r0:r1].
template <typename T>
void down(
    const Job<T>& job, const acc_t<T>* topk_weights, int64_t slots, int64_t dim, int64_t r0, int64_t r1, acc_t<T>* y,
    acc_t<T>* scratch) {
  for (int64_t r = r0; r < r1; r += kRows) {
    const int64_t n = std::min(kRows, r1 - r);
    matvec<T>(job.down + r * job.inner, job.inner, 0, n, job.hidden, job.tokens, scratch, kRows);
    for (int64_t m = 0; m < job.tokens; ++m) {
      const int64_t token = job.pair ? job.pair[m] / slots : m;
      const acc_t<T> weight = job.pair ? topk_weights[job.pair[m]] : acc_t<T>(1);
      axpy<acc_t<T>>(weight, scratch + m * kRows, y + token * dim + r, n);
    }
  }
}

// Jobs of some experts, and the rows of their gate and up matrices in pieces.
template <typename T>
struct Jobs {
  struct Piece {
    int64_t job, begin, end;
  };
  std::vector<Job<T>> jobs;
  std::vector<Piece> pieces;
  int64_t rows = 0;

  void add(
      const Experts& experts, int64_t e, int64_t tokens, const int64_t* pair, const acc_t<T>* x, acc_t<T>* hidden,
      T* kept, int64_t half) {
    for (int64_t r = 0; r < experts.inner; r += kRows) {
      pieces.push_back({static_cast<int64_t>(jobs.size()), r, std::min(r + kRows, experts.inner)});
    }
    jobs.push_back(
        {experts.gate[e].template const_data_ptr<T>(), experts.up[e].template const_data_ptr<T>(),
         experts.down[e].template const_data_ptr<T>(), experts.inner, tokens, pair, x, hidden, kept,
         kept ? kept + half : nullptr});
    rows += experts.inner;
  }
};

template <typename T>
void run(
    const at::Tensor& x, const Plan& plan, const at::Tensor& topk_weights, const Experts& routed, const Experts& shared,
    Forward& out, bool save, const Find& find) {
  using A = acc_t<T>;
  const int64_t N = x.size(0), D = x.size(1), S = shared.size();

  // In accumulator precision: y, x, the hidden activations of shared experts.
  const auto buffer = std::make_unique_for_overwrite<A[]>(N * (2 * D + S * shared.inner));
  A *const y = buffer.get(), *const xa = y + N * D, *const hidden = xa + N * D;
  std::fill_n(y, N * D, A(0));
  widen<T>(x.const_data_ptr<T>(), xa, N * D);
  Jobs<T> dense;
  T* const kept_shared = save ? out.saved_shared.template mutable_data_ptr<T>() : nullptr;
  for (int64_t s = 0; s < S; ++s) {
    const int64_t size = N * shared.inner;
    dense.add(shared, s, N, nullptr, xa, hidden + s * size, kept_shared ? kept_shared + s * size : nullptr, S * size);
  }

  // For routed experts: x in the plan's order, hidden activations.
  std::unique_ptr<A[]> more;
  Jobs<T> chosen;
  const auto prepare = [&]() -> int64_t {
    if (find) find();
    const bool sort = N > 1;
    const int64_t pairs = N * plan.slots;
    more = std::make_unique_for_overwrite<A[]>(pairs * ((sort ? D : 0) + routed.inner));
    A *const sorted = more.get(), *const routed_hidden = sorted + (sort ? pairs * D : 0);
    if (sort) {
      for (int64_t r = 0; r < pairs; ++r) std::copy_n(xa + plan.token(r) * D, D, sorted + r * D);
    }
    if (save) out.saved_routed = empty({2, pairs, routed.inner}, x.options());
    T* const kept = save ? out.saved_routed.template mutable_data_ptr<T>() : nullptr;
    for (int64_t e = 0; e < routed.size(); ++e) {
      const int64_t first = plan.offset[e];
      if (plan.rows(e) == 0) continue;
      chosen.add(
          routed, e, plan.rows(e), plan.pair.data() + first, sort ? sorted + first * D : xa,
          routed_hidden + first * routed.inner, kept ? kept + first * routed.inner : nullptr, pairs * routed.inner);
    }
    return dense.pieces.size() + chosen.pieces.size();
  };

  // By a work queue: pieces of shared experts, with all tokens, take longer.
  const int64_t early = dense.pieces.size();
  const bool together = find || (dense.rows + routed.size() * routed.inner) * D * int64_t(sizeof(T)) > kThreadBytes;
  run_tasks_after(together ? at::get_num_threads() : 1, early, prepare, [&](int64_t, auto next) {
    std::vector<A> scratch;
    for (int64_t i = next(); i >= 0; i = next()) {
      const Jobs<T>& of = i < early ? dense : chosen;
      const auto& piece = of.pieces[i < early ? i : i - early];
      const Job<T>& job = of.jobs[piece.job];
      scratch.resize(std::max<size_t>(scratch.size(), 2 * job.tokens * kRows));
      gate_up(job, D, piece.begin, piece.end, scratch.data());
    }
  });
  const at::Tensor wide_weights = topk_weights.to(at::toOpMathType(x.scalar_type()));
  const A* const weights = wide_weights.const_data_ptr<A>();
  const int64_t down_grain = std::max<int64_t>(1, kThreadBytes / ((dense.rows + chosen.rows) * sizeof(T) + 1));
  // Each thread owns columns of y and adds the jobs in order, so bits do not depend on the number of threads.
  at::parallel_for(0, D, down_grain, [&](int64_t begin, int64_t end) {
    std::vector<A> scratch;
    for (const auto* part : {&dense, &chosen}) {
      for (const auto& job : part->jobs) {
        scratch.resize(std::max<size_t>(scratch.size(), job.tokens * kRows));
        down(job, weights, plan.slots, D, begin, end, y, scratch.data());
      }
    }
  });
  std::copy_n(y, N * D, out.y.template mutable_data_ptr<T>());
}

}  // namespace

Forward gemv(
    const at::Tensor& x, const Plan& plan, const at::Tensor& topk_weights, const Experts& routed, const Experts& shared,
    bool save, const Find& find) {
  const auto dtype = (routed.size() ? routed : shared).gate[0].scalar_type();  // x's, or wider
  const at::Tensor input = x.to(dtype);
  Forward out{at::empty(x.sizes(), input.options()), at::empty({0}, input.options()), at::empty({0}, input.options())};
  if (save) out.saved_shared = empty({2, shared.size(), x.size(0), shared.inner}, input.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "moe_gemv", [&] {
    run<scalar_t>(input, plan, topk_weights, routed, shared, out, save, find);
  });
  const auto given = x.scalar_type();
  return {out.y.to(given), out.saved_routed.to(given), out.saved_shared.to(given)};
}

}  // namespace openmythos::moe
