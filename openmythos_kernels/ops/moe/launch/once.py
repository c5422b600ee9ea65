"""Launch of the routed weights' gradients over several calls."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import triton

from openmythos_kernels.ops.moe import configs
from openmythos_kernels.ops.moe.kernels.experts_weights_once import down_weights_once_kernel, up_weights_once_kernel
from openmythos_kernels.ops.moe.launch.weights import table


def weights(x, dy, dpre, act, offsets, pair, tokens: Sequence[int], like):
    """`openmythos::moe_experts_weights`."""
    starts = table((0, *itertools.accumulate(tokens)), x.device)
    E, D, I, K, calls = offsets.shape[1] - 1, x.shape[1], act.shape[1], len(pair) // len(x), len(tokens)
    dgate, dup, ddown = like.new_empty(E, I, D), like.new_empty(E, I, D), like.new_empty(E, D, I)
    config = configs.experts("up_weights", x.element_size())
    up_weights_once_kernel[(E * triton.cdiv(I, config.m) * triton.cdiv(D, config.n),)](
        x, dpre, offsets, pair, starts, dgate, dup, calls, E, K, D, I, **config.constants()
    )
    config = configs.experts("down_weights", x.element_size())
    down_weights_once_kernel[(E * triton.cdiv(D, config.m) * triton.cdiv(I, config.n),)](
        dy, act, offsets, pair, starts, ddown, calls, E, K, D, I, **config.constants()
    )
    return list(dgate), list(dup), list(ddown)
