// The loop step and its gradients, as `openmythos_kernels/ops/loop/step.py` defines them.
// All pointers are device memory, all tensors contiguous.
#pragma once

#include "cuda/launch.h"

namespace openmythos::cuda {

// Sizes, and the parameters that do not depend on the position; `element` types, or float/double where "wide".
struct LoopStepShape {
  Element element;
  int64_t N;    // positions
  int D, rank;  // channels, rank of the LoRA delta
  const void *lora_B, *log_A, *log_dt, *B, *halt_weight, *norm_weight, *emb;
  int embedded;  // channels that emb covers
  double threshold;
  bool spend_remainder;
};

struct LoopStep {
  const void *h, *e, *f, *lora_hidden, *h_out;       // (N, D), lora_hidden (N, rank)
  const void *cumulative_p, *ponder;                 // (N), wide
  const bool* running;                               // (N)
  const void* halt_bias;                             // (1)
  void *h_next, *h_out_next, *u;                     // (N, D); u null: no next loop
  void *cumulative_p_next, *ponder_next, *p, *rstd;  // (N), wide
  bool* running_next;
  int loop;
  double eps;
};

// Seven passes over (N, D): h, e, f, h_out read, h_next, h_out_next, u written.
cudaError_t loop_step(const LoopStepShape& shape, const LoopStep& x, cudaStream_t stream);

struct LoopStepBackward {
  const void *grad_h, *grad_out, *grad_u;       // (N, D), each may be null: zeros
  const void *grad_cumulative_p, *grad_ponder;  // (N), wide, each may be null: zeros
  const void *h, *e, *h_next;                   // (N, D)
  const void *cumulative_p, *p, *rstd;          // (N), wide
  const bool* running;                          // (N)
  void *dh, *de, *df;                           // (N, D)
  void *dcumulative_p, *dponder;                // (N), wide
  void *dlog_A, *dlog_dt, *dB, *dhalt_weight, *dhalt_bias, *dnorm_weight;
  void* scratch;  // loop_step_scratch(shape) wide elements, uninitialised
};

// Six (N, D) tensors read (four of them twice where rows are longer than a block takes), three written, and 8 D sums
// moved per block of at least 32 rows.
// Gradients of lora_hidden and lora_B are products with df, which a matrix library does better.
cudaError_t loop_step_backward(const LoopStepShape& shape, const LoopStepBackward& x, cudaStream_t stream);

int64_t loop_step_scratch(int64_t N, int D);

}  // namespace openmythos::cuda
