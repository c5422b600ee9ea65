"""The four contenders, with equal weights and one calling form."""

from __future__ import annotations

import copy
import math
from typing import Iterable, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from benchmarks.compiled import NOTE, compile_reference
from benchmarks.upstream import load_upstream
from openmythos import KVCache, MythosConfig, OpenMythos
try:
    from openmythos_kernels import accelerate, report
except ImportError:  # STUB
    accelerate, report = (lambda m: m), (lambda m: 'stub')

LABELS = {
    "upstream": "open-mythos",
    "reference": "reference",
    "compiled": "reference + torch.compile",
    "ours": "ours (fast modules)",
}

# ACT's probabilities add up to this over the loops: below every threshold in use, so no position
# ever halts and all contenders run to full depth, yet the weighted state keeps its scale.
SPENT_AT_FULL_DEPTH = 0.9


class Contender:
    """A model with the optimizer and the cache handling that it needs; the reference's forms, unless overridden.

    Attributes:
        name: key into LABELS.
        note: what a reader of its figures should know, or "".
    """

    def __init__(self, name: str, model: nn.Module, note: str = ""):
        self.name = name
        self.model = model
        self.note = note
        self._optimizer: Optional[torch.optim.Optimizer] = None

    def train_step(self, ids: Tensor, targets: Tensor, loops: int, learning_rate: float = 3e-4) -> Tensor:
        """Forward, loss, backward and AdamW step on (B, T) bytes; returns the loss, not yet read by the host."""
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        if self._optimizer is None:
            self._optimizer = torch.optim.AdamW(trainable, lr=learning_rate, betas=(0.9, 0.95), fused=True)
        self.model.train()
        logits = self.model(ids, n_loops=loops)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        # The reference leaves an expert without tokens without gradient, and AdamW skips such a parameter
        # but moves one whose gradient is zero: all contenders take the second way.
        for p in trainable:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach()

    def forget_training(self) -> None:
        """Frees optimizer state and gradients; weights stay as trained."""
        self._optimizer = None
        self.model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def prefill(self, ids: Tensor, loops: int) -> tuple[Tensor, "Cache"]:
        """Fills a new cache with (B, T) tokens; returns the logits too."""
        self.model.eval()
        cache = self.new_cache(ids.shape[1])
        return self.model(ids, n_loops=loops, kv_cache=cache.held), cache

    @torch.no_grad()
    def decode(self, token: Tensor, cache: "Cache", loops: int) -> Tensor:
        """One token (B, 1) behind the cached ones; `cache.rewind()` takes it back."""
        return self.model(token, n_loops=loops, kv_cache=cache.held, start_pos=cache.tokens)

    def new_cache(self, tokens: int) -> "Cache":
        return Cache(tokens)


class Cache:
    """A KVCache that can be taken back to the prefilled length, so that every decoded token is equally expensive."""

    def __init__(self, tokens: int):
        self.tokens = tokens
        self.held = KVCache(tokens + 1)

    def rewind(self) -> None:
        self.held.truncate([self.tokens] * len(self.held.lengths))


class UpstreamContender(Contender):
    def new_cache(self, tokens: int) -> "UpstreamCache":
        return UpstreamCache(tokens)

    @torch.no_grad()
    def prefill(self, ids: Tensor, loops: int) -> tuple[Tensor, "UpstreamCache"]:
        logits, cache = super().prefill(ids, loops)
        cache.keep()
        return logits, cache


class UpstreamCache(Cache):
    """Upstream grows a dict by replacing its tensors: a shallow copy is enough to go back."""

    def __init__(self, tokens: int):
        self.tokens = tokens
        self.held: dict = {}
        self._prefilled: dict = {}

    def keep(self) -> None:
        self._prefilled = dict(self.held)

    def rewind(self) -> None:
        self.held.clear()
        self.held.update(self._prefilled)


def build(fields: dict, names: Iterable[str], device: torch.device, seed: int = 0) -> tuple[dict[str, Contender], dict]:
    """Makes the named contenders of a config, all with the weights of one seed.

    Returns:
        name -> contender, and name -> reason for those that cannot be had here.
    """
    torch.manual_seed(seed)
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
        model = upstream.OpenMythos(upstream.MythosConfig(**fields))
        model.load_state_dict(reference.state_dict())
        return UpstreamContender(name, model.to(device))
    model = copy.deepcopy(reference).to(device)
    note = ""
    if name == "compiled":
        compile_reference(model)
        note = NOTE
    if name == "ours":
        model = accelerate(model)
        note = str(report(model))
    return Contender(name, model, note)


def run_to_full_depth(contender: Contender, loops: int) -> None:
    """Fixes the halting head at a probability with which nothing halts within `loops`; no training moves it."""
    head = contender.model.recurrent.act.halt
    p = SPENT_AT_FULL_DEPTH / loops
    with torch.no_grad():
        head.weight.zero_()
        head.bias.fill_(math.log(p / (1 - p)))
    head.requires_grad_(False)


def agreement(logits: dict[str, Tensor], against: str) -> dict[str, float]:
    """Largest difference of each contender's logits from those of `against`."""
    return {name: (value - logits[against]).abs().max().item() for name, value in logits.items() if name != against}
