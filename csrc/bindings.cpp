// The extension module. Python declares the ops (openmythos_kernels/ops), so that fakes and autograd exist without the
// extension. Loading it registers the implementations in cpu/ and cuda/ (TORCH_LIBRARY_IMPL).
#include "cpu/runtime/bindings.h"

#include <pybind11/pybind11.h>
#include <torch/version.h>

#define STRING_(x) #x
#define STRING(x) STRING_(x)

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of openmythos_kernels; see openmythos_kernels.runtime.";
  m.attr("torch_version") = STRING(TORCH_VERSION_MAJOR) "." STRING(TORCH_VERSION_MINOR) "." STRING(TORCH_VERSION_PATCH);
  m.attr("cpu_capability") = STRING(CPU_CAPABILITY);
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
#ifdef OPENMYTHOS_CUDA_ARCHITECTURES  // as in TORCH_CUDA_ARCH_LIST; undefined without CUDA kernels
  m.attr("cuda_architectures") = OPENMYTHOS_CUDA_ARCHITECTURES;
#else
  m.attr("cuda_architectures") = "";
#endif
  openmythos::bind_moe(m);
  openmythos::bind_causal(m);
  openmythos::bind_layer(m);
#if defined(__clang__)
  m.attr("compiler") = "clang " __clang_version__;
#elif defined(__GNUC__)
  m.attr("compiler") = "gcc " __VERSION__;
#else
  m.attr("compiler") = "unknown";
#endif
}
