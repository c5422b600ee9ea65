// openmythos::mla_attention and mla_attention_rows, per-head latent attention of many queries: online softmax over
// blocks of keys.
#include "cpu/mla/attention.h"

#include "cpu/mla/mla.h"
#include "cpu/runtime/allocator.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

namespace openmythos::mla {
namespace {

// Per query so far: the largest score, as an exponent of 2, and the sum of weights.
struct Running {
  alignas(64) float top[kQueries], mass[kQueries];

  // Turns products (n, kQueries) into weights exp2(product * exponent - top) in place, for queries [q, end). `factor`
  // gets the correction of earlier sums.
  void softmax(float* scores, int64_t n, int64_t q, int64_t end, float exponent, float* factor) {
    for (int64_t c = q; c < end; c += Vec::size()) {
      Vec most(kNone);
      for (int64_t j = 0; j < n; ++j) most = at::vec::maximum(most, Vec::loadu(scores + j * kQueries + c));
      const Vec before = Vec::loadu(top + c), after = at::vec::maximum(before, most * Vec(exponent));
      // A query that has seen no key yet has top = -inf and must not subtract it; its weights are exp2(-inf) = 0.
      const Vec shift = Vec::blendv(after.neg(), Vec(0), after == Vec(kNone)), scale(exponent);
      Vec total(0);
      for (int64_t j = 0; j < n; ++j) {
        float* const at = scores + j * kQueries + c;
        const Vec weight = exp2(at::vec::fmadd(Vec::loadu(at), scale, shift));
        weight.store(at);
        total = total + weight;
      }
      const Vec kept = Vec::blendv(exp2(before + shift), Vec(1), before == after);
      kept.store(factor + c);
      after.store(top + c);
      at::vec::fmadd(Vec::loadu(mass + c), kept, total).store(mass + c);
    }
  }
};

struct Task {
  Block block;
  int64_t h;
};

template <typename W>
void forward(const Prompt<W>& p, W* out, float* lse) {
  std::vector<Task> tasks;
  for (int64_t b = 0; b < p.B; ++b) {
    std::vector<Block> blocks = p.queries.blocks(b);
    std::reverse(blocks.begin(), blocks.end());  // queries that see most keys first
    for (int64_t h = 0; h < p.heads; ++h) {
      for (const Block& block : blocks) tasks.push_back({block, h});
    }
  }
  const int64_t ld = padded(p.width());
  const int64_t size = kQueries * (ld + p.width() + kKeys + p.v);
  const at::Tensor memory = empty({at::get_num_threads(), size}, at::kFloat);
  run_tasks(tasks.size(), [&](int64_t slot, auto next) {
    float* const rows = memory.mutable_data_ptr<float>() + slot * size;
    float *const queries = rows + kQueries * ld, *const scores = queries + kQueries * p.width();
    float* const sums = scores + kQueries * kKeys;
    alignas(64) float factor[kQueries];
    Running running;
    for (int64_t task = next(); task >= 0; task = next()) {
      const Block& block = tasks[task].block;
      const int64_t b = block.b, h = tasks[task].h, m = block.rows, end = padded(m);
      p.load_queries(block, h, rows);
      transpose_rows(rows, ld, p.width(), queries);
      std::fill_n(running.top, kQueries, kNone);
      std::fill_n(running.mass, kQueries, 0.0f);
      std::fill_n(sums, p.v * kQueries, 0.0f);
      each_part(block, [&](int64_t j, int64_t n, int64_t q) {
        const int64_t vectors = (end - q) / Vec::size();
        p.products(b, h, j, n, queries + q, vectors, scores + q);
        for (int64_t t = 0; t < n; ++t) std::fill_n(scores + t * kQueries, block.blind(j + t), kNone);
        running.softmax(scores, n, q, end, p.exponent(), factor);
        for (int64_t c = 0; c < p.v && j > 0; ++c) {
          for (int64_t t = q; t < end; t += Vec::size()) {
            float* const sum = sums + c * kQueries + t;
            (Vec::loadu(sum) * Vec::loadu(factor + t)).store(sum);
          }
        }
        const Strided<W> values = p.values(b, h, j);
        multiply(
            Strided<W>{values.data, 1, values.row}, scores + q, kQueries, sums + q, kQueries, p.v, n, vectors, true);
      });
      for (int64_t t = 0; t < m; ++t) {
        const bool any = running.mass[t] > 0.0f;
        factor[t] = any ? 1 / running.mass[t] : 0.0f;
        lse[p.queries.lse_place(b, h, block.first + t)] = any ? running.top[t] + std::log2(running.mass[t]) : kNone;
      }
      for (int64_t t = 0; t < m; ++t) {
        W* const y = out + ((block.first + t) * p.heads + h) * p.v;
        for (int64_t c = 0; c < p.v; ++c) y[c] = W(sums[c * kQueries + t] * factor[t]);
      }
    }
  });
}

// q_nope and q_rope: (N, heads, width).
void attend(
    const Queries& queries, const at::Tensor& q_nope_, const at::Tensor& q_rope_, const at::Tensor& kv_,
    const at::Tensor& k_rope_, const at::Tensor& out, const at::Tensor& lse) {
  if (lse.numel() == 0) return;
  const auto q_nope = dense_rows(q_nope_), q_rope = dense_rows(q_rope_), kv = dense_rows(kv_);
  const auto k_rope = dense_rows(k_rope_);
  const auto run = [&](auto zero) {
    using W = decltype(zero);
    forward(prompt<W>(queries, q_nope, q_rope, kv, k_rope), out.mutable_data_ptr<W>(), lse.mutable_data_ptr<float>());
  };
  AT_DISPATCH_SWITCH(q_nope.scalar_type(), "mla_attention", AT_DISPATCH_CASE(at::kFloat, [&] {
                       run(scalar_t(0));
                     }) AT_DISPATCH_CASE_REDUCED_FLOATING_TYPES([&] { run(scalar_t(0)); }));
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> mla_attention(
    const at::Tensor& q_nope, const at::Tensor& q_rope, const at::Tensor& kv, const at::Tensor& k_rope,
    const at::Tensor& start, const at::Tensor& lengths) {
  const int64_t B = q_nope.size(0), T = q_nope.size(1), H = q_nope.size(2);
  auto out = empty({B, T, H, kv.size(3) - q_nope.size(3)}, q_nope.options());
  auto lse = at::empty({B, H, T}, q_nope.options().dtype(at::kFloat));
  attend(
      consecutive(start, lengths, T, kv.size(1), H), q_nope.flatten(0, 1), q_rope.flatten(0, 1), kv, k_rope, out, lse);
  return {out, lse};
}

std::tuple<at::Tensor, at::Tensor> mla_attention_rows(
    const at::Tensor& q_nope, const at::Tensor& q_rope, const at::Tensor& kv, const at::Tensor& k_rope,
    const at::Tensor& position, const at::Tensor& offset) {
  const int64_t N = q_nope.size(0), H = q_nope.size(1);
  auto out = empty({N, H, kv.size(3) - q_nope.size(2)}, q_nope.options());
  auto lse = at::empty({H, N}, q_nope.options().dtype(at::kFloat));
  attend(packed(position, offset, kv.size(0), kv.size(1)), q_nope, q_rope, kv, k_rope, out, lse);
  return {out, lse};
}

TORCH_LIBRARY_IMPL(openmythos, CPU, m) {
  m.impl("mla_attention", mla_attention);
  m.impl("mla_attention_rows", mla_attention_rows);
}

}  // namespace openmythos::mla
