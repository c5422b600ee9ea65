// Threads that go through the phases of a decode step together.
#pragma once

#include <ATen/Parallel.h>

#include <cstdint>
#include <utility>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace openmythos {

// One thread's view of its team. A step has five dependent phases and runs in one parallel region: opening a region
// costs more than a barrier.
struct Team {
  int64_t id, size;

  // What any thread wrote before is visible to all threads after.
  void barrier() const {
#ifdef _OPENMP
    if (size > 1) {
#pragma omp barrier
    }
#endif
  }

  // This thread's range of n tasks. It is the same at every step, so that weights stay in the core's cache if they fit.
  std::pair<int64_t, int64_t> share(int64_t n) const { return {n * id / size, n * (id + 1) / size}; }
};

// Calls body(Team) on up to at::get_num_threads() threads; body must not throw.
template <typename F>
inline void run_team(const F& body) {
#ifdef _OPENMP
  const int threads = at::get_num_threads();
  if (threads > 1 && !at::in_parallel_region()) {
#pragma omp parallel num_threads(threads)
    body(Team{omp_get_thread_num(), omp_get_num_threads()});
    return;
  }
#endif
  body(Team{0, 1});
}

}  // namespace openmythos
