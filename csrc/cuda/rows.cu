// Gather and scatter of rows by index, as bytes, in the widest unit that addresses and row length allow.
#include <cuda_runtime.h>

#include "cuda/compaction.h"

#ifndef OPENMYTHOS_COUNT
#define OPENMYTHOS_COUNT(what, bytes)
#endif

namespace openmythos::cuda {
namespace {

// Grid: one block per selected row; its threads walk the row.
template <typename Unit>
__global__ void gather_kernel(const Unit* x, const int64_t* index, Unit* out, int64_t rows, int64_t units) {
  const int64_t row = blockIdx.x, from = index[row];
  const bool inside = from >= 0 && from < rows;
  for (int64_t i = threadIdx.x; i < units; i += blockDim.x) {
    OPENMYTHOS_COUNT(loaded, inside ? sizeof(Unit) : 0);
    OPENMYTHOS_COUNT(stored, sizeof(Unit));
    out[row * units + i] = inside ? x[from * units + i] : Unit{};
  }
}

template <typename Unit>
__global__ void scatter_kernel(const Unit* x, const int64_t* index, Unit* out, int64_t rows, int64_t units) {
  const int64_t row = blockIdx.x, to = index[row];
  if (to < 0 || to >= rows) return;
  for (int64_t i = threadIdx.x; i < units; i += blockDim.x) {
    OPENMYTHOS_COUNT(loaded, x ? sizeof(Unit) : 0);
    OPENMYTHOS_COUNT(stored, sizeof(Unit));
    out[to * units + i] = x ? x[row * units + i] : Unit{};
  }
}

template <typename Unit>
cudaError_t run(
    bool gather, const void* x, const int64_t* index, void* out, int64_t rows, int64_t selected, int64_t row_bytes,
    cudaStream_t stream) {
  const int64_t units = row_bytes / static_cast<int64_t>(sizeof(Unit));
  const auto grid = static_cast<unsigned>(selected),
             threads = units < 256 ? static_cast<unsigned>(ceil_div(units, 32) * 32) : 256u;
  const Unit* from = static_cast<const Unit*>(x);
  if (gather) {
    gather_kernel<Unit><<<grid, threads, 0, stream>>>(from, index, static_cast<Unit*>(out), rows, units);
  } else {
    scatter_kernel<Unit><<<grid, threads, 0, stream>>>(from, index, static_cast<Unit*>(out), rows, units);
  }
  return cudaGetLastError();
}

cudaError_t run(
    bool gather, const void* x, const int64_t* index, void* out, int64_t rows, int64_t selected, int64_t row_bytes,
    cudaStream_t stream) {
  if (selected == 0 || row_bytes == 0) return cudaSuccess;
  const uintptr_t bits =
      reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(out) | static_cast<uintptr_t>(row_bytes);
  if (bits % 16 == 0) return run<uint4>(gather, x, index, out, rows, selected, row_bytes, stream);
  if (bits % 4 == 0) return run<uint32_t>(gather, x, index, out, rows, selected, row_bytes, stream);
  if (bits % 2 == 0) return run<uint16_t>(gather, x, index, out, rows, selected, row_bytes, stream);
  return run<uint8_t>(gather, x, index, out, rows, selected, row_bytes, stream);
}

}  // namespace

cudaError_t gather_rows(
    const void* x, const int64_t* index, void* out, int64_t rows, int64_t selected, int64_t row_bytes,
    cudaStream_t stream) {
  return run(true, x, index, out, rows, selected, row_bytes, stream);
}

cudaError_t scatter_rows(
    const void* x, const int64_t* index, void* out, int64_t rows, int64_t selected, int64_t row_bytes,
    cudaStream_t stream) {
  return run(false, x, index, out, rows, selected, row_bytes, stream);
}

}  // namespace openmythos::cuda
