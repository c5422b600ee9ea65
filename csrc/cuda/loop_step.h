// The loop step and its gradients, defined in `openmythos_kernels/ops/loop/step.py`. All pointers are device memory,
// all tensors contiguous.
#pragma once

#include "cuda/launch.h"

namespace openmythos::cuda {

// Sizes, and parameters with a number for each channel. Pointers are to `element`s; wide ones to double for f64, else
// float.
struct LoopStepShape {
  Element element;
  int64_t N;    // positions
  int D, rank;  // channels, rank of the LoRA delta
  const void *lora_B, *log_A, *log_dt, *B, *halt_weight, *norm_weight, *emb;
  int embedded;  // length of emb, <= D
  double threshold;
  bool spend_remainder;
};

struct LoopStep {
  const void *h, *e, *f, *lora_hidden, *h_out;       // (N, D), lora_hidden (N, rank)
  const void *cumulative_p, *ponder;                 // (N), wide
  const bool* running;                               // (N)
  const void* halt_bias;                             // (1)
  void *h_next, *h_out_next, *u;                     // (N, D); u: null if no loop follows
  void *cumulative_p_next, *ponder_next, *p, *rstd;  // (N), wide
  bool* running_next;
  int loop;
  double eps;
};

// Memory traffic: seven (N, D) tensors. h, e, f, h_out are read; h_next, h_out_next, u are written.
cudaError_t loop_step(const LoopStepShape& shape, const LoopStep& x, cudaStream_t stream);

struct LoopStepBackward {
  const void *grad_h, *grad_out, *grad_u;       // (N, D); null: zeros
  const void *grad_cumulative_p, *grad_ponder;  // (N), wide; null: zeros
  const void *h, *e, *h_next;                   // (N, D)
  const void *cumulative_p, *p, *rstd;          // (N), wide
  const bool* running;                          // (N)
  void *dh, *de, *df;                           // (N, D)
  void *dcumulative_p, *dponder;                // (N), wide
  void *dlog_A, *dlog_dt, *dB, *dhalt_weight, *dhalt_bias, *dnorm_weight;
  void* scratch;     // loop_step_scratch(shape) wide elements, uninitialized
  bool whole_packs;  // take the kernels whose accesses are all of 16 bytes, where addresses and sizes allow
};

// Memory traffic: six (N, D) tensors read (four of them twice if a row exceeds a block), three written, and 8 D sums
// per block of at least 32 rows. The gradients of lora_hidden and lora_B are left to the matrix library: they are
// products with df.
cudaError_t loop_step_backward(const LoopStepShape& shape, const LoopStepBackward& x, cudaStream_t stream);

int64_t loop_step_scratch(int64_t N, int D);

}  // namespace openmythos::cuda
