// Independent tasks of uneven length, handed out to threads one by one.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

namespace openmythos {

// Calls work(slot, next) on every thread, slot in [0, threads) being nobody else's; next() hands out tasks in order
// until it returns -1. Who runs a task must change no bit of its result. Only the first `known` tasks can begin at
// once: how many there are is what `prepare` returns, which the calling thread runs first. Should it throw, no more
// tasks are begun.
template <typename P, typename F>
void share_out_late(int64_t threads, int64_t known, P prepare, F work) {
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

// The same where all tasks are known, on as many threads as have one.
template <typename F>
void share_out(int64_t tasks, F work) {
  share_out_late(std::min<int64_t>(at::get_num_threads(), tasks), tasks, [&] { return tasks; }, work);
}

}  // namespace openmythos
