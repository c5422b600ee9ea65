// openmythos::moe_experts_weights: the gradients of routed weights, one product over the rows of several calls.
#include "cpu/moe/experts.h"

#include "cpu/moe/grouped.h"
#include "cpu/moe/panel_gradients.h"
#include "cpu/runtime/allocator.h"

#include <ATen/Dispatch.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

namespace openmythos::moe {
namespace {

// Where the row of a (token, slot) pair lies in each tensor.
struct Row {
  int64_t gate, up;  // of dpre
  int64_t act;
  int64_t token;  // of x and dy
};

// The rows of each expert, call after call. ValueError for indices that lead outside.
std::vector<std::vector<Row>> rows_by_expert(
    const at::Tensor& offsets, const at::Tensor& pair, at::IntArrayRef tokens, int64_t slots) {
  const int64_t experts = offsets.size(1) - 1;
  const int32_t *offset = offsets.const_data_ptr<int32_t>(), *of_row = pair.const_data_ptr<int32_t>();
  std::vector<std::vector<Row>> rows(experts);
  int64_t before = 0;  // tokens of the calls before
  for (const int64_t count : tokens) {
    const int64_t first = before * slots, pairs = count * slots;
    for (int64_t e = 0; e < experts; ++e) {
      TORCH_CHECK_VALUE(
          0 <= offset[e] && offset[e] <= offset[e + 1] && offset[e + 1] <= pairs, "offsets: must ascend in [0, ", pairs,
          "], got ", offset[e], " and ", offset[e + 1]);
      for (int64_t r = offset[e]; r < offset[e + 1]; ++r) {
        const int64_t p = of_row[first + r];
        TORCH_CHECK_VALUE(0 <= p && p < pairs, "pair: must lie in [0, ", pairs, "), got ", p);
        rows[e].push_back({2 * first + r, 2 * first + pairs + r, first + r, before + p / slots});
      }
    }
    before += count;
    offset += experts + 1;
  }
  return rows;
}

template <typename W, typename T = acc_t<W>>
void run(
    const at::Tensor& x, const at::Tensor& dy, const at::Tensor& dpre, const at::Tensor& act,
    const std::vector<std::vector<Row>>& rows, const Experts& to) {
  const int64_t D = x.size(1), I = to.inner;
  const T *const from_x = x.const_data_ptr<T>(), *const from_dy = dy.const_data_ptr<T>();
  const T *const from_dpre = dpre.const_data_ptr<T>(), *const from_act = act.const_data_ptr<T>();
  std::vector<Work> items;
  int64_t most = 0;
  for (int64_t e = 0; e < to.size(); ++e) {
    const int64_t count = rows[e].size();
    if (count == 0) continue;
    items.push_back({true, e, count, count});
    most = std::max(most, held_size<T>(pieces<T>(0, count), D, I));
  }
  const at::Tensor memory = empty({at::get_num_threads(), most}, x.options());
  Schedule(std::move(items)).run([&](const Work& item, int64_t worker) {
    const std::vector<Row>& of = rows[item.expert];
    const auto cut = pieces<T>(0, item.rows);
    const auto held = hold(memory.mutable_data_ptr<T>() + std::max<int64_t>(worker, 0) * most, cut, D, I);
    run_tasks(cut.size(), [&](int64_t, auto next) {
      for (int64_t p = next(); p >= 0; p = next()) {
        const Held<T>& to_piece = held[p];
        const Row* const row = of.data() + cut[p].begin;
        const int64_t count = to_piece.rows, width = to_piece.width;
        transpose_in([&](int64_t r) { return from_dpre + row[r].gate * I; }, count, I, to_piece.dgate, width);
        transpose_in([&](int64_t r) { return from_dpre + row[r].up * I; }, count, I, to_piece.dup, width);
        transpose_in([&](int64_t r) { return from_dy + row[r].token * D; }, count, D, to_piece.dy, width);
        split_columns([&](int64_t r) { return from_act + row[r].act * I; }, count, I, to_piece.hidden);
        split_columns([&](int64_t r) { return from_x + row[r].token * D; }, count, D, to_piece.x);
      }
    });
    weight_gradients<W>(to, item.expert, held, D, I, false);
  });
}

// Memory for the gradients, in one block; zeros for experts without rows.
Experts allocated(const at::Tensor& like, const std::vector<std::vector<Row>>& rows, int64_t D, int64_t I) {
  Experts to;
  to.inner = I;
  const at::Tensor up = at::empty({1}, like.options()).expand({I, D}), down = up.new_empty({1}).expand({D, I});
  std::vector<at::Tensor> shapes;
  for (size_t e = 0; e < rows.size(); ++e) shapes.insert(shapes.end(), {up, up, down});
  const auto memory = empty_together(shapes);
  for (size_t e = 0; e < rows.size(); ++e) {
    to.gate.push_back(memory[3 * e]);
    to.up.push_back(memory[3 * e + 1]);
    to.down.push_back(memory[3 * e + 2]);
    if (rows[e].empty()) {
      for (auto* part : {&to.gate, &to.up, &to.down}) part->back().zero_();
    }
  }
  return to;
}

using Tensors = std::vector<at::Tensor>;

std::tuple<Tensors, Tensors, Tensors> moe_experts_weights(
    const at::Tensor& x, const at::Tensor& dy, const at::Tensor& dpre, const at::Tensor& act, const at::Tensor& offsets,
    const at::Tensor& pair, at::IntArrayRef tokens, const at::Tensor& like) {
  TORCH_CHECK_VALUE(x.dim() == 2 && act.dim() == 2, "x and act: must be matrices, got ", x.sizes(), ", ", act.sizes());
  int64_t T = 0;
  for (const int64_t count : tokens) {
    TORCH_CHECK_VALUE(count >= 0, "tokens: must not be negative, got ", count);
    T += count;
  }
  const int64_t D = x.size(1), I = act.size(1), pairs = act.size(0), calls = tokens.size();
  TORCH_CHECK_VALUE(T > 0 && pairs % T == 0, "act: got ", pairs, " rows, must be a multiple of the ", T, " tokens");
  check_rows("x", x, {T, D}, x.scalar_type());
  check_rows("dy", dy, {T, D}, x.scalar_type());
  check_rows("act", act, {pairs, I}, x.scalar_type());
  check_rows("dpre", dpre, {2 * pairs, I}, x.scalar_type());
  TORCH_CHECK_VALUE(
      offsets.dim() == 2 && offsets.size(1) > 0, "offsets: must be (calls, E + 1), got ", offsets.sizes());
  check_rows("offsets", offsets, {calls, offsets.size(1)}, at::kInt);
  check_rows("pair", pair, {pairs}, at::kInt);
  const auto rows = rows_by_expert(offsets, pair, tokens, pairs / T);
  const Experts to = allocated(like, rows, D, I);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, like.scalar_type(), "moe_experts_weights", [&] {
    const auto wide = [](const at::Tensor& t) { return t.to(c10::CppTypeToScalarType<acc_t<scalar_t>>::value); };
    run<scalar_t>(wide(x), wide(dy), wide(dpre), wide(act), rows, to);
  });
  return {to.gate, to.up, to.down};
}

}  // namespace
}  // namespace openmythos::moe

TORCH_LIBRARY_IMPL(openmythos, CPU, m) { m.impl("moe_experts_weights", openmythos::moe::moe_experts_weights); }
