#include "cpu/gemm.h"

#include <ATen/Context.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

// Exported by every PyTorch since 1.12, in a header that is not installed; it throws where oneDNN is not built in.
namespace at::native {
TORCH_API void mkldnn_matmul(const Tensor& mat1, const Tensor& mat2, const Tensor& result, float beta, float alpha);
}

namespace openmythos {
namespace {

// oneDNN compiles a kernel for every new shape (half a millisecond), and a call costs 15 microseconds more than
// one of MKL, where PyTorch sends float32. Where both pay it is 5 to 20 % faster on cores with 512-bit units.
constexpr int64_t kLeastProducts = 4 << 20;

bool by_onednn(const at::Tensor& a, const at::Tensor& b) {
  const auto& context = at::globalContext();
  return a.scalar_type() == at::kFloat && a.size(0) * a.size(1) * b.size(1) >= kLeastProducts && context.hasMKLDNN() &&
         context.userEnabledMkldnn();
}

}  // namespace

void gemm(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool accumulate, bool recurring) {
  if (recurring && by_onednn(a, b)) return at::native::mkldnn_matmul(a, b, out, accumulate ? 1.0f : 0.0f, 1.0f);
  at::Tensor result = out;
  if (accumulate) {
    at::addmm_out(result, result, a, b);
  } else {
    at::mm_out(result, a, b);
  }
}

}  // namespace openmythos
