// Checks of rows in a ragged cache.
#include "cpu/mla/mla.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <limits>
#include <tuple>

namespace openmythos::mla {

void Places::check(int64_t N) const {
  fits("sequence", sequence, {N}, at::kLong);
  fits("position", position, {N}, at::kLong);
  fits("loop", loop, {N}, at::kLong);
  TORCH_CHECK_VALUE(keep >= 0, "keep = ", keep, ": must be the slots of a token, or 0 for one in each loop");
  for (const auto& [name, t] : {std::tuple{"first", &first}, {"last", &last}}) {
    TORCH_CHECK_VALUE(
        t->dim() == 2 && t->sizes() == first.sizes() && t->scalar_type() == at::kInt && t->is_cpu() &&
            (t->stride(1) == 1 || t->size(1) <= 1),
        name, ": got ", t->scalar_type(), " ", t->sizes(), " with strides ", t->strides(), " on ", t->device(),
        "; must be int32 (sequences, tokens) on cpu with dense rows, and both tables of one size");
  }
}

void Places::check_row(int64_t n, int64_t deepest, int64_t pool_rows) const {
  const Table at = table();
  const int64_t s = at.sequence[n], p = at.position[n];
  TORCH_CHECK_VALUE(
      0 <= s && s < first.size(0), "sequence[", n, "] = ", s, ": must be one of the table's ", first.size(0));
  TORCH_CHECK_VALUE(
      0 <= p && p < first.size(1), "position[", n, "] = ", p, ": must be one of the table's ", first.size(1));
  TORCH_CHECK_VALUE(at.loop[n] >= 0, "loop[", n, "] = ", at.loop[n], ": must not be negative");
  const int32_t *const from = at.first + s * at.first_stride, *const ran = at.last + s * at.last_stride;
  const int64_t slots = keep ? std::min(deepest, keep - 1) : deepest;
  const auto limit = int32_t(std::min<int64_t>(slots, std::numeric_limits<int32_t>::max()));
  // Over the tokens before, and then its own: the least entry and the largest row.
  int32_t least = from[p];
  int64_t most = int64_t(from[p]) + limit;
  for (int64_t j = 0; j < p; ++j) {
    least = std::min({least, from[j], ran[j]});
    most = std::max(most, int64_t(from[j]) + std::min(ran[j], limit));
  }
  TORCH_CHECK_VALUE(
      least >= 0 && most < pool_rows, "first, last: row ", n, " (sequence ", s, ", position ", p, ") has entries from ",
      least, " on and reads or writes up to row ", most, ": must be in [0, ", pool_rows, "), the pool's rows");
}

Table Places::table() const {
  return {
      first.const_data_ptr<int32_t>(),
      last.const_data_ptr<int32_t>(),
      first.stride(0),
      last.stride(0),
      sequence.const_data_ptr<int64_t>(),
      position.const_data_ptr<int64_t>(),
      loop.const_data_ptr<int64_t>(),
      keep};
}

void check_rows(
    const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& latent, const at::Tensor& k_rope,
    const Weights& weights, const HeadSizes& sizes) {
  TORCH_CHECK_VALUE(
      x.dim() == 2 && at::isFloatingType(x.scalar_type()), "x: got ", x.scalar_type(), " ", x.sizes(),
      ", must be (N, D) in a floating dtype");
  const int64_t N = x.size(0), D = x.size(1);
  const auto dtype = x.scalar_type();
  const int64_t rows = latent.dim() == 2 ? latent.size(0) : 0, r = latent.dim() == 2 ? latent.size(1) : 0;
  fits("x", x, {N, D}, dtype);
  fits("latent", latent, {rows, r}, dtype);
  fits("k_rope", k_rope, {rows, sizes.rope}, dtype);
  check_weights(D, r, dtype, weights, sizes);
  fits("freqs", freqs, {N, sizes.rope / 2, 2}, at::kFloat);
}

}  // namespace openmythos::mla
