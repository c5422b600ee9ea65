"""A kernel with selectable faults, which the modes must find."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["read_to", "write_to"])
def double(x, out, read_to, write_to, SHIFT: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """out = 2 x for x (n,), if read_to = write_to = n, SHIFT = 0 and STEP = BLOCK. Grid (ceil(n / BLOCK),)."""
    i = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < read_to, other=0.0)
    tl.store(out + i - SHIFT, value * 2, mask=i < write_to)
