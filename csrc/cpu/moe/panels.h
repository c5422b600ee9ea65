// Routed experts of many tokens in float32 or float64: products with the weights as they lie. A library GEMM packs them
// first, which does not pay for the few rows that an expert gets, and knows nothing of the expert that follows.
#pragma once

#include "cpu/moe/experts.h"
#include "cpu/simd/panel.h"

namespace openmythos::moe {

// y (N * K, D), rows in the plan's order, of x (N, D); gate and up to `saved` (2, N * K, I) unless that is empty.
// All in one type, that of sums over the weights'.
void panels(
    const at::Tensor& x, const Plan& plan, const Experts& experts, const at::Tensor& y, const at::Tensor& saved);

// The gradients of routed experts that are wanted; dx (N * K, D) in the plan's order; dtopk_weights (N, K) always.
void panels_backward(
    const at::Tensor& dy, const at::Tensor& x, const Plan& plan, const at::Tensor& topk_weights, const Experts& experts,
    const at::Tensor& saved, const Wanted& wanted, const at::Tensor& dx, const at::Tensor& dtopk_weights);

// Consecutive rows of the plan, as many columns of a panel; fewer only at the end of an expert's rows.
struct Piece {
  int64_t begin, rows;

  // Columns of its panel: whole vectors.
  template <typename T>
  int64_t width() const {
    constexpr int64_t S = at::vec::Vectorized<T>::size();
    return (rows + S - 1) / S * S;
  }
};

// Twice a tile's width: each weight is then fetched half as often.
template <typename T>
constexpr int64_t kPieceWidth = 2 * kPanelWidth<T>;

// Rows from `begin` on in pieces of nearly equal size, at most `most` rows each, which are whole vectors.
template <typename T>
std::vector<Piece> pieces(int64_t begin, int64_t rows, int64_t most = kPieceWidth<T>) {
  constexpr int64_t S = at::vec::Vectorized<T>::size();
  const int64_t vectors = (rows + S - 1) / S, count = (rows + most - 1) / most;
  std::vector<Piece> all;
  for (int64_t p = 0; p < count; ++p) {
    const int64_t first = vectors * p / count * S, last = std::min(rows, vectors * (p + 1) / count * S);
    all.push_back({begin + first, last - first});
  }
  return all;
}

// The rows of an expert.
template <typename T>
std::vector<Piece> pieces(const Plan& plan, int64_t expert) {
  return pieces<T>(plan.offset[expert], plan.rows(expert));
}

}  // namespace openmythos::moe
