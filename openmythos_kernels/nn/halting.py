"""Drop-in halting probability, for recurrent blocks that keep their other parts; `RecurrentBlock` fuses it with
them."""

from __future__ import annotations

import torch
from torch import Tensor

import openmythos
from openmythos_kernels.nn.guards import halt_obstacle
from openmythos_kernels.ops.loop import DTYPES, act_update, loop_down
from openmythos_kernels.runtime.backends import choose

_NEVER = 2.0  # a threshold that no sum of one probability reaches


class ACTHalting(openmythos.recurrence.ACTHalting):
    """`openmythos.recurrence.ACTHalting`, same parameters and numbers, without the product of h and the weight in
    memory."""

    def forward(self, h: Tensor) -> Tensor:
        """As the reference's; mixed dtypes and devices without kernels take its path."""
        if halt_obstacle(self):
            return super().forward(h)
        weight, bias, device = self.halt.weight, self.halt.bias, h.device.type
        plain = h.dtype in DTYPES and weight.dtype == bias.dtype == h.dtype and weight.device == h.device
        if not plain or torch.is_autocast_enabled(device) or not choose("loop_step", device).fast:
            return super().forward(h)
        wide = torch.float64 if h.dtype == torch.float64 else torch.float32
        if h.dtype == wide and choose("loop_down", device).fast:
            return torch.sigmoid(loop_down(h, weight).squeeze(-1) + bias)
        if wide == torch.float64:
            return super().forward(h)  # the Triton kernels take none
        zero = h.new_zeros(h.shape[:-1], dtype=wide)
        running = torch.ones_like(zero, dtype=torch.bool)
        # What a first loop spends is its probability, in float32 where h is not.
        return act_update(h, h.detach(), zero, running, zero, weight, bias, 0, _NEVER).cumulative_p
