"""Training attention of the running positions from their latents alone.

What a loop keeps for the backward are c_q and c_kv of its rows. The backward needs the keys and values of all positions
as the loop saw them: it walks from the last loop to the first and puts back, in each, those of the loop's rows.
Gradients of keys go from loop to loop: what a loop's attention gives is added to what later loops gave, and each row's
sum leaves in the loop that made it. So every row has one owner, sums have one order, and runs give the same bits.

Between loops the gradients travel along carriers: tensors of the keys' shapes without memory of their own.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from openmythos_kernels.nn.call import LayerCall
from openmythos_kernels.nn.packed import PackedKeys
from openmythos_kernels.nn.paths import mla_attention as per_head
from openmythos_kernels.nn.paths import mla_recompute
from openmythos_kernels.ops import mla
from openmythos_kernels.ops.derivatives import uncast
from openmythos_kernels.runtime.backends import Choice

WHEN = "training inside the path packed_rows of a recurrent block, every projection plain"


def choice(layer) -> Choice:
    return mla_recompute.choice(layer)


def refuses(call: LayerCall) -> str:
    if not (isinstance(call.mask, PackedKeys) and call.mask.graded):
        return "not in packed_rows, or no gradients"
    # Compilers and checkpointing decide by themselves what to keep.
    if call.compiling or call.packs_saved or not call.narrow:
        return "a compiler, checkpointing, or rotary angles that are not complex64"
    if call.dtype != torch.float64 and (reason := per_head.dtypes(call, "cpu" if call.device == "cpu" else "triton")):
        return reason
    return mla_recompute.choice(call.module).reason


def run(call: LayerCall) -> Tensor:
    layer, keys, x = call.module, call.mask, call.x
    name = keys.layer(call.cache_key)
    if name not in keys.walks:
        keys.walks[name] = Walk(layer, keys)
    walk = keys.walks[name]
    c_q, c_kv = (per_head.project(layer, down, x) for down in ("q_down", "kv_down"))
    inputs = (c_q, c_kv, *per_head.head_weights(layer), layer.wo.weight)
    y, *walk.carriers = PackedRecompute.apply(walk, torch.view_as_real(call.freqs_cis), keys, *walk.carriers, *inputs)
    return y


class Walk:
    """One layer's loops in one forward, and its keys and values on the way back.

    Attributes:
        made: for each loop its rows' places in the buffers, phasors and c_kv.
        carriers: of the keys and values, and of the rotary keys, after the last loop so far.
        autocast: brings the forward's autocast back.
    """

    def __init__(self, layer, keys: PackedKeys):
        self.layer, self.size = layer, keys.batch * keys.keys
        self.shape = keys.batch, keys.keys
        self.made: list[tuple[Tensor, Tensor, Tensor]] = []
        self.carriers: list[Tensor | None] = [None, None]
        self.autocast = mla_recompute.autocast(keys.place.device.type)
        self.buffers: list[Tensor] = []
        self._loop = -1

    def put(self, at: Tensor, kv: Tensor, k_rope: Tensor, loop: int) -> tuple[Tensor, Tensor]:
        """The buffers in this loop, (B, S, ...): those of the loop before, or behind it, with its rows replaced."""
        if not self.buffers:
            self.buffers = [x.new_zeros(self.size, *x.shape[1:]) for x in (kv, k_rope)]
        for buffer, new in zip(self.buffers, (kv, k_rope)):
            buffer.index_copy_(0, at, new)
        self._loop = loop
        whole_kv, whole_rope = (x.unflatten(0, self.shape) for x in self.buffers)
        return whole_kv, whole_rope

    def back(self, made: list, kv: Tensor, k_rope: Tensor, keys_of) -> tuple[Tensor, Tensor]:
        """The buffers as loop t saw them, made[t] being its rows; keys_of(phasors, c_kv) gives kv and k_rope."""
        t = len(made) - 1
        if self._loop != t + 1 or not self.buffers:
            self.buffers = []
            for at, phasors, c_kv in _owned(made[:-1], self.size):
                earlier_kv, earlier_rope = keys_of(phasors, c_kv)
                self.put(at, earlier_kv, earlier_rope, t)
        return self.put(made[t][0], kv, k_rope, t)

    def drop(self) -> None:
        """Frees the buffers."""
        self.buffers, self._loop = [], -1


def _owned(made: list, size: int):
    """The rows of `made` that no later loop replaces: (at, phasors, c_kv) of each loop."""
    if not made:
        return
    owner = made[0][0].new_full((size,), -1)
    for t, (at, _, _) in enumerate(made):
        owner[at] = t
    for t, (at, phasors, c_kv) in enumerate(made):
        if not len(at):  # the row that stays for other ranks
            continue
        mine = owner[at] == t
        yield at[mine], phasors[:, mine], c_kv[:, mine]


class PackedRecompute(torch.autograd.Function):
    """The attention layer of one loop's rows, from what `q_down` and `kv_down` made of them to its result.

    `forward(walk, phasors, keys, *carriers, c_q, c_kv, *head_weights(layer), wo)` -> (y, *carriers).
    """

    @staticmethod
    def forward(ctx, walk: Walk, phasors, keys: PackedKeys, kv_carrier, rope_carrier, c_q, c_kv, *weights):
        q_norm, kv_norm, nope, rope, up, wo = weights
        layer = walk.layer
        kv, k_rope = (x[0] for x in per_head.keys(layer, c_kv, phasors, kv_norm, up))
        q_nope, q_rope = per_head.queries(layer, c_q, phasors, q_norm, nope, rope)
        at = keys.written
        buffers = walk.put(at, keys.writing(kv), keys.writing(k_rope), len(walk.made))
        walk.made.append((at, phasors, c_kv))
        out = mla.attention_rows(q_nope[0], q_rope[0], *buffers, keys.position, keys.offset)[0]
        ctx.walk, ctx.phasors, ctx.writes = walk, phasors, keys.running
        ctx.rows = keys.position, keys.offset
        ctx.places = [(at, phasors) for at, phasors, _ in walk.made]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(c_q, c_kv, *weights, *(c_kv for _, _, c_kv in walk.made[:-1]))
        carriers = (x.new_zeros(()).expand(walk.size, *x.shape[1:]) for x in (kv, k_rope))
        return per_head.project(layer, "wo", out.flatten(1)[None], wo), *carriers

    @staticmethod
    @uncast
    def backward(ctx, dy, *later):
        c_q, c_kv, *saved = ctx.saved_tensors
        weights, earlier = saved[:6], saved[6:]
        graph = torch.is_grad_enabled()
        walk, layer = ctx.walk, ctx.walk.layer
        if dy is None and all(x is None for x in later):
            return (None,) * 13
        leaf: Any = (lambda x: x.view_as(x)) if graph else (lambda x: x.detach().requires_grad_())
        with torch.enable_grad(), walk.autocast():
            own_q, own_kv = leaf(c_q), leaf(c_kv)
            q_norm, kv_norm, nope, rope, up, wo = [leaf(w) for w in weights]
            kv, k_rope = (x[0] for x in per_head.keys(layer, own_kv, ctx.phasors, kv_norm, up))
            keys_of = partial(_keys_of, layer, kv_norm, up)
            made = [(at, phasors, x) for (at, phasors), x in zip(ctx.places, [*earlier, c_kv])]
            if graph:
                seen = [leaf(x) for x in _differentiable(made, _writing(ctx, kv), _writing(ctx, k_rope), keys_of, walk)]
            else:
                with torch.no_grad():
                    found = walk.back(made, _writing(ctx, kv), _writing(ctx, k_rope), keys_of)
                seen = [leaf(x) for x in found]
            q_nope, q_rope = per_head.queries(layer, own_q, ctx.phasors, q_norm, nope, rope)
            out = mla.attention_rows(q_nope[0], q_rope[0], seen[0], seen[1], *ctx.rows)[0]
            y = per_head.project(layer, "wo", out.flatten(1)[None], wo)
        find = partial(torch.autograd.grad, create_graph=graph, allow_unused=True)
        dseen: list[Any]
        if dy is None:
            dc_q = dq_norm = dnope = drope = dwo = None
            dseen = [None, None]
        else:
            dc_q, dq_norm, dnope, drope, dwo, *dseen = find(y, [own_q, q_norm, nope, rope, wo, *seen], dy)
        at = ctx.places[-1][0]
        sums = [_sum(mine, theirs, x, walk.size, graph) for mine, theirs, x in zip(dseen, later, seen)]
        rows = [total.index_select(0, at) for total in sums]
        ends = [_writing(ctx, kv), _writing(ctx, k_rope)]
        dc_kv, dkv_norm, dup = find(ends, [own_kv, kv_norm, up], rows)
        wanted = ctx.needs_input_grad[3:5]
        others = [total.index_fill(0, at, 0.0) if graph else total.index_fill_(0, at, 0.0) for total in sums]
        carried = [total if want else None for total, want in zip(others, wanted)]
        if not any(wanted):  # what loops without gradients made, kv_up has expanded for this loop and later ones
            for earlier_at, phasors, x in _owned(made[:-1], walk.size):
                with torch.enable_grad(), walk.autocast():
                    frozen = _keys_of(layer, kv_norm.detach(), up, phasors, x.detach())[0]
                (more,) = find(frozen, up, others[0].index_select(0, earlier_at))
                dup = dup + more
            walk.drop()
        return None, None, None, *carried, dc_q, dc_kv, dq_norm, dkv_norm, dnope, drope, dup, dwo


def _keys_of(layer, norm: Tensor, up: Tensor, phasors: Tensor, c_kv: Tensor) -> tuple[Tensor, Tensor]:
    kv, k_rope = per_head.keys(layer, c_kv, phasors, norm, up)
    return kv[0], k_rope[0]


def _differentiable(made: list, kv: Tensor, k_rope: Tensor, keys_of, walk: Walk) -> list[Tensor]:
    """`Walk.back` by differentiable operators."""
    buffers = [x.new_zeros(walk.size, *x.shape[1:]) for x in (kv, k_rope)]
    owned = list(_owned(made[:-1], walk.size))
    for at, new in (*((at, keys_of(phasors, c_kv)) for at, phasors, c_kv in owned), (made[-1][0], (kv, k_rope))):
        buffers = [old.index_copy(0, at, x) for old, x in zip(buffers, new)]
    return [x.unflatten(0, walk.shape) for x in buffers]


def _writing(ctx, x: Tensor) -> Tensor:
    return x if ctx.writes is None else x[ctx.writes]


def _sum(mine: Tensor | None, theirs: Tensor | None, like: Tensor, size: int, graph: bool) -> Tensor:
    """(size, ...): what this loop's attention gives to the keys, behind what later loops gave. Without `graph` in place
    of what they gave, which nobody else holds."""
    mine = None if mine is None else mine.flatten(0, 1)
    if mine is None or theirs is None:
        found = theirs if mine is None else mine
        return like.new_zeros(size, *like.shape[2:]) if found is None else found
    return theirs + mine if graph else theirs.add_(mine)
