// Whether a float attention mask is exactly the causal one. Checked once per mask, at about the cost of reading it.
#include "cpu/moe/experts.h"
#include "cpu/runtime/bindings.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <limits>
#include <type_traits>

namespace openmythos {
namespace {

template <typename T>
using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;

constexpr int64_t kTogether = 4096;  // values compared between two branches

// Whether all n values are 0 or -0 (`seen`), or all are -infinity.
template <bool seen, typename T>
bool all_are(const T* p, int64_t stride, int64_t n) {
  using B = Bits<T>;
  const B hidden = std::bit_cast<B>(-std::numeric_limits<T>::infinity());
  const auto wrong = [&](const T* from, int64_t step, int64_t count) {
    B any = 0;
    for (int64_t i = 0; i < count; ++i) {
      const B bits = std::bit_cast<B>(from[i * step]);
      any |= seen ? B(bits << 1) : B(bits ^ hidden);
    }
    return any != 0;
  };
  for (int64_t i = 0; i < n; i += kTogether) {
    const int64_t count = std::min(kTogether, n - i);
    if (stride == 1 ? wrong(p + i, 1, count) : wrong(p + i * stride, stride, count)) return false;
  }
  return true;
}

// The mask without repeats: expanded leading dimensions (stride 0) are narrowed to size 1.
at::Tensor without_repeats(at::Tensor mask) {
  for (int64_t d = 0; d < mask.dim() - 2; ++d) {
    if (mask.size(d) > 1 && mask.stride(d) == 0) mask = mask.narrow(d, 0, 1);
  }
  return mask;
}

// The offset of row `row`, counted over all matrices.
int64_t offset_of(const at::Tensor& mask, int64_t row) {
  int64_t offset = 0;
  for (int64_t d = mask.dim() - 2; d >= 0; --d) {
    offset += row % mask.size(d) * mask.stride(d);
    row /= mask.size(d);
  }
  return offset;
}

// Whether mask (..., T, S) is 0 for j <= start + i and -infinity elsewhere, in every matrix.
bool is_causal(const at::Tensor& given, int64_t start) {
  if (!moe::is_plain(given) || given.dim() < 2 || !given.is_floating_point() || given.itemsize() < 2) {
    throw pybind11::value_error(
        c10::str(
            "mask must be a dense (..., T, S) of float32, float64, bfloat16 or float16 on cpu, got ",
            given.scalar_type(), " ", given.sizes(), " on ", given.device()));
  }
  if (given.numel() == 0) return true;
  const at::Tensor mask = without_repeats(given.resolve_neg());
  const int64_t T = mask.size(-2), S = mask.size(-1), rows = mask.numel() / S, stride = mask.stride(-1);
  std::atomic<bool> causal{true};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, mask.scalar_type(), "is_causal", [&] {
    const scalar_t* const data = mask.const_data_ptr<scalar_t>();
    at::parallel_for(0, rows, std::max<int64_t>(1, (1 << 15) / S), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end && causal.load(std::memory_order_relaxed); ++row) {
        const scalar_t* const from = data + offset_of(mask, row);
        const int64_t seen = start < -T ? 0 : start >= S ? S : std::clamp<int64_t>(start + row % T + 1, 0, S);
        if (!all_are<true>(from, stride, seen) || !all_are<false>(from + seen * stride, stride, S - seen)) {
          causal.store(false, std::memory_order_relaxed);
        }
      }
    });
  });
  return causal;
}

}  // namespace

void bind_causal(pybind11::module_& m) {
  m.def(
      "is_causal", is_causal, pybind11::arg("mask"), pybind11::arg("start"),
      pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace openmythos
