// openmythos::mla_decode, one decode step of latent attention: projections, cache append, attention over the cached
// latents with absorbed up-projections, output projection.
#include "cpu/mla/mla.h"

#include "cpu/mla/decode_attention.h"
#include "cpu/mla/rope.h"
#include "cpu/mla/team.h"
#include "cpu/simd/matvec.h"

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <tuple>
#include <vector>

namespace openmythos::mla {
namespace {

// Pointers and sizes of one step; named as in openmythos.attention.MLAttention.
template <typename T>
struct Step {
  int64_t rows, dim, q_rank, heads, nope, rope, v, r;
  const T *x, *q_down, *q_norm, *q_up_nope, *q_up_rope, *kv_down, *kv_norm, *kv_up, *wo;
  T* y;
  const float* freqs;
  int64_t freqs_stride;  // 0 where all rows sit at the same position
  double eps;

  Query<acc_t<T>> query() const { return {heads, r, rope}; }
  int64_t width() const { return r + rope; }         // of a key
  int64_t down() const { return q_rank + width(); }  // rows of q_down and kv_down together
};

// Where each row's keys are: a cache of its own, which holds lengths[b] tokens.
template <typename T>
struct Caches {
  using Keys = mla::Keys<T>;
  T *latent, *k_rope;
  int64_t latent_stride, k_rope_stride;  // elements from one row's cache to the next's
  int64_t r, rope;
  const int64_t* lengths;

  int64_t count(int64_t b) const { return lengths[b] + 1; }  // with the new one
  T* new_latent(int64_t b) const { return latent + b * latent_stride + lengths[b] * r; }
  T* new_k_rope(int64_t b) const { return k_rope + b * k_rope_stride + lengths[b] * rope; }
  Keys keys(int64_t b) const { return {latent + b * latent_stride, k_rope + b * k_rope_stride, r, rope}; }
};

// The same in a pool that all rows share.
template <typename T>
struct Pool {
  using Keys = PooledKeys<T>;
  T *latent, *k_rope;
  int64_t r, rope;
  Table table;

  int64_t count(int64_t n) const { return table.position[n] + 1; }
  T* new_latent(int64_t n) const { return latent + table.own(n) * r; }
  T* new_k_rope(int64_t n) const { return k_rope + table.own(n) * rope; }
  Keys keys(int64_t n) const { return {latent, k_rope, r, rope, table, n}; }
};

// out = in * rsqrt(mean(in^2) + eps) * weight
template <typename T>
void rms_norm(const acc_t<T>* in, const T* weight, int64_t n, double eps, acc_t<T>* out) {
  using A = acc_t<T>;
  A squares = dot<A>(in, in, n);
  const A scale = A(1) / std::sqrt(squares / A(n) + A(eps));
  for (int64_t i = 0; i < n; ++i) out[i] = in[i] * scale * A(weight[i]);
}

// out[m][c] = sum_n a[m][n] * W[n][c]; the rows of W are read once, in order.
template <typename T>
void vecmat(const acc_t<T>* a, const T* W, int64_t n, int64_t cols, int64_t rows, acc_t<T>* out, int64_t ldo) {
  using V = AccVec<T>;
  for (int64_t m = 0; m < rows; ++m) std::fill_n(out + m * ldo, cols, acc_t<T>(0));
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    const T* const w = W + i * cols;
    for (int64_t m = 0; m < rows; ++m) {
      const acc_t<T>* const am = a + m * n + i;
      acc_t<T>* const y = out + m * ldo;
      const V a0(am[0]), a1(am[1]), a2(am[2]), a3(am[3]);
      int64_t c = 0;
      for (; c + step<T> <= cols; c += step<T>) {
        const auto w0 = openmythos::load(w + c), w1 = openmythos::load(w + cols + c);
        const auto w2 = openmythos::load(w + 2 * cols + c), w3 = openmythos::load(w + 3 * cols + c);
        V s = V::loadu(y + c);
        s = at::vec::fmadd(a0, w0.first, at::vec::fmadd(a1, w1.first, s));
        at::vec::fmadd(a2, w2.first, at::vec::fmadd(a3, w3.first, s)).store(y + c);
        if constexpr (widens<T>) {
          V t = V::loadu(y + c + V::size());
          t = at::vec::fmadd(a0, w0.second, at::vec::fmadd(a1, w1.second, t));
          at::vec::fmadd(a2, w2.second, at::vec::fmadd(a3, w3.second, t)).store(y + c + V::size());
        }
      }
      for (; c < cols; ++c) {
        for (int k = 0; k < 4; ++k) y[c] += am[k] * acc_t<T>(w[k * cols + c]);
      }
    }
  }
  for (; i < n; ++i) {
    for (int64_t m = 0; m < rows; ++m) axpy<T>(a[m * n + i], W + i * cols, out + m * ldo, cols);
  }
}

// Buffers of a step, in accumulator precision. `own` has a slice for each thread; the others are shared.
template <typename T>
struct Buffers {
  using A = acc_t<T>;
  int64_t heads;                    // padded to whole vectors
  std::vector<int64_t> first_task;  // of each row; then the number of attention tasks
  int64_t own_size;
  std::unique_ptr<A[]> memory;
  A *x, *down, *query, *top, *mass, *partial, *attended, *result, *own;

  template <typename Cache>
  Buffers(const Step<T>& s, const Cache& cache, int64_t threads) : heads(s.query().heads()), first_task(s.rows + 1) {
    for (int64_t b = 0; b < s.rows; ++b) first_task[b + 1] = first_task[b] + Splits(cache.count(b)).count;
    const int64_t tasks = first_task.back();
    const int64_t project = s.rows * (s.q_rank + std::max(s.nope, s.rope));
    const int64_t merge = s.rows * s.r;
    own_size = round_up(std::max({project, merge, s.query().size() + Scratch<T>(s.query()).total()}), 16);

    std::vector<std::pair<A**, int64_t>> wanted = {
        {&x, s.rows * s.dim},
        {&down, s.rows * s.down()},
        {&query, s.rows * s.heads * s.width()},
        {&top, tasks * heads},
        {&mass, tasks * heads},
        {&partial, tasks * s.heads * s.r},
        {&attended, s.rows * s.heads * s.v},
        {&result, s.rows * s.dim},
        {&own, threads * own_size},
    };
    int64_t total = 0;
    for (auto& [_, n] : wanted) total += round_up(n, 16);
    memory.reset(new A[total]);
    A* at = memory.get();
    for (auto& [pointer, n] : wanted) *pointer = at, at += round_up(n, 16);
  }
};

// c_q and the new latent before their norms, and the new rotary key before its rotation.
template <typename T>
void project_down(const Team& team, const Step<T>& s, Buffers<T>& buf) {
  const auto [begin, end] = team.share(s.down());
  matvec<T>(s.q_down, s.dim, begin, std::min(end, s.q_rank), buf.x, s.rows, buf.down, s.down());
  matvec<T>(
      s.kv_down, s.dim, std::max(begin, s.q_rank) - s.q_rank, end - s.q_rank, buf.x, s.rows, buf.down + s.q_rank,
      s.down());
}

template <typename T, typename Cache>
void append(const Step<T>& s, const Cache& cache, int64_t b, const acc_t<T>* down, acc_t<T>* work) {
  rms_norm<T>(down, s.kv_norm, s.r, s.eps, work);
  T* const latent = cache.new_latent(b);
  for (int64_t c = 0; c < s.r; ++c) latent[c] = T(work[c]);
  rotate(down + s.r, s.freqs + b * s.freqs_stride, s.rope, acc_t<T>(1), work);
  T* const k_rope = cache.new_k_rope(b);
  for (int64_t c = 0; c < s.rope; ++c) k_rope[c] = T(work[c]);
}

// Queries, head by head: q_nope @ W_uk and the rotated q_rope, both times the softmax scale and log2(e), so that
// query . key is the score as an exponent of 2. Also appends the new keys.
template <typename T, typename Cache>
void project_query(const Team& team, const Step<T>& s, const Cache& cache, Buffers<T>& buf) {
  using A = acc_t<T>;
  const A scale = A(exponent(s.nope + s.rope));
  A* const c_q = buf.own + team.id * buf.own_size;
  A* const up = c_q + s.rows * s.q_rank;
  if (const auto [begin, end] = team.share(s.rows); begin < end) {
    for (int64_t b = begin; b < end; ++b) append(s, cache, b, buf.down + b * s.down() + s.q_rank, c_q);
  }
  for (int64_t b = 0; b < s.rows; ++b) {
    rms_norm<T>(buf.down + b * s.down(), s.q_norm, s.q_rank, s.eps, c_q + b * s.q_rank);
  }
  const auto [begin, end] = team.share(s.heads);
  const int64_t row = s.heads * s.width();
  for (int64_t h = begin; h < end; ++h) {
    A* const query = buf.query + h * s.width();
    matvec<T>(s.q_up_nope + h * s.nope * s.q_rank, s.q_rank, 0, s.nope, c_q, s.rows, up, s.nope);
    for (int64_t i = 0; i < s.rows * s.nope; ++i) up[i] *= scale;
    vecmat<T>(up, s.kv_up + h * (s.nope + s.v) * s.r, s.nope, s.r, s.rows, query, row);
    matvec<T>(s.q_up_rope + h * s.rope * s.q_rank, s.q_rank, 0, s.rope, c_q, s.rows, up, s.rope);
    for (int64_t b = 0; b < s.rows; ++b) {
      rotate(up + b * s.rope, s.freqs + b * s.freqs_stride, s.rope, scale, query + b * row + s.r);
    }
  }
}

template <typename T, typename Cache>
void attend_tasks(const Team& team, const Step<T>& s, const Cache& cache, Buffers<T>& buf) {
  using A = acc_t<T>;
  const Query<A> query = s.query();
  A* const q = buf.own + team.id * buf.own_size;
  A* const work = q + query.size();
  const auto [first, last] = team.share(buf.first_task.back());
  int64_t b = 0, packed = -1;
  for (int64_t task = first; task < last; ++task) {
    while (buf.first_task[b + 1] <= task) ++b;
    if (packed != b) query.pack(buf.query + b * s.heads * s.width(), q);
    packed = b;
    const Splits splits(cache.count(b));
    const int64_t begin = (task - buf.first_task[b]) * splits.size;
    attend<T>(
        cache.keys(b), begin, std::min(begin + splits.size, splits.keys), query, q, work, buf.top + task * buf.heads,
        buf.mass + task * buf.heads, buf.partial + task * s.heads * s.r);
  }
}

// Merges each row's tasks in order, and expands the mean latent to values.
template <typename T>
void merge_and_expand(const Team& team, const Step<T>& s, Buffers<T>& buf) {
  using A = acc_t<T>;
  A* const mean = buf.own + team.id * buf.own_size;
  const auto [begin, end] = team.share(s.heads);
  for (int64_t h = begin; h < end; ++h) {
    for (int64_t b = 0; b < s.rows; ++b) {
      const int64_t first = buf.first_task[b], last = buf.first_task[b + 1];
      A top = buf.top[first * buf.heads + h];
      for (int64_t t = first + 1; t < last; ++t) top = std::max(top, buf.top[t * buf.heads + h]);
      A mass = 0;
      for (int64_t t = first; t < last; ++t) {
        mass += buf.mass[t * buf.heads + h] * std::exp2(buf.top[t * buf.heads + h] - top);
      }
      A* const out = mean + b * s.r;
      std::fill_n(out, s.r, A(0));
      for (int64_t t = first; t < last; ++t) {
        const A weight = std::exp2(buf.top[t * buf.heads + h] - top) / mass;
        axpy<A>(weight, buf.partial + (t * s.heads + h) * s.r, out, s.r);
      }
    }
    const T* const W_uv = s.kv_up + (h * (s.nope + s.v) + s.nope) * s.r;
    matvec<T>(W_uv, s.r, 0, s.v, mean, s.rows, buf.attended + h * s.v, s.heads * s.v);
  }
}

template <typename T>
void project_out(const Team& team, const Step<T>& s, Buffers<T>& buf) {
  const auto [begin, end] = team.share(s.dim);
  acc_t<T>* result = buf.result;
  if constexpr (!widens<T>) result = s.y;
  matvec<T>(s.wo, s.heads * s.v, begin, end, buf.attended, s.rows, result, s.dim);
  if constexpr (widens<T>) {
    for (int64_t b = 0; b < s.rows; ++b) {
      for (int64_t i = begin; i < end; ++i) s.y[b * s.dim + i] = T(result[b * s.dim + i]);
    }
  }
}

template <typename T, typename Cache>
void decode(const Step<T>& s, const Cache& cache) {
  Buffers<T> buf(s, cache, at::get_num_threads());
  widen(s.x, buf.x, s.rows * s.dim);
  run_team([&](const Team& team) {
    project_down(team, s, buf);
    team.barrier();
    project_query(team, s, cache, buf);
    team.barrier();
    attend_tasks(team, s, cache, buf);
    team.barrier();
    merge_and_expand(team, s, buf);
    team.barrier();
    project_out(team, s, buf);
  });
}

template <typename T>
Step<T> step_of(
    const at::Tensor& x, const at::Tensor& freqs, int64_t r, const Weights& weights, const HeadSizes& sizes, double eps,
    const at::Tensor& y) {
  return {
      x.size(0),
      x.size(1),
      weights.q_down.size(0),
      sizes.heads,
      sizes.nope,
      sizes.rope,
      sizes.v,
      r,
      x.const_data_ptr<T>(),
      weights.q_down.const_data_ptr<T>(),
      weights.q_norm.const_data_ptr<T>(),
      weights.q_up_nope.const_data_ptr<T>(),
      weights.q_up_rope.const_data_ptr<T>(),
      weights.kv_down.const_data_ptr<T>(),
      weights.kv_norm.const_data_ptr<T>(),
      weights.kv_up.const_data_ptr<T>(),
      weights.wo.const_data_ptr<T>(),
      y.mutable_data_ptr<T>(),
      freqs.const_data_ptr<float>(),
      freqs.size(0) == 1 ? 0 : sizes.rope,
      eps};
}

}  // namespace

void fits(const char* name, const at::Tensor& t, at::IntArrayRef shape, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(
      t.sizes() == shape && t.scalar_type() == dtype && t.is_cpu() && t.is_contiguous(), name, ": got ",
      t.scalar_type(), " ", t.sizes(), " on ", t.device(), t.is_contiguous() ? "" : ", not dense", "; must be dense ",
      dtype, " ", shape, " on cpu");
}

void check_weights(int64_t D, int64_t r, at::ScalarType dtype, const Weights& weights, const HeadSizes& sizes) {
  const auto [heads, nope, rope, v] = sizes;
  TORCH_CHECK_VALUE(
      heads > 0 && nope > 0 && rope > 0 && rope % 2 == 0 && v > 0, "n_heads, nope, rope, v: got ", heads, ", ", nope,
      ", ", rope, ", ", v, ", must be positive and rope even");
  const int64_t q_rank = weights.q_down.dim() == 2 ? weights.q_down.size(0) : 0;
  fits("q_down", weights.q_down, {q_rank, D}, dtype);
  fits("q_norm", weights.q_norm, {q_rank}, dtype);
  fits("q_up_nope", weights.q_up_nope, {heads * nope, q_rank}, dtype);
  fits("q_up_rope", weights.q_up_rope, {heads * rope, q_rank}, dtype);
  fits("kv_down", weights.kv_down, {r + rope, D}, dtype);
  fits("kv_norm", weights.kv_norm, {r}, dtype);
  fits("kv_up", weights.kv_up, {heads * (nope + v), r}, dtype);
  fits("wo", weights.wo, {D, heads * v}, dtype);
}

void check_decode(
    const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& latent_cache, const at::Tensor& rope_cache,
    const at::Tensor& lengths, const Weights& weights, const HeadSizes& sizes) {
  const int64_t rope = sizes.rope;
  TORCH_CHECK_VALUE(
      x.dim() == 2 && at::isFloatingType(x.scalar_type()), "x: got ", x.scalar_type(), " ", x.sizes(),
      ", must be (B, D) in a floating dtype");
  const int64_t B = x.size(0), D = x.size(1);
  const auto dtype = x.scalar_type();
  const int64_t r = latent_cache.dim() == 3 ? latent_cache.size(2) : 0;
  for (const auto& [name, cache, width] :
       {std::tuple{"latent_cache", &latent_cache, r}, {"rope_cache", &rope_cache, rope}}) {
    TORCH_CHECK_VALUE(
        cache->dim() == 3 && cache->size(0) == B && cache->size(1) == latent_cache.size(1) && cache->size(2) == width &&
            cache->stride(2) == 1 && cache->stride(1) == width && cache->scalar_type() == dtype && cache->is_cpu(),
        name, ": got ", cache->scalar_type(), " ", cache->sizes(), " with strides ", cache->strides(), ", must be ",
        dtype, " (", B, ", capacity, ", width, ") with each row dense, and both caches of one capacity");
  }
  fits("x", x, {B, D}, dtype);
  check_weights(D, r, dtype, weights, sizes);
  fits("lengths", lengths, {B}, at::kLong);
  fits("freqs", freqs, {freqs.dim() == 3 && freqs.size(0) == 1 ? 1 : B, rope / 2, 2}, at::kFloat);
}

at::Tensor mla_decode(
    const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& latent_cache, const at::Tensor& rope_cache,
    const at::Tensor& lengths, const Weights& weights, const HeadSizes& sizes, double eps) {
  auto y = at::empty_like(x);
  const int64_t rows = x.size(0), capacity = latent_cache.size(1);
  const int64_t* const held = lengths.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < rows; ++b) {
    TORCH_CHECK_VALUE(
        0 <= held[b] && held[b] < capacity, "mla_decode: lengths[", b, "] = ", held[b],
        ": must leave room for one token in caches of capacity ", capacity);
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "mla_decode", [&] {
    using T = scalar_t;
    decode(
        step_of<T>(x, freqs, latent_cache.size(2), weights, sizes, eps, y),
        Caches<T>{
            latent_cache.mutable_data_ptr<T>(), rope_cache.mutable_data_ptr<T>(), latent_cache.stride(0),
            rope_cache.stride(0), latent_cache.size(2), sizes.rope, held});
  });
  return y;
}

at::Tensor mla_rows(
    const at::Tensor& x, const at::Tensor& freqs, const Places& places, const at::Tensor& latent,
    const at::Tensor& k_rope, const Weights& weights, const HeadSizes& sizes, double eps) {
  auto y = at::empty_like(x);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "mla_rows", [&] {
    using T = scalar_t;
    decode(
        step_of<T>(x, freqs, latent.size(1), weights, sizes, eps, y),
        Pool<T>{
            latent.mutable_data_ptr<T>(), k_rope.mutable_data_ptr<T>(), latent.size(1), sizes.rope, places.table()});
  });
  return y;
}

namespace {

// The op as Python declares it: any strides, but the caches'.
at::Tensor checked_decode(
    const at::Tensor& x, const at::Tensor& freqs, at::Tensor latent_cache, at::Tensor rope_cache,
    const at::Tensor& lengths, const at::Tensor& q_down, const at::Tensor& q_norm, const at::Tensor& q_up_nope,
    const at::Tensor& q_up_rope, const at::Tensor& kv_down, const at::Tensor& kv_norm, const at::Tensor& kv_up,
    const at::Tensor& wo, int64_t heads, int64_t nope, int64_t rope, int64_t v, double eps) {
  const at::Tensor dense_x = x.contiguous(), dense_freqs = freqs.contiguous(), dense_lengths = lengths.contiguous();
  const std::array<at::Tensor, 8> dense{q_down.contiguous(),    q_norm.contiguous(),  q_up_nope.contiguous(),
                                        q_up_rope.contiguous(), kv_down.contiguous(), kv_norm.contiguous(),
                                        kv_up.contiguous(),     wo.contiguous()};
  const Weights weights = std::apply([](const auto&... w) { return Weights{w...}; }, dense);
  const HeadSizes sizes{heads, nope, rope, v};
  check_decode(dense_x, dense_freqs, latent_cache, rope_cache, dense_lengths, weights, sizes);
  if (x.numel() == 0) return at::empty_like(dense_x);
  return mla_decode(dense_x, dense_freqs, latent_cache, rope_cache, dense_lengths, weights, sizes, eps);
}

}  // namespace

TORCH_LIBRARY_IMPL(openmythos, CPU, m) { m.impl("mla_decode", checked_decode); }

}  // namespace openmythos::mla
