// openmythos::linear_rows: a linear layer of few rows, as matrix-vector products.
#include "cpu/layer/linear_rows.h"

#include "cpu/mla/mla.h"
#include "cpu/simd/matvec.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

namespace openmythos::layer {
namespace {

// Weights that pay for waking a thread.
constexpr int64_t kThreadWeights = 1 << 15;

template <typename T>
void product(const T* x, const T* weight, int64_t rows, int64_t D, int64_t V, T* y) {
  std::vector<acc_t<T>> wide(rows * D);
  widen(x, wide.data(), rows * D);
  const int64_t grain = std::max<int64_t>(1, kThreadWeights / std::max<int64_t>(D, 1));
  at::parallel_for(0, V, grain, [&](int64_t begin, int64_t end) {
    if constexpr (widens<T>) {
      const int64_t n = end - begin;
      std::vector<acc_t<T>> sums(rows * n);
      matvec<T>(weight + begin * D, D, 0, n, wide.data(), rows, sums.data(), n);
      for (int64_t m = 0; m < rows; ++m) std::copy_n(sums.data() + m * n, n, y + m * V + begin);
    } else {
      matvec<T>(weight, D, begin, end, wide.data(), rows, y, V);
    }
  });
}

}  // namespace

at::Tensor linear_rows(const at::Tensor& x, const at::Tensor& weight) {
  const int64_t rows = x.size(0), D = x.size(1), V = weight.size(0);
  at::Tensor out = at::empty({rows, V}, x.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "linear_rows", [&] {
    product(
        x.const_data_ptr<scalar_t>(), weight.const_data_ptr<scalar_t>(), rows, D, V, out.mutable_data_ptr<scalar_t>());
  });
  return out;
}

namespace {

// The op as Python declares it.
at::Tensor linear_rows_op(const at::Tensor& x, const at::Tensor& weight) {
  TORCH_CHECK_VALUE(
      x.dim() == 2 && at::isFloatingType(x.scalar_type()), "x: got ", x.scalar_type(), " ", x.sizes(),
      ", must be (N, D) in a floating dtype");
  mla::fits("weight", weight, {weight.dim() == 2 ? weight.size(0) : 0, x.size(1)}, x.scalar_type());
  mla::fits("x", x, x.sizes(), x.scalar_type());
  return linear_rows(x, weight);
}

}  // namespace
}  // namespace openmythos::layer

TORCH_LIBRARY_IMPL(openmythos, CPU, m) { m.impl("linear_rows", openmythos::layer::linear_rows_op); }
