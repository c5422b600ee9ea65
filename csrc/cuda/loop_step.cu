// The forward loop step: LoRA delta, injection, halting and the next loop's norm, in one pass over (N, D).
//
// A team of threads walks over groups of R rows. Each thread owns C packs of channels, the same in all rows, so that
// what depends on the channel alone is computed once (decay), and parameters are fetched once per R rows. The first
// sweep computes h' and two sums per row; the second finishes from packs held in registers. Rows too long for a team's
// registers take the same code, which then reads h' and e again.
#include "common/lti.h"
#include "cuda/loop_step.h"
#include "cuda/pack.cuh"
#include "cuda/team.cuh"

namespace openmythos::cuda {
namespace {

constexpr int kMaxWarps = kMaxThreads / 32;
constexpr int kWarpTeams = 4;        // teams per block if a team is one warp
constexpr int64_t kMaxBlocks = 512;  // about two waves of two blocks per multiprocessor

template <typename T>
struct Channels {
  const T *lora_B, *log_A, *log_dt, *B, *halt_weight, *norm_weight, *emb;
};

template <typename T>
struct Rows {
  const T *h, *e, *f, *lora_hidden, *h_out, *halt_bias;
  const acc_t<T>*cumulative_p, *ponder;
  const bool* running;
  T *h_next, *h_out_next, *u;
  acc_t<T>*cumulative_p_next, *ponder_next, *p, *rstd;
  bool* running_next;
};

constexpr int kAnyRank = -1;

// Grid: teams, which walk over groups of R rows. Threads: (team, teams of a block). Vectors: AlwaysVectors, or
// bool, which is false, for rows of any width and address. kRank: the rank, so that all of a row's loads may be in
// flight.
template <typename T, int C, int R, typename Vectors, int kRank>
__global__ void __launch_bounds__(kMaxThreads) loop_step_kernel(
    Channels<T> ch, Rows<T> x, int64_t N, int D, int any_rank, int embedded, int loop, acc_t<T> threshold, acc_t<T> eps,
    bool spend_remainder) {
  const Vectors vectors{};
  const int rank = kRank == kAnyRank ? any_rank : kRank;
  using A = acc_t<T>;
  constexpr int W = kWidth<T>;
  constexpr int kLoads = C * W > 8 ? 1 : 4;  // rows of lora_B fetched together, as registers allow
  __shared__ A partial[kMaxWarps][2 * R];    // per warp: logits, then squares
  __shared__ A shared_weight[kWarpTeams][R], shared_scale[kWarpTeams][R];

  const int team = blockDim.x, lane = threadIdx.x;
  const bool enter = x.u != nullptr;
  const bool held = D <= team * C * W;
  // The decays of each thread's own channels, private to it: (W, C, team). In shared memory, as they would take the
  // rows' registers.
  extern __shared__ __align__(16) unsigned char dynamic[];
  A* decays = reinterpret_cast<A*>(dynamic) + static_cast<int64_t>(threadIdx.y) * C * team * W;
  const A log_dt = widen(*ch.log_dt);
  auto decay_of = [&](int c, int d) {
    const Pack<T> log_A = parameter(ch.log_A, d, D, vectors);
#pragma unroll
    for (int i = 0; i < W; ++i) decays[(i * C + c) * team + lane] = lti::decay<A>(log_dt, log_A[i]).value;
  };
  if (held) {
#pragma unroll
    for (int c = 0; c < C; ++c) {
      if ((c * team + lane) * W < D) decay_of(c, (c * team + lane) * W);
    }
  }

  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y * R;
  for (int64_t first = (static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y) * R; first < N; first += step) {
    int64_t row[R];  // past the end: the last row again, computed twice and stored once
#pragma unroll
    for (int r = 0; r < R; ++r) row[r] = first + r < N ? first + r : N - 1;

    Pack<T> state[C][R], injected[C][R], sum[C][R];
    A logit[R], square[R], cumulative_p = 0, ponder = 0;
    bool running = false;
    const int64_t mine =
        first + lane < N ? first + lane : N - 1;  // the row whose scalars this thread computes, if lane < R
    if (lane < R) {
      cumulative_p = x.cumulative_p[mine];
      ponder = x.ponder[mine];
      running = x.running[mine];
    }
#pragma unroll
    for (int r = 0; r < R; ++r) logit[r] = square[r] = 0;
    for (int begin = 0; begin < D; begin += team * C * W) {
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const int d = begin + (c * team + lane) * W;
        if (d >= D) continue;
        if (!held) decay_of(c, d);
        Pack<T> h[R], f[R];
#pragma unroll
        for (int r = 0; r < R; ++r) {
          h[r] = load(x.h + row[r] * D, d, D, vectors);
          injected[c][r] = load(x.e + row[r] * D, d, D, vectors);
          f[r] = load(x.f + row[r] * D, d, D, vectors);
          if (held) sum[c][r] = load(x.h_out + row[r] * D, d, D, vectors);  // needed in the second sweep, loaded early
        }
        const Pack<T> B = parameter(ch.B, d, D, vectors), halt = parameter(ch.halt_weight, d, D, vectors);
        const Pack<T> emb = d < embedded ? parameter(ch.emb, d, embedded, vectors) : zeros<T>();
        A next[R][W];
#pragma unroll
        for (int r = 0; r < R; ++r) {
#pragma unroll
          for (int i = 0; i < W; ++i) next[r][i] = 0;
        }
#pragma unroll(kRank == kAnyRank ? 1 : kRank)
        for (int k = 0; k < rank; k += kLoads) {  // several loads in flight: each takes longer than its sums
          Pack<T> up[kLoads];
          A lora_hidden[kLoads][R];
#pragma unroll
          for (int j = 0; j < kLoads; ++j) {
            const bool there = k + j < rank;  // else both factors are zero: zero times infinity would be NaN
            up[j] = there ? parameter(ch.lora_B + static_cast<int64_t>(k + j) * D, d, D, vectors) : zeros<T>();
#pragma unroll
            for (int r = 0; r < R; ++r) lora_hidden[j][r] = there ? widen(x.lora_hidden[row[r] * rank + k + j]) : A(0);
          }
#pragma unroll
          for (int j = 0; j < kLoads; ++j) {
#pragma unroll
            for (int r = 0; r < R; ++r) {
#pragma unroll
              for (int i = 0; i < W; ++i) next[r][i] = fused(lora_hidden[j][r], up[j][i], next[r][i]);
            }
          }
        }
#pragma unroll
        for (int i = 0; i < W; ++i) {
          const A decay = decays[(i * C + c) * team + lane];
#pragma unroll
          for (int r = 0; r < R; ++r) {
            const A made = fused(decay, h[r][i], fused(B[i], injected[c][r][i], f[r][i] + next[r][i]));
            state[c][r].x[i] = narrow<T>(made);
            const A seen = d + i < D ? state[c][r][i] : A(0);
            logit[r] = fused(seen, halt[i], logit[r]);
            const A entering = d + i < D ? seen + emb[i] + injected[c][r][i] : A(0);
            square[r] = fused(entering, entering, square[r]);
          }
        }
#pragma unroll
        for (int r = 0; r < R; ++r) {
          if (first + r < N) store(x.h_next + row[r] * D, d, D, vectors, state[c][r]);
        }
      }
    }

#pragma unroll
    for (int r = 0; r < R; ++r) {
      logit[r] = warp_sum(logit[r]);
      square[r] = warp_sum(square[r]);
      if (lane % 32 == 0) {
        partial[warp_in_block()][r] = logit[r];
        partial[warp_in_block()][R + r] = square[r];
      }
    }
    team_sync();
    if (lane < R) {  // one thread per row computes its scalars
      A z = 0, squares = 0;
      for (int w = 0; w < team_warps(); ++w) {
        z += partial[first_warp_of_team() + w][lane];
        squares += partial[first_warp_of_team() + w][R + lane];
      }
      const A p = lti::sigmoid<A>(z + widen(*x.halt_bias));
      const lti::Halt<A> halt = lti::halt<A>(p, cumulative_p, ponder, running, loop, threshold, spend_remainder);
      const A rstd = A(1) / std::sqrt(squares / A(D) + eps);
      shared_weight[threadIdx.y][lane] = halt.weight;
      shared_scale[threadIdx.y][lane] = rstd;
      if (first + lane < N) {
        x.p[mine] = p;
        x.cumulative_p_next[mine] = halt.cumulative_p;
        x.ponder_next[mine] = halt.ponder;
        x.running_next[mine] = halt.running;
        if (enter) x.rstd[mine] = rstd;
      }
    }
    team_sync();  // also protects `partial` from the next group's sums; the next team_sync protects the scalars

    for (int begin = 0; begin < D; begin += team * C * W) {
#pragma unroll
      for (int c = 0; c < C; ++c) {
        const int d = begin + (c * team + lane) * W;
        if (d >= D) continue;
        const Pack<T> norm = parameter(ch.norm_weight, d, D, vectors);
        const Pack<T> emb = d < embedded ? parameter(ch.emb, d, embedded, vectors) : zeros<T>();
#pragma unroll
        for (int r = 0; r < R; ++r) {
          if (first + r >= N) continue;
          if (!held) {
            state[c][r] = load(x.h_next + row[r] * D, d, D, vectors);
            injected[c][r] = load(x.e + row[r] * D, d, D, vectors);
            sum[c][r] = load(x.h_out + row[r] * D, d, D, vectors);
          }
          const A weight = shared_weight[threadIdx.y][r], scale = shared_scale[threadIdx.y][r];
#pragma unroll
          for (int i = 0; i < W; ++i) sum[c][r].x[i] = narrow<T>(fused(weight, state[c][r][i], sum[c][r][i]));
          store(x.h_out_next + row[r] * D, d, D, vectors, sum[c][r]);
          if (enter) {
            Pack<T> u;
#pragma unroll
            for (int i = 0; i < W; ++i) {
              u.x[i] = narrow<T>((state[c][r][i] + emb[i] + injected[c][r][i]) * scale * norm[i]);
            }
            store(x.u + row[r] * D, d, D, vectors, u);
          }
        }
      }
    }
  }
}

template <typename T, int C, int R, typename Vectors, int kRank>
void launch_of(
    const LoopStepShape& shape, const Channels<T>& ch, const Rows<T>& x, int team, const LoopStep& args,
    cudaStream_t stream) {
  const dim3 threads(team, team == 32 ? kWarpTeams : 1);
  const int64_t blocks = ceil_div(shape.N, static_cast<int64_t>(threads.y) * R);
  const dim3 grid(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks));
  const size_t decays = sizeof(acc_t<T>) * kWidth<T> * C * threads.x * threads.y;  // bytes, at most 32 KiB
  loop_step_kernel<T, C, R, Vectors, kRank><<<grid, threads, decays, stream>>>(
      ch, x, shape.N, shape.D, shape.rank, shape.embedded, args.loop, acc_t<T>(shape.threshold), acc_t<T>(args.eps),
      shape.spend_remainder);
}

template <typename T, int C, int R>
void launch(
    const LoopStepShape& shape, const Channels<T>& ch, const Rows<T>& x, int team, bool vectors, const LoopStep& args,
    cudaStream_t stream) {
  if (!vectors) return launch_of<T, C, R, bool, kAnyRank>(shape, ch, x, team, args, stream);
  if constexpr (sizeof(T) == 2) {  // unrolled for float32, or for larger ranks, some would spill
    if (shape.rank == 8) return launch_of<T, C, R, AlwaysVectors, 8>(shape, ch, x, team, args, stream);
  }
  launch_of<T, C, R, AlwaysVectors, kAnyRank>(shape, ch, x, team, args, stream);
}

template <typename T>
cudaError_t run(const LoopStepShape& shape, const LoopStep& args, cudaStream_t stream) {
  using A = acc_t<T>;
  auto in = [](const void* p) { return static_cast<const T*>(p); };
  auto out = [](void* p) { return static_cast<T*>(p); };
  const Channels<T> ch{in(shape.lora_B),      in(shape.log_A),       in(shape.log_dt), in(shape.B),
                       in(shape.halt_weight), in(shape.norm_weight), in(shape.emb)};
  const Rows<T> x{
      in(args.h),
      in(args.e),
      in(args.f),
      in(args.lora_hidden),
      in(args.h_out),
      in(args.halt_bias),
      static_cast<const A*>(args.cumulative_p),
      static_cast<const A*>(args.ponder),
      args.running,
      out(args.h_next),
      out(args.h_out_next),
      out(args.u),
      static_cast<A*>(args.cumulative_p_next),
      static_cast<A*>(args.ponder_next),
      static_cast<A*>(args.p),
      static_cast<A*>(args.rstd),
      args.running_next};
  const bool vectors = shape.D % kWidth<T> == 0 && shape.embedded % kWidth<T> == 0 &&
                       aligned(
                           {x.h, x.e, x.f, x.h_out, x.h_next, x.h_out_next, x.u, ch.lora_B, ch.log_A, ch.B,
                            ch.halt_weight, ch.norm_weight, ch.emb});

  const int64_t packs = ceil_div(shape.D, kWidth<T>);
  auto team = [&](int64_t per_thread) {
    const int64_t threads = ceil_div(ceil_div(packs, per_thread), 32) * 32;
    return static_cast<int>(threads < kMaxThreads ? threads : kMaxThreads);
  };
  // These shapes fit into 128 registers (`python -m tools.nvcc`): two packs per row, or four of fewer numbers. Once all
  // multiprocessors have work, it pays to share parameters between two rows, if they fit, and to have one pack per
  // thread, with more loads in flight.
  constexpr int64_t kFewRows = 512;
  const bool many = shape.N > kFewRows;
  if constexpr (sizeof(T) == 4) {
    if (packs > 2 * kMaxThreads) {
      launch<T, 4, 1>(shape, ch, x, team(4), vectors, args, stream);
      return cudaGetLastError();
    }
  }
  if constexpr (sizeof(T) <= 4) {
    if (many && packs <= kMaxThreads) {
      launch<T, 1, sizeof(T) == 4 ? 2 : 1>(shape, ch, x, team(1), vectors, args, stream);
      return cudaGetLastError();
    }
  }
  launch<T, 2, 1>(shape, ch, x, team(2), vectors, args, stream);
  return cudaGetLastError();
}

}  // namespace

cudaError_t loop_step(const LoopStepShape& shape, const LoopStep& x, cudaStream_t stream) {
  if (shape.N == 0) return cudaSuccess;
  switch (shape.element) {
    case Element::f32:
      return run<float>(shape, x, stream);
    case Element::f64:
      return run<double>(shape, x, stream);
    case Element::bf16:
      return run<__nv_bfloat16>(shape, x, stream);
    case Element::f16:
      return run<__half>(shape, x, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace openmythos::cuda
