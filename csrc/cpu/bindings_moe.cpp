// What Python calls without PyTorch's dispatcher, as operators cannot take functions.
#include "cpu/bindings.h"
#include "cpu/moe.h"

#include <c10/util/Exception.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>

namespace openmythos {
namespace {

using Tensors = std::vector<at::Tensor>;

struct Declined {};

// moe_chosen, or None where `look` returns None or something does not fit, about which the reference has more to say.
std::optional<std::tuple<at::Tensor, at::Tensor, at::Tensor>> moe_chosen(
    const at::Tensor& x, const pybind11::object& router, const at::Tensor& bias, int64_t k, const Tensors& shared_gate,
    const Tensors& shared_up, const Tensors& shared_down, const pybind11::function& look) {
  // Both on the thread that called, which holds the interpreter's lock.
  const auto logits = [&](const at::Tensor& rows) { return router(rows).cast<at::Tensor>(); };
  const auto found = [&](const std::vector<int64_t>& used) {
    const pybind11::object weights = look(used);
    if (weights.is_none()) throw Declined{};
    return weights.cast<std::array<Tensors, 3>>();
  };
  try {
    return moe::moe_chosen(x, logits, bias, k, shared_gate, shared_up, shared_down, found);
  } catch (const Declined&) {
    return std::nullopt;
  } catch (const c10::ValueError&) {
    return std::nullopt;
  }
}

}  // namespace

void bind_moe(pybind11::module_& m) { m.def("moe_chosen", moe_chosen); }

}  // namespace openmythos
