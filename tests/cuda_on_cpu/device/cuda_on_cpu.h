// CUDA C++ for a host compiler, included before a translated .cu file. Types and the half and bfloat16 conversions come
// from the CUDA toolkit's headers. Needs neither a GPU nor libcudart.
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
#define __shared__ static  // AddressSanitizer puts red zones around static data, but not around thread-local data
#else
#define __shared__ static thread_local  // the runtime poisons this module's thread-local block
#endif

#include "runtime.h"  // the others need it

#include "arithmetic.h"
#include "atomics.h"
#include "collectives.h"
#include "launch.h"
