// What the extension module has beside operators.
#pragma once

#include <pybind11/pybind11.h>

namespace openmythos {

void bind_moe(pybind11::module_& m);
void bind_causal(pybind11::module_& m);

}  // namespace openmythos
