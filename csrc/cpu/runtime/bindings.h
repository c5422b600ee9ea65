// Functions of the extension module that are not operators.
#pragma once

#include <pybind11/pybind11.h>

namespace openmythos {

void bind_moe(pybind11::module_& m);
void bind_causal(pybind11::module_& m);
void bind_layer(pybind11::module_& m);

}  // namespace openmythos
