#include "cpu/moe/bf16_dot.h"

#include "cpu/moe/panels.h"
#include "cpu/moe/swiglu.h"
#include "cpu/runtime/allocator.h"
#include "cpu/runtime/work_queue.h"
#include "cpu/simd/bf16_dot.h"

#include <c10/util/Exception.h>

#include <optional>

namespace openmythos::moe {

#if defined(CPU_CAPABILITY_AVX512)

namespace {

using V = Bf16Dot::V;

// Rows of a product kept in float32: still in cache when they are activated or rounded.
constexpr int64_t kSumRows = 256;
constexpr int64_t kWidth = kPieceWidth<float>;

// One expert and some of its rows.
struct Task {
  const Bf16Experts* of;
  int64_t expert;
  Piece piece;
};

// Full-width tasks take less time in all, but narrower ones are used if there would be fewer tasks than threads.
std::vector<Task> tasks_of(const Bf16Experts& part, int64_t tokens) {
  const int64_t rows = part.plan ? part.plan->pair.size() : part.experts.size() * tokens;
  const int64_t vectors = (rows / at::get_num_threads() + V::size() - 1) / V::size();
  const int64_t most = std::clamp<int64_t>(vectors * V::size(), V::size(), kWidth);
  std::vector<Task> tasks;
  for (int64_t e = 0; e < part.experts.size(); ++e) {
    const auto of_expert =
        part.plan ? pieces<float>(part.plan->offset[e], part.plan->rows(e), most) : pieces<float>(0, tokens, most);
    for (const Piece& piece : of_expert) tasks.push_back({&part, e, piece});
  }
  return tasks;
}

// A dense bfloat16 tensor as rows of 32-bit lanes, two bf16 each. Nothing here reads them as bfloat16.
const float* lanes_of(const at::Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
float* mutable_lanes_of(const at::Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

bool is_aligned(const at::Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % sizeof(float) == 0; }

// A thread's panels.
struct Panels {
  at::Tensor memory;
  float *input, *first, *second, *hidden;
  Panels(int64_t dim, int64_t inner, const at::TensorOptions& options) {
    memory = empty({dim / 2 + 2 * kSumRows + inner / 2, kWidth}, options.dtype(at::kFloat));
    input = memory.mutable_data_ptr<float>();
    first = input + dim / 2 * kWidth;
    second = first + kSumRows * kWidth;
    hidden = second + kSumRows * kWidth;
  }
};

// to[i, :] = rows 2 i and 2 i + 1 of `sums`, rounded and packed. `to` may be `sums`.
void round_rows(const float* sums, int64_t width, int64_t rows, float* to) {
  for (int64_t i = 0; i < rows; i += 2) {
    const float *even = sums + i * width, *odd = even + width;
    for (int64_t c = 0; c < width; c += V::size()) {
      Bf16Dot::pack(V::loadu(even + c), V::loadu(odd + c)).store(to + i / 2 * width + c);
    }
  }
}

// The same for silu(gate) * up.
void activate_rows(const float* gate, const float* up, int64_t width, int64_t rows, float* to) {
  const auto hidden = [&](int64_t at) {
    const V g = V::loadu(gate + at);
    const V s = _mm512_rcp14_ps(V(1) + g.neg().exp_u20());  // sigmoid(g) within 2^-14; rounding to bf16 costs 2^-9
    return silu(g, s) * V::loadu(up + at);
  };
  for (int64_t i = 0; i < rows; i += 2) {
    for (int64_t c = i * width; c < (i + 1) * width; c += V::size()) {
      Bf16Dot::pack(hidden(c), hidden(c + width)).store(to + c - i / 2 * width);
    }
  }
}

void run(const Task& task, const at::Tensor& x, const Panels& panels) {
  const auto& [of, e, piece] = task;
  const Experts& experts = of->experts;
  const int64_t D = x.size(1), I = experts.inner, begin = piece.begin, rows = piece.rows, width = piece.width<float>();
  const int64_t above = of->plan ? 0 : e * x.size(0);  // rows of the experts before
  const int64_t vectors = width / V::size();
  const bool half = rows + V::size() / 2 <= width;
  const auto product = [&](const at::Tensor& weight, int64_t first, int64_t count, const float* by, float* sums) {
    const int64_t depth = weight.size(1) / 2;
    const Strided<float> left{lanes_of(weight) + first * depth, depth, 1};
    multiply<Bf16Dot>(left, by, width, sums, width, count, depth, vectors, false, half);
  };
  // Stores to columns [first, first + count) of the piece's rows of a matrix.
  const auto put = [&](float* sums, float* matrix, int64_t cols, int64_t first, int64_t count) {
    round_rows(sums, width, count, sums);
    const auto row = [&](int64_t r) { return matrix + ((above + begin + r) * cols + first) / 2; };
    transpose_out(sums, width, rows, count / 2, row);
  };

  const float* const from = lanes_of(x);
  const auto token = [&](int64_t r) { return from + (of->plan ? of->plan->token(begin + r) : begin + r) * (D / 2); };
  transpose_in(token, rows, D / 2, panels.input, width);
  for (int64_t i = 0; i < I; i += kSumRows) {
    const int64_t count = std::min(kSumRows, I - i);
    product(experts.gate[e], i, count, panels.input, panels.first);
    product(experts.up[e], i, count, panels.input, panels.second);
    activate_rows(panels.first, panels.second, width, count, panels.hidden + i / 2 * width);
    if (of->saved.numel() > 0) {
      put(panels.first, mutable_lanes_of(of->saved), I, i, count);
      put(panels.second, mutable_lanes_of(of->saved) + of->saved.stride(0) / 2, I, i, count);
    }
  }
  for (int64_t d = 0; d < D; d += kSumRows) {
    const int64_t count = std::min(kSumRows, D - d);
    product(experts.down[e], d, count, panels.hidden, panels.first);
    put(panels.first, mutable_lanes_of(of->y), D, d, count);
  }
}

}  // namespace

bool Bf16Experts::supported(const at::Tensor& x) const {
  if (!Bf16Dot::supported() || x.scalar_type() != at::kBFloat16) return false;
  if (x.size(1) % 2 != 0 || experts.inner % 2 != 0 || !is_aligned(x)) return false;
  for (const auto* list : {&experts.gate, &experts.up, &experts.down}) {
    for (const at::Tensor& w : *list) {
      if (w.scalar_type() != at::kBFloat16 || !is_aligned(w)) return false;
    }
  }
  return true;
}

bool bf16_dot_experts(
    const at::Tensor& x, const Bf16Experts& first, const Bf16Experts& then, const std::function<bool()>& prepare) {
  const std::vector<Task> early = tasks_of(first, x.size(0));
  std::vector<Task> late;
  bool both = false;
  const auto total = [&]() -> int64_t {
    both = prepare();
    if (both) late = tasks_of(then, x.size(0));
    return early.size() + late.size();
  };
  const int64_t known = early.size();
  run_tasks_after(at::get_num_threads(), known, total, [&](int64_t, auto next) {
    std::optional<Panels> panels[2];
    for (int64_t i = next(); i >= 0; i = next()) {
      const Task& task = i < known ? early[i] : late[i - known];
      auto& own = panels[i >= known];
      if (!own) own.emplace(x.size(1), task.of->experts.inner, x.options());
      run(task, x, *own);
    }
  });
  return both;
}

#else

bool Bf16Experts::supported(const at::Tensor&) const { return false; }

bool bf16_dot_experts(const at::Tensor&, const Bf16Experts&, const Bf16Experts&, const std::function<bool()>&) {
  TORCH_CHECK(false, "moe: built without bf16 dot products");
}

#endif

}  // namespace openmythos::moe
