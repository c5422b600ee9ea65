// openmythos::loop_rows: independent tokens through loops of a recurrent block, each from a loop of its own on.
#include "cpu/layer/block_decode.h"
#include "cpu/layer/loop_step.h"
#include "cpu/norm/norm_row.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace openmythos::layer {
namespace {

using at::Tensor;

// Row n: RMSNorm(h + embedding of loop[n] + e).
Tensor enter_rows(
    const Tensor& h, const Tensor& e, const Tensor& loop, at::TensorList embeddings, const Tensor& weight, double eps) {
  const int64_t N = h.size(0), D = h.size(1);
  const int64_t* const t = loop.const_data_ptr<int64_t>();
  Tensor u = at::empty_like(h);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, h.scalar_type(), "enter_rows", [&] {
    using T = scalar_t;
    using A = acc_t<T>;
    const T *state = h.const_data_ptr<T>(), *injected = e.const_data_ptr<T>();
    T* const to = u.mutable_data_ptr<T>();
    std::vector<A> scales(D);
    widen(weight.const_data_ptr<T>(), scales.data(), D);
    const int64_t grain = std::max<int64_t>(1, norm::kThreadElements / std::max<int64_t>(D, 1));
    at::parallel_for(0, N, grain, [&](int64_t begin, int64_t end) {
      std::vector<A> sum(D);
      for (int64_t n = begin; n < end; ++n) {
        const Tensor& emb = embeddings[t[n]];
        const T* const number = emb.const_data_ptr<T>();
        for (int64_t i = 0; i < D; ++i) sum[i] = A(state[n * D + i]) + A(injected[n * D + i]);
        for (int64_t i = 0; i < emb.size(0); ++i) sum[i] += A(number[i]);
        const A scale = A(1) / std::sqrt(dot<A>(sum.data(), sum.data(), D) / A(D) + A(eps));
        norm::leave<T>(sum.data(), scales.data(), scale, to + n * D, D);
      }
    });
  });
  return u;
}

// All arguments of the op but the weights of the blocks.
struct Rows {
  const Tensor &h, &e, &h_out, &cumulative_p, &ponder, &running, &loop, &limit, &freqs;
  mla::Places places;
  at::TensorList latents, k_ropes, embeddings;
  double norm_eps, threshold;
  bool spend_remainder, residual, freeze, act;
  int64_t loops;

  // Row n has loops left.
  bool runs(int64_t n) const {
    return loop.const_data_ptr<int64_t>()[n] < limit.const_data_ptr<int64_t>()[n] &&
           (!freeze || running.const_data_ptr<bool>()[n]);
  }

  // ValueError naming what does not fit; nothing has been written then.
  void check(const std::vector<Block>& blocks) const {
    TORCH_CHECK_VALUE(
        latents.size() == blocks.size() && k_ropes.size() == blocks.size(), "latents, k_ropes: got ", latents.size(),
        " and ", k_ropes.size(), " tensors, must be one for each of ", blocks.size(), " blocks");
    for (size_t i = 0; i < blocks.size(); ++i) blocks[i].check_rows(h, freqs, latents[i], k_ropes[i]);
    const int64_t N = h.size(0);
    const auto wide = at::toOpMathType(h.scalar_type());
    for (const auto& [name, t] : {std::tuple{"e", &e}, {"h_out", &h_out}})
      mla::fits(name, *t, h.sizes(), h.scalar_type());
    mla::fits("cumulative_p", cumulative_p, {N}, wide);
    mla::fits("ponder", ponder, {N}, wide);
    mla::fits("running", running, {N}, at::kBool);
    mla::fits("limit", limit, {N}, at::kLong);
    check_embeddings(embeddings, h);
    places.check(N);
    int64_t rows = latents[0].size(0);
    for (const Tensor& pool : latents) rows = std::min(rows, pool.size(0));
    for (int64_t n = 0; n < N; ++n) {
      if (!runs(n)) continue;
      const int64_t t = loop.const_data_ptr<int64_t>()[n], end = limit.const_data_ptr<int64_t>()[n];
      TORCH_CHECK_VALUE(
          end <= int64_t(embeddings.size()), "limit[", n, "] = ", end, ": there are embeddings of ", embeddings.size(),
          " loops");
      places.check_row(n, std::min(end - t, loops) + t - 1, rows);
    }
  }

  // Counts the tokens of each expert; for checked arguments.
  Tensor run(const std::vector<Block>& blocks, const Step& step) const {
    const int64_t experts = blocks[0].routed.gate.size();
    const Tensor load = at::zeros({int64_t(blocks.size()), experts}, loop.options());
    for (int64_t i = 0; i < loops; ++i) {
      std::vector<int64_t> rows;
      for (int64_t n = 0; n < h.size(0); ++n) {
        if (runs(n)) rows.push_back(n);
      }
      if (rows.empty()) break;
      const Tensor at = at::empty({int64_t(rows.size())}, loop.options());
      std::copy(rows.begin(), rows.end(), at.mutable_data_ptr<int64_t>());
      run_once(blocks, step, at, load);
    }
    return load;
  }

  // One loop of rows `at`.
  void run_once(const std::vector<Block>& blocks, const Step& step, const Tensor& at, const Tensor& load) const {
    const bool all = at.size(0) == h.size(0);
    const auto of = [&](const Tensor& x) { return all ? x : x.index_select(0, at); };
    const auto put = [&](const Tensor& x, const Tensor& value) { all ? x.copy_(value) : x.index_copy_(0, at, value); };
    const Tensor sequence = of(places.sequence), position = of(places.position), t = of(loop), angles = of(freqs);
    const Tensor before = of(h), injected = of(e), ends = of(limit);
    const mla::Places here{sequence, position, t, places.first, places.last, places.keep};
    deepen(here);

    const Tensor u = enter_rows(before, injected, t, embeddings, step.weights.norm_weight, norm_eps);
    Tensor f = u;
    for (size_t i = 0; i < blocks.size(); ++i) {
      Tensor expert_idx;
      std::tie(f, expert_idx) = blocks[i].rows(f, angles, here, latents[i], k_ropes[i]);
      int64_t* const count = load.mutable_data_ptr<int64_t>() + i * load.size(1);
      const int64_t* const chosen = expert_idx.const_data_ptr<int64_t>();
      for (int64_t k = 0; k < expert_idx.numel(); ++k) ++count[chosen[k]];
    }
    const Tensor lora_hidden = step.lora_hidden_rows(f, t);
    if (residual) f = at::sub(f, u);
    const Tensor spends = at::empty(t.sizes(), running.options());
    std::transform(
        t.const_data_ptr<int64_t>(), t.const_data_ptr<int64_t>() + t.numel(), ends.const_data_ptr<int64_t>(),
        spends.mutable_data_ptr<bool>(), [&](int64_t t, int64_t end) { return spend_remainder && t == end - 1; });
    // Without halting no row runs, as far as the step knows: it adds nothing to h_out.
    const Tensor held = of(cumulative_p), runs = act ? of(running) : at::zeros_like(spends);
    const loop::StepResults state = loop::step(
        {before, injected, f, of(h_out), held, runs, of(ponder)}, lora_hidden, step.with(embeddings[0]),
        step.weights.halt_bias, {0, threshold, false, false, norm_eps},
        {t.const_data_ptr<int64_t>(), spends.const_data_ptr<bool>()});
    put(h, state.h);
    put(h_out, act ? state.h_out : state.h);
    if (act) {
      put(cumulative_p, state.cumulative_p);
      put(ponder, state.ponder);
      put(running, state.running);
    }
    put(loop, at::add(t, 1));
  }

  // Tokens have latents of the loop that is about to run.
  static void deepen(const mla::Places& here) {
    const mla::Table table = here.table();
    int32_t* const last = here.last.mutable_data_ptr<int32_t>();
    for (int64_t n = 0; n < here.loop.size(0); ++n) {
      last[table.sequence[n] * table.last_stride + table.position[n]] = static_cast<int32_t>(table.loop[n]);
    }
  }
};

// The op as Python declares it.
Tensor loop_rows(
    Tensor h, const Tensor& e, Tensor h_out, Tensor cumulative_p, Tensor ponder, Tensor running, Tensor loop,
    const Tensor& limit, const Tensor& freqs, const Tensor& sequence, const Tensor& position, const Tensor& first,
    Tensor last, at::TensorList latents, at::TensorList k_ropes, at::TensorList attention, at::TensorList router,
    at::TensorList gate, at::TensorList up, at::TensorList down, at::TensorList shared_gate, at::TensorList shared_up,
    at::TensorList shared_down, int64_t topk, int64_t heads, int64_t nope, int64_t rope, int64_t v,
    c10::ArrayRef<double> eps, at::TensorList lora, at::TensorList step, at::TensorList embeddings, int64_t keep,
    double norm_eps, double threshold, bool spend_remainder, bool residual, bool freeze, bool act, int64_t loops) {
  const Rows rows{h,          e,
                  h_out,      cumulative_p,
                  ponder,     running,
                  loop,       limit,
                  freqs,      {sequence, position, loop, first, last, keep},
                  latents,    k_ropes,
                  embeddings, norm_eps,
                  threshold,  spend_remainder,
                  residual,   freeze,
                  act,        loops};
  const std::vector<Block> blocks = split(
      {attention,
       router,
       {gate, up, down},
       {shared_gate, shared_up, shared_down},
       eps,
       {topk, {heads, nope, rope, v}}});
  rows.check(blocks);
  return rows.run(blocks, Step(step, lora, h));
}

}  // namespace
}  // namespace openmythos::layer

TORCH_LIBRARY_IMPL(openmythos, CPU, m) { m.impl("loop_rows", openmythos::layer::loop_rows); }
