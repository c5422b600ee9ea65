// Independent tasks of uneven length, handed out to threads one by one.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace openmythos {

// Calls work(slot, next) on every thread, slot in [0, at::get_num_threads()) being nobody else's; next() hands out tasks
// in order until it returns -1. Who runs a task must change no bit of its result.
template <typename F>
void share_out(int64_t tasks, F work) {
  std::atomic<int64_t> handed{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), tasks), 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      work(slot, [&]() -> int64_t {
        const int64_t task = handed++;
        return task < tasks ? task : -1;
      });
    }
  });
}

}  // namespace openmythos
