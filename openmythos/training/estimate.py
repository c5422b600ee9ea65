"""What a training run costs, before anything is allocated: FLOPs, bytes per rank, time."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch
import torch.nn as nn

from openmythos.baseline import DenseConfig
from openmythos.config import MythosConfig
from openmythos.parallel.counting import Held, held, traffic
from openmythos.sizes import measure, outline
from openmythos.training.config import TrainConfig
from openmythos.training.optimizers import muon_matrices


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per token, a multiply-add counting 2.

    Attributes:
        before: forward pass through the prelude.
        loop: forward pass through one loop.
        after: forward pass through coda and head.
    """

    before: float
    loop: float
    after: float

    def training(self, loops: float, gradient_loops: float | None, predicts_each: bool = False) -> float:
        """Forward and backward; the backward pass of what has gradients costs twice its forward pass.

        What checkpointing computes again is not counted, as is usual where shares of a peak are given.

        Args:
            predicts_each: coda and head predict from the state of every loop, as with `loss.prior_weight`. They have
                gradients in loops that have none, too.
        """
        graded = loops if gradient_loops is None else min(loops, gradient_loops)
        predictions = loops if predicts_each else 1
        # Loops without gradients stand between prelude and loss, but `e` enters every loop.
        return 3 * (self.before + self.after * predictions) + self.loop * (loops + 2 * graded)


def flops(cfg: MythosConfig, tokens: int) -> Flops:
    """Those of a token in a sequence of `tokens`; attention over half of it, the mean of a causal pass."""
    if isinstance(cfg, DenseConfig):
        return Flops(0.0, 0.0, measure(replace(cfg, max_seq_len=tokens)).flops)
    cfg, lora = replace(cfg, max_seq_len=tokens, lora_rank=0), 4.0 * cfg.dim * cfg.lora_rank
    one, two = (measure(replace(cfg, max_loop_iters=n)).flops for n in (1, 2))
    loop = two - one
    before = one - measure(replace(cfg, max_loop_iters=1, prelude_layers=0)).flops
    return Flops(before, loop + lora, one - loop - before)


@dataclass(frozen=True)
class Estimate:
    """Bytes on the rank that holds most, and the work of a step.

    Attributes:
        parameters: of the model. active: those that a token uses.
        rank: bytes of weights, gradients and optimizer. averages: those of averaged weights.
        activations: bytes kept for the backward pass; an estimate.
        logits: bytes of the logits that are in memory at a time, and their gradient.
        sent: bytes that leave a rank in a step.
        step_flops: of a step over all ranks.
        step_seconds: those FLOPs at the peak given and 40 % of it used; None without a peak.
    """

    parameters: int
    active: int
    rank: Held
    averages: int
    activations: int
    logits: int
    sent: int
    step_flops: float
    step_seconds: float | None

    @property
    def total(self) -> int:
        return self.rank.total + self.averages + self.activations + self.logits


UTILIZATION = 0.4  # of the peak, assumed for the estimated time of a step


def estimate(config: TrainConfig, ranks: int = 1, peak: float | None = None) -> Estimate:
    """The cost of a run on `ranks` ranks; nothing is allocated.

    Args:
        peak: FLOP/s of a rank.

    Raises:
        ValueError: as `TrainConfig.check`.
    """
    cfg = config.check(ranks)
    model = outline(cfg)
    muon = _muon_share(model) if config.optimizer.name == "muon" else 0.0
    itemsize = 2 if config.precision.mode == "bf16" else 4
    rank = held(cfg, config.parallel, ranks, itemsize=itemsize, gathered_itemsize=itemsize, moments=2 - muon)
    size = measure(cfg)
    rows = config.batch // ranks // config.accumulate
    tokens = rows * config.tokens
    loops, graded = config.depth.mean, config.depth.gradient_loops
    each = config.loss.predicts_each
    work = flops(cfg, config.tokens).training(loops, graded, each) * config.batch * config.tokens
    predicted = math.ceil(tokens * loops) if each else tokens
    chunk = min(config.loss.chunk or predicted, predicted)
    return Estimate(
        parameters=size.parameters,
        active=size.active_parameters,
        rank=rank,
        averages=rank.parameters if config.optimizer.ema else 0,
        activations=tokens * _activation_bytes(cfg, config),
        logits=2 * 4 * chunk * cfg.vocab_size,
        sent=_sent(config, cfg, ranks, tokens),
        step_flops=work,
        step_seconds=None if peak is None else work / ranks / (peak * UTILIZATION),
    )


def _sent(config: TrainConfig, cfg: MythosConfig, ranks: int, tokens: int) -> int:
    """Bytes that leave a rank in a step of the mean depth. Each part of a step sends its tokens, the last one gradients
    of weights too, which are most of it; all are counted as the last."""
    rows = traffic(
        cfg,
        config.parallel,
        ranks,
        tokens * config.accumulate,
        n_loops=config.depth.evaluation_loops,
        grad_loops=config.depth.gradient_loops,
        checkpoint_loops=config.memory.checkpoint_loops,
        itemsize=config.precision.products.itemsize,
        gradient_itemsize=2 if config.precision.mode == "bf16" else 4,
    )
    return sum(row.sent * row.times for row in rows)


def _muon_share(model: nn.Module) -> float:
    """The share of the parameters that Muon updates."""
    chosen = muon_matrices(model)
    counts = [(p.numel(), id(p) in chosen) for p in model.parameters()]
    return sum(n for n, muon in counts if muon) / sum(n for n, _ in counts)


def _activation_bytes(cfg: MythosConfig, config: TrainConfig) -> int:
    """Bytes that a token keeps for the backward pass: inputs of products, norms, attention and experts."""
    itemsize = config.precision.products.itemsize
    heads = cfg.n_heads * (2 * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim) + 2 * cfg.v_head_dim)
    latents = 2 * cfg.dim + cfg.q_lora_rank + cfg.kv_lora_rank + heads
    attention = latents if cfg.attn_type == "mla" else 5 * cfg.dim
    dense = 2 * cfg.dim + 3 * cfg.dense_dim
    k = cfg.n_experts_per_tok
    experts = 2 * cfg.dim + k * (cfg.dim + 3 * cfg.expert_dim) + cfg.n_shared_experts * 3 * k * cfg.expert_dim
    layer = cfg.dim if config.memory.checkpoint_layers else attention + dense
    if isinstance(cfg, DenseConfig):
        total = cfg.n_layers * layer
    else:
        total = (cfg.prelude_layers + cfg.coda_layers) * layer
        if config.loss.predicts_each:  # the coda's layers for each loop; states, the last norm's input and its output
            more = (config.depth.mean - 1) * cfg.coda_layers * layer + 3 * config.depth.mean * cfg.dim
            total += math.ceil(more)
        graded = config.depth.gradient_loops
        loops = config.depth.mean if graded is None else min(graded, config.depth.mean)
        core = cfg.core_layers * (attention + (experts if cfg.core_ffn == "moe" else dense)) + 4 * cfg.dim
        # With checkpoints a loop keeps its state, the output so far and its input; one loop is whole at a time.
        total += int(loops * 3 * cfg.dim + core) if config.memory.checkpoint_loops else int(loops * core)
    return itemsize * total


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of a few square matrix products on this machine, in about half a second.

    On a CPU their size grows as long as they are quick: one without instructions for bfloat16 needs seconds for what
    takes it milliseconds in float32.
    """
    if device.type == "cuda":
        return max(_flops_of_product(8192, device, dtype) for _ in range(8))
    best, n, end = 0.0, 128, time.perf_counter() + 0.4
    while (now := time.perf_counter()) < end:
        best = max(best, _flops_of_product(n, device, dtype))
        if n < 1024 and time.perf_counter() - now < 0.02:
            n *= 2
    return best


def _flops_of_product(n: int, device: torch.device, dtype: torch.dtype) -> float:
    a = torch.randn(n, n, device=device).to(dtype)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    a @ a
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 2.0 * n**3 / (time.perf_counter() - began)
