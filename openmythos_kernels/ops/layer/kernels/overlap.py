"""Programmatic dependent launch: a kernel is scheduled while the one before it drains."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def overlap(OVERLAP: tl.constexpr):
    """The first thing that a kernel does: it waits until all that earlier launches wrote is there, and lets the next
    launch take the multiprocessors that become free. What follows may then read and write anything, as behind an
    ordinary launch. Nothing without OVERLAP, which needs launches with `launch_pdl=True`."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
