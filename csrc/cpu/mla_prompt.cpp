// Per-head latent attention of many queries (openmythos::mla_attention): online softmax over tiles of keys.
#include "cpu/mla_prompt.h"

#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <vector>

namespace openmythos::mla {
namespace {

using V = at::vec::Vectorized<float>;
constexpr float kNone = -std::numeric_limits<float>::infinity();

// One row of products to weights exp2(product * exponent - top) with zeros from `visible` on, over `cols` columns rounded up
// to vectors; returns what earlier tiles must be multiplied by.
float soften(float* score, int64_t visible, int64_t cols, float exponent, float& top, float& mass) {
  const int64_t end = (cols + V::size() - 1) / V::size() * V::size();
  std::fill(score + visible, score + end, kNone);
  V most(kNone);
  for (int64_t c = 0; c < end; c += V::size()) most = at::vec::maximum(most, V::loadu(score + c));
  const float before = top;
  const auto larger = [](auto& a, auto& b) { return at::vec::maximum(a, b); };
  top = std::max(top, exponent * at::vec::vec_reduce_all<float>(larger, most, V::size()));
  const V scale(exponent), shift(top == kNone ? 0.0f : -top);
  V total(0);
  for (int64_t c = 0; c < end; c += V::size()) {
    const V weight = at::vec::fmadd(V::loadu(score + c), scale, shift).exp2();
    weight.store(score + c);
    total = total + weight;
  }
  const float factor = before == top ? 1.0f : std::exp2(before - top);
  mass = mass * factor + sum<float>(total);
  return factor;
}

template <typename T>
void forward(const Prompt<T>& p, T* out, float* lse) {
  const int64_t blocks = (p.queries + kQueryTile - 1) / kQueryTile;
  share_out(p.B * p.heads * blocks, [&](auto next) {
    Tile q(kQueryTile, p.width()), k(kKeyTile, p.width()), v(kKeyTile, p.v), score(kQueryTile, kKeyTile);
    Tile sum_(kQueryTile, p.v);
    std::vector<float> top(kQueryTile), mass(kQueryTile);
    const at::Tensor k_t = k.whole.t();
    for (int64_t task = next(); task >= 0; task = next()) {
      const int64_t b = task / blocks / p.heads, h = task / blocks % p.heads;
      const int64_t i = (blocks - 1 - task % blocks) * kQueryTile;  // those that see most first
      const int64_t m = std::min(kQueryTile, p.queries - i);
      const int64_t last = p.seen(b, i + m - 1);
      p.load_queries(b, h, i, m, q.data);
      std::fill(top.begin(), top.end(), kNone);
      std::fill(mass.begin(), mass.end(), 0.0f);
      for (int64_t j = 0; j < last; j += kKeyTile) {
        const int64_t n = std::min(kKeyTile, last - j);
        p.load_keys(b, h, j, n, k.data, v.data);
        product(score.part(0, m, n), q.part(m), n == kKeyTile ? k_t : k.part(n).t(), false);
        for (int64_t t = 0; t < m; ++t) {
          const int64_t visible = std::clamp<int64_t>(p.seen(b, i + t) - j, 0, n);
          const float factor = soften(score.row(t), visible, n, p.exponent(), top[t], mass[t]);
          if (j > 0 && factor != 1.0f) {
            float* const y = sum_.row(t);
            for (int64_t c = 0; c < p.v; ++c) y[c] *= factor;
          }
        }
        product(sum_.part(m), score.part(0, m, n), v.part(n), j > 0);
      }
      for (int64_t t = 0; t < m; ++t) {
        T* const y = out + ((b * p.queries + i + t) * p.heads + h) * p.v;
        const bool any = mass[t] > 0.0f;
        for (int64_t c = 0; c < p.v; ++c) y[c] = any ? T(sum_.row(t)[c] / mass[t]) : T(0);
        lse[(b * p.heads + h) * p.queries + i + t] = any ? top[t] + std::log2(mass[t]) : kNone;
      }
    }
  });
}

template <typename T>
void backward(
    const Prompt<T>& p, const View<T>& grad, const View<T>& out, const float* lse, T* dq_nope, T* dq_rope, T* dkv,
    float* dk_rope) {
  share_out(p.B * p.heads, [&](auto next) {
    Tile q(kQueryTile, p.width()), k(kKeyTile, p.width()), v(kKeyTile, p.v), dout(kQueryTile, p.v);
    Tile weight(kQueryTile, kKeyTile), slope(kQueryTile, kKeyTile), dk(kKeyTile, p.width()), dv(kKeyTile, p.v);
    Tile dq(p.queries, p.width());
    std::vector<float> delta(p.queries);
    const V exponent(p.exponent());
    const float scale = p.scale();
    for (int64_t task = next(); task >= 0; task = next()) {
      const int64_t b = task / p.heads, h = task % p.heads, held = p.held(b);
      const float* const row_lse = lse + task * p.queries;
      std::fill_n(dq.data, p.queries * p.width(), 0.0f);
      for (int64_t i = 0; i < p.queries; ++i) {
        const T *g = grad.row(b, i, h), *y = out.row(b, i, h);
        float total = 0;
        for (int64_t c = 0; c < p.v; ++c) total += float(g[c]) * float(y[c]);
        delta[i] = total;
      }
      for (int64_t j = 0; j < p.S; j += kKeyTile) {
        const int64_t rows = std::min(kKeyTile, p.S - j), n = std::clamp<int64_t>(held - j, 0, rows);
        bool used = false;
        if (n > 0) p.load_keys(b, h, j, n, k.data, v.data);
        for (int64_t i = n > 0 ? std::max<int64_t>(0, j - p.start[b]) : p.queries; i < p.queries; i += kQueryTile) {
          const int64_t m = std::min(kQueryTile, p.queries - i);
          p.load_queries(b, h, i, m, q.data);
          for (int64_t t = 0; t < m; ++t) widen(grad.row(b, i + t, h), dout.row(t), p.v);
          const at::Tensor w = weight.part(0, m, n), s = slope.part(0, m, n), g = dout.part(m);
          product(w, q.part(m), k.part(n).t(), false);
          product(s, g, v.part(n).t(), false);
          const int64_t end = (n + V::size() - 1) / V::size() * V::size();
          for (int64_t t = 0; t < m; ++t) {
            const int64_t visible = std::clamp<int64_t>(p.seen(b, i + t) - j, 0, n);
            float *x = weight.row(t), *y = slope.row(t);
            std::fill(x + visible, x + end, kNone);
            std::fill(y + visible, y + end, 0.0f);
            const V shift(visible > 0 ? -row_lse[i + t] : 0.0f), d(delta[i + t]);
            for (int64_t c = 0; c < end; c += V::size()) {
              const V e = at::vec::fmadd(V::loadu(x + c), exponent, shift).exp2();
              e.store(x + c);
              (e * (V::loadu(y + c) - d)).store(y + c);
            }
          }
          product(dv.part(n), w.t(), g, used);
          product(dk.part(n), s.t(), q.part(m), used);
          product(dq.part(i, m, dq.ld), s, k.part(n), true);
          used = true;
        }
        for (int64_t t = 0; t < rows; ++t) {
          T* const y = dkv + ((b * p.S + j + t) * p.heads + h) * (p.nope + p.v);
          float* const r = dk_rope + (task * p.S + j + t) * p.rope;
          const bool any = used && t < n;
          for (int64_t c = 0; c < p.nope; ++c) y[c] = any ? T(dk.row(t)[c] * scale) : T(0);
          for (int64_t c = 0; c < p.v; ++c) y[p.nope + c] = any ? T(dv.row(t)[c]) : T(0);
          for (int64_t c = 0; c < p.rope; ++c) r[c] = any ? dk.row(t)[p.nope + c] * scale : 0.0f;
        }
      }
      for (int64_t i = 0; i < p.queries; ++i) {
        const float* const x = dq.row(i);
        const int64_t row = (b * p.queries + i) * p.heads + h;
        for (int64_t c = 0; c < p.nope; ++c) dq_nope[row * p.nope + c] = T(x[c] * scale);
        for (int64_t c = 0; c < p.rope; ++c) dq_rope[row * p.rope + c] = T(x[p.nope + c] * scale);
      }
    }
  });
}

template <typename T>
Prompt<T> prompt(
    const at::Tensor& q_nope, const at::Tensor& q_rope, const at::Tensor& kv, const at::Tensor& k_rope,
    const at::Tensor& start, const at::Tensor& lengths) {
  return {View<T>(q_nope), View<T>(q_rope), View<T>(kv), View<T>(k_rope), q_nope.size(0), q_nope.size(1), kv.size(1),
          q_nope.size(2), q_nope.size(3), q_rope.size(3), kv.size(3) - q_nope.size(3),
          start.const_data_ptr<int64_t>(), lengths.const_data_ptr<int64_t>()};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> mla_attention(
    const at::Tensor& q_nope_, const at::Tensor& q_rope_, const at::Tensor& kv_, const at::Tensor& k_rope_,
    const at::Tensor& start, const at::Tensor& lengths) {
  const auto q_nope = dense_rows(q_nope_), q_rope = dense_rows(q_rope_), kv = dense_rows(kv_);
  const auto k_rope = dense_rows(k_rope_);
  const int64_t B = q_nope.size(0), T = q_nope.size(1), H = q_nope.size(2);
  auto out = at::empty({B, T, H, kv.size(3) - q_nope.size(3)}, q_nope.options());
  auto lse = at::empty({B, H, T}, q_nope.options().dtype(at::kFloat));
  if (lse.numel() == 0) return {out, lse};
  AT_DISPATCH_SWITCH(
      q_nope.scalar_type(), "mla_attention", AT_DISPATCH_CASE(at::kFloat, [&] {
        forward(prompt<scalar_t>(q_nope, q_rope, kv, k_rope, start, lengths), out.mutable_data_ptr<scalar_t>(),
                lse.mutable_data_ptr<float>());
      }) AT_DISPATCH_CASE_REDUCED_FLOATING_TYPES([&] {
        forward(prompt<scalar_t>(q_nope, q_rope, kv, k_rope, start, lengths), out.mutable_data_ptr<scalar_t>(),
                lse.mutable_data_ptr<float>());
      }));
  return {out, lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> mla_attention_backward(
    const at::Tensor& grad_, const at::Tensor& q_nope_, const at::Tensor& q_rope_, const at::Tensor& kv_,
    const at::Tensor& k_rope_, const at::Tensor& start, const at::Tensor& lengths, const at::Tensor& out,
    const at::Tensor& lse) {
  const auto q_nope = dense_rows(q_nope_), q_rope = dense_rows(q_rope_), kv = dense_rows(kv_);
  const auto k_rope = dense_rows(k_rope_), grad = dense_rows(grad_);
  const int64_t B = q_nope.size(0), H = q_nope.size(2), S = kv.size(1), rope = q_rope.size(3);
  auto dq_nope = at::empty(q_nope.sizes(), q_nope.options()), dq_rope = at::empty(q_rope.sizes(), q_nope.options());
  auto dkv = at::empty(kv.sizes(), q_nope.options());
  // Per head first, then added in the heads' order.
  auto per_head = at::empty({B, H, S, rope}, q_nope.options().dtype(at::kFloat));
  const auto lse_ = lse.contiguous();
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    backward(prompt<T>(q_nope, q_rope, kv, k_rope, start, lengths), View<T>(grad), View<T>(out),
             lse_.const_data_ptr<float>(), dq_nope.mutable_data_ptr<T>(), dq_rope.mutable_data_ptr<T>(),
             dkv.mutable_data_ptr<T>(), per_head.mutable_data_ptr<float>());
  };
  AT_DISPATCH_SWITCH(
      q_nope.scalar_type(), "mla_attention_backward", AT_DISPATCH_CASE(at::kFloat, [&] { run(scalar_t(0)); })
                                                          AT_DISPATCH_CASE_REDUCED_FLOATING_TYPES([&] { run(scalar_t(0)); }));
  auto dk_rope = at::empty({B, S, rope}, q_nope.options().dtype(at::kFloat));
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
  m.impl("mla_attention", mla_attention);
  m.impl("mla_attention_backward", mla_attention_backward);
}

}  // namespace openmythos::mla
