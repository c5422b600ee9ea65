// Gradients of per-head latent attention (openmythos::mla_attention_backward): a head at a time, weights recomputed from
// the log-sum-exp of each query.
#include "cpu/mla_prompt.h"
#include "cpu/pages.h"

#include <ATen/Dispatch.h>
#include <torch/library.h>

namespace openmythos::mla {
namespace {

// A block of queries, packed once for all blocks of keys: as rows and with queries along vectors.
struct Block {
  float *rows, *turned;            // (kQueries, padded(width)), (width, kQueries)
  float *grad_rows, *grad_turned;  // the output's gradient: (kQueries, padded(v)), (v, kQueries)
  float* dq;                       // (kQueries, padded(width)): the sum so far
  float *lse, *delta;              // (kQueries): lse +inf where nothing is seen

  static int64_t size(int64_t width, int64_t v) { return kQueries * (2 * padded(width) + width + padded(v) + v + 2); }
  Block(float* memory, int64_t width, int64_t v) {
    rows = memory;
    dq = rows + kQueries * padded(width);
    turned = dq + kQueries * padded(width);
    grad_rows = turned + kQueries * width;
    grad_turned = grad_rows + kQueries * padded(v);
    lse = grad_turned + kQueries * v;
    delta = lse + kQueries;
  }
};

template <typename W>
struct Gradients {
  View<W> grad, out;
  const float* lse;
  W *dq_nope, *dq_rope, *dkv;
  float* dk_rope;
};

template <typename W>
void pack(const Prompt<W>& p, const Gradients<W>& g, int64_t b, int64_t h, int64_t i, const Block& to) {
  const int64_t m = std::min(kQueries, p.queries - i), v = padded(p.v);
  p.load_queries(b, h, i, m, to.rows);
  turn(to.rows, padded(p.width()), p.width(), to.turned);
  std::fill_n(to.grad_rows, kQueries * v, 0.0f);
  std::fill_n(to.dq, kQueries * padded(p.width()), 0.0f);
  for (int64_t t = 0; t < kQueries; ++t) {
    to.lse[t] = std::numeric_limits<float>::infinity();
    to.delta[t] = 0;
    if (t >= m) continue;
    const W* const y = g.out.row(b, i + t, h);
    float* const row = to.grad_rows + t * v;
    widen(g.grad.row(b, i + t, h), row, p.v);
    for (int64_t c = 0; c < p.v; ++c) to.delta[t] += row[c] * float(y[c]);
    const float lse = g.lse[(b * p.heads + h) * p.queries + i + t];
    if (lse != kNone) to.lse[t] = lse;
  }
  turn(to.grad_rows, v, p.v, to.grad_turned);
}

// products and slopes (n, kQueries) to the softmax's weights and to the gradients of its exponents' natural logarithms.
inline void weigh(float* products, float* slopes, int64_t n, float exponent, const Block& block) {
  for (int64_t c = 0; c < kQueries; c += Vec::size()) {
    const Vec scale(exponent), shift = Vec::loadu(block.lse + c).neg(), delta = Vec::loadu(block.delta + c);
    for (int64_t j = 0; j < n; ++j) {
      float *const x = products + j * kQueries + c, *const y = slopes + j * kQueries + c;
      const Vec weight = at::vec::fmadd(Vec::loadu(x), scale, shift).exp2();
      weight.store(x);
      (weight * (Vec::loadu(y) - delta)).store(y);
    }
  }
}

template <typename W>
void backward(const Prompt<W>& p, const Gradients<W>& g) {
  const int64_t width = p.width(), wide = padded(width), v = padded(p.v);
  const int64_t blocks = (p.queries + kQueries - 1) / kQueries, block_size = Block::size(width, p.v);
  const int64_t size = blocks * block_size + kKeys * (2 * kQueries + 2 * wide + v);
  const at::Tensor memory = empty({at::get_num_threads(), size}, at::kFloat);
  const float scale = p.scale();
  share_out(p.B * p.heads, [&](int64_t slot, auto next) {
    float* from = memory.mutable_data_ptr<float>() + slot * size;
    std::vector<Block> packed;
    for (int64_t i = 0; i < blocks; ++i, from += block_size) packed.emplace_back(from, width, p.v);
    float *const weights = from, *const slopes = weights + kKeys * kQueries, *const keys = slopes + kKeys * kQueries;
    float *const dk = keys + kKeys * wide, *const dv = dk + kKeys * wide;
    for (int64_t task = next(); task >= 0; task = next()) {
      const int64_t b = task / p.heads, h = task % p.heads, held = p.held(b);
      for (int64_t i = 0; i < blocks; ++i) pack(p, g, b, h, i * kQueries, packed[i]);
      for (int64_t j = 0; j < p.S; j += kKeys) {
        const int64_t rows = std::min(kKeys, p.S - j), n = std::clamp<int64_t>(held - j, 0, rows);
        // The first query that sees key j.
        const int64_t first = n > 0 ? std::max<int64_t>(0, j - p.start[b]) / kQueries : blocks;
        std::fill_n(dk, kKeys * wide, 0.0f);
        std::fill_n(dv, kKeys * v, 0.0f);
        std::fill_n(keys, kKeys * wide, 0.0f);
        for (int64_t t = 0; t < n; ++t) {
          widen(p.kv.row(b, j + t, h), keys + t * wide, p.nope);
          widen(p.k_rope.row(b, j + t, 0), keys + t * wide + p.nope, p.rope);
        }
        for (int64_t i = first; i < blocks; ++i) {
          const Block& block = packed[i];
          multiply_near(
              Strided<float>{keys, wide, 1}, block.turned, kQueries, weights, kQueries, n, width, kVectors, false);
          multiply(p.values(b, h, j), block.grad_turned, kQueries, slopes, kQueries, n, p.v, kVectors, false);
          for (int64_t t = 0; t < n; ++t) {
            std::fill_n(weights + t * kQueries, p.blind(b, i * kQueries, j + t), kNone);
          }
          weigh(weights, slopes, n, p.exponent(), block);
          multiply_near(
              Strided<float>{weights, kQueries, 1}, block.grad_rows, v, dv, v, n, kQueries, v / Vec::size(), true);
          multiply_near(
              Strided<float>{slopes, kQueries, 1}, block.rows, wide, dk, wide, n, kQueries, wide / Vec::size(), true);
          multiply_near(
              Strided<float>{slopes, 1, kQueries}, keys, wide, block.dq, wide, kQueries, n, wide / Vec::size(), true);
        }
        for (int64_t t = 0; t < rows; ++t) {
          W* const y = g.dkv + ((b * p.S + j + t) * p.heads + h) * (p.nope + p.v);
          float* const r = g.dk_rope + (task * p.S + j + t) * p.rope;
          for (int64_t c = 0; c < p.nope; ++c) y[c] = W(dk[t * wide + c] * scale);
          for (int64_t c = 0; c < p.v; ++c) y[p.nope + c] = W(dv[t * v + c]);
          for (int64_t c = 0; c < p.rope; ++c) r[c] = dk[t * wide + p.nope + c] * scale;
        }
      }
      for (int64_t i = 0; i < p.queries; ++i) {
        const float* const x = packed[i / kQueries].dq + i % kQueries * wide;
        const int64_t row = (b * p.queries + i) * p.heads + h;
        for (int64_t c = 0; c < p.nope; ++c) g.dq_nope[row * p.nope + c] = W(x[c] * scale);
        for (int64_t c = 0; c < p.rope; ++c) g.dq_rope[row * p.rope + c] = W(x[p.nope + c] * scale);
      }
    }
  });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> mla_attention_backward(
    const at::Tensor& grad_, const at::Tensor& q_nope_, const at::Tensor& q_rope_, const at::Tensor& kv_,
    const at::Tensor& k_rope_, const at::Tensor& start, const at::Tensor& lengths, const at::Tensor& out,
    const at::Tensor& lse_) {
  const auto q_nope = dense_rows(q_nope_), q_rope = dense_rows(q_rope_), kv = dense_rows(kv_);
  const auto k_rope = dense_rows(k_rope_), grad = dense_rows(grad_), lse = lse_.contiguous();
  const int64_t B = q_nope.size(0), H = q_nope.size(2), S = kv.size(1), rope = q_rope.size(3);
  auto dq_nope = empty(q_nope.sizes(), q_nope.options()), dq_rope = empty(q_rope.sizes(), q_nope.options());
  auto dkv = empty(kv.sizes(), q_nope.options());
  // Per head first, then added in the heads' order.
  auto per_head = empty({B, H, S, rope}, q_nope.options().dtype(at::kFloat));
  const auto run = [&](auto zero) {
    using W = decltype(zero);
    backward<W>(
        prompt<W>(q_nope, q_rope, kv, k_rope, start, lengths),
        {View<W>(grad), View<W>(out), lse.const_data_ptr<float>(), dq_nope.mutable_data_ptr<W>(),
         dq_rope.mutable_data_ptr<W>(), dkv.mutable_data_ptr<W>(), per_head.mutable_data_ptr<float>()});
  };
  AT_DISPATCH_SWITCH(
      q_nope.scalar_type(), "mla_attention_backward",
      AT_DISPATCH_CASE(at::kFloat, [&] { run(scalar_t(0)); })
          AT_DISPATCH_CASE_REDUCED_FLOATING_TYPES([&] { run(scalar_t(0)); }));
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
  return {dq_nope, dq_rope, dkv, dk_rope.to(q_nope.scalar_type())};
}

TORCH_LIBRARY_IMPL(openmythos, CPU, m) {
  m.impl("mla_attention_backward", mla_attention_backward);
}

}  // namespace openmythos::mla
