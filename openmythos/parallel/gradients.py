"""Gradients over ranks: the mean of every parameter's, the norm of all, and backward passes that add up first."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from openmythos.compat import at_end_of_backward
from openmythos.moe import MoEFFN

BUCKET = 2**25  # numbers that are averaged in one collective


class AveragedCopies:
    """Parameters whose gradients become the mean over the ranks of `group`, at the end of every backward pass.

    Attributes:
        on: whether they do.
    """

    on: bool = True

    def __init__(self, parameters: list[nn.Parameter], group: dist.ProcessGroup):
        self._parameters, self._group, self._waits = parameters, group, False
        for p in parameters:
            p.register_post_accumulate_grad_hook(self._made)

    def _made(self, p: Tensor) -> None:
        if self.on and not self._waits:
            self._waits = True
            at_end_of_backward(self._average)

    @torch.no_grad()
    def _average(self) -> None:
        self._waits = False
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        for some in _buckets(gradients):
            flat = torch.cat([grad.flatten() for grad in some])
            dist.all_reduce(flat, group=self._group)
            flat /= dist.get_world_size(self._group)
            for grad, mean in zip(some, flat.split([grad.numel() for grad in some])):
                grad.copy_(mean.view_as(grad))


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in order, so many at once as make up BUCKET numbers."""
    some: list[Tensor] = []
    for tensor in tensors:
        if some and sum(t.numel() for t in some) + tensor.numel() > BUCKET:
            yield some
            some = []
        some.append(tensor)
    if some:
        yield some


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """Scales all gradients so that their norm, over the whole model on all ranks, is at most max_norm.

    Returns:
        The norm before, a scalar: that of the mean gradient over all ranks, the same on each of them.
    """
    divided = {id(p) for p in divided_experts(model)}
    parts: list[list[nn.Parameter]] = [[], [], []]  # whole on every rank, sharded, experts on several ranks
    for p in model.parameters():
        if p.grad is not None:
            parts[2 if id(p) in divided else int(isinstance(p, DTensor))].append(p)
    squares = []
    for part in parts:
        norm = nn.utils.get_total_norm([p.grad for p in part if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        squares.append(norm.float().square().to(next(model.parameters()).device))
    if divided:
        dist.all_reduce(squares[2], group=next(_exchanges(model)).group)
    norm = torch.stack(squares).sum().sqrt()
    for part in parts:
        nn.utils.clip_grads_with_norm_(part, max_norm, norm)
    return norm


@contextlib.contextmanager
def accumulating(model: nn.Module) -> Iterator[None]:
    """Within, a backward pass adds to the gradients of this rank alone; the next one outside reduces the sum."""
    copies = [e.copies for e in _exchanges(model) if e.copies is not None]
    sharded = [m for m in model.modules() if isinstance(m, FSDPModule)]
    with contextlib.ExitStack() as stack:
        if isinstance(model, DistributedDataParallel):
            stack.enter_context(model.no_sync())
        for module in sharded:
            module.set_requires_gradient_sync(False, recurse=False)
            stack.callback(module.set_requires_gradient_sync, True, recurse=False)
        for one in copies:
            one.on = False
            stack.callback(setattr, one, "on", True)
        yield


def divided_experts(model: nn.Module) -> Iterable[nn.Parameter]:
    """The parameters of routed experts that only some ranks hold."""
    for module in model.modules():
        if isinstance(module, MoEFFN) and module.exchange is not None:
            yield from module.routed_experts.parameters()


def split_groups(groups: list[dict]) -> list[dict]:
    """An optimizer's groups, each split into parameters that are sharded alike: PyTorch's fused and multi-tensor
    optimizers take no mixture of sharded and whole tensors in one group."""
    split = []
    for group in groups:
        kinds: dict = {}
        for p in group["params"]:
            kinds.setdefault(isinstance(p, DTensor), []).append(p)
        split += [{**group, "params": params} for params in kinds.values()]
    return split


def _exchanges(model: nn.Module) -> Iterator:
    for module in model.modules():
        if isinstance(module, MoEFFN) and module.exchange is not None:
            yield module.exchange
