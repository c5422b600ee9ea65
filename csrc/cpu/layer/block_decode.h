// One token per row through a whole transformer block: norms, latent attention against its cache, feed-forward layer.
#pragma once

#include "cpu/mla/mla.h"

#include <ATen/core/Tensor.h>

#include <tuple>

namespace openmythos::decode {

using mla::fits;

struct Sizes {
  int64_t topk, heads, nope, rope, v;
};

// A block's weights, views of the lists that the ops get. `attention`: attn_norm, q_down, q_norm, q_up_nope, q_up_rope,
// kv_down, kv_norm, kv_up, wo, ffn_norm. `router`: its weight and bias; empty for a dense FFN, which is then the one
// shared expert. `eps`: of attn_norm, of the latents' norms, of ffn_norm.
struct Block {
  at::TensorList attention, router, gate, up, down, shared_gate, shared_up, shared_down;
  c10::ArrayRef<double> eps;
  Sizes sizes;

  // ValueError naming what does not fit; nothing has been written then.
  void check(
      const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& latent_cache, const at::Tensor& rope_cache,
      const at::Tensor& lengths) const;

  // (block(x), chosen experts (B, topk) or nothing), for checked arguments; appends to the caches.
  std::tuple<at::Tensor, at::Tensor> operator()(
      const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& latent_cache, const at::Tensor& rope_cache,
      const at::Tensor& lengths) const;
};

// Lists of several blocks' weights, one block after the other.
class Blocks {
 public:
  // ValueError for lists of lengths that belong to no number of blocks.
  Blocks(
      at::TensorList attention, at::TensorList router, at::TensorList gate, at::TensorList up, at::TensorList down,
      at::TensorList shared_gate, at::TensorList shared_up, at::TensorList shared_down, c10::ArrayRef<double> eps,
      Sizes sizes);
  int64_t count() const { return count_; }
  Block operator[](int64_t i) const;

 private:
  int64_t count_;
  Block all_;
};

}  // namespace openmythos::decode
