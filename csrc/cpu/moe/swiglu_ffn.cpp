// openmythos::swiglu_ffn and its backward: a dense feed-forward layer is one shared expert.
#include "cpu/moe/experts.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace openmythos::moe {
namespace {

Experts one(const at::Tensor& gate, const at::Tensor& up, const at::Tensor& down) {
  return {{gate}, {up}, {down}, gate.size(0)};
}

Plan nothing_routed() { return {{0}, {}, {}, 0}; }

}  // namespace

std::tuple<at::Tensor, at::Tensor> swiglu_ffn(
    const at::Tensor& x, const at::Tensor& gate, const at::Tensor& up, const at::Tensor& down, bool save) {
  const at::Tensor no_weights = at::empty({x.size(0), 0}, x.options());
  const Experts dense = one(gate, up, down);
  Forward out = forward(x, nothing_routed(), no_weights, {}, dense, save);
  return {out.y, out.saved_shared};
}

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> swiglu_ffn_backward(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& gate, const at::Tensor& up, const at::Tensor& down,
    const at::Tensor& saved, bool need_x, bool need_weights) {
  const at::Tensor no_weights = at::empty({x.size(0), 0}, x.options()), none = at::empty({0}, x.options());
  const Experts weights = one(gate, up, down);
  const Wanted wanted{need_x, {}, gradients(weights, need_weights)};
  Backward g =
      backward(dy, x, nothing_routed(), no_weights, {}, weights, at::empty({2, 0, 0}, x.options()), saved, wanted);
  if (!need_weights) return {g.dx, none, none, none};
  return {g.dx, wanted.shared.gate[0], wanted.shared.up[0], wanted.shared.down[0]};
}

}  // namespace
}  // namespace openmythos::moe

TORCH_LIBRARY_IMPL(openmythos, CPU, m) {
  m.impl("swiglu_ffn", openmythos::moe::swiglu_ffn);
  m.impl("swiglu_ffn_backward", openmythos::moe::swiglu_ffn_backward);
}
