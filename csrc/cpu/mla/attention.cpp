// openmythos::mla_attention, per-head latent attention of many queries: online softmax over blocks of keys.
#include "cpu/mla/attention.h"

#include "cpu/mla/mla.h"
#include "cpu/runtime/allocator.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace openmythos::mla {
namespace {

// Per query so far: the largest score, as an exponent of 2, and the sum of weights.
struct Running {
  alignas(64) float top[kQueries], mass[kQueries];

  // Turns products (n, kQueries) into weights exp2(product * exponent - top) in place, for queries from q on. `factor`
  // gets the correction of earlier sums.
  void softmax(float* scores, int64_t n, int64_t q, float exponent, float* factor) {
    for (int64_t c = q; c < kQueries; c += Vec::size()) {
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

template <typename W>
void forward(const Prompt<W>& p, W* out, float* lse) {
  const int64_t blocks = (p.queries + kQueries - 1) / kQueries, ld = padded(p.width());
  const int64_t size = kQueries * (ld + p.width() + kKeys + p.v);
  const at::Tensor memory = empty({at::get_num_threads(), size}, at::kFloat);
  run_tasks(p.B * p.heads * blocks, [&](int64_t slot, auto next) {
    float* const rows = memory.mutable_data_ptr<float>() + slot * size;
    float *const queries = rows + kQueries * ld, *const scores = queries + kQueries * p.width();
    float* const sums = scores + kQueries * kKeys;
    alignas(64) float factor[kQueries];
    Running running;
    for (int64_t task = next(); task >= 0; task = next()) {
      const int64_t b = task / blocks / p.heads, h = task / blocks % p.heads;
      const int64_t i = (blocks - 1 - task % blocks) * kQueries;  // queries that see most keys first
      const int64_t m = std::min(kQueries, p.queries - i), last = p.seen(b, i + m - 1);
      p.load_queries(b, h, i, m, rows);
      transpose_rows(rows, ld, p.width(), queries);
      std::fill_n(running.top, kQueries, kNone);
      std::fill_n(running.mass, kQueries, 0.0f);
      std::fill_n(sums, p.v * kQueries, 0.0f);
      p.each_part(b, i, last, [&](int64_t j, int64_t n, int64_t q) {
        const int64_t vectors = (kQueries - q) / Vec::size();
        p.products(b, h, j, n, queries + q, vectors, scores + q);
        for (int64_t t = 0; t < n; ++t) std::fill_n(scores + t * kQueries, p.blind(b, i, j + t), kNone);
        running.softmax(scores, n, q, p.exponent(), factor);
        for (int64_t c = 0; c < p.v && j > 0; ++c) {
          for (int64_t t = q; t < kQueries; t += Vec::size()) {
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
        lse[(b * p.heads + h) * p.queries + i + t] = any ? running.top[t] + std::log2(running.mass[t]) : kNone;
      }
      for (int64_t t = 0; t < m; ++t) {
        W* const y = out + ((b * p.queries + i + t) * p.heads + h) * p.v;
        for (int64_t c = 0; c < p.v; ++c) y[c] = W(sums[c * kQueries + t] * factor[t]);
      }
    }
  });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> mla_attention(
    const at::Tensor& q_nope_, const at::Tensor& q_rope_, const at::Tensor& kv_, const at::Tensor& k_rope_,
    const at::Tensor& start, const at::Tensor& lengths) {
  const auto q_nope = dense_rows(q_nope_), q_rope = dense_rows(q_rope_), kv = dense_rows(kv_);
  const auto k_rope = dense_rows(k_rope_);
  const int64_t B = q_nope.size(0), T = q_nope.size(1), H = q_nope.size(2);
  auto out = empty({B, T, H, kv.size(3) - q_nope.size(3)}, q_nope.options());
  auto lse = at::empty({B, H, T}, q_nope.options().dtype(at::kFloat));
  if (lse.numel() == 0) return {out, lse};
  const auto run = [&](auto zero) {
    using W = decltype(zero);
    forward(
        prompt<W>(q_nope, q_rope, kv, k_rope, start, lengths), out.mutable_data_ptr<W>(),
        lse.mutable_data_ptr<float>());
  };
  AT_DISPATCH_SWITCH(q_nope.scalar_type(), "mla_attention", AT_DISPATCH_CASE(at::kFloat, [&] {
                       run(scalar_t(0));
                     }) AT_DISPATCH_CASE_REDUCED_FLOATING_TYPES([&] { run(scalar_t(0)); }));
  return {out, lse};
}

TORCH_LIBRARY_IMPL(openmythos, CPU, m) { m.impl("mla_attention", mla_attention); }

}  // namespace openmythos::mla
