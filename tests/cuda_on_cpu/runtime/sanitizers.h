// The sanitizers' interface for fibers. The runtime itself is built without sanitizers and finds them at run time.
#pragma once

#include <cstddef>

#define WEAK __attribute__((weak))
extern "C" {
void* __tsan_get_current_fiber() WEAK;
void* __tsan_create_fiber(unsigned) WEAK;
void __tsan_switch_to_fiber(void*, unsigned) WEAK;
void __tsan_acquire(void*) WEAK;
void __tsan_release(void*) WEAK;
void __sanitizer_start_switch_fiber(void**, const void*, size_t) WEAK;
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) WEAK;
}

namespace cuda_on_cpu {

// Tells ThreadSanitizer that what happened before `release` is visible after `acquire`.
inline void acquire(void* tag) {
  if (__tsan_acquire) __tsan_acquire(tag);
}
inline void release(void* tag) {
  if (__tsan_release) __tsan_release(tag);
}

}  // namespace cuda_on_cpu
