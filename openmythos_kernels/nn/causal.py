"""Causal masks that come as tensors, as open_mythos passes them: known by their values, which are looked at once.

A module that is called with an additive (..., T, S) mask of 0 and -inf cannot tell what it hides. Where it hides
exactly what causality does, the kernels for `CausalMask` compute the same. A mask is remembered by the tensor object
and its version, so that all layers and loops of a forward look once. On a GPU the answer is copied to the host behind
the work that is queued, and used once it has arrived: the host never waits, and the first layers take the mask as it
is.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from openmythos import compat
from openmythos.attention import CausalMask, Mask
from openmythos_kernels.ops.dtypes import FLOATS
from openmythos_kernels.runtime import extension


def recognised(mask: Mask, tokens: int, keys: int) -> Mask:
    """`mask` as a CausalMask if it is a tensor that hides what one would of `tokens` queries, the last of `keys`
    tokens; else `mask` itself.

    Args:
        mask: what a module was called with.
        tokens, keys: queries in this call and keys that they see at most, this call's included.
    """
    if not isinstance(mask, Tensor):
        return mask
    if type(mask) is not Tensor or mask.dim() < 2 or mask.shape[-2:] != (tokens, keys) or mask.dtype not in FLOATS:
        return mask
    if (
        mask.requires_grad
        or mask.is_meta
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or compat.is_in_torch_dispatch_mode()
    ):
        return mask
    if compat.in_transform():
        return mask
    return CausalMask(keys - tokens, tokens) if _seen(mask, keys - tokens) else mask


class _Look:
    """A look at a mask's values.

    Attributes:
        mask: weak, as looking must not keep the tensor.
        version: of the tensor when it was looked at.
    """

    def __init__(self, mask: Tensor, start: int):
        self.mask, self.version = weakref.ref(mask), mask._version
        self._answer: bool | None = None
        self._flag = self._arrived = None
        if mask.device.type == "cpu":
            self._answer = _is_causal(mask, start)
        elif not compat.capturing(mask.device):
            self._flag = _is_causal_on_device(mask, start).to("cpu", non_blocking=True)
            if mask.is_cuda:
                self._arrived = torch.cuda.Event()
                self._arrived.record()

    def answer(self) -> bool:
        """Whether the mask is known to be causal; False while nobody knows."""
        if self._answer is None and self._flag is not None and (self._arrived is None or self._arrived.query()):
            self._answer, self._flag, self._arrived = bool(self._flag), None, None
        return bool(self._answer)


def _seen(mask: Tensor, start: int) -> bool:
    if mask.is_inference():
        return mask.device.type == "cpu" and _is_causal(mask, start)  # has no version to remember it by
    look = _looks.get(id(mask))
    if look is None or look.mask() is not mask or look.version != mask._version:
        if len(_looks) >= _KEPT:
            for key in [key for key, old in _looks.items() if old.mask() is None] or list(_looks):
                del _looks[key]
        look = _looks[id(mask)] = _Look(mask, start)
    return look.answer()


# By id, of living tensors: those of ended ones are told by their weak reference.
_looks: dict[int, _Look] = {}
_KEPT = 16


def _is_causal(mask: Tensor, start: int) -> bool:
    module = extension.module
    if module is not None:
        return module.is_causal(mask, start)
    return bool(_is_causal_on_device(mask, start))


def _is_causal_on_device(mask: Tensor, start: int) -> Tensor:
    return (mask == CausalMask(start, mask.shape[-2]).additive(mask.shape[-1], mask)).all()
