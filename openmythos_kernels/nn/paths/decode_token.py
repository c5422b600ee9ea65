"""Decoding on a CPU: one token per row through a whole model, judged when it first decodes and not at every token.

A token is some ten ops. Asking hundreds of modules at every token whether ops may stand in for them took 6 to 8 % of a
token's time (dim 512, one thread); here a `Snapshot` notices if that has to be asked again.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from openmythos import debug
from openmythos.cache import RAGGED_KEY, KVCache, LayerCache, check_cache
from openmythos.dropout import drops, without_dropout
from openmythos_kernels.nn.call import ModelCall
from openmythos_kernels.nn.guards import global_hooks
from openmythos_kernels.nn.model_weights import ModelWeights, obstacle_of
from openmythos_kernels.nn.paths.decode_block import note
from openmythos_kernels.nn.paths.decode_loop import blocks_of, loop_keys
from openmythos_kernels.nn.paths.decode_rows import Rows
from openmythos_kernels.nn.paths.mla_decode import phasors_of
from openmythos_kernels.nn.snapshot import Snapshot
from openmythos_kernels.ops.layer import block_decode, loop_decode
from openmythos_kernels.runtime.backends import Choice, choose

WHEN = "one cached token per row, no gradients, on a CPU; latent attention and every part plain"


def choice(model) -> Choice:
    if reason := global_hooks() or _judged(model).reason(model):
        return Choice("reference", reason)
    found = choose("loop_decode", next(model.parameters()).device.type)
    return Choice("reference", "a GPU's token is a graph") if found.backend == "triton" else found


def refuses(call: ModelCall) -> str:
    ids, model = call.x, call.module
    if type(call.kv_cache) not in (KVCache, dict) or type(ids) is not Tensor or ids.dim() != 2 or ids.shape[1] != 1:
        return "not one token per row with a cache"
    if call.others or not isinstance(call.counts, int) or (call.rule is not None and call.rule.predicts):
        return "other options than n_loops and an exit that reads no predictions"
    if not call.inference or not ids.numel():
        return "gradients, autocast, a compiler or a transform, or no tokens"
    if choose("loop_decode", call.device).backend != "cpu":
        return f"loop_decode does not run on {call.device} here"
    found = _judged(model)
    if reason := global_hooks() or found.reason(model):
        return reason
    if any(map(drops, found.dropouts)):
        return "dropout"
    if debug.on or (model.recurrent.watchers and call.halting != "freeze"):
        return "watchers, or OPENMYTHOS_DEBUG"
    call.judged, call.entries = found, _entries(found, call)
    return "" if call.entries is not None else "the cache has to grow, or is not of this model"


def run(call: ModelCall) -> Tensor:
    model, weights, entries = call.module, call.judged.weights, call.entries
    x, freqs_cis, _, starts = model._embed(call.x, call.start_pos, True)
    freezes = call.halting == "freeze"
    check_cache(call.kv_cache, starts, call.counts, freezes)
    phasors, held = phasors_of(freqs_cis), torch.tensor(starts)
    first, last = len(weights.prelude), len(entries) - len(weights.coda)
    e = _through(model.prelude, weights.prelude, entries[:first], x.squeeze(1), phasors, held)
    h = torch.zeros_like(e) if weights.h0 == "zeros" else e
    embeddings = weights.embeddings(call.counts)
    if freezes:
        x = Rows(model.recurrent, weights.loop, h, e, phasors, embeddings, call.rule, None).decode(call.kv_cache)
    else:
        loop = weights.loop
        out = loop_decode(
            h,
            e,
            phasors,
            held,
            [entry.tensors["latent"] for entry in entries[first:last]],
            [entry.tensors["k_rope"] for entry in entries[first:last]],
            loop.blocks,
            loop.lora,
            loop.step,
            embeddings,
            act=weights.halting != "off",
            **loop.options,
        )
        note(call.judged.core, entries[first:last], out.expert_idx)
        x = out.h_out
    x = _through(model.coda, weights.coda, entries[last:], x, phasors, held)
    return model._logits(x.unsqueeze(1), None)


class _Judged:
    """What the guards say of a model, and what ops take of it where they may.

    Attributes:
        weights: the model's. core: its looped blocks. dropouts: its dropout modules. keys: of the caches of the blocks
            before the loop, and behind it.
    """

    weights: ModelWeights
    core: list
    dropouts: list
    keys: tuple[list[str], list[str]]

    def __init__(self, model):
        self.snapshot = Snapshot(model)
        self._reason: str | None = None  # not asked yet: a model is not judged while it has hooks

    def reason(self, model) -> str:
        """Why ops must not stand in for the model's parts; empty when they may, and then the attributes are there."""
        if self.snapshot.hooked():
            return "the model or a part of it has hooks"
        if self._reason is None:
            with without_dropout(model):  # every call asks that
                self._reason = obstacle_of(model)
            if not all(weight.is_contiguous() for weight in model.parameters()):
                self._reason = self._reason or "weights that are not dense"
            if not self._reason:
                self.weights, self.core = ModelWeights(model), blocks_of(model.recurrent)[0]
                self.dropouts = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
                sides = ("prelude", model.prelude), ("coda", model.coda)
                before, behind = ([f"{name}_{i}" for i in range(len(blocks))] for name, blocks in sides)
                self.keys = before, behind
        return self._reason


# Model -> what was found of it. Nothing in a `_Judged` holds the model itself.
_found: WeakKeyDictionary[Any, _Judged] = WeakKeyDictionary()


def _judged(model) -> _Judged:
    """What the guards say of the model as it is now."""
    found = _found.get(model)
    if found is None or not found.snapshot.unchanged(model):
        found = _found[model] = _Judged(model)
    return found


def _entries(found: _Judged, call: ModelCall) -> list[LayerCache] | None:
    """The caches of prelude, loops and coda, if each has room for the token behind what it holds."""
    cache, freezes = call.kv_cache, call.halting == "freeze"
    looped = [] if freezes else loop_keys(call.module.recurrent, call.counts, cache)
    entries: list[Any] = [cache.get(key) for key in (*found.keys[0], *looped, *found.keys[1])]
    if not entries or any(type(entry) is not LayerCache for entry in entries):
        return None
    held = entries[0].lengths
    most = max(held, default=0)
    for entry in entries:
        latent = entry.tensors.get("latent")
        if entry.lengths != held or latent is None or latent.dtype != found.weights.dtype or latent.shape[1] <= most:
            return None
        if not (latent.stride(0) and entry.tensors["k_rope"].stride(0)):  # rows share memory
            return None
    if freezes and (RAGGED_KEY not in cache or cache[RAGGED_KEY].lengths != held):
        return None
    return entries


def _through(blocks, weights, entries: list[LayerCache], x: Tensor, phasors: Tensor, held: Tensor) -> Tensor:
    for block, weight, entry in zip(blocks, weights, entries):
        caches = entry.tensors
        x, expert_idx = block_decode(x, phasors, held, caches["latent"], caches["k_rope"], weight)
        note([block], [entry], [expert_idx])
    return x
