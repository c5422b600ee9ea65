// openmythos::block_rows: independent tokens, each in a loop of its own, through a block and a ragged cache.
#include "cpu/layer/block_decode.h"

#include <torch/library.h>

#include <vector>

namespace openmythos::layer {
namespace {

// The op as Python declares it.
std::tuple<at::Tensor, at::Tensor> block_rows(
    const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& sequence, const at::Tensor& position,
    const at::Tensor& loop, const at::Tensor& first, const at::Tensor& last, at::Tensor latent, at::Tensor k_rope,
    at::TensorList attention, at::TensorList router, at::TensorList gate, at::TensorList up, at::TensorList down,
    at::TensorList shared_gate, at::TensorList shared_up, at::TensorList shared_down, int64_t topk, int64_t heads,
    int64_t nope, int64_t rope, int64_t v, c10::ArrayRef<double> eps, int64_t keep) {
  const std::vector<Block> blocks = split(
      {attention,
       router,
       {gate, up, down},
       {shared_gate, shared_up, shared_down},
       eps,
       {topk, {heads, nope, rope, v}}});
  blocks[0].check_rows(x, freqs, latent, k_rope);
  const mla::Places places{sequence, position, loop, first, last, keep};
  places.check(x.size(0));
  for (int64_t n = 0; n < x.size(0); ++n) places.check_row(n, loop.const_data_ptr<int64_t>()[n], latent.size(0));
  return blocks[0].rows(x, freqs, places, latent, k_rope);
}

}  // namespace
}  // namespace openmythos::layer

TORCH_LIBRARY_IMPL(openmythos, CPU, m) { m.impl("block_rows", openmythos::layer::block_rows); }
