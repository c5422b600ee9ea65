"""What a training step sends between ranks, and what a rank holds, counted before anything is allocated.

Layers, units and sizes are those of the model itself, on the meta device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from openmythos.config import MythosConfig
from openmythos.moe import MoEFFN
from openmythos.parallel.exchange import FLAGS
from openmythos.parallel.gradients import BUCKET
from openmythos.parallel.plan import Plan
from openmythos.parallel.wrap import units
from openmythos.sizes import outline

_DDP_BUCKET = 25 * 2**20  # bytes; DDP's own
# The share of what a rank gives to a collective of n ranks that leaves it, in a ring or, of tokens, with even routing.
_LEAVES = {
    "all_to_all": lambda n: (n - 1) / n,
    "all_gather": lambda n: n - 1,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_reduce": lambda n: 2 * (n - 1) / n,
}


@dataclass(frozen=True)
class Traffic:
    """One kind of collective in a training step.

    Attributes:
        layer: the module's name.
        what: what is sent.
        collective: all_to_all, all_gather, reduce_scatter or all_reduce.
        ranks: of a group.
        times: how often in a step; `in_loop` of them in each loop with gradients.
        given: bytes that a rank gives to one, on the mean over ranks.
    """

    layer: str
    what: str
    collective: str
    ranks: int
    times: int
    given: int
    in_loop: int = 0

    @property
    def sent(self) -> int:
        """Bytes that leave a rank in one."""
        return round(self.given * _LEAVES[self.collective](self.ranks))


@dataclass(frozen=True)
class Held:
    """Bytes that a rank holds.

    Attributes:
        parameters, gradients, optimizer: between steps; gradients until they are cleared.
        gathered: whole weights and their gradients at once, at most: of the loop, the embedding and one more block.
    """

    parameters: int
    gradients: int
    optimizer: int
    gathered: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.gathered


def traffic(
    cfg: MythosConfig,
    plan: Plan,
    ranks: int,
    tokens: int,
    *,
    n_loops: int | None = None,
    grad_loops: int | None = None,
    checkpoint_loops: bool = False,
    itemsize: int = 4,
    gradient_itemsize: int = 4,
) -> list[Traffic]:
    """The collectives of a training step: forward, backward and the update of router biases.

    Args:
        cfg, plan, ranks: as for `parallelize`; nothing of torch.distributed is used.
        tokens: of one rank's batch; every loop computes all of them.
        n_loops, grad_loops, checkpoint_loops: as for the model's forward.
        itemsize: bytes of a number in gathered weights and in tokens: 2 with `mixed`, or under autocast for tokens of
            swapped layers.
        gradient_itemsize: in gradients of weights.

    Raises:
        ValueError: the plan does not fit.
    """
    plan, model = plan.over(ranks), outline(cfg)
    names = {module: name or "(model)" for name, module in model.named_modules()}
    loops = cfg.max_loop_iters if n_loops is None else n_loops
    graded = loops if grad_loops is None else min(loops, grad_loops)
    forwards, a_loop = (loops + graded, 2) if checkpoint_loops else (loops, 1)
    rows: list[Traffic] = []

    def add(module: nn.Module, *fields: Any) -> None:
        rows.append(Traffic(names[module], *fields))

    layers = [m for m in model.modules() if isinstance(m, MoEFFN)]
    for layer in layers:
        if (e := plan.expert) > 1:
            counts = (layer.n_experts + FLAGS * e) * 8
            pairs = tokens * layer.topk * cfg.dim * itemsize
            mine = sum(p.numel() for p in layer.routed_experts.parameters()) // e
            add(layer, "counts", "all_to_all", e, forwards, counts, a_loop)
            add(layer, "tokens to experts, results back", "all_to_all", e, 2 * forwards, pairs, 2 * a_loop)
            add(layer, "gradients of both", "all_to_all", e, 2 * graded, pairs, 2)
            if layer is layers[0]:  # once more than there are loops
                add(layer, "counts, all ranks done", "all_to_all", e, 1, counts)
            if ranks > e:
                times = -(-mine // BUCKET)
                add(layer, "gradients of experts", "all_reduce", ranks // e, times, mine * gradient_itemsize // times)
        if ranks > 1:
            add(layer, "router loads", "all_reduce", ranks, 1, layer.n_experts * 8)
    for unit, members in _members(model, plan).items():
        if plan.shard == 1:
            continue
        part = sum(_part(p, plan.shard) for p in members)
        gathers = 1 if units(model)[unit] else 2
        add(unit, "weights", "all_gather", plan.shard, gathers, part * itemsize)
        add(unit, "gradients", "reduce_scatter", plan.shard, 1, part * plan.shard * gradient_itemsize)
        if ranks > plan.shard:
            add(unit, "gradients of a shard", "all_reduce", ranks // plan.shard, 1, part * gradient_itemsize)
    if plan.shard == 1 < ranks:
        whole = sum(p.numel() for members in _members(model, plan).values() for p in members) * gradient_itemsize
        times = -(-whole // _DDP_BUCKET)
        add(model, "gradients", "all_reduce", ranks, times, whole // times)
    return rows


def held(
    cfg: MythosConfig, plan: Plan, ranks: int, *, itemsize: int = 4, gathered_itemsize: int = 4, moments: float = 2
) -> Held:
    """What a rank holds of weights, gradients and optimizer state; activations are not counted.

    Args:
        cfg, plan, ranks: as for `parallelize`.
        itemsize: bytes of a number in weights, gradients and optimizer.
        gathered_itemsize: in gathered weights and their gradients, 2 with `mixed`.
        moments: numbers that the optimizer keeps per parameter: 2 for AdamW, 1 for Muon, their mean for both.
    """
    plan, model = plan.over(ranks), outline(cfg)
    members = _members(model, plan)
    mine = sum(_part(p, plan.shard) for ps in members.values() for p in ps)
    mine += sum(p.numel() for p in _divided(model, plan)) // plan.expert
    gathered = 0
    if plan.shard > 1:
        sizes = {unit: sum(_part(p, plan.shard) for p in ps) * plan.shard for unit, ps in members.items()}
        stay = sum(size for unit, size in sizes.items() if units(model)[unit])
        gathered = stay + max((size for unit, size in sizes.items() if not units(model)[unit]), default=0)
    return Held(mine * itemsize, mine * itemsize, round(moments * mine * itemsize), 2 * gathered * gathered_itemsize)


def table(rows: list[Traffic]) -> str:
    """The rows as text, with sums of what leaves a rank in a step."""
    head = "layer", "what", "collective", "ranks", "a loop", "a step", "MB sent, each", "MB sent, a step"
    lines = [head]
    for row in rows:
        each, step = row.sent / 1e6, row.sent * row.times / 1e6
        loop = str(row.in_loop or "")
        lines.append(
            (row.layer, row.what, row.collective, str(row.ranks), loop, str(row.times), f"{each:,.3f}", f"{step:,.1f}")
        )
    total = sum(row.sent * row.times for row in rows) / 1e6
    lines.append(("all", "", "", "", "", str(sum(row.times for row in rows)), "", f"{total:,.1f}"))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))).rstrip()
        for line in lines
    )


def _divided(model: nn.Module, plan: Plan) -> list[nn.Parameter]:
    layers = [m for m in model.modules() if isinstance(m, MoEFFN)] if plan.expert > 1 else []
    return [p for layer in layers for p in layer.routed_experts.parameters()]


def _members(model: nn.Module, plan: Plan) -> dict[nn.Module, list[nn.Parameter]]:
    """The parameters that each unit of FSDP2 gathers."""
    taken, members = {id(p) for p in _divided(model, plan)}, {}
    for unit in units(model):
        members[unit] = [p for p in unit.parameters() if id(p) not in taken]
        taken |= {id(p) for p in members[unit]}
    return members


def _part(p: nn.Parameter, shard: int) -> int:
    """Numbers of a rank's shard: rows are padded until they can be divided."""
    rows = p.shape[0]
    return -(-rows // shard) * (p.numel() // rows)
