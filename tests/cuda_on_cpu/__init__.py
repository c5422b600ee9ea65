"""The CUDA kernels of csrc/cuda, executed on the CPU.

The same, unchanged `.cu` files are compiled by the host's C++ compiler against headers that say what CUDA's words
mean here (device/), and run by a scheduler with one fiber per CUDA thread (runtime/). Their bindings are compiled,
unchanged too, against stand-ins for the few headers that only a CUDA build of PyTorch has (torch_stubs/). Then
`backends.forcing("cuda")` runs an op's CUDA implementation on CPU tensors, from Python to kernel and back.

What is checked on the way: shared memory is poisoned before each block; barrier divergence, lanes missing from a
warp's collective and deadlocks are errors; threads run in forward, reverse or random order. Built with
AddressSanitizer and UBSan, accesses out of bounds and misaligned ones are found; built with ThreadSanitizer, every
CUDA thread is a fiber whose only order is `__syncthreads` and `__syncwarp`, so that a missing barrier is found by
logic, not by luck.

Not covered: inline PTX, cooperative groups, cub, textures, tensor cores, blocks that wait for one another, and
races between blocks. Floats may differ from a GPU's in the last bit.
"""
