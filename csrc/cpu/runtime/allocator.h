// An allocator for large CPU tensors: huge pages (2 MiB) where the system has them, kept for the next tensor.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace openmythos {

// Like at::empty: dense, on the CPU.
at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options);

// Dense tensors with the sizes and dtypes of `like`, side by side in one block, each with a storage of its own. Once
// all are freed, the block is reused. Until then, the next allocation returns the memory of the freed ones to the
// system.
std::vector<at::Tensor> empty_together(const std::vector<at::Tensor>& like);

// The same, filled with zeros. With huge pages, zeros cost nothing until first touched; touching them later costs more
// than writing zeros here would have.
std::vector<at::Tensor> zeros_together(const std::vector<at::Tensor>& like);

}  // namespace openmythos
