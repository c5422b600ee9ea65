// The ops of latent attention, for ops that are made of others.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace openmythos::mla {

// ValueError naming the tensor, what came and what was expected.
void fits(const char* name, const at::Tensor& t, at::IntArrayRef shape, at::ScalarType dtype);

// ValueError for sizes or weights of a layer that do not fit x's D channels and latents of r.
void check_weights(
    int64_t D, int64_t r, at::ScalarType dtype, const at::Tensor& q_down, const at::Tensor& q_norm,
    const at::Tensor& q_up_nope, const at::Tensor& q_up_rope, const at::Tensor& kv_down, const at::Tensor& kv_norm,
    const at::Tensor& kv_up, const at::Tensor& wo, int64_t heads, int64_t nope, int64_t rope, int64_t v);

// ValueError naming what does not fit; nothing has been written then. Caches must be as they are: they are written to.
void check_decode(
    const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& latent_cache, const at::Tensor& rope_cache,
    const at::Tensor& lengths, const at::Tensor& q_down, const at::Tensor& q_norm, const at::Tensor& q_up_nope,
    const at::Tensor& q_up_rope, const at::Tensor& kv_down, const at::Tensor& kv_norm, const at::Tensor& kv_up,
    const at::Tensor& wo, int64_t heads, int64_t nope, int64_t rope, int64_t v);

// For checked arguments, all but the caches dense; lengths are looked at here.
at::Tensor mla_decode(
    const at::Tensor& x, const at::Tensor& freqs, at::Tensor latent_cache, at::Tensor rope_cache,
    const at::Tensor& lengths, const at::Tensor& q_down, const at::Tensor& q_norm, const at::Tensor& q_up_nope,
    const at::Tensor& q_up_rope, const at::Tensor& kv_down, const at::Tensor& kv_norm, const at::Tensor& kv_up,
    const at::Tensor& wo, int64_t heads, int64_t nope, int64_t rope, int64_t v, double eps);

// For arguments as the ops get them.
at::Tensor linear(const at::Tensor& x, const at::Tensor& weight);
std::tuple<at::Tensor, at::Tensor> norm_rope(
    const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& weight, double eps);
std::tuple<at::Tensor, at::Tensor> mla_attention(
    const at::Tensor& q_nope, const at::Tensor& q_rope, const at::Tensor& kv, const at::Tensor& k_rope,
    const at::Tensor& start, const at::Tensor& lengths);

}  // namespace openmythos::mla
