#include "cpu/moe/panels.h"

#include "cpu/moe/swiglu.h"
#include "cpu/runtime/allocator.h"
#include "cpu/runtime/work_queue.h"

#include <ATen/Dispatch.h>

namespace openmythos::moe {
namespace {

template <typename W, typename T = acc_t<W>>
void run(const at::Tensor& x, const Plan& plan, const Experts& experts, const at::Tensor& y, const at::Tensor& saved) {
  const int64_t D = x.size(1), I = experts.inner;
  const T* const from = x.const_data_ptr<T>();
  T* const to = y.mutable_data_ptr<T>();
  T* const kept_gate = saved.numel() > 0 ? saved.mutable_data_ptr<T>() : nullptr;
  T* const kept_up = kept_gate ? kept_gate + saved.stride(0) : nullptr;
  std::vector<std::pair<int64_t, Piece>> tasks;
  for (int64_t e = 0; e < experts.size(); ++e) {
    for (const Piece& piece : pieces<T>(plan, e)) tasks.emplace_back(e, piece);
  }
  // Each thread's panels: the piece's input (later its result), gate, up.
  const at::Tensor memory = empty({at::get_num_threads(), D + 2 * I, kPieceWidth<T>}, x.options());
  run_tasks(tasks.size(), [&](int64_t slot, auto next) {
    T* const input = memory.mutable_data_ptr<T>() + slot * memory.stride(0);
    T *const gate = input + D * kPieceWidth<T>, *const up = gate + I * kPieceWidth<T>;
    for (int64_t task = next(); task >= 0; task = next()) {
      const auto& [e, piece] = tasks[task];
      const int64_t begin = piece.begin, rows = piece.rows, width = piece.width<T>();
      const int64_t vectors = width / panel::Vec<T>::size();
      transpose_in([&](int64_t r) { return from + plan.token(begin + r) * D; }, rows, D, input, width);
      multiply(Strided<W>{experts.gate[e].const_data_ptr<W>(), D, 1}, input, width, gate, width, I, D, vectors, false);
      multiply(Strided<W>{experts.up[e].const_data_ptr<W>(), D, 1}, input, width, up, width, I, D, vectors, false);
      if (kept_gate) {
        transpose_out(gate, width, rows, I, [&](int64_t r) { return kept_gate + (begin + r) * I; });
        transpose_out(up, width, rows, I, [&](int64_t r) { return kept_up + (begin + r) * I; });
      }
      swiglu(gate, up, gate, I * width);
      multiply(Strided<W>{experts.down[e].const_data_ptr<W>(), I, 1}, gate, width, input, width, D, I, vectors, false);
      transpose_out(input, width, rows, D, [&](int64_t r) { return to + (begin + r) * D; });
    }
  });
}

}  // namespace

void panels(
    const at::Tensor& x, const Plan& plan, const Experts& experts, const at::Tensor& y, const at::Tensor& saved) {
  if (experts.size() == 0) return;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, experts.gate[0].scalar_type(), "moe_panels", [&] {
    run<scalar_t>(x, plan, experts, y, saved);
  });
}

}  // namespace openmythos::moe
