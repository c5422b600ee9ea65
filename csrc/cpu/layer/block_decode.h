// One token per row through a whole transformer block: norms, latent attention against a cache, feed-forward layer.
#pragma once

#include "cpu/layer/weights.h"

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace openmythos::layer {

struct BlockSizes {
  int64_t topk;
  mla::HeadSizes heads;
};

// A block's weights: views of the lists that the ops get.
struct Block {
  AttentionWeights attention;
  std::optional<RouterWeights> router;  // none for a dense FFN, which is the only shared expert
  moe::ExpertLists routed, shared;
  Eps eps;
  BlockSizes sizes;

  // ValueError naming what does not fit; nothing has been written then.
  void check(
      const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& latent_cache, const at::Tensor& rope_cache,
      const at::Tensor& lengths) const;

  // (block(x), chosen experts (B, topk), or (B, 0) for a dense FFN). Takes checked arguments; appends to the caches.
  std::tuple<at::Tensor, at::Tensor> operator()(
      const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& latent_cache, const at::Tensor& rope_cache,
      const at::Tensor& lengths) const;

  // The same for rows of a ragged cache, whose `places` the caller checks. No bit of a row depends on the others.
  void check_rows(
      const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& latent, const at::Tensor& k_rope) const;
  std::tuple<at::Tensor, at::Tensor> rows(
      const at::Tensor& x, const at::Tensor& freqs, const mla::Places& places, const at::Tensor& latent,
      const at::Tensor& k_rope) const;

 private:
  void check_rest(int64_t D, at::ScalarType dtype) const;
  // (x + attend(norm(x)), its norm, its scale)
  template <typename Attend>
  std::tuple<at::Tensor, at::Tensor, at::Tensor> attended(const at::Tensor& x, const Attend& attend) const;
  // (sum + ffn(behind), chosen experts)
  std::tuple<at::Tensor, at::Tensor> feed_forward(const at::Tensor& sum, const at::Tensor& behind) const;
  at::Tensor no_experts(const at::Tensor& x) const;
};

// The weights of several blocks, block after block, as the ops get them.
struct BlockLists {
  at::TensorList attention, router;
  moe::ExpertLists routed, shared;
  c10::ArrayRef<double> eps;
  BlockSizes sizes;
};

// ValueError if the lists' lengths fit no number of blocks.
std::vector<Block> split(const BlockLists& lists);

}  // namespace openmythos::layer
