// openmythos::rms_norm, for ops composed of others.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace openmythos::norm {

// (s, norm of s, 1 / root mean square of s) with s = x + add; without `add`, s = x and the first is empty.
std::tuple<at::Tensor, at::Tensor, at::Tensor> rms_norm(
    const at::Tensor& x, const std::optional<at::Tensor>& add, const at::Tensor& weight, double eps);

}  // namespace openmythos::norm
