// openmythos::loop_step_backward and loop_lora_step_backward: all gradients from h' and two scalars per position.
//
// As in forward, groups of rows are swept twice: first for the two dot products that a row's scalars need (the
// gradients of its halting weight and of its norm), then for the gradients. Memory traffic is six (N, D) tensors read
// once and three written once. With the LoRA's down-projection, a third sweep sends the gradient of f through it, and
// reads f as well.
//
// Parameter gradients are sums over N: each block of rows (`RowBlocks`) sums into its own slab, and a second pass adds
// the slabs in order.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cstring>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/loop/down.h"
#include "cpu/runtime/allocator.h"
#include "cpu/runtime/row_blocks.h"

namespace openmythos::loop {
namespace {

// Rows of a slab's tile: column sums for A, B, halt_weight, norm_weight, lora_B and, with the down-projection, down.
enum Sum : int64_t { kSumA, kSumB, kSumHalt, kSumNorm, kSumLora };

inline int64_t slab_rows(int64_t rank, bool inside) { return kSumLora + (inside ? 2 : 1) * rank; }

// The rows of a gradient. An absent one reads as zeros: one row with stride 0.
template <typename T>
struct Grad {
  const T* data;
  int64_t stride;
  const T* row(int64_t i) const { return data + i * stride; }
};

template <typename T>
struct Rows {
  Grad<T> grad_h, grad_out, grad_u;
  const acc_t<T>*grad_cumulative_p, *grad_ponder;  // may be null
  const T *h, *e, *h_next;
  bool inside;  // whether lora_hidden is raw * scale with raw = f @ down^T
  const T *lora_hidden, *f, *raw, *scale;
  const acc_t<T>* down;
  const acc_t<T>*cumulative_p, *p, *rstd;
  const bool* running;
  T *dh, *de, *df, *dlora_hidden;
  acc_t<T>*dcumulative_p, *dponder;
  acc_t<T> threshold;
  bool spend_remainder, streamed;
};

template <typename T>
struct Scratch {
  explicit Scratch(const Channels<T>& ch)
      : lora_hidden(new acc_t<T>[kRows * ch.rank]), total(new acc_t<T>[kRows * ch.tiles * width<T>]) {}
  std::unique_ptr<acc_t<T>[]> lora_hidden, total;  // `total`: the whole gradient of h', (tiles, rows, width)
};

template <typename T>
inline void add_product(acc_t<T>* sums, const Tile<T>& a, const Tile<T>& b) {
  store_acc<T>(sums, fma(a, b, load_acc<T>(sums)));
}

// Sums of a block of rows.
template <typename T>
struct Sums {
  acc_t<T>* slab;
  double *bias, *scale;  // gradients of the halting bias and of the LoRA's scale (rank)
};

// The gradient of f for rows [row, row + R) from those of f + LoRA(f) (`total`) and of raw (`grad`, R x rank).
template <typename T, int64_t R>
void through_down(
    const Rows<T>& x, const Channels<T>& ch, int64_t row, const acc_t<T>* total, const acc_t<T>* grad, acc_t<T>* slab) {
  const int64_t D = ch.D, rank = ch.rank, slab_tile = slab_rows(rank, true) * width<T>;
  for_tiles<T>(D, 0, ch.tiles, [&](int64_t t, int64_t c, auto n) {
    Tile<T> f[R], df[R];
    for (int64_t r = 0; r < R; ++r) {
      f[r] = load_tile(x.f + (row + r) * D + c, n);
      df[r] = load_acc<T>(total + (t * kRows + r) * width<T>);
    }
    for (int64_t k = 0; k < rank; ++k) {
      acc_t<T>* at = slab + t * slab_tile + (kSumLora + rank + k) * width<T>;
      const Tile<T> w = load_acc<T>(x.down + (k * ch.tiles + t) * width<T>);
      Tile<T> sum = load_acc<T>(at);
      for (int64_t r = 0; r < R; ++r) {
        const Tile<T> g = splat<T>(grad[r * rank + k]);
        df[r] = fma(g, w, df[r]);
        sum = fma(g, f[r], sum);
      }
      store_acc<T>(at, sum);
    }
    for (int64_t r = 0; r < R; ++r) put_tile(x.df + (row + r) * D + c, df[r], n, x.streamed);
  });
}

// Rows [row, row + R); adds to the sums of their block.
template <typename T, int64_t R, bool Enter>
void step_rows(const Rows<T>& x, const Channels<T>& ch, int64_t row, Scratch<T>& scratch, const Sums<T>& block) {
  using A = acc_t<T>;
  using V = AccVec<T>;
  const int64_t D = ch.D, rank = ch.rank;
  A* lora_hidden = scratch.lora_hidden.get();
  A* total = scratch.total.get();
  A* slab = block.slab;
  if (x.inside) {
    for (int64_t i = 0; i < R * rank; ++i) lora_hidden[i] = scaled<T>(x.raw[row * rank + i], x.scale[i % rank]);
  } else {
    widen(x.lora_hidden + row * rank, lora_hidden, R * rank);
  }

  // dh' = grad_h + weight * grad_out + logit * halt_weight + scale * grad_u * norm_weight + shrink * (h' + emb + e)
  A weight[R], logit[R], scale[R], shrink[R];
  for (int64_t r = 0; r < R; ++r) {
    const int64_t at = row + r;
    const T *grad_out = x.grad_out.row(at), *grad_u = x.grad_u.row(at);
    const T *h_next = x.h_next + at * D, *e = x.e + at * D;
    V on_weight(0), on_norm(0);
    for (int64_t begin = 0; begin < ch.tiles; begin += kChunkTiles) {
      V of_weight(0), of_norm(0);
      for_tiles<T>(D, begin, std::min(begin + kChunkTiles, ch.tiles), [&](int64_t t, int64_t c, auto n) {
        fetch_tile(x.h + at * D + c);
        const Tile<T> h = load_tile(h_next + c, n);
        of_weight = fold(load_tile(grad_out + c, n), h, of_weight);
        if constexpr (Enter) {
          const Tile<T> next = h + ch.tile(t, kEmb) + load_tile(e + c, n);
          of_norm = fold(load_tile(grad_u + c, n) * ch.tile(t, kNorm), next, of_norm);
        }
      });
      on_weight = on_weight + of_weight;
      on_norm = on_norm + of_norm;
    }
    const A p = x.p[at];
    const lti::Halt<A> step =
        lti::halt<A>(p, x.cumulative_p[at], A(0), x.running[at], 0, x.threshold, x.spend_remainder);
    const lti::HaltGrad<A> grad = lti::halt_backward<A>(
        x.cumulative_p[at], x.running[at], step.remainder, lane_sum(on_weight),
        x.grad_cumulative_p ? x.grad_cumulative_p[at] : A(0), x.grad_ponder ? x.grad_ponder[at] : A(0));
    x.dcumulative_p[at] = grad.cumulative_p;
    x.dponder[at] = grad.ponder;
    weight[r] = step.weight;
    logit[r] = grad.p * p * (A(1) - p);
    *block.bias += logit[r];
    scale[r] = Enter ? x.rstd[at] : A(0);
    shrink[r] = Enter ? -lane_sum(on_norm) / A(D) * scale[r] * scale[r] * scale[r] : A(0);
  }

  const int64_t slab_tile = slab_rows(rank, x.inside) * width<T>;
  for (int64_t begin = 0; begin < ch.tiles; begin += kChunkTiles) {
    const int64_t end = std::min(begin + kChunkTiles, ch.tiles);
    for (int64_t r = 0; r < R; ++r) {
      const int64_t at = row + r;
      const T *grad_h = x.grad_h.row(at), *grad_out = x.grad_out.row(at), *grad_u = x.grad_u.row(at);
      const T *h = x.h + at * D, *e = x.e + at * D, *h_next = x.h_next + at * D;
      T *dh = x.dh + at * D, *de = x.de + at * D, *df = x.df + at * D;
      for_tiles<T>(D, begin, end, [&](int64_t t, int64_t c, auto n) {
        A* sums = slab + t * slab_tile;
        fetch_tile(h_next + R * D + c);  // of the next rows
        fetch_tile(e + R * D + c);
        fetch_tile(x.grad_out.row(at + R) + c);
        if constexpr (Enter) fetch_tile(x.grad_u.row(at + R) + c);
        if (x.inside) fetch_tile(x.f + at * D + c);
        const Tile<T> next = load_tile(h_next + c, n), injected = load_tile(e + c, n);
        Tile<T> g = fma(splat<T>(weight[r]), load_tile(grad_out + c, n), load_tile(grad_h + c, n));
        g = fma(splat<T>(logit[r]), ch.tile(t, kHalt), g);
        Tile<T> into_e = splat<T>(0);
        if constexpr (Enter) {
          const Tile<T> scaled = load_tile(grad_u + c, n) * splat<T>(scale[r]);
          const Tile<T> entering = next + ch.tile(t, kEmb) + injected;
          into_e = fma(splat<T>(shrink[r]), entering, scaled * ch.tile(t, kNorm));
          g = g + into_e;
          add_product<T>(sums + kSumNorm * width<T>, scaled, entering);
        }
        put_tile(dh + c, ch.tile(t, kA) * g, n, x.streamed);
        put_tile(de + c, fma(ch.tile(t, kB), g, into_e), n, x.streamed);
        if (!x.inside) put_tile(df + c, g, n, x.streamed);
        store_acc<T>(total + (t * kRows + r) * width<T>, g);
        add_product<T>(sums + kSumA * width<T>, g, load_tile(h + c, n));
        add_product<T>(sums + kSumB * width<T>, g, injected);
        add_product<T>(sums + kSumHalt * width<T>, splat<T>(logit[r]), next);
      });
    }
    for (int64_t t = begin; t < end; ++t) {
      Tile<T> g[R];
      for (int64_t r = 0; r < R; ++r) g[r] = load_acc<T>(total + (t * kRows + r) * width<T>);
      for (int64_t k = 0; k < rank; ++k) {
        A* at = slab + t * slab_tile + (kSumLora + k) * width<T>;
        Tile<T> s = load_acc<T>(at);
        for (int64_t r = 0; r < R; ++r) s = fma(splat<T>(lora_hidden[r * rank + k]), g[r], s);
        store_acc<T>(at, s);
      }
    }
  }

  for (int64_t k = 0; k < rank; ++k) {
    V dots[R];
    for (int64_t r = 0; r < R; ++r) dots[r] = V(0);
    for (int64_t t = 0; t < ch.tiles; ++t) {
      const Tile<T> up = ch.tile(t, kLora + k);
      for (int64_t r = 0; r < R; ++r) dots[r] = fold(load_acc<T>(total + (t * kRows + r) * width<T>), up, dots[r]);
    }
    for (int64_t r = 0; r < R; ++r) {
      const T dlora_hidden = T(lane_sum(dots[r]));
      if (x.inside) {
        block.scale[k] += A(dlora_hidden) * A(x.raw[(row + r) * rank + k]);
        lora_hidden[r * rank + k] = scaled<T>(dlora_hidden, x.scale[k]);  // raw's gradient; lora_hidden is done with
      } else {
        x.dlora_hidden[(row + r) * rank + k] = dlora_hidden;
      }
    }
  }
  if (x.inside) through_down<T, R>(x, ch, row, total, lora_hidden, slab);
}

// All rows. Partial sums go to `slabs` (blocks, slab) and to `bias` (blocks) and `scale` (blocks, rank), which are
// zero.
template <typename T, bool Enter>
void step_all(
    const Rows<T>& x, const Channels<T>& ch, const RowBlocks& blocks, int64_t slab, acc_t<T>* slabs, double* bias,
    double* scale) {
  at::parallel_for(0, blocks.count, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(ch);
    for (int64_t b = begin; b < end; ++b) {
      const Sums<T> sums{slabs + b * slab, bias + b, scale + b * ch.rank};
      std::memset(sums.slab, 0, slab * sizeof(acc_t<T>));
      const int64_t last = blocks.end(b);
      for (int64_t row = blocks.begin(b); row < last;) {
        if (row + kRows <= last) {
          step_rows<T, kRows, Enter>(x, ch, row, scratch, sums);
          row += kRows;
        } else {
          step_rows<T, 1, Enter>(x, ch, row, scratch, sums);
          row += 1;
        }
      }
    }
    finish_streams();
  });
}

template <typename T>
struct ParameterGrads {
  T *lora_B, *log_A, *B, *halt_weight, *norm_weight;
  T* down;  // or null
};

// Adds the slabs in order and turns the sums into parameter gradients. `rates` gets the gradients of the channels' log
// rates, whose sum is that of log_dt.
template <typename T>
void reduce(
    const Channels<T>& ch, int64_t blocks, acc_t<T>* slabs, const T* log_A, acc_t<T> log_dt,
    const ParameterGrads<T>& grads, bool inside, acc_t<T>* rates) {
  using A = acc_t<T>;
  const int64_t rows = slab_rows(ch.rank, inside), slab = ch.tiles * rows * width<T>;
  at::parallel_for(0, ch.tiles, 16, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t c = t * width<T>, n = std::min(ch.D - c, width<T>);
      for (int64_t row = 0; row < rows; ++row) {
        A* first = slabs + (t * rows + row) * width<T>;
        Tile<T> total = splat<T>(0);
        for (int64_t b = 0; b < blocks; ++b) total = total + load_acc<T>(first + b * slab);
        switch (row) {
          case kSumA: {
            A sums[width<T>];
            store_acc<T>(sums, total);
            for (int64_t i = 0; i < n; ++i) {
              rates[c + i] = sums[i] * lti::decay<A>(log_dt, log_A[c + i]).slope;
              grads.log_A[c + i] = T(rates[c + i]);
            }
            break;
          }
          case kSumB:
            store_tile(grads.B + c, total, n);
            break;
          case kSumHalt:
            store_tile(grads.halt_weight + c, total, n);
            break;
          case kSumNorm:
            store_tile(grads.norm_weight + c, total, n);
            break;
          default: {
            const int64_t k = row - kSumLora;
            store_tile((k < ch.rank ? grads.lora_B + k * ch.D : grads.down + (k - ch.rank) * ch.D) + c, total, n);
          }
        }
      }
    }
  });
}

template <typename T>
Grad<T> grad_rows(const std::optional<at::Tensor>& grad, const std::vector<T>& zeros) {
  if (grad) return {grad->const_data_ptr<T>(), grad->size(-1)};
  return {zeros.data(), 0};
}

template <typename T>
const T* data_or_null(const std::optional<at::Tensor>& x) {
  return x ? x->const_data_ptr<T>() : nullptr;
}

// The LoRA's part of a step and of its gradients: lora_hidden and dlora_hidden, or all others.
struct Lora {
  at::Tensor lora_hidden, f, raw, down, scale;
  at::Tensor dlora_hidden, ddown, dscale;
};

// Gradients of h, e, f, and of cumulative_p, ponder, lora_B, log_A, log_dt, B, halt_weight, halt_bias, norm_weight.
using OfStates = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using OfOthers = std::tuple<
    at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// The LoRA's gradients go to `lora`.
std::pair<OfStates, OfOthers> backward(
    const Lora& lora, const StepGrads& grads, const StepSaved& saved, const StepWeights& weights, double threshold,
    bool spend_remainder) {
  const at::Tensor& h = saved.h;
  const int64_t N = saved.cumulative_p.numel(), D = weights.B.numel();
  auto dh = empty(h.sizes(), h.options()), de = empty(h.sizes(), h.options()), df = empty(h.sizes(), h.options());
  auto dcumulative_p = at::empty_like(saved.cumulative_p), dponder = at::empty_like(saved.cumulative_p);
  auto dlora_B = at::empty_like(weights.lora_B), dlog_A = at::empty_like(weights.log_A);
  auto dlog_dt = at::empty_like(weights.log_dt), dB = at::empty_like(weights.B);
  auto dhalt_weight = at::empty_like(weights.halt_weight), dhalt_bias = at::empty({1}, weights.halt_weight.options());
  auto dnorm_weight = at::empty_like(weights.norm_weight);
  const RowBlocks blocks(N);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, h.scalar_type(), "loop_step_backward", [&] {
    using T = scalar_t;
    using A = acc_t<T>;
    const Channels<T> channels(weights);
    const int64_t rank = channels.rank;
    const std::vector<T> zeros(D, T(0));
    const bool streamed = 3 * h.numel() * int64_t(sizeof(T)) >= kStreamBytes && streamable(dh.const_data_ptr<T>(), D) &&
                          streamable(de.const_data_ptr<T>(), D) && streamable(df.const_data_ptr<T>(), D);
    const bool inside = !lora.lora_hidden.defined();
    const auto down = inside ? packed_rows<T>(lora.down, rank, D, channels.tiles) : nullptr;
    const Rows<T> rows{
        grad_rows<T>(grads.h, zeros),
        grad_rows<T>(grads.h_out, zeros),
        grad_rows<T>(grads.u, zeros),
        data_or_null<A>(grads.cumulative_p),
        data_or_null<A>(grads.ponder),
        h.const_data_ptr<T>(),
        saved.e.const_data_ptr<T>(),
        saved.h_next.const_data_ptr<T>(),
        inside,
        inside ? nullptr : lora.lora_hidden.const_data_ptr<T>(),
        inside ? lora.f.const_data_ptr<T>() : nullptr,
        inside ? lora.raw.const_data_ptr<T>() : nullptr,
        inside ? lora.scale.const_data_ptr<T>() : nullptr,
        down.get(),
        saved.cumulative_p.const_data_ptr<A>(),
        saved.p.const_data_ptr<A>(),
        saved.rstd.const_data_ptr<A>(),
        saved.running.const_data_ptr<bool>(),
        dh.mutable_data_ptr<T>(),
        de.mutable_data_ptr<T>(),
        df.mutable_data_ptr<T>(),
        inside ? nullptr : lora.dlora_hidden.mutable_data_ptr<T>(),
        dcumulative_p.mutable_data_ptr<A>(),
        dponder.mutable_data_ptr<A>(),
        A(threshold),
        spend_remainder,
        streamed};
    const int64_t slab = channels.tiles * slab_rows(rank, inside) * width<T>;
    std::unique_ptr<A[]> slabs(new A[blocks.count * slab]);
    std::vector<double> bias(blocks.count), scale(blocks.count * rank);
    grads.u ? step_all<T, true>(rows, channels, blocks, slab, slabs.get(), bias.data(), scale.data())
            : step_all<T, false>(rows, channels, blocks, slab, slabs.get(), bias.data(), scale.data());
    std::vector<A> rates(D);
    const ParameterGrads<T> to{dlora_B.mutable_data_ptr<T>(),      dlog_A.mutable_data_ptr<T>(),
                               dB.mutable_data_ptr<T>(),           dhalt_weight.mutable_data_ptr<T>(),
                               dnorm_weight.mutable_data_ptr<T>(), inside ? lora.ddown.mutable_data_ptr<T>() : nullptr};
    reduce<T>(
        channels, blocks.count, slabs.get(), weights.log_A.const_data_ptr<T>(), A(*weights.log_dt.const_data_ptr<T>()),
        to, inside, rates.data());
    // Long sums of scalars, in double and in a fixed order.
    double bias_total = 0, rate_total = 0;
    for (double b : bias) bias_total += b;
    for (A r : rates) rate_total += r;
    *dhalt_bias.mutable_data_ptr<T>() = T(bias_total);
    *dlog_dt.mutable_data_ptr<T>() = T(rate_total);
    for (int64_t k = 0; inside && k < rank; ++k) {
      double total = 0;
      for (int64_t b = 0; b < blocks.count; ++b) total += scale[b * rank + k];
      lora.dscale.mutable_data_ptr<T>()[k] = T(total);
    }
  });
  return {{dh, de, df}, {dcumulative_p, dponder, dlora_B, dlog_A, dlog_dt, dB, dhalt_weight, dhalt_bias, dnorm_weight}};
}

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The ops as Python declares them.
auto loop_step_backward(
    const OptionalTensor& grad_h, const OptionalTensor& grad_out, const OptionalTensor& grad_cumulative_p,
    const OptionalTensor& grad_ponder, const OptionalTensor& grad_u, const Tensor& h, const Tensor& e,
    const Tensor& lora_hidden, const Tensor& cumulative_p, const Tensor& running, const Tensor& h_next, const Tensor& p,
    const Tensor& rstd, const Tensor& lora_B, const Tensor& log_A, const Tensor& log_dt, const Tensor& B,
    const Tensor& halt_weight, const Tensor& norm_weight, const Tensor& emb, double threshold, bool spend_remainder) {
  Lora lora;
  lora.lora_hidden = lora_hidden, lora.dlora_hidden = at::empty_like(lora_hidden);
  const auto [states, others] = backward(
      lora, {grad_h, grad_out, grad_cumulative_p, grad_ponder, grad_u}, {h, e, cumulative_p, running, h_next, p, rstd},
      {lora_B, log_A, log_dt, B, halt_weight, norm_weight, emb}, threshold, spend_remainder);
  return std::tuple_cat(states, std::make_tuple(lora.dlora_hidden), others);
}

auto loop_lora_step_backward(
    const OptionalTensor& grad_h, const OptionalTensor& grad_out, const OptionalTensor& grad_cumulative_p,
    const OptionalTensor& grad_ponder, const OptionalTensor& grad_u, const Tensor& h, const Tensor& e, const Tensor& f,
    const Tensor& raw, const Tensor& down, const Tensor& scale, const Tensor& cumulative_p, const Tensor& running,
    const Tensor& h_next, const Tensor& p, const Tensor& rstd, const Tensor& lora_B, const Tensor& log_A,
    const Tensor& log_dt, const Tensor& B, const Tensor& halt_weight, const Tensor& norm_weight, const Tensor& emb,
    double threshold, bool spend_remainder) {
  const Lora lora{{}, f, raw, down, scale, {}, at::empty_like(down), at::empty_like(scale)};
  const auto [states, others] = backward(
      lora, {grad_h, grad_out, grad_cumulative_p, grad_ponder, grad_u}, {h, e, cumulative_p, running, h_next, p, rstd},
      {lora_B, log_A, log_dt, B, halt_weight, norm_weight, emb}, threshold, spend_remainder);
  return std::tuple_cat(states, std::make_tuple(lora.ddown, lora.dscale), others);
}

}  // namespace

TORCH_LIBRARY_IMPL(openmythos, CPU, m) {
  m.impl("loop_step_backward", loop_step_backward);
  m.impl("loop_lora_step_backward", loop_lora_step_backward);
}

}  // namespace openmythos::loop
