"""Turns: programs of one launch add to the same tile one after the other, always in the same order.

A tile has a count of the programs that have added to it. The program whose turn is `order` waits until `order` others
have. So float32 sums have the same bits in every run. A program may only wait for programs that have started before it,
or a GPU could be full of programs that wait: a program takes its work by `ticket`, not by its number in the grid.
"""

import triton
import triton.language as tl

# The interpreter knows no assembly. It runs one program after the other, so that a program that would wait is a fault.
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def ticket(counter):
    """How many programs have asked before, from a counter that begins at 0."""
    return tl.atomic_add(counter, 1, sem="relaxed")


@triton.jit
def wait_for_turn(count, order):
    """Returns when `order` programs have passed the turn on; what they wrote can then be read.

    NVIDIA's assembly, since Triton pipelines no loop that has another in it. One thread asks, all wait at the barrier.
    After 2^26 questions, about a minute by estimate, the launch fails: a fault must not keep a GPU busy for ever.
    """
    if _INTERPRETED:
        tl.static_assert(tl.atomic_add(count, 0, sem="acquire") == order)
    else:
        tl.inline_asm_elementwise(
            """{
            .reg .pred %asks, %early, %late;
            .reg .u32 %thread, %passed, %left;
            mov.u32 %left, 0x4000000;
            mov.u32 %thread, %tid.x;
            setp.eq.u32 %asks, %thread, 0;
            @!%asks bra met_${:uid};
            again_${:uid}: ld.acquire.gpu.global.u32 %passed, [$1];
            setp.ne.u32 %early, %passed, $2;
            sub.u32 %left, %left, 1;
            setp.eq.u32 %late, %left, 0;
            @%late trap;
            @%early bra again_${:uid};
            met_${:uid}: bar.sync 0;
            mov.u32 $0, 0;
            }""",
            "=r,l,r",
            [count, order],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def pass_turn_on(count):
    """Behind it the next program may read what any thread of this one has written."""
    if _INTERPRETED:
        tl.atomic_add(count, 1, sem="release")
    else:
        tl.inline_asm_elementwise(
            """{
            .reg .pred %tells;
            .reg .u32 %thread;
            mov.u32 %thread, %tid.x;
            setp.eq.u32 %tells, %thread, 0;
            bar.sync 0;
            @%tells red.release.gpu.global.add.u32 [$1], 1;
            mov.u32 $0, 0;
            }""",
            "=r,l",
            [count],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
