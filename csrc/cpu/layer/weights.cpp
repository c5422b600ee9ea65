// What layers' weights have in common, and their names for Python.
#include "cpu/layer/weights.h"
#include "cpu/runtime/bindings.h"

#include <pybind11/stl.h>

#include <string>
#include <vector>

namespace openmythos {
namespace layer {

void check_ffn(const FfnWeights& ffn, int64_t D, at::ScalarType dtype) {
  const int64_t inner = ffn.gate.dim() == 2 ? ffn.gate.size(0) : 0;
  mla::fits("gate", ffn.gate, {inner, D}, dtype);
  mla::fits("up", ffn.up, {inner, D}, dtype);
  mla::fits("down", ffn.down, {D, inner}, dtype);
}

}  // namespace layer

void bind_layer(pybind11::module_& m) {
  // {argument: (name, ...)} of all families.
  m.def("layer_weight_names", [] {
    pybind11::dict all;
    const auto add = [&](const auto& family) { all[family.argument] = pybind11::tuple(pybind11::cast(family.names)); };
    add(layer::kAttention);
    add(layer::kRouter);
    add(layer::kFfn);
    add(layer::kLora);
    add(layer::kStep);
    add(layer::kEps);
    return all;
  });
}

}  // namespace openmythos
