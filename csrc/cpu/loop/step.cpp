// openmythos::loop_step and loop_lora_step: LoRA delta, LTI injection, halting and the norm that enters the next loop,
// in one pass over (N, D).
//
// A group of rows is swept twice. The first sweep computes h' and, from registers, its dot product with the halting
// weight and the sum of squares of the next input; h' goes to a scratch buffer that stays in cache. The second sweep
// writes h', h_out' and u. So memory traffic is h, e, f, h_out read once and h', h_out', u written once; large results
// are streamed.
#include "cpu/loop/loop.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "cpu/loop/down.h"
#include "cpu/runtime/allocator.h"

namespace openmythos::loop {
namespace {

using at::Tensor;

template <typename T>
struct Rows {
  const T *h, *e, *f, *h_out;
  // With `down`, lora_hidden is computed here: raw * scale with raw = f @ down^T.
  const T *lora_hidden, *scale;
  const acc_t<T>* down;
  T* raw;
  const acc_t<T>*cumulative_p, *ponder;
  const bool* running;
  T *h_next, *h_out_next, *u;
  acc_t<T>*cumulative_p_next, *ponder_next, *p, *rstd;
  bool* running_next;
  acc_t<T> halt_bias, threshold, eps;
  int loop;
  bool spend_remainder, streamed;
  StepRows each;

  int loop_of(int64_t at) const { return each.loop ? static_cast<int>(each.loop[at]) : loop; }
  bool spends(int64_t at) const { return each.spend_remainder ? each.spend_remainder[at] : spend_remainder; }
};

// A thread's buffers for its rows: lora_hidden and h', row by row.
template <typename T>
struct Scratch {
  explicit Scratch(const Channels<T>& ch)
      : lora_hidden(new acc_t<T>[kRows * ch.rank]), states(new acc_t<T>[kRows * ch.tiles * width<T>]) {}
  std::unique_ptr<acc_t<T>[]> lora_hidden, states;
};

// Rows [row, row + R).
template <typename T, int64_t R, bool Enter>
void step_rows(const Rows<T>& x, const Channels<T>& ch, int64_t row, const Scratch<T>& scratch) {
  using A = acc_t<T>;
  using V = AccVec<T>;
  const int64_t D = ch.D, rank = ch.rank;
  A* lora_hidden = scratch.lora_hidden.get();
  if (x.down) {
    for (int64_t i = 0; i < R * D; i += width<T>) {
      fetch_tile(x.h + row * D + i);
      fetch_tile(x.e + row * D + i);
    }
    project_rows<T, R>(x.f, x.down, x.raw, row, D, ch.tiles, rank);
    for (int64_t i = 0; i < R * rank; ++i) lora_hidden[i] = scaled<T>(x.raw[row * rank + i], x.scale[i % rank]);
  } else {
    widen(x.lora_hidden + row * rank, lora_hidden, R * rank);
  }

  A deltas[R * kChunkTiles * width<T>];
  V logits[R], squares[R];
  for (int64_t r = 0; r < R; ++r) logits[r] = squares[r] = V(0);
  for (int64_t begin = 0; begin < ch.tiles; begin += kChunkTiles) {
    const int64_t end = std::min(begin + kChunkTiles, ch.tiles);
    for (int64_t t = begin; t < end; ++t) {
      Tile<T> delta[R];
      for (int64_t r = 0; r < R; ++r) delta[r] = splat<T>(0);
      for (int64_t k = 0; k < rank; ++k) {
        const Tile<T> up = ch.tile(t, kLora + k);
        for (int64_t r = 0; r < R; ++r) delta[r] = fma(splat<T>(lora_hidden[r * rank + k]), up, delta[r]);
      }
      for (int64_t r = 0; r < R; ++r) store_acc<T>(deltas + (r * kChunkTiles + t - begin) * width<T>, delta[r]);
    }
    for (int64_t r = 0; r < R; ++r) {
      const T *h = x.h + (row + r) * D, *e = x.e + (row + r) * D, *f = x.f + (row + r) * D;
      A* states = scratch.states.get() + r * ch.tiles * width<T>;
      const A* delta = deltas + r * kChunkTiles * width<T>;
      V logit(0), square(0);
      for_tiles<T>(D, begin, end, [&](int64_t t, int64_t c, auto n) {
        fetch_tile(x.h_out + (row + r) * D + c);
        const Tile<T> injected = load_tile(e + c, n);
        const Tile<T> block = load_tile(f + c, n) + load_acc<T>(delta + (t - begin) * width<T>);
        const Tile<T> state = fma(ch.tile(t, kA), load_tile(h + c, n), fma(ch.tile(t, kB), injected, block));
        const Tile<T> next = rounded(state);
        store_acc<T>(states + t * width<T>, next);
        logit = fold(next, ch.tile(t, kHalt), logit);
        if constexpr (Enter) {
          const Tile<T> entering = next + ch.tile(t, kEmb) + injected;
          square = fold(entering, entering, square);
        }
      });
      logits[r] = logits[r] + logit;
      squares[r] = squares[r] + square;
    }
  }

  for (int64_t r = 0; r < R; ++r) {
    const int64_t at = row + r;
    const A p = lti::sigmoid<A>(lane_sum(logits[r]) + x.halt_bias);
    const lti::Halt<A> step =
        lti::halt<A>(p, x.cumulative_p[at], x.ponder[at], x.running[at], x.loop_of(at), x.threshold, x.spends(at));
    x.p[at] = p;
    x.cumulative_p_next[at] = step.cumulative_p;
    x.ponder_next[at] = step.ponder;
    x.running_next[at] = step.running;
    const Tile<T> weight = splat<T>(step.weight);
    const A* states = scratch.states.get() + r * ch.tiles * width<T>;
    A rstd = 0;
    if constexpr (Enter) x.rstd[at] = rstd = A(1) / std::sqrt(lane_sum(squares[r]) / A(D) + x.eps);
    for_tiles<T>(D, 0, ch.tiles, [&](int64_t t, int64_t c, auto n) {
      const int64_t i = at * D + c;
      fetch_tile(x.f + i + R * D);  // of the next rows
      const Tile<T> h = load_acc<T>(states + t * width<T>);
      put_tile(x.h_next + i, h, n, x.streamed);
      put_tile(x.h_out_next + i, fma(weight, h, load_tile(x.h_out + i, n)), n, x.streamed);
      if constexpr (Enter) {
        const Tile<T> next = h + ch.tile(t, kEmb) + load_tile(x.e + i, n);
        put_tile(x.u + i, next * splat<T>(rstd) * ch.tile(t, kNorm), n, x.streamed);
      }
    });
  }
}

template <typename T, bool Enter>
void step_all(const Rows<T>& x, const Channels<T>& ch, int64_t N) {
  const int64_t groups = (N + kRows - 1) / kRows;
  const int64_t grain = std::max<int64_t>(1, 16384 / (kRows * std::max<int64_t>(ch.D, 1)));
  at::parallel_for(0, groups, grain, [&](int64_t begin, int64_t end) {
    const Scratch<T> scratch(ch);
    for (int64_t row = begin * kRows; row < std::min(end * kRows, N);) {
      if (row + kRows <= N) {
        step_rows<T, kRows, Enter>(x, ch, row, scratch);
        row += kRows;
      } else {
        step_rows<T, 1, Enter>(x, ch, row, scratch);
        row += 1;
      }
    }
    finish_streams();
  });
}

// Either lora_hidden, or the weights to compute it with and memory for `raw`.
struct Lora {
  at::Tensor lora_hidden, down, scale, raw;
};

StepResults run_step(
    const StepInputs& in, const Lora& lora, const StepWeights& weights, const at::Tensor& halt_bias,
    const StepOptions& options, const StepRows& each) {
  const bool enter = options.enter;
  const int64_t N = in.cumulative_p.numel(), D = weights.B.numel();
  const int64_t zero = 0;
  const at::IntArrayRef shape = in.h.sizes(), positions = in.cumulative_p.sizes(), none(zero);
  const at::TensorOptions like_h = in.h.options(), wide = in.cumulative_p.options();
  auto h_next = empty(shape, like_h), h_out_next = empty(shape, like_h);
  auto cumulative_p_next = at::empty(positions, wide), ponder_next = at::empty(positions, wide);
  auto running_next = at::empty(positions, in.running.options());
  auto u = empty(enter ? shape : none, like_h);
  auto p = at::empty(positions, wide), rstd = at::empty(enter ? positions : none, wide);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, in.h.scalar_type(), "loop_step", [&] {
    using T = scalar_t;
    using A = acc_t<T>;
    const Channels<T> channels(weights);
    const bool streamed = 3 * in.h.numel() * int64_t(sizeof(T)) >= kStreamBytes &&
                          streamable(h_next.const_data_ptr<T>(), D) && streamable(h_out_next.const_data_ptr<T>(), D) &&
                          streamable(u.const_data_ptr<T>(), D);
    const bool inside = !lora.lora_hidden.defined();
    const auto down = inside ? packed_rows<T>(lora.down, channels.rank, D, channels.tiles) : nullptr;
    const Rows<T> rows{
        in.h.const_data_ptr<T>(),
        in.e.const_data_ptr<T>(),
        in.f.const_data_ptr<T>(),
        in.h_out.const_data_ptr<T>(),
        inside ? nullptr : lora.lora_hidden.const_data_ptr<T>(),
        inside ? lora.scale.const_data_ptr<T>() : nullptr,
        down.get(),
        inside ? lora.raw.mutable_data_ptr<T>() : nullptr,
        in.cumulative_p.const_data_ptr<A>(),
        in.ponder.const_data_ptr<A>(),
        in.running.const_data_ptr<bool>(),
        h_next.mutable_data_ptr<T>(),
        h_out_next.mutable_data_ptr<T>(),
        u.mutable_data_ptr<T>(),
        cumulative_p_next.mutable_data_ptr<A>(),
        ponder_next.mutable_data_ptr<A>(),
        p.mutable_data_ptr<A>(),
        rstd.mutable_data_ptr<A>(),
        running_next.mutable_data_ptr<bool>(),
        A(*halt_bias.const_data_ptr<T>()),
        A(options.threshold),
        A(options.eps),
        static_cast<int>(options.loop),
        options.spend_remainder,
        streamed,
        each};
    enter ? step_all<T, true>(rows, channels, N) : step_all<T, false>(rows, channels, N);
  });
  return {h_next, h_out_next, cumulative_p_next, running_next, ponder_next, u, p, rstd};
}

}  // namespace

StepResults step(
    const StepInputs& inputs, const at::Tensor& lora_hidden, const StepWeights& weights, const at::Tensor& halt_bias,
    const StepOptions& options, const StepRows& rows) {
  return run_step(inputs, {lora_hidden, {}, {}, {}}, weights, halt_bias, options, rows);
}

namespace {

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Results as_tuple(StepResults x) { return {x.h, x.h_out, x.cumulative_p, x.running, x.ponder, x.u, x.p, x.rstd}; }

// The ops as Python declares them.
Results loop_step(
    const Tensor& h, const Tensor& e, const Tensor& f, const Tensor& lora_hidden, const Tensor& h_out,
    const Tensor& cumulative_p, const Tensor& running, const Tensor& ponder, const Tensor& lora_B, const Tensor& log_A,
    const Tensor& log_dt, const Tensor& B, const Tensor& halt_weight, const Tensor& halt_bias,
    const Tensor& norm_weight, const Tensor& emb, int64_t loop, double threshold, bool spend_remainder, bool enter,
    double eps) {
  return as_tuple(step(
      {h, e, f, h_out, cumulative_p, running, ponder}, lora_hidden,
      {lora_B, log_A, log_dt, B, halt_weight, norm_weight, emb}, halt_bias,
      {loop, threshold, spend_remainder, enter, eps}));
}

auto loop_lora_step(
    const Tensor& h, const Tensor& e, const Tensor& f, const Tensor& down, const Tensor& scale, const Tensor& h_out,
    const Tensor& cumulative_p, const Tensor& running, const Tensor& ponder, const Tensor& lora_B, const Tensor& log_A,
    const Tensor& log_dt, const Tensor& B, const Tensor& halt_weight, const Tensor& halt_bias,
    const Tensor& norm_weight, const Tensor& emb, int64_t loop, double threshold, bool spend_remainder, bool enter,
    double eps) {
  auto shape = h.sizes().vec();
  shape.back() = down.size(0);
  const Tensor raw = at::empty(shape, h.options());
  const StepResults out = run_step(
      {h, e, f, h_out, cumulative_p, running, ponder}, {{}, down, scale, raw},
      {lora_B, log_A, log_dt, B, halt_weight, norm_weight, emb}, halt_bias,
      {loop, threshold, spend_remainder, enter, eps}, {});
  return std::tuple_cat(as_tuple(out), std::make_tuple(raw));
}

}  // namespace

TORCH_LIBRARY_IMPL(openmythos, CPU, m) {
  m.impl("loop_step", loop_step);
  m.impl("loop_lora_step", loop_lora_step);
}

}  // namespace openmythos::loop
