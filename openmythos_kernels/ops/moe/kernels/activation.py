"""SwiGLU between the library's products, forward and backward: elementwise, in float32."""

import triton
import triton.language as tl

from openmythos_kernels.ops.moe.kernels.tiles import silu, swiglu_gradients


@triton.jit(do_not_specialize=["N"])
def swiglu_kernel(gate, up, act, N, I: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: (ceil(N * I / BLOCK),). act = silu(gate) * up."""
    elements = N.to(tl.int64) * I  # the compiler sees the powers of two in I, so that masked loads stay wide
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + i, mask=i < elements, other=0.0).to(tl.float32)
    u = tl.load(up + i, mask=i < elements, other=0.0).to(tl.float32)
    tl.store(act + i, (silu(g) * u).to(act.dtype.element_ty), mask=i < elements)


@triton.jit(do_not_specialize=["N"])
def swiglu_backward_kernel(dact, gate, up, dgate, dup, act, N, I: tl.constexpr, BLOCK: tl.constexpr):
    """Grid as above. The gradients of gate and up; and act again, which the gradient of `down` needs."""
    elements = N.to(tl.int64) * I
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.load(dact + i, mask=i < elements, other=0.0).to(tl.float32)
    g = tl.load(gate + i, mask=i < elements, other=0.0).to(tl.float32)
    u = tl.load(up + i, mask=i < elements, other=0.0).to(tl.float32)
    dg, du = swiglu_gradients(d, g, u)
    tl.store(dgate + i, dg.to(dgate.dtype.element_ty), mask=i < elements)
    tl.store(dup + i, du.to(dup.dtype.element_ty), mask=i < elements)
    tl.store(act + i, (silu(g) * u).to(act.dtype.element_ty), mask=i < elements)
