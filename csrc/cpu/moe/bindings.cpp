// moe_inference for Python, past PyTorch's dispatcher: operators cannot take functions.
#include "cpu/runtime/bindings.h"
#include "cpu/moe/experts.h"

#include <ATen/TracerMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/util/Exception.h>
#include <torch/csrc/utils/pybind.h>

namespace openmythos {
namespace {

struct Declined {};

// Whether a call computes with x's numbers at once: no dispatch mode or transform is active. The path refuses tracers.
bool is_eager(const at::Tensor& x) {
  if (c10::impl::TorchDispatchModeTLS::any_modes_set()) return false;
  // Under a transform, ask before is_plain does: its tensors have no storage.
  return !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) && moe::is_plain(x);
}

// moe_inference. NotImplemented if the call is not eager; None if `look` returns None or an argument does not fit: the
// reference then runs and raises the better error.
pybind11::object moe_inference(
    const at::Tensor& x, const pybind11::object& router, const at::Tensor& bias, int64_t k,
    const pybind11::object& shared, const pybind11::function& look) {
  if (!is_eager(x)) return pybind11::reinterpret_borrow<pybind11::object>(Py_NotImplemented);
  // Both run on the calling thread, which holds the GIL only meanwhile.
  const auto logits = [&](const at::Tensor& rows) {
    const pybind11::gil_scoped_acquire lock;
    return router(rows).cast<at::Tensor>();
  };
  const auto found = [&](const std::vector<int64_t>& used) {
    const pybind11::gil_scoped_acquire lock;
    const pybind11::object weights = look(used);
    if (weights.is_none()) throw Declined{};
    return weights.cast<moe::Lists>();
  };
  try {
    const auto dense = shared.cast<moe::Lists>();
    return pybind11::cast([&] {
      const pybind11::gil_scoped_release unlocked;
      return moe::moe_inference(x, logits, bias, k, dense, found);
    }());
  } catch (const Declined&) {
  } catch (const c10::ValueError&) {
  } catch (const pybind11::cast_error&) {
  }
  return pybind11::none();
}

}  // namespace

void bind_moe(pybind11::module_& m) { m.def("moe_inference", moe_inference); }

}  // namespace openmythos
