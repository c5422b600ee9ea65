// openmythos::compact_active, gather_rows and scatter_rows.
#include "cpu/runtime/allocator.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>

namespace openmythos::compaction {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor> compact(const Tensor& running) {
  const int64_t sequences = running.size(0), length = running.size(1), positions = sequences * length;
  const auto options = running.options().dtype(at::kLong);
  Tensor index = at::empty({positions}, options), last = at::empty({sequences}, options);
  Tensor counts = at::empty({sequences}, options), total = at::empty({1}, options);
  const bool* runs = running.const_data_ptr<bool>();
  int64_t *where = index.mutable_data_ptr<int64_t>(), found = 0;
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t before = found;
    int64_t latest = -1;
    for (int64_t t = 0; t < length; ++t) {
      if (!runs[s * length + t]) continue;
      where[found++] = s * length + t;
      latest = t;
    }
    last.mutable_data_ptr<int64_t>()[s] = latest;
    counts.mutable_data_ptr<int64_t>()[s] = found - before;
  }
  std::fill(where + found, where + positions, -1);
  *total.mutable_data_ptr<int64_t>() = found;
  return {index, last, counts, total};
}

// Calls body(i, row) for all i, with row = index[i], or -1 if that is outside [0, rows).
template <typename Body>
void for_selected(const Tensor& index, int64_t rows, int64_t row_bytes, const Body& body) {
  const int64_t* selected = index.const_data_ptr<int64_t>();
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(row_bytes, 1));
  at::parallel_for(0, index.numel(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      body(i, selected[i] >= 0 && selected[i] < rows ? selected[i] : -1);
    }
  });
}

Tensor gather(const Tensor& x, const Tensor& index) {
  const int64_t row_bytes = x.size(1) * static_cast<int64_t>(x.element_size());
  Tensor out = empty({index.numel(), x.size(1)}, x.options());
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  if (row_bytes == 0) return out;
  for_selected(index, x.size(0), row_bytes, [&](int64_t i, int64_t row) {
    if (row < 0)
      std::memset(to + i * row_bytes, 0, row_bytes);
    else
      std::memcpy(to + i * row_bytes, from + row * row_bytes, row_bytes);
  });
  return out;
}

Tensor scatter(const std::optional<Tensor>& base, const std::optional<Tensor>& rows, const Tensor& index, int64_t n) {
  const Tensor& some = base ? *base : *rows;
  const int64_t row_bytes = some.size(1) * static_cast<int64_t>(some.element_size());
  Tensor out = base ? base->clone() : at::zeros({n, some.size(1)}, some.options());
  const char* from = rows ? static_cast<const char*>(rows->const_data_ptr()) : nullptr;
  char* to = static_cast<char*>(out.mutable_data_ptr());
  if (row_bytes == 0) return out;
  for_selected(index, n, row_bytes, [&](int64_t i, int64_t row) {
    if (row < 0) return;
    if (from)
      std::memcpy(to + row * row_bytes, from + i * row_bytes, row_bytes);
    else
      std::memset(to + row * row_bytes, 0, row_bytes);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(openmythos, CPU, m) {
  m.impl("compact_active", compact);
  m.impl("gather_rows", gather);
  m.impl("scatter_rows", scatter);
}

}  // namespace openmythos::compaction
