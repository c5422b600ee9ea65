"""The four contenders, with equal weights and one interface."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn as nn
from torch import Tensor

from benchmarks.compiled import NOTE, compile_reference
from benchmarks.upstream import load_upstream
from openmythos import KVCache, MythosConfig, OpenMythos
from openmythos.cache import LOOP_KEY
from openmythos.training import Step, make_optimizer, train
from openmythos_kernels import accelerate, report

LABELS = {
    "upstream": "open-mythos",
    "reference": "reference",
    "compiled": "reference + torch.compile",
    "ours": "ours (fast modules)",
}

# The sum of ACT's halting probabilities over all loops. It is below every threshold in use, so no position halts and
# all contenders run to full depth; it is close to 1, so the weighted state keeps its scale.
CUMULATIVE_P_AT_FULL_DEPTH = 0.9

# Rounding stays far below this limit; a token whose top experts are nearly tied may come close to it.
LIMIT_APART = 1e-2


class Contender:
    """A model, with the training loop and the kind of KV cache that it needs.

    Attributes:
        name: a key of LABELS.
        note: what a reader of its figures should know, or "".
    """

    def __init__(self, name: str, model: nn.Module, note: str = ""):
        self.name = name
        self.model = model
        self.note = note
        self.cache_class = UpstreamCache if name == "upstream" else Cache

    def training(self, data, loops: int, steps: int, **options) -> Iterator[Step]:
        """Iterates over training steps at `loops` loops (see `openmythos.training.train`)."""
        optimizer = make_optimizer(self.model)
        for group in optimizer.param_groups:
            group["fused"] = True  # so that the optimizer, which all contenders share, takes little of a step's time
        return train(self.model, data, steps, n_loops=loops, optimizer=optimizer, **options)

    def forget_gradients(self) -> None:
        self.model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def prefill(self, ids: Tensor, loops: int) -> Tensor:
        """Logits (B, T, vocabulary) of the prompt `ids` (B, T), with a new cache."""
        return self._prefill(ids, loops)[0]

    @torch.no_grad()
    def cached(self, ids: Tensor, loops: int) -> Cache:
        """A cache that holds `ids` (B, T) at every loop.

        All loops hold copies of the first loop's entries. Filling them properly would take longer than the measurement,
        and the time of decoding does not depend on the values.
        """
        cache = self._prefill(ids, 1)[1]
        for t in range(1, loops):
            cache.held[LOOP_KEY.format(t)] = copy.deepcopy(cache.held[LOOP_KEY.format(0)])
        cache.keep()
        return cache

    @torch.no_grad()
    def decode(self, token: Tensor, cache: Cache, loops: int) -> Tensor:
        """Logits of one token (B, 1) that follows the cached ones; `cache.rewind()` removes it from the cache."""
        return self.model(token, n_loops=loops, kv_cache=cache.held, start_pos=cache.tokens)

    def _prefill(self, ids: Tensor, loops: int) -> tuple[Tensor, Cache]:
        self.model.eval()
        cache = self.cache_class(ids.shape[1])
        return self.model(ids, n_loops=loops, kv_cache=cache.held), cache


class Cache:
    """A KVCache that can be rewound to the prefilled length, so that every decoded token costs the same."""

    def __init__(self, tokens: int):
        self.tokens = tokens
        self.held: dict = KVCache(tokens + 1)

    def keep(self) -> None:
        """Records the present content as what `rewind` restores."""

    def rewind(self) -> None:
        self.held.truncate([self.tokens] * len(self.held.lengths))


class UpstreamCache(Cache):
    """open-mythos' cache: a plain dict that grows by replacing its tensors, so a shallow copy restores it."""

    def __init__(self, tokens: int):
        self.tokens = tokens
        self.held = {}

    def keep(self) -> None:
        self._kept = dict(self.held)

    def rewind(self) -> None:
        self.held.update(self._kept)


def build(fields: dict, names: Iterable[str], device: torch.device, seed: int = 0) -> tuple[dict[str, Contender], dict]:
    """Builds the named contenders from one config, with equal weights.

    Returns:
        name -> contender, and name -> reason for contenders that are not available here.
    """
    torch.manual_seed(seed)
    with device:
        reference = OpenMythos(MythosConfig(**fields))
    made, missing = {}, {}
    for name in names:
        try:
            made[name] = _make(name, reference, fields, device)
        except ImportError as error:
            missing[name] = str(error)
    return made, missing


def _make(name: str, reference: OpenMythos, fields: dict, device: torch.device) -> Contender:
    if name == "upstream":
        upstream = load_upstream()
        with device:
            model = upstream.OpenMythos(upstream.MythosConfig(**fields))
        model.load_state_dict(reference.state_dict())
        return Contender(name, model)
    model = copy.deepcopy(reference)
    note = ""
    if name == "compiled":
        compile_reference(model)
        note = NOTE
    if name == "ours":
        model = accelerate(model)
        note = str(report(model))
    return Contender(name, model, note)


def run_to_full_depth(contender: Contender, loops: int) -> None:
    """Sets the halting head to a constant probability with which no position halts within `loops`, and freezes it."""
    head = contender.model.recurrent.act.halt
    p = CUMULATIVE_P_AT_FULL_DEPTH / loops
    with torch.no_grad():
        head.weight.zero_()
        head.bias.fill_(math.log(p / (1 - p)))
    head.requires_grad_(False)


def check_agreement(results: dict[str, Tensor]) -> dict[str, float]:
    """Relative Frobenius distance of each contender's result from the reference's.

    Raises:
        ArithmeticError: a contender, which is named, computes something else, so its speed means nothing.
    """
    right = results["reference"].double()
    apart = {name: ((x.double() - right).norm() / right.norm()).item() for name, x in results.items()}
    for name, distance in apart.items():
        if not distance <= LIMIT_APART:
            raise ArithmeticError(f"{LABELS[name]} is {distance:.2g} (relative) off the reference: not measured")
    return apart
