// openmythos::mla_linear and its backward: x @ weight^T by the faster library (gemm.h).
#include "cpu/mla/mla.h"
#include "cpu/runtime/allocator.h"
#include "cpu/simd/gemm.h"

#include <torch/library.h>

#include <tuple>

namespace openmythos::mla {

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight) {
  auto shape = x.sizes().vec();
  shape.back() = weight.size(0);
  at::Tensor out = empty(shape, x.options());
  if (out.numel()) gemm(out.view({-1, weight.size(0)}), x.view({-1, x.size(-1)}), weight.t(), false, true);
  return out;
}

namespace {

std::tuple<at::Tensor, at::Tensor> linear_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, bool need_x, bool need_weight) {
  at::Tensor dx = empty(need_x ? x.sizes() : at::IntArrayRef{0}, x.options());
  at::Tensor dweight = empty(need_weight ? weight.sizes() : at::IntArrayRef{0}, x.options());
  if (!x.numel()) return {dx, dweight.zero_()};
  const at::Tensor g = grad.view({-1, weight.size(0)});
  if (need_x) gemm(dx.view({-1, x.size(-1)}), g, weight, false, true);
  if (need_weight) gemm(dweight, g.t(), x.view({-1, x.size(-1)}), false, false);
  return {dx, dweight};
}

}  // namespace

TORCH_LIBRARY_IMPL(openmythos, CPU, m) {
  m.impl("mla_linear", linear);
  m.impl("mla_linear_backward", linear_backward);
}

}  // namespace openmythos::mla
