// The scheduler's interface for translated kernels (runtime/scheduler.cpp).
#pragma once

namespace cuda_on_cpu {

// A CUDA thread: its index, its number in the block, its lane and warp.
struct Thread {
  uint3 index;
  int number, lane, warp;
};
extern Thread* current;

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* argument);
void* dynamic_shared();

// __syncthreads: waits until all living threads of the block are at this line.
void barrier(const char* file, int line);

// A warp's collective: waits until all living lanes of `mask` have passed a value of n <= 16 bytes at this line.
// Returns all values, and which lanes passed one.
enum class Kind { shuffle, vote, sync };
struct Exchanged {
  const unsigned char (*value)[16];
  unsigned lanes;
};
Exchanged exchange(unsigned mask, const void* value, int n, Kind kind, const char* file, int line);

unsigned active_lanes();
void maybe_switch();  // before an atomic: may yield to another thread

// Bytes that kernels report as moved; see OPENMYTHOS_COUNT in csrc/cuda/pack.cuh.
enum class Counter { loaded, stored, parameters };
void count(Counter counter, uint64_t bytes);

}  // namespace cuda_on_cpu

#define OPENMYTHOS_COUNT(what, bytes) cuda_on_cpu::count(cuda_on_cpu::Counter::what, bytes)

// The source location of a call, as default arguments: reported in errors, and compared to detect divergence.
#define CALL_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// Hides the collectives' own memory from the race detector: only barriers order a kernel's accesses.
#if defined(__SANITIZE_THREAD__)
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
namespace cuda_on_cpu {
struct Unwatched {
  Unwatched() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~Unwatched() {
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
};
}  // namespace cuda_on_cpu
#else
namespace cuda_on_cpu {
struct Unwatched {
  Unwatched() {}  // not trivial, so that compilers do not warn of unused variables
};
}  // namespace cuda_on_cpu
#endif
