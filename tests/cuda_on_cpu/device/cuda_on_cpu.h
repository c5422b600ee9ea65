// CUDA C++ as a host compiler reads it: one fiber per CUDA thread. Included before a translated .cu file.
// Types and the half and bfloat16 conversions are the CUDA toolkit's own headers; no GPU, no libcudart.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <device_launch_parameters.h>  // declares threadIdx, blockIdx, ...; the runtime defines them

#undef __shared__
#undef __launch_bounds__
#define __launch_bounds__(...)
#if defined(__SANITIZE_ADDRESS__)
#define __shared__ static  // AddressSanitizer puts red zones round it, which it does not for thread-local data
#else
#define __shared__ static thread_local  // the runtime finds this module's thread-local block and poisons it
#endif

#include "arithmetic.h"
#include "atomics.h"
#include "collectives.h"
#include "launch.h"
#include "runtime.h"
