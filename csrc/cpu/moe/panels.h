// Routed experts of many tokens in float32 or float64; the weights are read in place. A library GEMM packs them first,
// which does not pay for an expert's few rows.
#pragma once

#include "cpu/moe/experts.h"
#include "cpu/simd/panel.h"

namespace openmythos::moe {

// Computes y (N * K, D), rows in the plan's order, from x (N, D); stores gate and up before the activation in `saved`
// (2, N * K, I) unless it is empty. All in the accumulator type of the weights' dtype.
void panels(
    const at::Tensor& x, const Plan& plan, const Experts& experts, const at::Tensor& y, const at::Tensor& saved);

// The wanted gradients of routed experts; dx (N * K, D) in the plan's order. dtopk_weights (N, K) always.
void panels_backward(
    const at::Tensor& dy, const at::Tensor& x, const Plan& plan, const at::Tensor& topk_weights, const Experts& experts,
    const at::Tensor& saved, const Wanted& wanted, const at::Tensor& dx, const at::Tensor& dtopk_weights);

// Consecutive rows of the plan; they become columns of a panel.
struct Piece {
  int64_t begin, rows;

  // Columns of its panel, in whole vectors.
  template <typename T>
  int64_t width() const {
    constexpr int64_t S = at::vec::Vectorized<T>::size();
    return (rows + S - 1) / S * S;
  }
};

// Most rows of a piece: twice a tile's width, so that each weight is fetched half as often.
template <typename T>
constexpr int64_t kPieceWidth = 2 * kPanelWidth<T>;

// Cuts rows from `begin` on into pieces of nearly equal size, whole vectors of at most `most` rows.
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
