// openmythos::swiglu_ffn: a dense feed-forward layer is one shared expert that few tokens go through.
#include "cpu/moe.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace openmythos::moe {
namespace {

at::Tensor swiglu_ffn(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& up, const at::Tensor& down) {
  Experts dense;
  dense.gate = {gate};
  dense.up = {up};
  dense.down = {down};
  dense.inner = gate.size(0);
  return few(x, Plan{{0}, {}, {}, 0}, at::empty({x.size(0), 0}, x.options()), {}, dense, false).y;
}

}  // namespace
}  // namespace openmythos::moe

TORCH_LIBRARY_IMPL(openmythos, CPU, m) {
  m.impl("swiglu_ffn", openmythos::moe::swiglu_ffn);
}
