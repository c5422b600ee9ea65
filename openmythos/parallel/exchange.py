"""Tokens sent to the ranks that hold their experts, and the results sent back.

One call of a MoE layer is a round, on all ranks of a group at once: they exchange how many tokens each sends to each
expert, then the tokens, sorted by expert; every rank applies its experts to what arrives, and the results go back the
same way. A round of the backward pass sends the same numbers of rows in the opposite order.

Ranks may run different numbers of loops. A rank whose loops are done takes part in the others' rounds, without tokens
of its own, until all are done (`Session`); a flag beside the counts says whether a sender is still in its loops, so
that all leave after the same round. Another flag says whether a sender needs gradients: if one does, all ranks record
the round, as gradients will come back through their experts.

Ranks must go through the rounds of the backward pass in one order. A scalar, the token, makes it so: each round takes
the one of the round before and gives one to the next, and the last is tied to the recurrent block's output.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from openmythos.layers import recomputing
from openmythos.recurrence import RecurrentBlock

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]
FLAGS = 2


class Round(NamedTuple):
    """What the ranks of a group have told each other before a round.

    Attributes:
        sent, received: rows to and from each rank.
        experts: (rows received,) int64, the expert of each row, numbered from 0 on this rank.
        alive: whether any rank is still in its loops.
        grad: whether any rank needs gradients.
    """

    sent: list[int]
    received: list[int]
    experts: Tensor
    alive: bool
    grad: bool


class Exchange:
    """One layer's way to the experts on other ranks.

    Args:
        group: the ranks that divide the experts, in the order of the experts.
        n_experts: of the layer, on all ranks; a multiple of the group's size.
        topk: experts per token.
        session: of the recurrent block around the layer, or None.
        mixed: the dtype that experts compute in, if it is another than that of their weights.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        n_experts: int,
        topk: int,
        session: Session | None,
        mixed: torch.dtype | None = None,
    ):
        self.group, self.ranks = group, dist.get_world_size(group)
        self.n_experts, self.topk, self.session, self.mixed = n_experts, topk, session, mixed
        self.here = n_experts // self.ranks
        self.copies: Any = None  # `AveragedCopies`, where other groups hold the same experts

    def __call__(self, experts: Experts, flat: Tensor, expert_idx: Tensor, topk_weights: Tensor) -> Tensor:
        """The weighted sum of routed experts, (N, dim) in flat's dtype.

        Args:
            experts: `MoEFFN.routed`, of the experts that this rank holds.
            flat: (N, dim).
            expert_idx: (N, K) int64, among all experts.
            topk_weights: (N, K).
        """
        session, grad = self.session, torch.is_grad_enabled()
        told = self.tell(expert_idx, True, grad)
        if session is None or not session.open:  # a call of the layer alone, or again in the backward pass
            return self._round(told, experts, flat, expert_idx, topk_weights, _token(flat))[0]
        session.like = flat.new_empty(0, flat.shape[-1])  # without the graph

        def run(token: Tensor, again: bool) -> tuple[Tensor, Tensor]:
            now = self.tell(expert_idx, True, grad) if again else told
            return self._round(now, experts, flat, expert_idx, topk_weights, token)

        if not told.grad:
            return run(session.token, False)[0]
        if grad:
            out, session.token = run(session.token, False)
            return out
        # Other ranks need gradients of this round: this one's experts take part in them, its tokens do not.
        out, session.token = session.recorded(run)
        return out.detach()

    def idle(self, experts: Experts) -> bool:
        """A round without tokens of this rank's own. False if all ranks are done: then it was none."""
        session = self.session
        assert session is not None
        flat = session.like
        chosen = torch.empty(0, self.topk, dtype=torch.int64, device=flat.device)
        told = self.tell(chosen, False, False)
        if not told.alive:
            return False

        def run(token: Tensor, again: bool) -> tuple[Tensor, Tensor]:
            now = self.tell(chosen, False, False) if again else told
            return self._round(now, experts, flat, chosen, flat.new_empty(0, self.topk), token)

        if told.grad:
            session.token = session.recorded(run)[1]
        else:
            run(session.token, False)
        return True

    def tell(self, expert_idx: Tensor, alive: bool, grad: bool) -> Round:
        """Exchanges counts and flags, on the device; the host waits once."""
        chosen = expert_idx.flatten()
        counts = torch.zeros(self.n_experts, dtype=torch.int64, device=chosen.device)
        counts = counts.scatter_add_(0, chosen, torch.ones_like(chosen)).view(self.ranks, self.here)
        flags = torch.tensor([alive, grad], dtype=torch.int64, device=chosen.device).expand(self.ranks, FLAGS)
        message = torch.cat((counts, flags), 1)
        arrived = torch.empty_like(message)
        dist.all_to_all_single(arrived, message, group=self.group)
        came = arrived[:, : self.here]
        numbers = torch.stack((counts.sum(1), came.sum(1), *arrived[:, self.here :].unbind(1))).tolist()
        sent, received, living, needing = numbers
        local = torch.arange(self.here, device=chosen.device).repeat(self.ranks)
        local = local.repeat_interleave(came.flatten(), output_size=sum(received))
        return Round(sent, received, local, any(living), any(needing))

    def _round(
        self, told: Round, experts: Experts, flat: Tensor, expert_idx: Tensor, topk_weights: Tensor, token: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The weighted sums (N, dim), and the next token."""
        order = expert_idx.flatten().argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        route = _Route(told.sent, told.received, order, place, self.group, self.ranks)
        rows = _Send.apply(route, flat, self.topk, token)
        with contextlib.nullcontext() if self.mixed is None else torch.autocast(rows.device.type, self.mixed):
            y = experts(rows, told.experts.unsqueeze(1), rows.new_ones(len(rows), 1))
        return _Return.apply(route, y, topk_weights, token)


class Session:
    """What the MoE layers of one recurrent block share during a forward.

    Attributes:
        layers: the layers, in the order in which a loop calls them.
        open: whether the block's forward runs.
        token: the last round's; see above.
        like: no rows, (0, dim), in the dtype and on the device of all.
    """

    like: Tensor
    token: Tensor

    def __init__(self, recurrent: RecurrentBlock, layers: list):
        self.layers, self.open, self.checkpoints = layers, False, False
        recurrent.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True)
        recurrent.register_forward_hook(self._end, always_call=True)

    def recorded(self, run: Callable[[Tensor, bool], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """`run(token, again)` with gradients. With checkpointed loops it runs again in the backward, as the loops of
        the ranks that called for it do."""
        with torch.enable_grad():
            if not self.checkpoints:
                return run(self.token, False)
            return checkpoint(lambda token: run(token, recomputing()), self.token, use_reentrant=False)

    def _begin(self, recurrent, args, kwargs) -> None:
        given = _SIGNATURE.bind(recurrent, *args, **kwargs).arguments
        self.open, self.token, self.checkpoints = True, _token(given["h"]), bool(given.get("checkpoint_loops"))

    def _end(self, recurrent, args, output):
        if output is None:  # it has raised
            self.open = False
            return None
        while self.layers[0].exchange.idle(self.layers[0].routed):
            for layer in self.layers[1:]:
                layer.exchange.idle(layer.routed)
        self.open, token = False, self.token
        del self.token
        if not token.requires_grad or not torch.is_grad_enabled():
            return None
        if not isinstance(output, tuple):
            return Tied.apply(output, token)
        # A loss may use some of them alone.
        return tuple(Tied.apply(x, token) if x.requires_grad else x for x in output)


class Tied(torch.autograd.Function):
    """The first tensor, as a result of the others too: their gradients, zeros, are there when its own is."""

    @staticmethod
    def forward(ctx, x: Tensor, *others: Tensor) -> Tensor:
        ctx.save_for_backward(*others)
        return x.clone()  # a view would lose FSDP's hook if it were changed in place

    @staticmethod
    def backward(ctx, dx: Tensor):
        return dx, *(torch.zeros_like(other) for other in ctx.saved_tensors)


class _Route(NamedTuple):
    sent: list[int]
    received: list[int]
    order: Tensor  # (N * K,), sorted by expert -> pair
    place: Tensor  # (N * K,), pair -> sorted by expert
    group: dist.ProcessGroup
    ranks: int

    def there(self, rows: Tensor) -> Tensor:
        return _all_to_all(rows, self.sent, self.received, self.group)

    def back(self, rows: Tensor) -> Tensor:
        return _all_to_all(rows, self.received, self.sent, self.group)


class _Send(torch.autograd.Function):
    """(N, dim) -> the rows that arrive, (M, dim).

    `_Return` divides gradients by the number of ranks, so that weights of experts get the mean over ranks, as all
    other weights do. What leaves the experts again is multiplied by it.
    """

    @staticmethod
    def forward(ctx, route: _Route, flat: Tensor, topk: int, token: Tensor) -> Tensor:
        ctx.route, ctx.topk = route, topk
        return route.there(flat[route.order // topk])

    @staticmethod
    @once_differentiable
    def backward(ctx, drows: Tensor):
        route = ctx.route
        # Each pair's row at its place, and a sum over a token's pairs: an index_add has no fixed order on a GPU.
        dflat = route.back(drows)[route.place].unflatten(0, (-1, ctx.topk)).sum(1)
        return None, dflat * route.ranks, None, drows.new_zeros(())


class _Return(torch.autograd.Function):
    """Results (M, dim), weights (N, K) -> the weighted sums (N, dim), and the next token."""

    @staticmethod
    def forward(ctx, route: _Route, y: Tensor, topk_weights: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        pairs = route.back(y)[route.place].view(*topk_weights.shape, y.shape[-1])
        ctx.route = route
        ctx.save_for_backward(topk_weights, pairs)
        ctx.set_materialize_grads(False)
        return (pairs.to(topk_weights.dtype) * topk_weights.unsqueeze(-1)).sum(1), token.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor | None, dtoken: Tensor | None):
        route, (topk_weights, pairs) = ctx.route, ctx.saved_tensors
        dweights, dpairs = None, torch.zeros_like(pairs)
        if dout is not None:
            dweights = (dout.unsqueeze(1) * pairs.to(dout.dtype)).sum(-1).to(topk_weights.dtype)
            dpairs = (dout.unsqueeze(1) * (topk_weights / route.ranks).unsqueeze(-1)).to(pairs.dtype)
        return None, route.there(dpairs.flatten(0, 1)[route.order]), dweights, topk_weights.new_zeros(())


def _token(like: Tensor) -> Tensor:
    return torch.zeros((), device=like.device, requires_grad=torch.is_grad_enabled())


def _all_to_all(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
    return arrived


_SIGNATURE = inspect.signature(RecurrentBlock.forward)
