"""Experts whose matrices have more than 2^31 elements.

The last programs of each kernel run in Triton's interpreter, whose int32 overflows as a GPU's does. Pages that are
never written take no memory, so the 4 GiB of a matrix are only addresses.
"""

import contextlib
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

LONG, SHORT = 2**26 + 128, 32  # LONG * SHORT = 2^31 + 4096
LAST = 128  # the last rows or columns, which are computed and compared
TILE = dict(BM=16, BN=64, BK=64)

interpreted = pytest.mark.parametrize("triton_mode", ["interpreter"])


def array(*shape):
    """An fp16 tensor without initial values; the system allocates its pages when they are written."""
    return torch.from_numpy(np.empty(shape, np.float16))


def draw(*shape):
    return (torch.randn(*shape) / 4).half()


@contextlib.contextmanager
def last_programs(columns):
    """Within, a launch of a few programs runs as the last programs of a grid that covers `columns`."""
    from triton.runtime.interpreter import interpreter_builder as builder

    whole, first = columns // TILE["BN"], (columns - LAST) // TILE["BN"]
    grid, at = builder.set_grid_dim, builder.set_grid_idx
    with (
        mock.patch.object(builder, "set_grid_dim", lambda x, y, z: grid(whole, y, z)),
        mock.patch.object(builder, "set_grid_idx", lambda x, y, z: at(x + first, y, z)),
    ):
        yield


def launch(kernel, columns, *arguments):
    with last_programs(columns):
        kernel[(LAST // TILE["BN"],)](*arguments, **TILE)


def table(matrix):
    return matrix, torch.zeros(1, dtype=torch.int64)


def close(found, expected):
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-3)


@interpreted
def test_up(triton_mode):
    from openmythos_kernels.ops.moe.kernels.experts import up_kernel

    x, gate, up, act = draw(1, SHORT), array(LONG, SHORT), array(LONG, SHORT), array(1, LONG)
    for w in (gate, up):
        w[-LAST:] = draw(LAST, SHORT)
    launch(
        up_kernel,
        LONG,
        x,
        None,
        None,
        None,
        *table(gate),
        *table(up),
        act,
        act,
        1,
        1,
        1,
        1,
        SHORT,
        LONG,
        True,
        False,
        True,
    )
    g, u = (x.float() @ w[-LAST:].float().T for w in (gate, up))
    close(act[:, -LAST:], F.silu(g) * u)


@interpreted
def test_down(triton_mode):
    from openmythos_kernels.ops.moe.kernels.experts import down_kernel

    act, down, y = draw(1, SHORT), array(LONG, SHORT), array(1, LONG)
    down[-LAST:] = draw(LAST, SHORT)
    launch(down_kernel, LONG, act, None, None, *table(down), y, 1, 1, LONG, SHORT, True, True)
    close(y[:, -LAST:], act.float() @ down[-LAST:].float().T)


@interpreted
def test_down_backward(triton_mode):
    from openmythos_kernels.ops.moe.kernels.experts_backward import down_backward_kernel

    rows = 2 * SHORT  # the second half of the rows begins more than 2^31 elements away
    dy, down, pre, dpre, act = draw(1, rows), array(rows, LONG), array(2, 1, LONG), array(2, 1, LONG), array(1, LONG)
    down[:, -LAST:], pre[:, :, -LAST:] = draw(rows, LAST), draw(2, 1, LAST)
    launch(
        down_backward_kernel,
        LONG,
        dy,
        None,
        None,
        None,
        None,
        *table(down),
        pre,
        dpre,
        act,
        None,
        1,
        1,
        1,
        1,
        rows,
        LONG,
        True,
        True,
    )
    given = pre[:, :, -LAST:].float().requires_grad_()
    made = F.silu(given[0]) * given[1]
    made.backward(dy.float() @ down[:, -LAST:].float())
    close(act[:, -LAST:], made.detach())
    close(dpre[:, :, -LAST:], given.grad)


@interpreted
def test_up_backward(triton_mode):
    from openmythos_kernels.ops.moe.kernels.experts_backward import up_backward_kernel

    dpre, gate, up, dx = draw(2, 1, SHORT), array(SHORT, LONG), array(SHORT, LONG), array(1, LONG)
    for w in (gate, up):
        w[:, -LAST:] = draw(SHORT, LAST)
    launch(up_backward_kernel, LONG, dpre, None, None, *table(gate), *table(up), dx, 1, 1, 1, LONG, SHORT, True, True)
    close(dx[:, -LAST:], sum(d.float() @ w[:, -LAST:].float() for d, w in zip(dpre, (gate, up))))
