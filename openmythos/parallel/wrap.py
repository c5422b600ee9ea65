"""`parallelize(model, plan)`: one model on several ranks."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from openmythos.block import TransformerBlock
from openmythos.compat import ignore_in_ddp
from openmythos.config import setting
from openmythos.halting import ACTHalting
from openmythos.model import LanguageModel
from openmythos.moe import MoEFFN
from openmythos.parallel.exchange import Exchange, Session, Tied
from openmythos.parallel.gradients import AveragedCopies, divided_experts
from openmythos.parallel.initialize import initialize
from openmythos.parallel.plan import Meshes, Plan, ranks
from openmythos.recurrence import RecurrentBlock


def parallelize(
    model: nn.Module,
    plan: Plan | None = None,
    *,
    device: torch.device | str | None = None,
    seed: int = 0,
    mixed: torch.dtype | None = None,
    trains_halting: bool = False,
) -> nn.Module:
    """Divides a model over all ranks, in place. Every rank calls it with the same arguments, and then computes a batch
    of its own; gradients are the mean over all ranks. Without torch.distributed it only initializes.

    What is not sharded is copied to every rank (DDP). With `plan.shard > 1` every block is a unit of FSDP2, and the
    whole recurrent block is one: its weights are gathered once for all loops and their gradients reduced once. To
    gather in every loop would cost as many times the traffic, and ranks that halt at different depths would wait for
    each other. Meanwhile a rank holds the weights of all blocks in the loop; `plan.expert` divides their experts.

    Args:
        model: an OpenMythos or DenseTransformer, accelerated before or afterwards or not. On the meta device, it gets
            the initial weights of `seed`, which depend on no number of ranks (see `initialize`). With weights, these
            stay, and are rank 0's on every rank.
        plan: see there; None means `Plan()`, a whole copy on every rank.
        device: where a model on the meta device goes; None means the GPU of this rank with nccl, else the CPU.
        seed: of initial weights.
        mixed: FSDP2's units are gathered and compute in this dtype, as divided experts compute in it; weights keep
            their own between steps, and gradients are reduced in float32.
        trains_halting: the loss reads halting probabilities, of a model with halting="off" too.

    Returns:
        The model, within DistributedDataParallel where nothing is sharded and there are several ranks: see `unwrap`.

    Raises:
        ValueError: the plan does not fit the ranks or the model, naming it.
    """
    world = ranks()
    plan = (plan or Plan()).over(world)
    if not isinstance(model, LanguageModel):
        raise ValueError(f"model: got {type(model).__name__}, must be a model of openmythos")
    _check(model, plan, mixed)
    on_meta = any(p.is_meta for p in model.parameters())
    to = _device(model, device, on_meta)
    meshes = Meshes.of(plan, to.type) if world > 1 else Meshes(None, None)
    if world > 1 and not on_meta:
        _as_rank_0(model)
    recurrent: Any = next((m for m in model.modules() if isinstance(m, RecurrentBlock)), None)
    if meshes.experts is not None:
        _divide_experts(model, recurrent, meshes.experts, mixed)
    if world > 1 and recurrent is not None and setting(model.cfg, "act_remainder") == "last":
        recurrent.register_forward_hook(_halting_takes_part)  # before FSDP's own hooks
    if meshes.rest is not None:
        _shard(model, meshes.rest, mixed)
    if on_meta:
        model.to_empty(device=to)
        initialize(model, seed)
    if meshes.experts is not None and meshes.experts["copies"].size() > 1:
        _average_copies(model, meshes.experts.get_group("copies"))
    if recurrent is not None:
        recurrent.ranks_may_part = True
    if world == 1:
        return model
    return model if meshes.rest is not None else _replicated(model, trains_halting)


def unwrap(model: nn.Module) -> Any:
    """The model inside what `parallelize` returned."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _check(model: nn.Module, plan: Plan, mixed: torch.dtype | None) -> None:
    layers = [m for m in model.modules() if isinstance(m, MoEFFN)]
    if plan.expert > 1 and not layers:
        raise ValueError(f"{plan}: expert must be 1: the model has no experts")
    for layer in layers:
        if layer.n_experts % plan.expert:
            raise ValueError(f"{plan}: expert must divide the number of experts, {layer.n_experts}")
    if mixed is not None and plan.shard == 1:
        raise ValueError(f"mixed = {mixed}: must be None without sharding, where autocast does the same")


def _device(model: nn.Module, device: torch.device | str | None, on_meta: bool) -> torch.device:
    if not on_meta:
        return next(model.parameters()).device
    if device is None:
        cuda = dist.is_initialized() and "nccl" in dist.get_backend() and torch.cuda.is_available()
        device = f"cuda:{torch.cuda.current_device()}" if cuda else "cpu"
    return torch.device(device)


@torch.no_grad()
def _as_rank_0(model: nn.Module) -> None:
    for tensor in (*model.parameters(), *(b for b in model.buffers() if not b.is_complex())):
        dist.broadcast(tensor, 0)


def _divide_experts(model: nn.Module, recurrent: RecurrentBlock, mesh, mixed: torch.dtype | None) -> None:
    """Keeps this rank's experts of every layer, under the names that they have among all."""
    group, rank = mesh.get_group("expert"), mesh["expert"].get_local_rank()
    layers = [m for m in recurrent.modules() if isinstance(m, MoEFFN)]
    session = Session(recurrent, layers)
    for layer in layers:
        layer.exchange = Exchange(group, layer.n_experts, layer.topk, session, mixed)
        held = layer.routed_experts._modules
        for name in list(held):
            if int(name) // layer.exchange.here != rank:
                del held[name]


def _average_copies(model: nn.Module, group: dist.ProcessGroup) -> None:
    copies = AveragedCopies(list(divided_experts(model)), group)
    for module in model.modules():
        if isinstance(module, MoEFFN):
            module.exchange.copies = copies


def _shard(model: nn.Module, mesh, mixed: torch.dtype | None) -> None:
    ignored = set(divided_experts(model))
    options: dict[str, Any] = {"mesh": mesh, "ignored_params": ignored}
    if mixed is not None:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=mixed, reduce_dtype=torch.float32)
    for module, keeps in units(model).items():
        fully_shard(module, reshard_after_forward=not keeps, **options)


def units(model: nn.Module) -> dict[nn.Module, bool]:
    """The modules that FSDP2 gathers as one, parts before what they are part of -> whether a unit stays whole from the
    forward to the backward."""
    inside = {m for r in model.modules() if isinstance(r, RecurrentBlock) for m in r.modules()}
    blocks = [m for m in model.modules() if isinstance(m, TransformerBlock) and m not in inside]
    loops = [m for m in model.modules() if isinstance(m, RecurrentBlock)]
    return {**dict.fromkeys(blocks, False), **dict.fromkeys(loops, True), model: True}


def _replicated(model: LanguageModel, trains_halting: bool) -> DistributedDataParallel:
    ignored = {id(p) for p in divided_experts(model)}
    if setting(model.cfg, "halting") == "off" and not trains_halting:  # unused
        ignored |= {id(p) for m in model.modules() if isinstance(m, ACTHalting) for p in m.parameters()}
    ignore_in_ddp(model, [name for name, p in model.named_parameters() if id(p) in ignored])
    cuda = next(model.parameters()).is_cuda
    with warnings.catch_warnings():  # newer releases have another name for `broadcast_buffers`
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            model,
            device_ids=[torch.cuda.current_device()] if cuda else None,
            broadcast_buffers=False,  # they are alike on all ranks: router biases move by the loads of all
            gradient_as_bucket_view=True,
        )


def _halting_takes_part(recurrent, args, output):
    """With one loop and `act_remainder="last"` the halting layer has no gradient, on this rank alone if others run
    more loops."""
    if not torch.is_grad_enabled():
        return None
    out, *more = output if isinstance(output, tuple) else (output,)
    out = Tied.apply(out, *recurrent.act.parameters())
    return (out, *more) if more else out
