// One token per row through a whole transformer block: norms, latent attention against its cache, feed-forward layer.
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
