"""Decoding on a CPU: one token per row through a whole model, whose guards were judged when decoding began.

A token is some ten ops. Asking hundreds of modules at every token whether ops may stand in for them takes as long as
half of these; here a `Snapshot` notices if that was ever to be asked again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from openmythos.cache import KVCache, LayerCache, check_cache, ragged_cache
from openmythos.config import setting
from openmythos.dropout import drops, without_dropout
from openmythos.exits import ACT, Exit, exit_rule
from openmythos.recurrence import resolve_loops
from openmythos_kernels.nn.call import Call
from openmythos_kernels.nn.guards import global_hooks, has_hooks
from openmythos_kernels.nn.model_weights import ModelWeights, obstacle_of
from openmythos_kernels.nn.paths.decode_block import note
from openmythos_kernels.nn.paths.decode_loop import blocks_of, loop_keys
from openmythos_kernels.nn.paths.decode_rows import Rows
from openmythos_kernels.nn.paths.mla_decode import phasors_of
from openmythos_kernels.nn.snapshot import Snapshot
from openmythos_kernels.ops.layer import block_decode, loop_decode
from openmythos_kernels.runtime.backends import Choice, choose

WHEN = "generation on a CPU, no gradients, no autocast; latent attention and every part plain"


def choice(model) -> Choice:
    if reason := refuses(model):
        return Choice("reference", reason)
    return choose("loop_decode", "cpu")


def refuses(model) -> str:
    """Why the model's decoder calls its modules; empty when it does not. `TokenDecoder` stands where other paths have
    `run`."""
    if (device := next(model.parameters()).device.type) != "cpu":
        return f"on {device}"
    found = choose("loop_decode", "cpu")
    if found.backend != "cpu":
        return found.reason or f"backend {found.backend}"
    with without_dropout(model):  # every token asks that
        if reason := global_hooks() or obstacle_of(model):
            return reason
    for name, module in model.named_modules():
        if has_hooks(module):
            return f"{name} has hooks"
    dense = all(weight.is_contiguous() for weight in model.parameters())
    return "" if dense else "weights that are not dense"


class TokenDecoder:
    """A decoder that runs ops on the model's weights, which may change in place and move.

    What does not fit these ops runs as `eager` does: gradients, autocast, watchers, a cache that has to grow. Once the
    model itself does not fit any more, all tokens do.

    Args:
        model: an `openmythos_kernels.nn.OpenMythos` that `refuses` says nothing about.
        kv_cache: the KVCache that calls continue.
        eager: decodes a token by calling the model.
        n_loops, exit: as for the model.
    """

    def __init__(
        self, model, kv_cache: KVCache, eager: Callable[[Tensor], Tensor], n_loops: int | None = None, exit: Exit = None
    ):
        self._model, self._cache, self._eager = model, kv_cache, eager
        self._loops, rule = resolve_loops(n_loops, model.cfg), exit_rule(exit)
        self._rule = None if isinstance(rule, ACT) else rule
        self._freezes = rule is not None or setting(model.cfg, "halting") == "freeze"
        self.refused = ""  # why the model does not fit any more
        self._read()

    def __call__(self, ids: Tensor) -> Tensor:
        """(B, 1) ids -> logits (B, 1, vocab_size)."""
        if not self._takes(ids):
            return self._eager(ids)
        held = self._cache.lengths
        x, freqs_cis, _, starts = self._model._embed(ids, held, True)
        check_cache(self._cache, starts, self._loops, self._freezes)
        entries = self._entries(held, x)
        if entries is None:
            return self._eager(ids)
        return self._decoded(x.squeeze(1), phasors_of(freqs_cis), torch.tensor(held), entries)

    def _read(self) -> None:
        """What the ops take of a model that they may compute."""
        model = self._model
        self._weights = ModelWeights(model)
        self._snapshot = Snapshot(model, list(model.parameters()))
        self._dropouts = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
        recurrent = model.recurrent
        self._looped = [] if self._freezes else loop_keys(recurrent, self._loops, self._cache)
        outside = {"prelude": model.prelude, "coda": model.coda}
        self._outside = [[f"{name}_{i}" for i in range(len(blocks))] for name, blocks in outside.items()]
        self._core = blocks_of(recurrent)[0]
        self._embeddings = self._weights.embeddings(self._loops)

    def _takes(self, ids: Tensor) -> bool:
        """Whether the ops may compute this token, as far as its cache does not decide it."""
        if self.refused or type(ids) is not Tensor or ids.dim() != 2 or ids.shape[1] != 1 or not ids.numel():
            return False
        if not Call(self._model, ids).inference or choose("loop_decode", "cpu").backend != "cpu":
            return False
        if global_hooks() or (self._model.recurrent.watchers and not self._freezes):
            return False
        if any(map(drops, self._dropouts)):
            return False
        if self._snapshot.unchanged():
            return True
        self.refused = refuses(self._model)
        if not self.refused:
            self._read()
        return not self.refused

    def _entries(self, held: list[int], x: Tensor) -> list[LayerCache] | None:
        """The caches of prelude, loops and coda, if each has room for the token behind what it holds."""
        found = []
        get, most = self._cache.get, max(held, default=0)
        for keys in (self._outside[0], self._looped, self._outside[1]):
            for key in keys:
                entry: Any = get(key)
                if type(entry) is not LayerCache or entry.lengths != held:
                    return None
                latent = entry.tensors.get("latent")
                if latent is None or latent.shape[1] <= most or latent.dtype != x.dtype:
                    return None
                if not (latent.stride(0) and entry.tensors["k_rope"].stride(0)):  # rows share memory
                    return None
                found.append(entry)
        return found if not self._freezes or ragged_cache(self._cache).lengths == held else None

    def _decoded(self, x: Tensor, phasors: Tensor, held: Tensor, entries: list[LayerCache]) -> Tensor:
        model, weights = self._model, self._weights
        first, last = len(weights.prelude), len(entries) - len(weights.coda)
        outside = x, phasors, held
        e = self._through(model.prelude, weights.prelude, entries[:first], *outside)
        h = torch.zeros_like(e) if weights.h0 == "zeros" else e
        if self._freezes:
            rows = Rows(model.recurrent, weights.loop, h, e, phasors, self._embeddings, self._rule, None)
            x = rows.decode(self._cache)
        else:
            x = self._looped_through(h, e, phasors, held, entries[first:last])
        x = self._through(model.coda, weights.coda, entries[last:], x, phasors, held)
        return model._logits(x.unsqueeze(1), None)

    def _through(self, blocks, weights, entries: list[LayerCache], x: Tensor, phasors: Tensor, held: Tensor) -> Tensor:
        for block, weight, entry in zip(blocks, weights, entries):
            caches = entry.tensors
            x, expert_idx = block_decode(x, phasors, held, caches["latent"], caches["k_rope"], weight)
            note([block], [entry], [expert_idx])
        return x

    def _looped_through(self, h: Tensor, e: Tensor, phasors: Tensor, held: Tensor, entries: list[LayerCache]) -> Tensor:
        weights = self._weights.loop
        out = loop_decode(
            h,
            e,
            phasors,
            held,
            [entry.tensors["latent"] for entry in entries],
            [entry.tensors["k_rope"] for entry in entries],
            *weights[:3],
            self._embeddings,
            act=self._weights.halting != "off",
            **weights.options,
        )
        note(self._core, entries, out.expert_idx)
        return out.h_out
