// The ops of latent attention, for ops composed of others.
#pragma once

#include "cpu/mla/table.h"

#include <ATen/core/Tensor.h>

#include <cmath>
#include <numbers>
#include <tuple>

namespace openmythos::mla {

// Weights of a layer, named as in openmythos.attention.MLAttention; shapes as in `check_weights`.
struct Weights {
  const at::Tensor &q_down, &q_norm, &q_up_nope, &q_up_rope, &kv_down, &kv_norm, &kv_up, &wo;
};

// Number of heads, and channels per head.
struct HeadSizes {
  int64_t heads, nope, rope, v;
};

// The softmax's scale for keys of this width, times log2(e): the factor from products to exponents of 2.
inline double exponent(int64_t width) { return std::numbers::log2e / std::sqrt(double(width)); }

// ValueError naming the tensor, what came and what was expected.
void fits(const char* name, const at::Tensor& t, at::IntArrayRef shape, at::ScalarType dtype);

// ValueError for sizes or weights that do not fit D channels and latents of width r.
void check_weights(int64_t D, int64_t r, at::ScalarType dtype, const Weights& weights, const HeadSizes& sizes);

// ValueError naming what does not fit; nothing has been written then. Caches are written in place, so their strides are
// checked too.
void check_decode(
    const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& latent_cache, const at::Tensor& rope_cache,
    const at::Tensor& lengths, const Weights& weights, const HeadSizes& sizes);

// Takes checked arguments, all dense but the caches. Checks the values of lengths itself.
at::Tensor mla_decode(
    const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& latent_cache, const at::Tensor& rope_cache,
    const at::Tensor& lengths, const Weights& weights, const HeadSizes& sizes, double eps);

// A ragged cache's table, and where rows are in it; see openmythos_kernels/ops/layer/block_rows.py.
struct Places {
  const at::Tensor &sequence, &position, &loop, &first, &last;
  int64_t keep;

  // ValueError for shapes and dtypes that do not fit N rows.
  void check(int64_t N) const;
  // ValueError for a row that is not in the table, or reads or writes outside of a pool of so many rows. Row n may
  // write the latents of the loops up to `deepest[n]`, and deepens `last` so far.
  void check_row(int64_t n, int64_t deepest, int64_t pool_rows) const;
  Table table() const;
};

// As check_decode, for rows in a pool: latent (R, r) and k_rope (R, rope).
void check_rows(
    const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& latent, const at::Tensor& k_rope,
    const Weights& weights, const HeadSizes& sizes);

// mla_decode with the keys in a pool. Takes checked arguments.
at::Tensor mla_rows(
    const at::Tensor& x, const at::Tensor& freqs, const Places& places, const at::Tensor& latent,
    const at::Tensor& k_rope, const Weights& weights, const HeadSizes& sizes, double eps);

// The ops, without checks.
at::Tensor linear(const at::Tensor& x, const at::Tensor& weight);
std::tuple<at::Tensor, at::Tensor> norm_rope(
    const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& weight, double eps);
std::tuple<at::Tensor, at::Tensor> mla_attention(
    const at::Tensor& q_nope, const at::Tensor& q_rope, const at::Tensor& kv, const at::Tensor& k_rope,
    const at::Tensor& start, const at::Tensor& lengths);

}  // namespace openmythos::mla
