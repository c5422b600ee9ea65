// translate.py turns kernel<<<grid, block, shared, stream>>>(arguments) into launch(kernel, ...)(arguments).
#pragma once

namespace cuda_on_cpu {

// Touched at each launch: a module's thread-local block exists, and can be poisoned, only after its first use.
static thread_local volatile char touched;

template <class... Parameters>
struct Launch {
  void (*kernel)(Parameters...);
  dim3 grid, block;
  size_t shared_bytes;

  void operator()(Parameters... arguments) const {
    touched = 1;
    auto body = [&] { kernel(arguments...); };
    run_grid(grid, block, shared_bytes, [](void* p) { (*static_cast<decltype(body)*>(p))(); }, &body);
  }
};

template <class... Parameters>
Launch<Parameters...> launch(
    void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes = 0, cudaStream_t = nullptr) {
  return {kernel, grid, block, shared_bytes};
}

}  // namespace cuda_on_cpu
