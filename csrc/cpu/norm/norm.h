// openmythos::rms_norm, for ops that are made of others.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace openmythos::norm {

// (x + add, its norm, 1 / its root mean square); without `add` the sum is empty and the norm is x's.
std::tuple<at::Tensor, at::Tensor, at::Tensor> rms_norm(
    const at::Tensor& x, const std::optional<at::Tensor>& add, const at::Tensor& weight, double eps);

}  // namespace openmythos::norm
