"""A whole model, mythos_1b, on a GPU: forward + backward, prefill and decode, in the precisions that are in use.

Training has float32 weights under bfloat16 autocast, or bfloat16 weights, as with FSDP's mixed precision. Decoding is
in bfloat16, but in float32 for open-mythos, whose bfloat16 forward fails. No position halts, so all contenders run
every loop. The calls are made from Python, one after the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contenders import Contender, build, run_to_full_depth
from benchmarks.models import MYTHOS_1B
from benchmarks.session import Session
from benchmarks.timing import Lap, interleave, speedup
from openmythos_kernels import graphed_step
from openmythos_kernels.nn.thresholds import THRESHOLDS
from openmythos_kernels.runtime import unproven

DTYPE = torch.bfloat16
LOOPS = 4
TRAIN = PREFILL = (2, 2048)  # batch, tokens
DECODE = ((1, 2048), (16, 2048))  # batch, cached tokens
SECONDS = 3.0  # of sampling per row
APART = 0.1  # the largest relative difference of losses and logits; rounding stays far below


def run(session: Session) -> dict:
    if session.device.type != "cuda":
        return {"rows": [], "missing": "these rows need a GPU", "requirements": []}
    with session.progress.stage("model: build"):
        wide, missing = build(MYTHOS_1B, ("upstream", "reference", "ours"), session.device)
        narrow, _ = build(MYTHOS_1B, ("reference", "ours"), session.device)
    for contender in (*wide.values(), *narrow.values()):
        run_to_full_depth(contender, LOOPS)
    for contender in narrow.values():
        contender.model.to(DTYPE)
    rows = [train(session, wide, narrow), prefill(session, wide, narrow)]
    rows += [decode(session, wide, narrow, batch, cached) for batch, cached in DECODE]
    return {"loops": LOOPS, "missing": missing, "rows": rows, "requirements": []}


def train(session: Session, wide: dict, narrow: dict) -> dict:
    """Loss and gradients of a batch, without the optimizer, which is the same for all."""
    ids, targets = session.batches(*TRAIN)[0]

    def step(contender: Contender, autocast: bool) -> Callable[[], Tensor]:
        def call():
            with torch.autocast("cuda", DTYPE, enabled=autocast):
                logits = contender.model(ids, n_loops=LOOPS)
            loss = entropy(logits, targets)
            loss.backward()
            contender.forget_gradients()
            return loss.detach()

        contender.model.train()
        return call

    calls = {f"{name}, autocast": step(c, True) for name, c in wide.items()}
    calls |= {f"{name}, bfloat16": step(c, False) for name, c in narrow.items()}
    ours = narrow["ours"]
    calls["ours, bfloat16, attention's keys kept"] = keeping_keys(ours.model, step(ours, False))
    calls["ours, bfloat16, experts' weights once"] = weights_once(step(ours, False))
    graph = graphed_step(ours.model, lambda model, ids, targets: entropy(model(ids, n_loops=LOOPS), targets))

    def graphed() -> Tensor:
        loss = graph(ids, targets)
        ours.forget_gradients()  # other calls would add to them
        return loss

    for _ in range(5):  # eager steps, then the capture
        graphed()
    calls[f"ours, bfloat16, {graph.refused or 'as a graph'}"] = graphed
    return measure(session, f"forward + backward, {TRAIN[0]} x {TRAIN[1]} tokens", calls)


def entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def weights_once(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The call with the gradients of routed experts' weights made once for all loops."""
    row = THRESHOLDS["moe_weights_once"]

    def once():
        THRESHOLDS["moe_weights_once"] = row._replace(value=float("inf"))
        try:
            return call()
        finally:
            THRESHOLDS["moe_weights_once"] = row

    return once


def keeping_keys(model: nn.Module, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The call with attention that saves its keys for the backward instead of recomputing them."""
    layers = [module for module in model.modules() if hasattr(module, "recompute")]

    def kept():
        for layer in layers:
            layer.recompute = False
        try:
            return call()
        finally:
            for layer in layers:
                del layer.recompute

    return kept


def prefill(session: Session, wide: dict, narrow: dict) -> dict:
    ids, _ = session.batches(*PREFILL)[0]

    def fill(contender: Contender, autocast: bool) -> Callable[[], Tensor]:
        def call():
            with torch.autocast("cuda", DTYPE, enabled=autocast):
                return contender.prefill(ids, LOOPS)

        return call

    calls = {f"{name}, autocast": fill(c, True) for name, c in wide.items() if name == "upstream"}
    calls |= {f"{name}, bfloat16": fill(c, False) for name, c in narrow.items()}
    return measure(session, f"prefill, {PREFILL[0]} x {PREFILL[1]} tokens", calls)


def decode(session: Session, wide: dict, narrow: dict, batch: int, cached: int) -> dict:
    """One token per row, following `cached` tokens."""
    ids, _ = session.batches(batch, cached)[0]
    calls, resets = {}, {}
    for name, contender in {
        "upstream, float32": wide.get("upstream"),
        **{f"{n}, bfloat16": c for n, c in narrow.items()},
    }.items():
        if contender is None:
            continue
        cache = contender.cached(ids, LOOPS)
        calls[name] = lambda c=contender, cache=cache: c.decode(ids[:, -1:], cache, LOOPS)
        resets[name] = cache.rewind
    # Of ours, the last contender. A graph has the kernels that were chosen when it was captured.
    for name, allowed in (("ours, as generate decodes", False), ("ours, as generate decodes, unproven", True)):
        calls[name] = decoding(contender.model.decoder(cache.held, n_loops=LOOPS), ids[:, -1:], allowed)
        resets[name] = cache.rewind
    return measure(session, f"decode, {batch} x 1 token, {cached} cached", calls, resets)


def decoding(decoder: Callable[[Tensor], Tensor], ids: Tensor, allowed: bool) -> Callable[[], Tensor]:
    """A call of the decoder; allowed: with kernels that no GPU has run."""

    @torch.no_grad()
    def call():
        with unproven.allowing() if allowed else contextlib.nullcontext():
            return decoder(ids)

    return call


def measure(session: Session, name: str, calls: dict, resets: dict | None = None) -> dict:
    """A row: of every contender the seconds, the peak memory beyond what it held, and the speedup over the first."""
    results, memory, resets = {}, {}, resets or {}
    with session.progress.stage(f"model: {name}") as tick:
        for who, call in calls.items():
            for _ in range(2):  # the first call compiles
                torch.cuda.synchronize()
                held = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                results[who] = call().float()
                memory[who] = torch.cuda.max_memory_allocated() - held
                resets.get(who, lambda: None)()
            tick()
        ours = results["ours, bfloat16"]
        for who, result in results.items():
            apart = float((result - ours).norm() / ours.norm())
            if not apart < APART:
                raise ArithmeticError(f"{name}: {who} is {apart:.2g} (relative) off ours: not measured")
        laps = {who: Lap(call, resets.get(who)) for who, call in calls.items()}
        seconds = interleave(laps, session.clock, 3, 30, SECONDS, warmup=0, tick=tick)
    first = next(iter(seconds))
    over = {who: speedup(seconds[first], times) for who, times in seconds.items() if who != first}
    return dict(
        name=name, medians={who: median(x) for who, x in seconds.items()}, memory=memory, over=over, seconds=seconds
    )
