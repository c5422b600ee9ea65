// Scalar arithmetic of one recurrence step, shared by every device: the decay
// of the linear time-invariant injection and adaptive halting, each with its
// derivative. `A` is the accumulator type (float, or double for double).
#pragma once

#include <cmath>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define OPENMYTHOS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define OPENMYTHOS_HOST_DEVICE inline
#endif

namespace openmythos::lti {

// exp(-exp(-16.6)) is the last decade step where fp32 still tells A from 1:
// below about -16.64 it rounds to 1.0 and the recurrence may grow without bound.
constexpr double kLogRateMin = -16.6;
constexpr double kLogRateMax = 20.0;

// A = exp(-exp(s)) with s = clamp(log_dt + log_A), and dA/ds (zero where the clamp holds).
template <typename A>
struct Decay {
  A value, slope;
};

template <typename A>
OPENMYTHOS_HOST_DEVICE Decay<A> decay(A log_dt, A log_A) {
  const A s = log_dt + log_A;
  const A low = A(kLogRateMin), high = A(kLogRateMax);
  const A clamped = s < low ? low : (s > high ? high : s);  // NaN stays NaN
  const A rate = std::exp(clamped);
  const A value = std::exp(-rate);
  return {value, s >= low && s <= high ? -value * rate : A(0)};
}

template <typename A>
OPENMYTHOS_HOST_DEVICE A sigmoid(A z) {
  return A(1) / (A(1) + std::exp(-z));
}

// What one loop does to one position: the weight its state gets in the output, the
// probability spent so far, the ponder cost, and whether the position goes on.
template <typename A>
struct Halt {
  A weight, cumulative_p, ponder;
  bool running, remainder;
};

// Loop number `loop` (from 0); `spend_remainder`: whoever still runs spends all that is left.
template <typename A>
OPENMYTHOS_HOST_DEVICE Halt<A> halt(
    A p, A cumulative_p, A ponder, bool running, int loop, A threshold, bool spend_remainder) {
  if (!running) return {A(0), cumulative_p, ponder, false, false};
  const A total = cumulative_p + p;
  const bool remainder = spend_remainder || total >= threshold;
  const A left = A(1) - cumulative_p;
  const A weight = remainder ? (left < A(0) ? A(0) : left) : p;
  return {weight, total, A(loop + 1) + left, total < threshold, remainder};
}

// Gradients of p and of the incoming cumulative_p and ponder, given those of weight and of the outgoing ones.
template <typename A>
struct HaltGrad {
  A p, cumulative_p, ponder;
};

template <typename A>
OPENMYTHOS_HOST_DEVICE HaltGrad<A> halt_backward(
    A cumulative_p, bool running, bool remainder, A grad_weight, A grad_cumulative_p, A grad_ponder) {
  if (!running) return {A(0), grad_cumulative_p, grad_ponder};
  if (!remainder) return {grad_cumulative_p + grad_weight, grad_cumulative_p - grad_ponder, A(0)};
  const A on_left = (A(1) - cumulative_p >= A(0) ? grad_weight : A(0)) + grad_ponder;
  return {grad_cumulative_p, grad_cumulative_p - on_left, A(0)};
}

}  // namespace openmythos::lti
