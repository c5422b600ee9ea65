#include "cpu/moe_pairs.h"

#include "cpu/bf16_pairs.h"
#include "cpu/moe_panels.h"
#include "cpu/moe_swiglu.h"
#include "cpu/pages.h"
#include "cpu/share_out.h"

#include <c10/util/Exception.h>

namespace openmythos::moe {

#if defined(CPU_CAPABILITY_AVX512)

namespace {

using V = Bf16Pairs::V;

// Rows of a product that are kept in float32: near still when they are activated or rounded.
constexpr int64_t kSumRows = 256;
constexpr int64_t kWidth = kPieceWidth<float>;

// One expert and some of its tokens.
struct Task {
  bool routed;
  int64_t expert;
  Piece piece;
};

// Rows of pairs of a dense bfloat16 tensor. By way of void*: nothing here reads them as anything else.
const float* pairs_of(const at::Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
float* pairs_of(at::Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

bool is_aligned(const at::Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % sizeof(float) == 0; }

// A thread's panels.
struct Panels {
  float *input, *first, *second, *hidden;
  Panels(float* memory, int64_t dim) {
    input = memory;
    first = input + dim / 2 * kWidth;
    second = first + kSumRows * kWidth;
    hidden = second + kSumRows * kWidth;
  }
  static int64_t size(int64_t dim, int64_t inner) { return (dim / 2 + 2 * kSumRows + inner / 2) * kWidth; }
};

// to[i, :] = rows 2 i and 2 i + 1 of `sums`, rounded. In place too.
void round_rows(const float* sums, int64_t width, int64_t rows, float* to) {
  for (int64_t i = 0; i < rows; i += 2) {
    const float *even = sums + i * width, *odd = even + width;
    for (int64_t c = 0; c < width; c += V::size()) {
      Bf16Pairs::pack(V::loadu(even + c), V::loadu(odd + c)).store(to + i / 2 * width + c);
    }
  }
}

// The same for silu(gate) * up.
void activate_rows(const float* gate, const float* up, int64_t width, int64_t rows, float* to) {
  const auto hidden = [&](int64_t at) {
    const V g = V::loadu(gate + at);
    return g * V::loadu(up + at) / (V(1) + g.neg().exp_u20());
  };
  for (int64_t i = 0; i < rows; i += 2) {
    for (int64_t c = i * width; c < (i + 1) * width; c += V::size()) {
      Bf16Pairs::pack(hidden(c), hidden(c + width)).store(to + c - i / 2 * width);
    }
  }
}

}  // namespace

bool takes_pairs(const at::Tensor& x, const Experts& routed, const Experts& shared) {
  if (!Bf16Pairs::supported() || x.scalar_type() != at::kBFloat16 || x.size(1) % 2 != 0 || !is_aligned(x)) return false;
  for (const Experts* experts : {&routed, &shared}) {
    if (experts->inner % 2 != 0) return false;
    for (const auto* list : {&experts->gate, &experts->up, &experts->down}) {
      for (const at::Tensor& w : *list) {
        if (w.scalar_type() != at::kBFloat16 || !is_aligned(w)) return false;
      }
    }
  }
  return true;
}

void panels_of_pairs(
    const at::Tensor& x, const Plan& plan, const Experts& routed, const Experts& shared, const at::Tensor& y_routed,
    const at::Tensor& y_shared, const at::Tensor& saved_routed, const at::Tensor& saved_shared) {
  const int64_t N = x.size(0), D = x.size(1), most = std::max(routed.inner, shared.inner);
  std::vector<Task> tasks;  // the long ones first
  for (int64_t s = 0; s < shared.size(); ++s) {
    for (const Piece& piece : pieces<float>(0, N)) tasks.push_back({false, s, piece});
  }
  for (int64_t e = 0; e < routed.size(); ++e) {
    for (const Piece& piece : pieces<float>(plan, e)) tasks.push_back({true, e, piece});
  }
  const at::Tensor memory = empty({at::get_num_threads(), Panels::size(D, most)}, x.options().dtype(at::kFloat));
  share_out(tasks.size(), [&](int64_t slot, auto next) {
    const Panels panels(memory.mutable_data_ptr<float>() + slot * memory.stride(0), D);
    for (int64_t task = next(); task >= 0; task = next()) {
      const auto& [is_routed, e, piece] = tasks[task];
      const Experts& experts = is_routed ? routed : shared;
      at::Tensor y = is_routed ? y_routed : y_shared.select(0, e);
      at::Tensor saved = is_routed || saved_shared.numel() == 0 ? saved_routed : saved_shared.select(1, e);
      const int64_t I = experts.inner, begin = piece.begin, rows = piece.rows, width = piece.width<float>();
      const int64_t vectors = width / V::size();
      const auto product = [&](const at::Tensor& weight, int64_t first, int64_t count, const float* by, float* sums) {
        const int64_t depth = weight.size(1) / 2;
        const Strided<float> left{pairs_of(weight) + first * depth, depth, 1};
        multiply<Bf16Pairs>(left, by, width, sums, width, count, depth, vectors, false);
      };
      // Columns [first, first + count) of the piece's rows of a matrix.
      const auto put = [&](const float* panel, float* matrix, int64_t cols, int64_t first, int64_t count) {
        transpose_out(panel, width, rows, count / 2, [&](int64_t r) { return matrix + ((begin + r) * cols + first) / 2; });
      };

      const float* const from = pairs_of(x);
      transpose_in([&](int64_t r) { return from + (is_routed ? plan.token(begin + r) : begin + r) * (D / 2); }, rows, D / 2,
                   panels.input, width);
      for (int64_t i = 0; i < I; i += kSumRows) {
        const int64_t count = std::min(kSumRows, I - i);
        product(experts.gate[e], i, count, panels.input, panels.first);
        product(experts.up[e], i, count, panels.input, panels.second);
        activate_rows(panels.first, panels.second, width, count, panels.hidden + i / 2 * width);
        if (saved.numel() > 0) {
          round_rows(panels.first, width, count, panels.first);
          round_rows(panels.second, width, count, panels.second);
          put(panels.first, pairs_of(saved), I, i, count);
          put(panels.second, pairs_of(saved) + saved.stride(0) / 2, I, i, count);
        }
      }
      for (int64_t d = 0; d < D; d += kSumRows) {
        const int64_t count = std::min(kSumRows, D - d);
        product(experts.down[e], d, count, panels.hidden, panels.first);
        round_rows(panels.first, width, count, panels.first);
        put(panels.first, pairs_of(y), D, d, count);
      }
    }
  });
}

#else

bool takes_pairs(const at::Tensor&, const Experts&, const Experts&) { return false; }

void panels_of_pairs(
    const at::Tensor&, const Plan&, const Experts&, const Experts&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
    const at::Tensor&) {
  TORCH_CHECK(false, "moe: no products of pairs were built");
}

#endif

}  // namespace openmythos::moe
