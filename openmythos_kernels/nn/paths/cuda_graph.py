"""Decoding on a GPU: one token per row through a whole model, captured once and replayed as a CUDA graph.

A token is some two hundred launches, done on the device long before Python has made them; with the ops that decode
whole layers, which OPENMYTHOS_UNPROVEN=1 selects, it is some seventy. In the graph what differs from token to token is
on the device: the token, and how many each row of the cache holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from openmythos.attention import CausalMask
from openmythos.cache import KVCache, LayerCache, check_cache
from openmythos.config import setting
from openmythos.recurrence import resolve_loops
from openmythos_kernels.nn.guards import global_hooks, has_hooks
from openmythos_kernels.nn.lengths import provider, to_device
from openmythos_kernels.nn.norms import normed
from openmythos_kernels.runtime import unproven
from openmythos_kernels.runtime.backends import Choice, choose

WHEN = "generation on a GPU: latent attention, no hooks, a first state that is not random"


def choice(model) -> Choice:
    if reason := refuses(model):
        return Choice("reference", reason)
    return decoding(model)


def decoding(model) -> Choice:
    """The backend of decoding, and on a GPU why not as a graph."""
    device = next(model.parameters()).device.type
    found = choose("mla_decode", device)
    reason = _obstacle(model) if found.fast and device == "cuda" else ""
    return Choice(found.backend, f"not as a graph: {reason}") if reason else found


def refuses(model) -> str:
    """Why the model's decoder is no graph; empty when it is one.

    A graph is chosen once for all tokens of a decoder, so this asks of the model. `TokenGraph` stands where other paths
    have `run`.
    """
    if not next(model.parameters()).is_cuda:
        return "not on a GPU"
    found = decoding(model)
    return found.reason or ("" if found.fast else "no kernel")


def _obstacle(model) -> str:
    """What a graph, which calls no module, would pass over; empty if nothing."""
    if model.cfg.attn_type != "mla":
        return "grouped-query attention keeps its cache by the host"
    if setting(model.cfg, "halting") == "freeze":
        return "where halted positions freeze, the host keeps the table of the cache"
    if (h0 := setting(model.cfg, "h0")) not in ("e", "zeros"):
        return f'h0="{h0}" is random'
    hooked = next((name or "the model" for name, module in model.named_modules() if has_hooks(module)), "")
    return global_hooks() or (hooked and f"{hooked} has hooks")


class Lengths:
    """Tokens held by each row, (B,) int64 on the device, which layers read instead of the host's.

    Attributes:
        asked: how many layers have read them, a layer in two loops as two.
    """

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self.asked = 0

    def __call__(self, layers: int) -> Tensor:
        self.asked += layers
        return self.tensor


class TokenGraph:
    """A decoder for as long as the model's weights stay where they are.

    The first call runs eagerly, which compiles what is to be compiled; the second captures. A call that the graph does
    not fit (another batch, a cache that has to grow, gradients) runs eagerly, and so do all where a layer's work
    depends on the host.

    Args:
        model: an `openmythos_kernels.nn.OpenMythos` on a GPU.
        kv_cache: the KVCache that calls continue.
        eager: decodes a token without a graph.
        n_loops: as for the model.
    """

    _held: list[int]

    def __init__(self, model, kv_cache: KVCache, eager: Callable[[Tensor], Tensor], n_loops: int | None = None):
        self._model, self._cache, self._eager = model, kv_cache, eager
        self._n_loops = resolve_loops(n_loops, model.cfg)
        self._warm = False
        self._graph: Any = None  # a torch.cuda.CUDAGraph once captured
        self._entries: dict[str, LayerCache] = {}  # the cache's that the graph writes to
        self._tensors: list[dict[str, Tensor]] = []  # theirs
        self.refused = ""  # why there will be no graph

    def __call__(self, ids: Tensor) -> Tensor:
        """(B, 1) ids -> logits (B, 1, vocab_size)."""
        held = self._cache.lengths
        watched = self._model.recurrent.watchers  # a graph calls none
        if self.refused or torch.is_grad_enabled() or watched or not self._has_room(ids, held):
            return self._eager(ids)
        if not self._warm:
            self._warm = True
            check_cache(self._cache, held, self._n_loops)
            return token_step(self._model, ids, Lengths(to_device(held, ids.device)), held, self._n_loops, self._cache)
        if self._graph is None or not self._fits(ids):
            self._capture(ids, held)
            if self.refused:
                return self._eager(ids)
        elif held != self._held:
            self._lengths.tensor.copy_(to_device(held, ids.device))
        self._ids.copy_(ids)
        self._graph.replay()
        self._held = [n + 1 for n in held]
        for entry in self._entries.values():
            entry.lengths = list(self._held)
        return self._logits.clone()

    def _has_room(self, ids: Tensor, held: list[int]) -> bool:
        """Whether the next token goes behind what the layers hold, without growing anything."""
        if not held or ids.shape != (len(held), 1) or max(held) >= self._model.cfg.max_seq_len:
            return False
        if any(self._cache.get(key) is not entry or entry.lengths != held for key, entry in self._entries.items()):
            return False
        return all(max(held) < entry.capacity for entry in self._cache.values() if entry.lengths == held)

    def _fits(self, ids: Tensor) -> bool:
        """Whether everything is where it was when the graph was captured."""
        if ids.shape != self._ids.shape or ids.dtype != self._ids.dtype or ids.device != self._ids.device:
            return False
        if [w.data_ptr() for w in self._weights] != self._addresses:
            return False
        held = (entry.tensors for entry in self._entries.values())
        return all(now.get(name) is x for now, then in zip(held, self._tensors) for name, x in then.items())

    @torch.inference_mode(False)  # what is made here is written to in calls outside of inference mode, too
    @torch.no_grad()
    def _capture(self, ids: Tensor, held: list[int]) -> None:
        self._weights = list(self._model.parameters())
        self._addresses = [w.data_ptr() for w in self._weights]
        self._ids, self._lengths = ids.clone(), Lengths(to_device(held, ids.device))
        self._graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(ids.device), torch.cuda.graph(self._graph):
                self._logits = token_step(self._model, self._ids, self._lengths, held, self._n_loops, self._cache)
        except RuntimeError as error:
            self.refused = f"capture failed: {error}"
        self._entries = {key: entry for key, entry in self._cache.items() if entry.lengths != held and entry.tensors}
        self._tensors = [dict(entry.tensors) for entry in self._entries.values()]
        if self._lengths.asked != len(self._entries):
            self.refused = self.refused or "a layer's cache is kept by the host"
        for entry in self._entries.values():
            entry.lengths = list(held)  # nothing has run yet
        if self.refused:
            self._graph = None


def token_step(model, ids: Tensor, lengths: Lengths, held: list[int], n_loops: int, kv_cache: dict) -> Tensor:
    """`model(ids, n_loops, kv_cache, held)`, with the rows' lengths read from the device and advanced there."""
    token = provider.set(lengths)
    try:
        freqs_cis = model.freqs_cis_mla[lengths.tensor].unsqueeze(1)
        x, _ = model.through(model.embed(ids), freqs_cis, CausalMask(list(held), 1), n_loops, kv_cache)
        # The op that norms inside of blocks, but not in any graph that a GPU has run.
        logits = model.head(normed(model.norm, x) if unproven.allowed() else model.norm(x))
    finally:
        provider.reset(token)
    lengths.tensor += 1
    return logits
