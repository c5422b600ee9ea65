// A linear layer whose rows do not depend on one another.
#pragma once

#include <ATen/core/Tensor.h>

namespace openmythos::layer {

// x (N, D) @ weight^T, as torch.nn.functional.linear; both dense and of one dtype. No bit of a row depends on the other
// rows or on the number of threads.
at::Tensor linear_rows(const at::Tensor& x, const at::Tensor& weight);

}  // namespace openmythos::layer
