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

// PyTorch sends float32 products to MKL (or OpenBLAS), which leaves AMD's 512-bit units unused; oneDNN's take
// 10 to 25 % less time there and no more elsewhere. Its calls cost some 15 microseconds more: not for small products.
constexpr int64_t kLeastOperations = 4 << 20;

bool by_onednn(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == at::kFloat && a.size(0) * a.size(1) * b.size(1) >= kLeastOperations / 2 &&
         at::globalContext().hasMKLDNN() && at::globalContext().userEnabledMkldnn();
}

}  // namespace

void gemm(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool accumulate) {
  if (by_onednn(a, b)) {
    at::native::mkldnn_matmul(a, b, out, accumulate ? 1.0f : 0.0f, 1.0f);
  } else {
    at::Tensor result = out;
    if (accumulate) {
      at::addmm_out(result, result, a, b);
    } else {
      at::mm_out(result, a, b);
    }
  }
}

}  // namespace openmythos
