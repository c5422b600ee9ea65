#include "cpu/simd/gemm.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include <cstdlib>
#include <string_view>

#ifdef _OPENMP
#include <omp.h>
#endif

// Exported since PyTorch 1.12, but its header is not installed. Throws if PyTorch was built without oneDNN.
namespace at::native {
TORCH_API void mkldnn_matmul(const Tensor& mat1, const Tensor& mat2, const Tensor& result, float beta, float alpha);
}

namespace openmythos {
namespace {

// Fewest multiply-adds for oneDNN. PyTorch sends float32 to MKL; oneDNN is 5 to 20 % faster on cores with 512-bit
// units, but compiles a kernel for each new shape (0.5 ms) and costs 15 us more a call.
constexpr int64_t kLeastProducts = 4 << 20;

// Whether PyTorch uses oneDNN on this processor: mkldnn_matmul rejects float32 wherever it rejects bfloat16.
bool runs_here() {
#if defined(__x86_64__) || defined(_M_X64)
  const auto& context = at::globalContext();
  if (!context.hasMKLDNN()) return false;
  const auto asked = c10::Dispatcher::singleton().findSchema({"mkldnn::_is_mkldnn_bf16_supported", ""});
  return asked && asked->typed<bool()>().call();
#else
  return false;  // elsewhere PyTorch picks the library that suits the processor
#endif
}

// Whether oneDNN may round the inputs of float32 products, by its own environment variables. PyTorch's setting of the
// same name is separate; at::mm and mkldnn_matmul both follow it.
bool rounds() {
  for (const char* name : {"ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"}) {
    if (const char* const mode = std::getenv(name); mode && std::string_view(mode) != "STRICT") return true;
  }
  return false;
}

// Whether OpenMP is sure to grant all at::get_num_threads() threads. oneDNN splits a product among that many, and
// leaves the part of a missing thread uninitialized. In a parallel region, or with one thread, it starts no team.
bool team_is_whole() {
#ifdef _OPENMP
  const int threads = at::get_num_threads();
  if (threads == 1 || omp_in_parallel()) return true;
  return !omp_get_dynamic() && omp_get_max_active_levels() > omp_get_active_level() &&
         threads <= omp_get_thread_limit();
#else
  return false;
#endif
}

bool by_onednn(const at::Tensor& a, const at::Tensor& b) {
  if (a.scalar_type() != at::kFloat || a.size(0) * a.size(1) * b.size(1) < kLeastProducts) return false;
  static const bool can = runs_here() && !rounds();
  return can && at::globalContext().userEnabledMkldnn() && team_is_whole();
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
