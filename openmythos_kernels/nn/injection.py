"""Drop-in LTI injection, for recurrent blocks that keep their other parts; `RecurrentBlock` fuses it with them."""

from __future__ import annotations

import torch
from torch import Tensor

import openmythos.injection
from openmythos_kernels.ops.loop import DTYPES, lti_update
from openmythos_kernels.runtime.backends import choose


class LTIInjection(openmythos.injection.LTIInjection):
    """`openmythos.injection.LTIInjection`, same parameters and numbers, as one pass with its gradients."""

    def forward(self, h: Tensor, e: Tensor, transformer_out: Tensor) -> Tensor:
        """As the reference's; mixed dtypes and devices without kernels take its path."""
        tensors = (h, e, transformer_out, self.log_A, self.log_dt, self.B)
        plain = h.shape == e.shape == transformer_out.shape and all(x.dtype == h.dtype for x in tensors)
        if not plain or h.dtype not in DTYPES or not choose("loop_step", h.device.type).fast:
            return super().forward(h, e, transformer_out)
        if torch.is_autocast_enabled(h.device.type) or (h.dtype == torch.float64 and h.device.type != "cpu"):
            return super().forward(h, e, transformer_out)
        return lti_update(*tensors)
