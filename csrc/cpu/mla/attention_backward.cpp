// openmythos::mla_attention_backward and mla_attention_rows_backward, the gradients of per-head latent attention, for
// one head and one block of queries at a time. It recomputes the weights of all visible keys from each query's
// log-sum-exp and, if the output was not saved, the output from the weights: one extra product, where forward takes two
// and a softmax.
#include "cpu/mla/attention.h"
#include "cpu/runtime/allocator.h"

#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

namespace openmythos::mla {
namespace {

template <typename W>
struct Gradients {
  View<W> grad;
  const float* lse;
  W *dq_nope, *dq_rope, *dkv, *out;  // out: null if the output is not wanted
  float* dk_rope;
};

// What a thread holds of a block of queries and all keys that it sees.
struct Work {
  float *rows, *rows_t;            // queries: (kQueries, padded(width)), (width, kQueries)
  float *grad_rows, *grad_rows_t;  // the output's gradient: (kQueries, padded(v)), (v, kQueries)
  float *dq, *out;                 // (kQueries, padded(width)), (kQueries, padded(v)): the sums so far
  float *lse, *mass, *mean;        // (kQueries): lse is +inf if no key is seen; sum of weights; weighted mean slope
  float *weights, *slopes;         // (S, kQueries); slopes: the weights' gradients

  static int64_t size(int64_t width, int64_t v, int64_t S) {
    return kQueries * (2 * padded(width) + width + 2 * padded(v) + v + 3 + 2 * S);
  }
  Work(float* memory, int64_t width, int64_t v, int64_t S) {
    rows = memory;
    dq = rows + kQueries * padded(width);
    grad_rows = dq + kQueries * padded(width);
    out = grad_rows + kQueries * padded(v);
    rows_t = out + kQueries * padded(v);
    grad_rows_t = rows_t + kQueries * width;
    lse = grad_rows_t + kQueries * v;
    mass = lse + kQueries;
    mean = mass + kQueries;
    weights = mean + kQueries;
    slopes = weights + kQueries * S;
  }

  template <typename W>
  void load(const Prompt<W>& p, const Gradients<W>& g, const Block& block, int64_t h) const {
    const int64_t v = padded(p.v), m = block.rows;
    p.load_queries(block, h, rows);
    transpose_rows(rows, padded(p.width()), p.width(), rows_t);
    std::fill_n(grad_rows, kQueries * v, 0.0f);
    for (int64_t t = 0; t < m; ++t) widen(g.grad.row(0, block.first + t, h), grad_rows + t * v, p.v);
    transpose_rows(grad_rows, v, p.v, grad_rows_t);
    std::fill_n(dq, kQueries * padded(p.width()), 0.0f);
    std::fill_n(out, kQueries * v, 0.0f);
    std::fill_n(mass, kQueries, 0.0f);
    std::fill_n(mean, kQueries, 0.0f);
    for (int64_t t = 0; t < kQueries; ++t) {
      const float sum = t < m ? g.lse[p.queries.lse_place(block.b, h, block.first + t)] : kNone;
      lse[t] = sum == kNone ? -kNone : sum;
    }
  }

  // Turns products into the softmax's weights for keys [j, j + n) and queries [q, end), and adds to mass and mean.
  void weigh(int64_t j, int64_t n, int64_t q, int64_t end, float exponent) const {
    for (int64_t c = q; c < end; c += Vec::size()) {
      const Vec scale(exponent), shift = Vec::loadu(lse + c).neg();
      Vec all = Vec::loadu(mass + c), total = Vec::loadu(mean + c);
      for (int64_t t = j; t < j + n; ++t) {
        float* const x = weights + t * kQueries + c;
        const Vec weight = exp2(at::vec::fmadd(Vec::loadu(x), scale, shift));
        weight.store(x);
        all = all + weight;
        total = at::vec::fmadd(weight, Vec::loadu(slopes + t * kQueries + c), total);
      }
      all.store(mass + c);
      total.store(mean + c);
    }
  }

  // Turns mass into its inverse and mean into the mean. The rounded log-sum-exp leaves weights whose sum is not quite
  // 1; this corrects the sums made of them. sees_one(t): whether query t sees one key only, and so has no gradient.
  template <typename F>
  void normalize(F sees_one) const {
    for (int64_t t = 0; t < kQueries; ++t) {
      mass[t] = mass[t] > 0.0f ? 1 / mass[t] : 0.0f;
      mean[t] = sees_one(t) ? slopes[t] : mean[t] * mass[t];
    }
  }

  // Turns slopes into the gradients of the scores for keys [j, j + n) and queries [q, end).
  void score_gradients(int64_t j, int64_t n, int64_t q, int64_t end) const {
    for (int64_t c = q; c < end; c += Vec::size()) {
      const Vec common = Vec::loadu(mean + c);
      for (int64_t t = j; t < j + n; ++t) {
        float* const y = slopes + t * kQueries + c;
        (Vec::loadu(weights + t * kQueries + c) * (Vec::loadu(y) - common)).store(y);
      }
    }
  }
};

template <typename W>
void backward(const Prompt<W>& p, const Gradients<W>& g) {
  const int64_t width = p.width(), wide = padded(width), v = padded(p.v), S = p.S;
  const int64_t work_size = Work::size(width, p.v, S), size = work_size + S * 2 * (wide + v);
  const at::Tensor memory = empty({at::get_num_threads(), size}, at::kFloat);
  const float scale = p.scale();
  run_tasks(p.B * p.heads, [&](int64_t slot, auto next) {
    float* const from = memory.mutable_data_ptr<float>() + slot * size;
    const Work work(from, width, p.v, S);
    // All keys and values of a head, copied: rows at a power-of-two distance would fall into few cache sets.
    float *const keys = from + work_size, *const values = keys + S * wide, *const dk = values + S * v,
                 *const dv = dk + S * wide;
    for (int64_t task = next(); task >= 0; task = next()) {
      const int64_t b = task / p.heads, h = task % p.heads;
      std::fill_n(keys, S * 2 * (wide + v), 0.0f);
      for (int64_t t = 0; t < p.queries.held(b); ++t) {
        widen(p.kv.row(b, t, h), keys + t * wide, p.nope);
        widen(p.k_rope.row(b, t, 0), keys + t * wide + p.nope, p.rope);
        widen(p.kv.row(b, t, h) + p.nope, values + t * v, p.v);
      }
      for (const Block& block : p.queries.blocks(b)) {
        const int64_t end = padded(block.rows);
        work.load(p, g, block, h);
        each_part(block, [&](int64_t j, int64_t n, int64_t q) {
          const int64_t queries = end - q, vectors = queries / Vec::size();
          float *const weights = work.weights + j * kQueries + q, *const slopes = work.slopes + j * kQueries + q;
          multiply_cached(
              Strided<float>{keys + j * wide, wide, 1}, work.rows_t + q, kQueries, weights, kQueries, n, width, vectors,
              false);
          multiply_cached(
              Strided<float>{values + j * v, v, 1}, work.grad_rows_t + q, kQueries, slopes, kQueries, n, p.v, vectors,
              false);
          for (int64_t t = 0; t < n; ++t)
            std::fill_n(weights + t * kQueries, std::max<int64_t>(0, block.blind(j + t) - q), kNone);
          work.weigh(j, n, q, end, p.exponent());
          if (g.out) {
            multiply_cached(
                Strided<float>{weights, 1, kQueries}, values + j * v, v, work.out + q * v, v, queries, n,
                v / Vec::size(), true);
          }
          multiply_cached(
              Strided<float>{weights, kQueries, 1}, work.grad_rows + q * v, v, dv + j * v, v, n, queries,
              v / Vec::size(), true);
        });
        work.normalize([&](int64_t t) { return block.seen(t) == 1; });
        each_part(block, [&](int64_t j, int64_t n, int64_t q) {
          const int64_t queries = end - q;
          float* const slopes = work.slopes + j * kQueries + q;
          work.score_gradients(j, n, q, end);
          multiply_cached(
              Strided<float>{slopes, kQueries, 1}, work.rows + q * wide, wide, dk + j * wide, wide, n, queries,
              wide / Vec::size(), true);
          multiply_cached(
              Strided<float>{slopes, 1, kQueries}, keys + j * wide, wide, work.dq + q * wide, wide, queries, n,
              wide / Vec::size(), true);
        });
        for (int64_t t = 0; t < block.rows; ++t) {
          const float *const x = work.dq + t * wide, *const y = work.out + t * v;
          const int64_t row = (block.first + t) * p.heads + h;
          for (int64_t c = 0; c < p.nope; ++c) g.dq_nope[row * p.nope + c] = W(x[c] * scale);
          for (int64_t c = 0; c < p.rope; ++c) g.dq_rope[row * p.rope + c] = W(x[p.nope + c] * scale);
          for (int64_t c = 0; c < p.v && g.out; ++c) g.out[row * p.v + c] = W(y[c] * work.mass[t]);
        }
      }
      for (int64_t t = 0; t < S; ++t) {
        W* const y = g.dkv + ((b * S + t) * p.heads + h) * (p.nope + p.v);
        float* const r = g.dk_rope + (task * S + t) * p.rope;
        for (int64_t c = 0; c < p.nope; ++c) y[c] = W(dk[t * wide + c] * scale);
        for (int64_t c = 0; c < p.v; ++c) y[p.nope + c] = W(dv[t * v + c]);
        for (int64_t c = 0; c < p.rope; ++c) r[c] = dk[t * wide + p.nope + c] * scale;
      }
    }
  });
}

// The gradients of q_nope, q_rope, kv and k_rope, and the output unless it was kept. Queries, the output's gradient and
// the results of their kind are (N, heads, width).
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> gradients(
    const Queries& queries, const at::Tensor& grad_, const at::Tensor& q_nope_, const at::Tensor& q_rope_,
    const at::Tensor& kv_, const at::Tensor& k_rope_, bool kept, const at::Tensor& lse_) {
  const auto q_nope = dense_rows(q_nope_), q_rope = dense_rows(q_rope_), kv = dense_rows(kv_);
  const auto k_rope = dense_rows(k_rope_), grad = dense_rows(grad_), lse = lse_.contiguous();
  const int64_t B = kv.size(0), H = q_nope.size(1), S = kv.size(1), rope = q_rope.size(2);
  auto dq_nope = empty(q_nope.sizes(), q_nope.options()), dq_rope = empty(q_rope.sizes(), q_nope.options());
  auto dkv = empty(kv.sizes(), q_nope.options()),
       out = empty(kept ? at::IntArrayRef{0} : grad.sizes(), q_nope.options());
  // dk_rope of each head; added in the heads' order below.
  auto per_head = empty({B, H, S, rope}, q_nope.options().dtype(at::kFloat));
  const auto run = [&](auto zero) {
    using W = decltype(zero);
    backward<W>(
        prompt<W>(queries, q_nope, q_rope, kv, k_rope),
        {View<W>(grad.unsqueeze(0)), lse.const_data_ptr<float>(), dq_nope.mutable_data_ptr<W>(),
         dq_rope.mutable_data_ptr<W>(), dkv.mutable_data_ptr<W>(), kept ? nullptr : out.mutable_data_ptr<W>(),
         per_head.mutable_data_ptr<float>()});
  };
  AT_DISPATCH_SWITCH(q_nope.scalar_type(), "mla_attention_backward", AT_DISPATCH_CASE(at::kFloat, [&] {
                       run(scalar_t(0));
                     }) AT_DISPATCH_CASE_REDUCED_FLOATING_TYPES([&] { run(scalar_t(0)); }));
  auto dk_rope = empty({B, S, rope}, q_nope.options().dtype(at::kFloat));
  float* const to = dk_rope.mutable_data_ptr<float>();
  const float* const from = per_head.const_data_ptr<float>();
  const int64_t size = S * rope;
  at::parallel_for(0, B * size, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t x = begin; x < end; ++x) {
      const float* const first = from + x / size * H * size + x % size;
      float total = 0;
      for (int64_t h = 0; h < H; ++h) total += first[h * size];
      to[x] = total;
    }
  });
  return {dq_nope, dq_rope, dkv, dk_rope.to(q_nope.scalar_type()), out};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> mla_attention_backward(
    const at::Tensor& grad, const at::Tensor& q_nope, const at::Tensor& q_rope, const at::Tensor& kv,
    const at::Tensor& k_rope, const at::Tensor& start, const at::Tensor& lengths, const std::optional<at::Tensor>& kept,
    const at::Tensor& lse) {
  const auto [dq_nope, dq_rope, dkv, dk_rope, out] = gradients(
      consecutive(start, lengths, q_nope.size(1), kv.size(1), q_nope.size(2)), grad.flatten(0, 1), q_nope.flatten(0, 1),
      q_rope.flatten(0, 1), kv, k_rope, kept.has_value(), lse);
  return {
      dq_nope.view(q_nope.sizes()), dq_rope.view(q_rope.sizes()), dkv, dk_rope, kept ? out : out.view(grad.sizes())};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> mla_attention_rows_backward(
    const at::Tensor& grad, const at::Tensor& q_nope, const at::Tensor& q_rope, const at::Tensor& kv,
    const at::Tensor& k_rope, const at::Tensor& position, const at::Tensor& offset, const at::Tensor&,
    const at::Tensor& lse) {
  const auto [dq_nope, dq_rope, dkv, dk_rope, out] =
      gradients(packed(position, offset, kv.size(0), kv.size(1)), grad, q_nope, q_rope, kv, k_rope, true, lse);
  return {dq_nope, dq_rope, dkv, dk_rope};
}

TORCH_LIBRARY_IMPL(openmythos, CPU, m) {
  m.impl("mla_attention_backward", mla_attention_backward);
  m.impl("mla_attention_rows_backward", mla_attention_rows_backward);
}

}  // namespace openmythos::mla
