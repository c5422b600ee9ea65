// Matrix products by the faster of the libraries that PyTorch ships.
#pragma once

#include <ATen/core/Tensor.h>

namespace openmythos {

// out = a @ b, or out += a @ b (`accumulate`). Matrices of one dtype, at any strides; out does not overlap a or b.
// `recurring`: the shape recurs, so that a kernel compiled for it pays; false where a size depends on the routing.
void gemm(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool accumulate, bool recurring);

}  // namespace openmythos
