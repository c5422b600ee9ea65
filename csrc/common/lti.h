// Scalar arithmetic of one loop step, shared by CPU and CUDA: the decay of the linear time-invariant injection, and
// adaptive halting, each with its derivative. A is the accumulator type (float, or double for double).
#pragma once

#include <cmath>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define OPENMYTHOS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define OPENMYTHOS_HOST_DEVICE inline
#endif

namespace openmythos::lti {

// Below about -16.64, exp(-exp(s)) rounds to 1 in float32 and the recurrence may grow without bound.
constexpr double kLogRateMin = -16.6;
constexpr double kLogRateMax = 20.0;

// The decay exp(-exp(s)) with s = clamp(log_dt + log_A), and its derivative by s (zero where clamped).
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

// One position after one loop: the weight of its state in the output, cumulative_p, ponder cost, whether it still runs,
// and whether `weight` is the remainder.
template <typename A>
struct Halt {
  A weight, cumulative_p, ponder;
  bool running, remainder;
};

// `loop` counts from 0. `spend_remainder`: a running position spends its remainder in this loop.
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

// Gradients of p and of the incoming cumulative_p and ponder.
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
