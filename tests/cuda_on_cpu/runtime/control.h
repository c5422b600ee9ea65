// Settings and errors of the scheduler.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace cuda_on_cpu {
cudaError_t error();       // of the last launch
cudaError_t take_error();  // the same, and clears it
const char* message();     // what went wrong
}  // namespace cuda_on_cpu

extern "C" {
// The order of ready threads and of a grid's blocks. With `random_order`, atomics may also yield to other threads.
enum cuda_on_cpu_order { forward, reverse, random_order };
void cuda_on_cpu_set_order(int order, uint64_t seed);
// Pretends that a launch failed with this cudaError_t.
void cuda_on_cpu_set_error(int error);
// Bytes counted since the last reset: loaded, stored, parameters.
void cuda_on_cpu_reset_counts();
uint64_t cuda_on_cpu_counted(int counter);
}
