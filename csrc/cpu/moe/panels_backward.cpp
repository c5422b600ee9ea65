// Expert by expert: for each piece of its rows the gradients of the activations and of x, then those of its weights.
#include "cpu/moe/panels.h"

#include "cpu/moe/grouped.h"
#include "cpu/moe/panel_gradients.h"
#include "cpu/moe/swiglu.h"
#include "cpu/runtime/allocator.h"
#include "cpu/runtime/work_queue.h"

#include <ATen/Dispatch.h>

namespace openmythos::moe {
namespace {

// SwiGLU's backward, with tokens along vectors, in place: dhidden, the gradient of weight * hidden, becomes weight *
// hidden; gate and up become their gradients; sums[r] = sum_i dhidden * hidden.
template <typename T>
void activate_backward(T* gate, T* up, T* dhidden, const T* weight, T* sums, int64_t inner, int64_t width) {
  using V = panel::Vec<T>;
  for (int64_t c = 0; c < width; c += V::size()) {
    const V w = V::loadu(weight + c);
    V total[4] = {V(0), V(0), V(0), V(0)};
    for (int64_t i = 0; i < inner; ++i) {
      const int64_t at = i * width + c;
      const V g = V::loadu(gate + at), u = V::loadu(up + at), s = sigmoid(g), act = silu(g, s), hidden = act * u;
      V d = V::loadu(dhidden + at);
      total[i % 4] = at::vec::fmadd(d, hidden, total[i % 4]);
      d = d * w;
      (d * u * silu_grad(g, s)).store(gate + at);
      (d * act).store(up + at);
      (hidden * w).store(dhidden + at);
    }
    ((total[0] + total[1]) + (total[2] + total[3])).store(sums + c);
  }
}

// Pointers and sizes of one call.
template <typename W, typename T>
struct Call {
  const Plan& plan;
  const Experts& experts;
  const Wanted& wanted;
  int64_t D, I;
  const T *dy, *x, *topk_weights, *saved_gate, *saved_up;
  T *dx, *dtopk_weights;

  // `scratch`: a panel of max(D, I) rows.
  void activations(int64_t e, const Piece& piece, const Held<T>& held, T* scratch) const {
    const int64_t begin = piece.begin, rows = piece.rows, width = piece.width<T>();
    const int64_t vectors = width / panel::Vec<T>::size();
    const auto token = [&](const T* from) {
      return [this, from, begin](int64_t r) { return from + plan.token(begin + r) * D; };
    };
    transpose_in(token(dy), rows, D, held.dy, width);
    transpose_in([&](int64_t r) { return saved_gate + (begin + r) * I; }, rows, I, held.dgate, width);
    transpose_in([&](int64_t r) { return saved_up + (begin + r) * I; }, rows, I, held.dup, width);
    multiply(
        Strided<W>{experts.down[e].const_data_ptr<W>(), 1, I}, held.dy, width, scratch, width, I, D, vectors, false);
    T weight[kPieceWidth<T>] = {}, sums[kPieceWidth<T>];
    for (int64_t r = 0; r < rows; ++r) weight[r] = topk_weights[plan.pair[begin + r]];
    activate_backward(held.dgate, held.dup, scratch, weight, sums, I, width);
    for (int64_t r = 0; r < rows; ++r) dtopk_weights[plan.pair[begin + r]] = sums[r];
    if (wanted.kept.act.defined()) {
      const auto keep = [&](const T* from, const at::Tensor& kept) {
        T* const to = kept.mutable_data_ptr<T>() + begin * I;
        transpose_out(from, width, rows, I, [&](int64_t r) { return to + r * I; });
      };
      keep(held.dgate, wanted.kept.dgate);
      keep(held.dup, wanted.kept.dup);
      keep(scratch, wanted.kept.act);
    }
    if (wanted.weights(true)) {
      for (int64_t c = 0; c < I; c += kPanelWidth<T>) {
        T* const to = held.hidden + c * rows;
        const int64_t n = std::min(kPanelWidth<T>, I - c);
        if (n < kPanelWidth<T>) std::fill_n(to, rows * kPanelWidth<T>, T(0));
        transpose_out(scratch + c * width, width, rows, n, [&](int64_t r) { return to + r * kPanelWidth<T>; });
      }
      split_columns(token(x), rows, D, held.x);
    }
    if (wanted.x) {
      const W *gate = experts.gate[e].template const_data_ptr<W>(), *up = experts.up[e].template const_data_ptr<W>();
      multiply(Strided<W>{gate, 1, D}, held.dgate, width, scratch, width, D, I, vectors, false);
      multiply(Strided<W>{up, 1, D}, held.dup, width, scratch, width, D, I, vectors, true);
      transpose_out(scratch, width, rows, D, [&](int64_t r) { return dx + (begin + r) * D; });
    }
  }
};

template <typename W, typename T>
void run(const Call<W, T>& call, const at::TensorOptions& options) {
  const Schedule schedule(work_items(call.plan, call.experts));
  const int64_t threads = at::get_num_threads(), D = call.D, I = call.I;
  int64_t alone = 0, shared = 0;  // memory of the largest expert: of those on all threads, of those on one
  for (size_t i = 0; i < schedule.items.size(); ++i) {
    int64_t& largest = i < schedule.alone ? alone : shared;
    largest = std::max(largest, held_size<T>(pieces<T>(call.plan, schedule.items[i].expert), D, I));
  }
  const at::Tensor memory = empty({std::max(alone, threads * shared)}, options);
  const at::Tensor scratch = empty({threads, std::max(D, I), kPieceWidth<T>}, options);
  schedule.run([&](const Work& item, int64_t worker) {
    const auto of_expert = pieces<T>(call.plan, item.expert);
    const auto held = hold(memory.mutable_data_ptr<T>() + (worker < 0 ? 0 : worker * shared), of_expert, D, I);
    run_tasks(of_expert.size(), [&](int64_t slot, auto next) {
      T* const own = scratch.mutable_data_ptr<T>() + (worker < 0 ? slot : worker) * scratch.stride(0);
      for (int64_t p = next(); p >= 0; p = next()) call.activations(item.expert, of_expert[p], held[p], own);
    });
    if (!call.wanted.weights(true)) return;
    weight_gradients<W>(call.wanted.routed, item.expert, held, D, I, call.wanted.add);
  });
}

}  // namespace

void panels_backward(
    const at::Tensor& dy, const at::Tensor& x, const Plan& plan, const at::Tensor& topk_weights, const Experts& experts,
    const at::Tensor& saved, const Wanted& wanted, const at::Tensor& dx, const at::Tensor& dtopk_weights) {
  if (experts.size() == 0) return;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, experts.gate[0].scalar_type(), "moe_panels_backward", [&] {
    using T = acc_t<scalar_t>;
    const T* const kept = saved.const_data_ptr<T>();
    run(
        Call<scalar_t, T>{
            plan, experts, wanted, x.size(1), experts.inner, dy.const_data_ptr<T>(), x.const_data_ptr<T>(),
            topk_weights.const_data_ptr<T>(), kept, kept + saved.stride(0), dx.mutable_data_ptr<T>(),
            dtopk_weights.mutable_data_ptr<T>()},
        x.options());
  });
}

}  // namespace openmythos::moe
