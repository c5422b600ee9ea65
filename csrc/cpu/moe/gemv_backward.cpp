// The gemv path, backward: each chosen weight is read once, and its gradient is written in the same pass.
#include "cpu/moe/grouped.h"
#include "cpu/moe/swiglu.h"
#include "cpu/runtime/allocator.h"
#include "cpu/simd/small_gemm.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>

namespace openmythos::moe {
namespace {

// Columns of a weight matrix in one piece of work.
constexpr int64_t kColumns = 256;

// One expert and the tokens that chose it. Rows of (M, ...) arrays are the expert's rows in the plan.
template <typename T>
struct Job {
  using A = acc_t<T>;
  const T *gate, *up, *down;
  T *dgate, *dup, *ddown;  // or nullptr
  bool add;                // add the weights' gradients instead of overwriting
  int64_t inner, tokens;   // I, M
  const int64_t* pair;     // M entries token * K + slot; nullptr: a shared expert, weight 1
  const A *x, *dy;         // (M, D)
  const A *g, *u;          // (M, I), from the forward
  A *da, *dg, *du, *act;   // (M, I); act times the routing weight
  A* dx;                   // (M, D)
};

// Columns [begin, end) of a job: of I in the first phase, of D in the second.
struct Piece {
  int64_t job, begin, end;
};

// da, dg, du, act and the gradient of `down` in the piece's inner channels. Writes the piece's share of the routing
// weights' gradients to dtopk_weights.
template <typename T>
void through_down(
    const Job<T>& job, const Piece& piece, int64_t dim, const acc_t<T>* topk_weights, acc_t<T>* dtopk_weights) {
  using A = acc_t<T>;
  const int64_t c = piece.begin, n = piece.end - c, I = job.inner, M = job.tokens;
  for (int64_t m = 0; m < M; ++m) {
    A* act = job.act + m * I + c;
    swiglu(job.g + m * I + c, job.u + m * I + c, act, n);
    if (job.pair) std::transform(act, act + n, act, [weight = topk_weights[job.pair[m]]](A a) { return weight * a; });
    std::fill_n(job.da + m * I + c, n, A(0));
  }
  for (int64_t d = 0; d < dim; d += kStripRows) {
    const int64_t rows = std::min(kStripRows, dim - d);
    add_product<T>(job.down + d * I + c, I, rows, n, job.dy + d, dim, M, job.da + c, I);
    if (job.ddown) outer<T>(job.ddown + d * I + c, I, rows, n, job.dy + d, dim, job.act + c, I, M, job.add);
  }
  for (int64_t m = 0; m < M; ++m) {
    const int64_t at = m * I + c;
    const A weight = job.pair ? topk_weights[job.pair[m]] : A(1);
    // Its last output, the activation again, overwrites `da`, which is no longer needed.
    dtopk_weights[m] =
        swiglu_backward(job.g + at, job.u + at, job.da + at, weight, job.dg + at, job.du + at, job.da + at, n);
  }
}

// dx and the gradients of `gate` and `up` in the piece's model channels.
template <typename T>
void through_up(const Job<T>& job, const Piece& piece, int64_t dim, bool need_x) {
  const int64_t c = piece.begin, n = piece.end - c, I = job.inner, M = job.tokens;
  if (need_x) {
    for (int64_t m = 0; m < M; ++m) std::fill_n(job.dx + m * dim + c, n, acc_t<T>(0));
  }
  const auto pass = [&](const T* weight, T* gradient, const acc_t<T>* d) {
    for (int64_t i = 0; i < I; i += kStripRows) {
      const int64_t rows = std::min(kStripRows, I - i);
      if (need_x) add_product<T>(weight + i * dim + c, dim, rows, n, d + i, I, M, job.dx + c, dim);
      if (gradient) outer<T>(gradient + i * dim + c, dim, rows, n, d + i, I, job.x + c, dim, M, job.add);
    }
  };
  pass(job.gate, job.dgate, job.dg);
  pass(job.up, job.dup, job.du);
}

template <typename F>
void hand_out(const std::vector<Piece>& pieces, F f) {
  std::atomic<size_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    for (size_t i = next++; i < pieces.size(); i = next++) f(i);
  });
}

template <typename T>
void run(
    const at::Tensor& dy, const at::Tensor& x, const Plan& plan, const at::Tensor& topk_weights, const Experts& routed,
    const Experts& shared, const at::Tensor& saved_routed, const at::Tensor& saved_shared, const Wanted& wanted,
    const at::Tensor& dx_routed, const at::Tensor& dx_shared, const at::Tensor& dtopk_weights) {
  using A = acc_t<T>;
  const int64_t N = x.size(0), D = x.size(1), pairs = N * plan.slots, S = shared.size();
  const int64_t hidden = pairs * routed.inner + S * N * shared.inner;
  std::vector<A> sorted(2 * pairs * D), scratch(4 * hidden);
  const A *xp = x.const_data_ptr<A>(), *dyp = dy.const_data_ptr<A>();
  for (int64_t r = 0; r < pairs; ++r) {
    std::copy_n(xp + plan.token(r) * D, D, sorted.data() + r * D);
    std::copy_n(dyp + plan.token(r) * D, D, sorted.data() + (pairs + r) * D);
  }

  std::vector<Job<T>> jobs;
  std::vector<Piece> first, second;
  std::vector<int64_t> parts;  // per job: its first piece in `first`
  A* at = scratch.data();
  // kept: where dg, du and act go; else they go to `scratch`.
  const auto add = [&](const Experts& experts, const Experts& grads, int64_t e, int64_t tokens, const int64_t* pair,
                       const A* x, const A* dy, const A* g, const A* u, A* dx, const std::array<A*, 3>& kept = {}) {
    const int64_t job = jobs.size(), I = experts.inner, each = tokens * I;
    const bool need = !grads.gate.empty();
    parts.push_back(first.size());
    for (int64_t c = 0; c < I; c += kColumns) first.push_back({job, c, std::min(c + kColumns, I)});
    for (int64_t c = 0; c < D; c += kColumns) second.push_back({job, c, std::min(c + kColumns, D)});
    const auto pointer = [&](const std::vector<at::Tensor>& list) {
      return need ? list[e].template mutable_data_ptr<T>() : nullptr;
    };
    jobs.push_back(
        {experts.gate[e].template const_data_ptr<T>(), experts.up[e].template const_data_ptr<T>(),
         experts.down[e].template const_data_ptr<T>(), pointer(grads.gate), pointer(grads.up), pointer(grads.down),
         wanted.add, I, tokens, pair, x, dy, g, u, at, kept[0] ? kept[0] : at + each, kept[1] ? kept[1] : at + 2 * each,
         kept[2] ? kept[2] : at + 3 * each, dx});
    at += 4 * each;
  };
  const A *kept = saved_shared.const_data_ptr<A>(), *kept_routed = saved_routed.const_data_ptr<A>();
  if (wanted.x || wanted.weights(false)) {
    for (int64_t s = 0; s < S; ++s) {
      const A* g = kept + s * N * shared.inner;
      add(shared, wanted.shared, s, N, nullptr, xp, dyp, g, g + S * N * shared.inner,
          wanted.x ? dx_shared.mutable_data_ptr<A>() + s * N * D : nullptr);
    }
  }
  for (int64_t e = 0; e < routed.size(); ++e) {
    const int64_t row = plan.offset[e];
    if (plan.rows(e) == 0) continue;
    const A* g = kept_routed + row * routed.inner;
    const auto kept_row = [&](const at::Tensor& rows) {
      return rows.defined() ? rows.mutable_data_ptr<A>() + row * routed.inner : nullptr;
    };
    add(routed, wanted.routed, e, plan.rows(e), plan.pair.data() + row, sorted.data() + row * D,
        sorted.data() + (pairs + row) * D, g, g + pairs * routed.inner,
        wanted.x ? dx_routed.mutable_data_ptr<A>() + row * D : nullptr,
        {kept_row(wanted.kept.dgate), kept_row(wanted.kept.dup), kept_row(wanted.kept.act)});
  }

  const A* weights = topk_weights.const_data_ptr<A>();
  int64_t most = 0;
  for (const auto& job : jobs) most = std::max(most, job.tokens);
  std::vector<A> partial(first.size() * most);
  hand_out(first, [&](size_t i) { through_down(jobs[first[i].job], first[i], D, weights, partial.data() + i * most); });
  A* dweights = dtopk_weights.mutable_data_ptr<A>();
  for (size_t j = 0; j < jobs.size(); ++j) {
    if (!jobs[j].pair) continue;
    const size_t end = j + 1 < jobs.size() ? parts[j + 1] : first.size();
    for (int64_t m = 0; m < jobs[j].tokens; ++m) {
      A total = 0;
      for (size_t i = parts[j]; i < end; ++i) total += partial[i * most + m];
      dweights[jobs[j].pair[m]] = total;
    }
  }
  hand_out(second, [&](size_t i) { through_up(jobs[second[i].job], second[i], D, wanted.x); });
}

}  // namespace

Backward gemv_backward(
    const at::Tensor& dy, const at::Tensor& x, const Plan& plan, const at::Tensor& topk_weights, const Experts& routed,
    const Experts& shared, const at::Tensor& saved_routed, const at::Tensor& saved_shared, const Wanted& wanted) {
  const auto dtype = (routed.size() ? routed : shared).gate[0].scalar_type(), acc = at::toOpMathType(dtype);
  const int64_t N = x.size(0), D = x.size(1);
  const auto options = x.options().dtype(acc);
  const at::Tensor dx_routed = empty({wanted.x ? N * plan.slots : 0, D}, options);
  const at::Tensor dx_shared = empty({wanted.x ? shared.size() : 0, N, D}, options);
  const at::Tensor dtopk_weights = at::empty(topk_weights.sizes(), options);
  Backward out;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "moe_gemv_backward", [&] {
    run<scalar_t>(
        dy.to(acc), x.to(acc), plan, topk_weights.to(acc), routed, shared, saved_routed.to(acc), saved_shared.to(acc),
        wanted, dx_routed, dx_shared, dtopk_weights);
  });
  out.dx = wanted.x ? combine(plan, {}, dx_routed, dx_shared, N, D).to(x.scalar_type()) : at::empty({0}, x.options());
  out.dtopk_weights = dtopk_weights.to(topk_weights.scalar_type());
  return out;
}

}  // namespace openmythos::moe
