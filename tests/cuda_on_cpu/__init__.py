"""The CUDA kernels of csrc/cuda, executed on the CPU.

The host's C++ compiler compiles the unchanged `.cu` files against headers that define CUDA's keywords (device/). A
scheduler runs them, one fiber per CUDA thread (runtime/). The bindings are compiled unchanged too, against stubs of
the few headers that only a CUDA build of PyTorch has (torch_stubs/). Then `backends.forcing("cuda")` runs an op's CUDA
implementation on CPU tensors, from Python to kernel and back.

Checked on the way: shared memory is poisoned before each block; barrier divergence, lanes missing from a warp's
collective and deadlocks are errors; threads run in forward, reverse or random order. AddressSanitizer and UBSan find
accesses that are out of bounds or misaligned. Under ThreadSanitizer only `__syncthreads` and `__syncwarp` order the
fibers, so that it finds every missing barrier, whatever the timing.


Not covered: inline PTX, cooperative groups, cub, textures, tensor cores, blocks that wait for one another, and
races between blocks. Floats may differ from a GPU's in the last bit.
"""
