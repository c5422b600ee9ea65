// Matrix products of plain tensors by the faster of the libraries that PyTorch ships.
#pragma once

#include <ATen/core/Tensor.h>

namespace openmythos {

// out = a @ b, or out += a @ b. Matrices of one dtype with any strides; out does not overlap a or b.
// recurring: whether this shape comes again and again, so that a kernel compiled for it pays; false where a size
// depends on the routing.
void gemm(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, bool accumulate, bool recurring);

}  // namespace openmythos
