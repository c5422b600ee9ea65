// Mixture of experts on the CPU: what its two paths, gemv (few tokens) and grouped (more), share.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <functional>
#include <tuple>
#include <vector>

namespace openmythos::moe {

// Most tokens of the gemv path. A library GEMM packs each weight first, which pays only for more.
constexpr int64_t kGemvTokens = 128;

// Weights of SwiGLU experts as ops get them: gate and up (I, D), down (D, I), one tensor an expert.
struct ExpertLists {
  at::TensorList gate, up, down;
};

// The same, checked: contiguous, of one inner width I.
struct Experts {
  std::vector<at::Tensor> gate, up, down;
  int64_t inner = 0;
  int64_t size() const { return static_cast<int64_t>(gate.size()); }
};

// Whether data_ptr holds the tensor's numbers. The dispatcher asks Python's tensor subclasses first, but calls that
// bypass it do not; and sharded training (FSDP) frees the storage of gathered weights.
bool is_plain(const at::Tensor& t);

// The dtype of all weights: x's, or float32 under autocast, which keeps master weights.
at::ScalarType weight_dtype(at::TensorList w_gate, const at::Tensor& x);

// The weights, contiguous. ValueError for a tensor that is not plain, or of another dtype or size than the others;
// `prefix` and gate, up or down name it.
Experts checked_experts(const char* prefix, const ExpertLists& weights, int64_t dim, at::ScalarType dtype);

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
  at::Tensor dx, dtopk_weights;  // dx: empty if not wanted
};

// Rows (N * K, I), in the plan's order, whose products with dy and x are the gradients of routed weights; all or none.
struct KeptRows {
  at::Tensor dgate, dup;  // gradients before the activation
  at::Tensor act;         // hidden activations times the routing weights
};

// Their dtype in a backward of `tokens` tokens.
at::ScalarType kept_type(int64_t tokens, at::ScalarType x, at::ScalarType weights);

// ValueError unless rows, or what orders them, are dense, on the CPU and of this size and dtype.
void check_rows(const char* name, const at::Tensor& rows, at::IntArrayRef sizes, at::ScalarType dtype);

// Which gradients to compute.
struct Wanted {
  bool x;
  Experts routed, shared;  // where the weights' gradients go; empty if not wanted
  bool add = false;        // add to their contents instead of overwriting them
  KeptRows kept;           // where the rows go
  bool weights(bool of_routed) const { return !(of_routed ? routed : shared).gate.empty(); }
};

// Memory for the gradients of these experts' weights; empty unless `needed`. With a plan, experts without rows get
// zeros. `more`: other calls will add their gradients.
Experts gradients(const Experts& experts, bool needed, const Plan* plan = nullptr, bool more = false);

// Fills in plan, topk_weights and routed experts. Called once, by the calling thread, while the other threads start on
// the shared experts.
using Find = std::function<void()>;

// All experts of a layer. Without routed experts: a plan of no slots, topk_weights (N, 0).
Forward forward(
    const at::Tensor& x, const Plan& plan, const at::Tensor& topk_weights, const Experts& routed, const Experts& shared,
    bool save, const Find& find = {});
Backward backward(
    const at::Tensor& dy, const at::Tensor& x, const Plan& plan, const at::Tensor& topk_weights, const Experts& routed,
    const Experts& shared, const at::Tensor& saved_routed, const at::Tensor& saved_shared, const Wanted& wanted);

// The ops openmythos::moe_experts, moe_route and swiglu_ffn, for ops composed of them. They check their arguments.
std::tuple<at::Tensor, at::Tensor, at::Tensor> moe_experts(
    const at::Tensor& x, const at::Tensor& expert_idx, const at::Tensor& topk_weights, const ExpertLists& routed,
    const ExpertLists& shared, bool save);
std::tuple<at::Tensor, at::Tensor, at::Tensor> moe_route(const at::Tensor& logits, const at::Tensor& bias, int64_t k);
std::tuple<at::Tensor, at::Tensor> swiglu_ffn(
    const at::Tensor& x, const at::Tensor& gate, const at::Tensor& up, const at::Tensor& down, bool save);

// A whole layer without gradients: routing and all experts. Returns y, shaped as x (..., D), expert_idx and load. The
// calling thread asks `router` for the logits of x's rows, and `look` for gate, up and down of the chosen experts,
// whose numbers it gets in ascending order. Under autocast x is rounded first.
using Lists = std::array<std::vector<at::Tensor>, 3>;
using Router = std::function<at::Tensor(const at::Tensor&)>;
using Look = std::function<Lists(const std::vector<int64_t>&)>;
std::tuple<at::Tensor, at::Tensor, at::Tensor> moe_inference(
    const at::Tensor& x, const Router& router, const at::Tensor& bias, int64_t k, const Lists& shared,
    const Look& look);

// The gemv path: every chosen weight is read once.
Forward gemv(
    const at::Tensor& x, const Plan& plan, const at::Tensor& topk_weights, const Experts& routed, const Experts& shared,
    bool save, const Find& find);
Backward gemv_backward(
    const at::Tensor& dy, const at::Tensor& x, const Plan& plan, const at::Tensor& topk_weights, const Experts& routed,
    const Experts& shared, const at::Tensor& saved_routed, const at::Tensor& saved_shared, const Wanted& wanted);

// The grouped path: matrix products over each expert's rows.
Forward grouped(
    const at::Tensor& x, const Plan& plan, const at::Tensor& topk_weights, const Experts& routed, const Experts& shared,
    bool save, const Find& find);
Backward grouped_backward(
    const at::Tensor& dy, const at::Tensor& x, const Plan& plan, const at::Tensor& topk_weights, const Experts& routed,
    const Experts& shared, const at::Tensor& saved_routed, const at::Tensor& saved_shared, const Wanted& wanted);

}  // namespace openmythos::moe
