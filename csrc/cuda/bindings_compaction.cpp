// openmythos::compact_active, gather_rows and scatter_rows for CUDA tensors.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "cuda/compaction.h"
#include "cuda/torch.h"

namespace openmythos::cuda {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor> compact(const Tensor& running) {
  const On on(running);
  const int64_t sequences = running.size(0), length = running.size(1);
  const auto options = running.options().dtype(at::kLong);
  Tensor index = at::empty({sequences * length}, options), last = at::empty({sequences}, options);
  Tensor counts = at::empty({sequences}, options), total = at::empty({1}, options);
  Tensor scratch = at::empty({compaction_scratch(sequences * length)}, options);
  C10_CUDA_CHECK(compact_active(
      {running.const_data_ptr<bool>(), sequences, length, index.mutable_data_ptr<int64_t>(),
       last.mutable_data_ptr<int64_t>(), counts.mutable_data_ptr<int64_t>(), total.mutable_data_ptr<int64_t>(),
       scratch.mutable_data_ptr<int64_t>()},
      on.stream));
  return {index, last, counts, total};
}

Tensor gather(const Tensor& x, const Tensor& index) {
  const On on(x);
  const int64_t row_bytes = x.size(1) * static_cast<int64_t>(x.element_size());
  Tensor out = at::empty({index.numel(), x.size(1)}, x.options());
  C10_CUDA_CHECK(gather_rows(
      x.const_data_ptr(), index.const_data_ptr<int64_t>(), out.mutable_data_ptr(), x.size(0), index.numel(), row_bytes,
      on.stream));
  return out;
}

Tensor scatter(const std::optional<Tensor>& base, const std::optional<Tensor>& rows, const Tensor& index, int64_t n) {
  const Tensor& some = base ? *base : *rows;
  const On on(some);
  const int64_t row_bytes = some.size(1) * static_cast<int64_t>(some.element_size());
  Tensor out = base ? base->clone() : at::zeros({n, some.size(1)}, some.options());
  C10_CUDA_CHECK(scatter_rows(
      rows ? rows->const_data_ptr() : nullptr, index.const_data_ptr<int64_t>(), out.mutable_data_ptr(), n,
      index.numel(), row_bytes, on.stream));
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(openmythos, CUDA, m) {
  m.impl("compact_active", compact);
  m.impl("gather_rows", gather);
  m.impl("scatter_rows", scatter);
}

}  // namespace openmythos::cuda
