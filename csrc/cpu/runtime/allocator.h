// Memory for large tensors: pages of 2 MiB where the system has them, and kept for the next tensor.
//
// The system hands out memory page by page, at its first use. In pages of 4 KiB that takes several times as long as
// writing them, and PyTorch asks anew for every large result, because malloc returns large blocks to the system.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace openmythos {

// Like at::empty: dense, on the CPU.
at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options);

// Dense tensors with the sizes and dtypes of these, side by side in one block, each with a storage of its own. The
// block serves again when all are gone. Before that, what those that are gone had goes back to the system when memory
// is next asked for here.
std::vector<at::Tensor> empty_together(const std::vector<at::Tensor>& like);

// The same, all zeros. Where the system has pages of 2 MiB they cost nothing until they are looked at, and then more
// than zeros written here.
std::vector<at::Tensor> zeros_together(const std::vector<at::Tensor>& like);

}  // namespace openmythos
