// Mixture of experts on CPU: what its two paths, few tokens and many, share.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <functional>
#include <tuple>
#include <vector>

namespace openmythos::moe {

// SwiGLU experts of one inner width I: gate and up are (I, D), down is (D, I), all contiguous.
struct Experts {
  std::vector<at::Tensor> gate, up, down;
  int64_t inner = 0;
  int64_t size() const { return static_cast<int64_t>(gate.size()); }
};

// Whether a tensor's numbers are where data_ptr says. Tensors that Python gives a meaning of their own reach operators
// by the dispatcher, which asks them first, but not what Python calls directly; and sharded training frees what it has
// gathered.
bool is_plain(const at::Tensor& t);

// Weights come in one dtype: that of x, or float32 under autocast, which keeps master weights.
at::ScalarType weight_dtype(at::TensorList w_gate, const at::Tensor& x);

// The weights, contiguous. ValueError for any that is not plain, of this dtype and of the size the others have.
Experts checked_experts(
    const char* gate_name, const char* up_name, const char* down_name, at::TensorList gate, at::TensorList up,
    at::TensorList down, int64_t dim, at::ScalarType dtype);

// (token, slot) pairs sorted by expert; ties keep their order.
struct Plan {
  std::vector<int64_t> offset;  // (E + 1): expert e owns rows [offset[e], offset[e + 1])
  std::vector<int64_t> pair;    // row -> token * K + slot
  std::vector<int64_t> row;     // token * K + slot -> row
  int64_t slots = 0;            // K
  int64_t rows(int64_t e) const { return offset[e + 1] - offset[e]; }
  int64_t token(int64_t r) const { return pair[r] / slots; }
};

// Counting sort of expert_idx (N, K). ValueError for an index outside [0, experts).
Plan sort_by_expert(const at::Tensor& expert_idx, int64_t experts);

struct Forward {
  at::Tensor y;             // (N, D)
  at::Tensor saved_routed;  // (2, N * K, I): gate and up before the activation, rows in the plan's order; or empty
  at::Tensor saved_shared;  // (2, S, N, Is), or empty
};

struct Backward {
  at::Tensor dx, dtopk_weights;  // dx empty where it is not wanted
};

// Which gradients to compute.
struct Wanted {
  bool x;
  Experts routed, shared;  // where the weights' gradients go; no tensors: they are not wanted
  bool add = false;        // to what stands there, instead of over it
  bool weights(bool of_routed) const { return !(of_routed ? routed : shared).gate.empty(); }
};

// Memory for the gradients of these experts' weights, or no tensors. Given a plan, experts without rows get zeros.
// `more`: the gradients of other calls will be added.
Experts gradients(const Experts& experts, bool needed, const Plan* plan = nullptr, bool more = false);

// Fills in plan, topk_weights and routed experts that are not known yet: called once, by the calling thread, while
// others begin with the shared experts.
using Find = std::function<void()>;

// All experts of a layer. Without routed experts: a plan of no slots, topk_weights (N, 0).
Forward forward(
    const at::Tensor& x, const Plan& plan, const at::Tensor& topk_weights, const Experts& routed, const Experts& shared,
    bool save, const Find& find = {});
Backward backward(
    const at::Tensor& dy, const at::Tensor& x, const Plan& plan, const at::Tensor& topk_weights, const Experts& routed,
    const Experts& shared, const at::Tensor& saved_routed, const at::Tensor& saved_shared, const Wanted& wanted);

// The ops openmythos::moe_experts, moe_route and swiglu_ffn, for those that are made of them: they check what they get.
std::tuple<at::Tensor, at::Tensor, at::Tensor> moe_experts(
    const at::Tensor& x, const at::Tensor& expert_idx, const at::Tensor& topk_weights, at::TensorList w_gate,
    at::TensorList w_up, at::TensorList w_down, at::TensorList shared_gate, at::TensorList shared_up,
    at::TensorList shared_down, bool save);

// Routing and all experts of a layer at once, without gradients: y as x (..., D), expert_idx and load. The calling
// thread asks `router` for the logits of x as rows, and `look` for gates, ups and downs of the chosen experts, whose
// numbers are given in rising order. Under autocast x is rounded first.
using Lists = std::array<std::vector<at::Tensor>, 3>;
using Router = std::function<at::Tensor(const at::Tensor&)>;
using Look = std::function<Lists(const std::vector<int64_t>&)>;
std::tuple<at::Tensor, at::Tensor, at::Tensor> moe_inference(
    const at::Tensor& x, const Router& router, const at::Tensor& bias, int64_t k, const Lists& shared,
    const Look& look);

std::tuple<at::Tensor, at::Tensor, at::Tensor> moe_route(const at::Tensor& logits, const at::Tensor& bias, int64_t k);
std::tuple<at::Tensor, at::Tensor> swiglu_ffn(
    const at::Tensor& x, const at::Tensor& gate, const at::Tensor& up, const at::Tensor& down, bool save);

// Few tokens: products that read every chosen weight once.
Forward few(
    const at::Tensor& x, const Plan& plan, const at::Tensor& topk_weights, const Experts& routed, const Experts& shared,
    bool save, const Find& find);
Backward few_backward(
    const at::Tensor& dy, const at::Tensor& x, const Plan& plan, const at::Tensor& topk_weights, const Experts& routed,
    const Experts& shared, const at::Tensor& saved_routed, const at::Tensor& saved_shared, const Wanted& wanted);

// Many tokens: library GEMMs over the rows of each expert.
Forward grouped(
    const at::Tensor& x, const Plan& plan, const at::Tensor& topk_weights, const Experts& routed, const Experts& shared,
    bool save, const Find& find);
Backward grouped_backward(
    const at::Tensor& dy, const at::Tensor& x, const Plan& plan, const at::Tensor& topk_weights, const Experts& routed,
    const Experts& shared, const at::Tensor& saved_routed, const at::Tensor& saved_shared, const Wanted& wanted);

}  // namespace openmythos::moe
