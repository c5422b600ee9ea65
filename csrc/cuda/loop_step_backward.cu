// The backward loop step.
//
// A block owns a range of rows and walks it R rows at a time. Each thread owns one pack of channels, the same in all
// rows, so that the sums over the rows for these channels (gradients of decay, B, halt_weight, norm_weight) stay in its
// registers. The first sweep over R rows computes the two dot products that the rows' scalars need, and keeps what it
// read; the second computes the gradients. Rows too long for a block go through two kernels, one per sweep, which read
// four of the tensors twice.
//
// Each block writes its sums to a slab, and another kernel adds the slabs in order: the bits depend on N and D alone.
#include "common/lti.h"
#include "cuda/loop_step.h"
#include "cuda/pack.cuh"
#include "cuda/parameter_gradients.cuh"
#include "cuda/team.cuh"

namespace openmythos::cuda {
namespace {

// Threads of a block: as many as shared memory holds the channels' parameters for (OfChannels).
template <typename T>
constexpr int kThreads = sizeof(T) == 4 ? 512 : 384;
constexpr int64_t kMinBlockRows = 32, kMaxBlocks = 512;

// Rows at a time: as many as fit into 128 registers per thread.
template <typename T>
constexpr int kRows = sizeof(T) == 4 ? 2 : 1;

int64_t block_rows(int64_t N) {
  const int64_t even = ceil_div(N, kMaxBlocks);
  return even > kMinBlockRows ? ceil_div(even, 2) * 2 : kMinBlockRows;
}

int64_t blocks_of(int64_t N) { return ceil_div(N, block_rows(N)); }

template <typename T>
struct Backward {
  const T *grad_h, *grad_out, *grad_u, *h, *e, *h_next;
  const acc_t<T>*grad_cumulative_p, *grad_ponder, *cumulative_p, *p, *rstd;
  const bool* running;
  const T *log_A, *log_dt, *B, *halt_weight, *norm_weight, *emb;
  T *dh, *de, *df;
  acc_t<T>*dcumulative_p, *dponder;
  acc_t<T>*slabs, *bias;  // (blocks, kSums, D), (blocks)
};

// A row's scalars for the second sweep.
template <typename A>
struct RowScalars {
  A weight, logit, rstd, shrink;
};

template <typename T, typename Vectors>
__device__ __forceinline__ Pack<T> load_or_zeros(const T* rows, int64_t row, int d, int D, Vectors vectors) {
  return rows ? load(rows + row * D, d, D, vectors) : zeros<T>();
}

template <typename T, typename Vectors>
__device__ __forceinline__ Pack<T> embedding(const Backward<T>& x, int d, int embedded, Vectors vectors) {
  return d < embedded ? parameter(x.emb, d, embedded, vectors) : zeros<T>();
}

// Parameters of each thread's own pack of channels, private to it. In shared memory, as the compiler would keep them in
// registers, which the rows need.
template <typename T>
struct OfChannels {
  acc_t<T> decay[kWidth<T>][kThreads<T>];
  Pack<T> B[kThreads<T>], halt[kThreads<T>], norm[kThreads<T>], emb[kThreads<T>];

  template <typename Vectors>
  __device__ __forceinline__ void make(const Backward<T>& x, int d, int D, int embedded, Vectors vectors) {
    const int mine = threadIdx.x;
    const acc_t<T> log_dt = widen(*x.log_dt);
    const Pack<T> log_A = parameter(x.log_A, d, D, vectors);
#pragma unroll
    for (int i = 0; i < kWidth<T>; ++i) decay[i][mine] = lti::decay<acc_t<T>>(log_dt, log_A[i]).value;
    B[mine] = parameter(x.B, d, D, vectors);
    halt[mine] = parameter(x.halt_weight, d, D, vectors);
    norm[mine] = parameter(x.norm_weight, d, D, vectors);
    emb[mine] = embedding(x, d, embedded, vectors);
  }
};

// What both sweeps read of a row.
template <typename T>
struct RowPacks {
  Pack<T> grad_out, next, grad_u, injected;

  template <typename Vectors>
  __device__ __forceinline__ void read(const Backward<T>& x, int64_t row, int d, int D, Vectors vectors) {
    grad_out = load_or_zeros(x.grad_out, row, d, D, vectors);
    next = load(x.h_next + row * D, d, D, vectors);
    grad_u = load_or_zeros(x.grad_u, row, d, D, vectors);
    injected = load(x.e + row * D, d, D, vectors);
  }
};

// First sweep: adds a pack's share to the gradients of the row's halting weight and of its norm.
template <typename T>
__device__ __forceinline__ void add_dots(
    const RowPacks<T>& row, const Pack<T>& norm, const Pack<T>& emb, acc_t<T>& on_weight, acc_t<T>& on_norm) {
#pragma unroll
  for (int i = 0; i < kWidth<T>; ++i) {  // past the end of a row all are zero
    on_weight = fused(row.grad_out[i], row.next[i], on_weight);
    on_norm = fused(row.grad_u[i] * norm[i], row.next[i] + emb[i] + row.injected[i], on_norm);
  }
}

// A row's numbers, loaded along with its packs.
template <typename T>
struct RowNumbers {
  acc_t<T> p, cumulative_p, grad_cumulative_p, grad_ponder, rstd;
  bool running;

  __device__ __forceinline__ void read(const Backward<T>& x, int64_t row) {
    p = x.p[row];
    cumulative_p = x.cumulative_p[row];
    running = x.running[row];
    grad_cumulative_p = x.grad_cumulative_p ? x.grad_cumulative_p[row] : acc_t<T>(0);
    grad_ponder = x.grad_ponder ? x.grad_ponder[row] : acc_t<T>(0);
    rstd = x.grad_u ? x.rstd[row] : acc_t<T>(0);
  }
};

template <typename T>
__device__ RowScalars<acc_t<T>> row_scalars(
    const Backward<T>& x, int64_t row, const RowNumbers<T>& of, acc_t<T> on_weight, acc_t<T> on_norm, int D,
    acc_t<T> threshold, bool spend_remainder) {
  using A = acc_t<T>;
  const lti::Halt<A> step = lti::halt<A>(of.p, of.cumulative_p, A(0), of.running, 0, threshold, spend_remainder);
  const lti::HaltGrad<A> grad = lti::halt_backward<A>(
      of.cumulative_p, of.running, step.remainder, on_weight, of.grad_cumulative_p, of.grad_ponder);
  x.dcumulative_p[row] = grad.cumulative_p;
  x.dponder[row] = grad.ponder;
  return {step.weight, grad.p * of.p * (A(1) - of.p), of.rstd, -on_norm / A(D) * of.rstd * of.rstd * of.rstd};
}

// Sums over a block's rows for a thread's pack of channels.
template <typename T>
struct ColumnSums {
  acc_t<T> of[kSums][kWidth<T>];

  __device__ __forceinline__ ColumnSums() {
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
#pragma unroll
      for (int i = 0; i < kWidth<T>; ++i) of[s][i] = 0;
    }
  }

  __device__ __forceinline__ void store(acc_t<T>* slab, int d, int D) const {
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
#pragma unroll
      for (int i = 0; i < kWidth<T>; ++i) {
        if (d + i >= D) continue;
        slab[static_cast<int64_t>(s) * D + d + i] = of[s][i];
        OPENMYTHOS_COUNT(stored, sizeof(acc_t<T>));
      }
    }
  }
};

// What only the second sweep reads of a row.
template <typename T>
struct LatePacks {
  Pack<T> grad_h, h;

  template <typename Vectors>
  __device__ __forceinline__ void read(const Backward<T>& x, int64_t row, int d, int D, Vectors vectors) {
    grad_h = load_or_zeros(x.grad_h, row, d, D, vectors);
    h = load(x.h + row * D, d, D, vectors);
  }
};

// Second sweep: the gradients of one pack of a row, and its share of the column sums.
template <typename T, typename Vectors>
__device__ __forceinline__ void pack_gradients(
    const Backward<T>& x, int64_t row, int d, int D, Vectors vectors, const OfChannels<T>& of, const RowPacks<T>& packs,
    const LatePacks<T>& late, const RowScalars<acc_t<T>>& s, ColumnSums<T>& sums) {
  using A = acc_t<T>;
  const Pack<T> B = of.B[threadIdx.x], halt = of.halt[threadIdx.x], norm = of.norm[threadIdx.x],
                emb = of.emb[threadIdx.x];
  Pack<T> dh, de, df;
#pragma unroll
  for (int i = 0; i < kWidth<T>; ++i) {
    A total = fused(s.logit, halt[i], fused(s.weight, packs.grad_out[i], late.grad_h[i]));
    A into_e = 0;
    if (x.grad_u) {
      const A scaled = packs.grad_u[i] * s.rstd, entering = packs.next[i] + emb[i] + packs.injected[i];
      into_e = fused(s.shrink, entering, scaled * norm[i]);
      total += into_e;
      sums.of[kSumNorm][i] = fused(scaled, entering, sums.of[kSumNorm][i]);
    }
    dh.x[i] = narrow<T>(of.decay[i][threadIdx.x] * total);
    de.x[i] = narrow<T>(fused(B[i], total, into_e));
    df.x[i] = narrow<T>(total);
    sums.of[kSumDecay][i] = fused(total, late.h[i], sums.of[kSumDecay][i]);
    sums.of[kSumB][i] = fused(total, packs.injected[i], sums.of[kSumB][i]);
    sums.of[kSumHalt][i] = fused(s.logit, packs.next[i], sums.of[kSumHalt][i]);
  }
  store(x.dh + row * D, d, D, vectors, dh);
  store(x.de + row * D, d, D, vectors, de);
  store(x.df + row * D, d, D, vectors, df);
}

// Grid: one block per `rows_of_block` rows, one thread per pack of a row. R rows at a time. Vectors: AlwaysVectors, or
// bool, for rows of any width and address.
template <typename T, int R, typename Vectors>
__global__ void __launch_bounds__(kMaxThreads) rows_kernel(
    Backward<T> x, int64_t N, int64_t rows_of_block, int D, int embedded, acc_t<T> threshold, bool spend_remainder,
    Vectors vectors) {
  using A = acc_t<T>;
  __shared__ A partial[kThreads<T> / 32][2 * R];
  __shared__ RowScalars<A> scalars[R];

  const int lane = threadIdx.x, d = lane * kWidth<T>;
  const int64_t begin = blockIdx.x * rows_of_block;
  const int64_t end = begin + rows_of_block < N ? begin + rows_of_block : N;
  __shared__ OfChannels<T> of;
  if (d < D) of.make(x, d, D, embedded, vectors);
  ColumnSums<T> sums;
  A bias = 0;
  for (int64_t first = begin; first < end; first += R) {
    const int rows = end - first < R ? static_cast<int>(end - first) : R;
    RowPacks<T> packs[R];
    LatePacks<T> late[R];  // needed in the second sweep, loaded early
    RowNumbers<T> numbers;
    if (lane < rows) numbers.read(x, first + lane);
    A on_weight[R], on_norm[R];
#pragma unroll
    for (int r = 0; r < R; ++r) on_weight[r] = on_norm[r] = 0;
    if (d < D) {  // threads past the end of a row still join the warp sums
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int64_t row = r < rows ? first + r : end - 1;  // past the end: the last row again, which nothing uses
        packs[r].read(x, row, d, D, vectors);
        late[r].read(x, row, d, D, vectors);
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (r < rows) add_dots(packs[r], of.norm[lane], of.emb[lane], on_weight[r], on_norm[r]);
      }
    }

#pragma unroll
    for (int r = 0; r < R; ++r) {
      on_weight[r] = warp_sum(on_weight[r]);
      on_norm[r] = warp_sum(on_norm[r]);
      if (lane % 32 == 0) {
        partial[lane / 32][r] = on_weight[r];
        partial[lane / 32][R + r] = on_norm[r];
      }
    }
    team_sync();
    if (lane < rows) {
      A weight = 0, norm = 0;
      for (int w = 0; w < team_warps(); ++w) {
        weight += partial[w][lane];
        norm += partial[w][R + lane];
      }
      scalars[lane] = row_scalars<T>(x, first + lane, numbers, weight, norm, D, threshold, spend_remainder);
      bias += scalars[lane].logit;
    }
    team_sync();

    if (d < D) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (r < rows) pack_gradients(x, first + r, d, D, vectors, of, packs[r], late[r], scalars[r], sums);
      }
    }
  }
  if (d < D) sums.store(x.slabs + blockIdx.x * static_cast<int64_t>(kSums) * D, d, D);

  if (lane < R) partial[0][lane] = bias;
  team_sync();
  if (lane == 0) {
    A total = 0;
    for (int r = 0; r < R; ++r) total += partial[0][r];
    x.bias[blockIdx.x] = total;
  }
}

// Long rows, first sweep. Grid: one block per row.
template <typename T, typename Vectors>
__global__ void __launch_bounds__(kThreads<T>) long_scalars_kernel(
    Backward<T> x, RowScalars<acc_t<T>>* scalars, int D, int embedded, acc_t<T> threshold, bool spend_remainder,
    Vectors vectors) {
  using A = acc_t<T>;
  __shared__ A partial[kThreads<T> / 32][2];
  const int lane = threadIdx.x;
  const int64_t row = blockIdx.x;
  A on_weight = 0, on_norm = 0;
  for (int d = lane * kWidth<T>; d < D; d += blockDim.x * kWidth<T>) {
    RowPacks<T> packs;
    packs.read(x, row, d, D, vectors);
    add_dots(packs, parameter(x.norm_weight, d, D, vectors), embedding(x, d, embedded, vectors), on_weight, on_norm);
  }
  on_weight = warp_sum(on_weight);
  on_norm = warp_sum(on_norm);
  if (lane % 32 == 0) {
    partial[lane / 32][0] = on_weight;
    partial[lane / 32][1] = on_norm;
  }
  team_sync();
  if (lane > 0) return;
  on_weight = on_norm = 0;
  for (int w = 0; w < team_warps(); ++w) {
    on_weight += partial[w][0];
    on_norm += partial[w][1];
  }
  RowNumbers<T> numbers;
  numbers.read(x, row);
  scalars[row] = row_scalars<T>(x, row, numbers, on_weight, on_norm, D, threshold, spend_remainder);
}

// Long rows, second sweep. Grid: (ranges of rows, ranges of channels), one pack per thread.
template <typename T, typename Vectors>
__global__ void __launch_bounds__(kThreads<T>) long_gradients_kernel(
    Backward<T> x, const RowScalars<acc_t<T>>* scalars, int64_t N, int64_t rows_of_block, int D, int embedded,
    Vectors vectors) {
  const int d = (blockIdx.y * blockDim.x + threadIdx.x) * kWidth<T>;
  if (d >= D) return;
  const int64_t begin = blockIdx.x * rows_of_block;
  const int64_t end = begin + rows_of_block < N ? begin + rows_of_block : N;
  __shared__ OfChannels<T> of;
  of.make(x, d, D, embedded, vectors);
  ColumnSums<T> sums;
  acc_t<T> bias = 0;
  for (int64_t row = begin; row < end; ++row) {
    RowPacks<T> packs;
    LatePacks<T> late;
    packs.read(x, row, d, D, vectors);
    late.read(x, row, d, D, vectors);
    pack_gradients(x, row, d, D, vectors, of, packs, late, scalars[row], sums);
    bias += scalars[row].logit;
  }
  sums.store(x.slabs + blockIdx.x * static_cast<int64_t>(kSums) * D, d, D);
  if (d == 0) x.bias[blockIdx.x] = bias;
}

template <typename T, typename Vectors>
void launch_rows(
    const LoopStepShape& shape, const Backward<T>& x, RowScalars<acc_t<T>>* scalars, Vectors vectors,
    cudaStream_t stream) {
  using A = acc_t<T>;
  const int64_t packs = ceil_div(shape.D, kWidth<T>), rows = block_rows(shape.N);
  const auto blocks = static_cast<unsigned>(blocks_of(shape.N));
  if (packs <= kThreads<T>) {
    const auto threads = static_cast<unsigned>(ceil_div(packs, 32) * 32);
    rows_kernel<T, kRows<T>, Vectors><<<blocks, threads, 0, stream>>>(
        x, shape.N, rows, shape.D, shape.embedded, A(shape.threshold), shape.spend_remainder, vectors);
    return;
  }
  long_scalars_kernel<T, Vectors><<<static_cast<unsigned>(shape.N), kThreads<T>, 0, stream>>>(
      x, scalars, shape.D, shape.embedded, A(shape.threshold), shape.spend_remainder, vectors);
  const dim3 grid(blocks, static_cast<unsigned>(ceil_div(packs, kThreads<T>)));
  long_gradients_kernel<T, Vectors>
      <<<grid, kThreads<T>, 0, stream>>>(x, scalars, shape.N, rows, shape.D, shape.embedded, vectors);
}

template <typename T>
cudaError_t run(const LoopStepShape& shape, const LoopStepBackward& args, cudaStream_t stream) {
  using A = acc_t<T>;
  auto in = [](const void* p) { return static_cast<const T*>(p); };
  auto out = [](void* p) { return static_cast<T*>(p); };
  auto wide = [](const void* p) { return static_cast<const A*>(p); };
  const int64_t blocks = blocks_of(shape.N), D = shape.D;
  A* slabs = static_cast<A*>(args.scratch);
  A *bias = slabs + blocks * kSums * D, *rates = bias + blocks;
  const Backward<T> x{
      in(args.grad_h),
      in(args.grad_out),
      in(args.grad_u),
      in(args.h),
      in(args.e),
      in(args.h_next),
      wide(args.grad_cumulative_p),
      wide(args.grad_ponder),
      wide(args.cumulative_p),
      wide(args.p),
      wide(args.rstd),
      args.running,
      in(shape.log_A),
      in(shape.log_dt),
      in(shape.B),
      in(shape.halt_weight),
      in(shape.norm_weight),
      in(shape.emb),
      out(args.dh),
      out(args.de),
      out(args.df),
      static_cast<A*>(args.dcumulative_p),
      static_cast<A*>(args.dponder),
      slabs,
      bias};
  const bool vectors = D % kWidth<T> == 0 && aligned(
                                                 {x.grad_h, x.grad_out, x.grad_u, x.h, x.e, x.h_next, x.log_A, x.B,
                                                  x.halt_weight, x.norm_weight, x.emb, x.dh, x.de, x.df});
  auto* scalars = reinterpret_cast<RowScalars<A>*>(rates + D);
  if (blocks > 0 && vectors && args.whole_packs && shape.embedded % kWidth<T> == 0) {
    launch_rows(shape, x, scalars, AlwaysVectors{}, stream);
  } else if (blocks > 0) {
    launch_rows(shape, x, scalars, vectors, stream);
  }
  const ParameterGrads<T> grads{in(shape.log_A), in(shape.log_dt),       out(args.dlog_A),     out(args.dlog_dt),
                                out(args.dB),    out(args.dhalt_weight), out(args.dhalt_bias), out(args.dnorm_weight)};
  const dim3 columns(static_cast<unsigned>(ceil_div(D, kReduceChannels)), kSums);
  if (D > 0)
    columns_kernel<T>
        <<<columns, dim3(kReduceChannels, kReduceGroups), 0, stream>>>(slabs, blocks, shape.D, grads, rates);
  totals_kernel<T><<<1, kTotalThreads, 0, stream>>>(rates, shape.D, bias, blocks, grads);
  return cudaGetLastError();
}

}  // namespace

int64_t loop_step_scratch(int64_t N, int D) {
  // Slabs, biases, rates, scalars of long rows.
  return blocks_of(N) * (kSums * static_cast<int64_t>(D) + 1) + D + 4 * N;
}

cudaError_t loop_step_backward(const LoopStepShape& shape, const LoopStepBackward& x, cudaStream_t stream) {
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
