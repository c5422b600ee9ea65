// A queue of independent tasks of uneven length: each thread takes the next task when it has finished one.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

namespace openmythos {

// Calls work(slot, next) on every thread; slot in [0, threads) is unique to it. next() returns the next task's number,
// or -1 when none is left. Which thread runs a task must change no bit of its result.
//
// The calling thread first runs `prepare`, which returns the number of tasks. Meanwhile the others start on the first
// `known` tasks, and wait before the rest. If `prepare` throws, no further task starts.
template <typename P, typename F>
void run_tasks_after(int64_t threads, int64_t known, P prepare, F work) {
  constexpr int64_t kNotYet = -1;
  std::atomic<int64_t> handed{0}, total{kNotYet};
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      if (slot == 0) {
        try {
          total.store(prepare(), std::memory_order_release);
        } catch (...) {
          handed = known;
          total.store(0, std::memory_order_release);
          throw;
        }
      }
      work(slot, [&]() -> int64_t {
        const int64_t task = handed++;
        if (task < known) return task;
        int64_t tasks;
        while ((tasks = total.load(std::memory_order_acquire)) == kNotYet) std::this_thread::yield();
        return task < tasks ? task : -1;
      });
    }
  });
}

// The same with all tasks known, on at most one thread a task.
template <typename F>
void run_tasks(int64_t tasks, F work) {
  run_tasks_after(std::min<int64_t>(at::get_num_threads(), tasks), tasks, [&] { return tasks; }, work);
}

}  // namespace openmythos
