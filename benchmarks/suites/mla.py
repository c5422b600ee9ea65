"""One latent-attention layer: decoding, prompts, training, and the memory of training.

float32, in one run: `upstream` is open-mythos' MLAttention with the causal mask it builds, `composed` the reference module
around PyTorch's scaled_dot_product_attention (values padded to the keys' width, as its fused CPU kernel wants them;
unpadded it takes a path that is several times slower), `ours` the accelerated module. All three have equal weights.
"""

from __future__ import annotations

import types
from typing import Callable, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import openmythos
from benchmarks.session import Requirement, Session
from benchmarks.timing import Lap, interleave, speedup
from benchmarks.upstream import load_upstream
from openmythos import KVCache, MythosConfig
from openmythos.attention import CausalMask
from openmythos.layers import rotary_table
from openmythos_kernels import accelerate

SIZES = {
    "small": dict(dim=512, n_heads=8, kv_lora_rank=128, q_lora_rank=256),
    "mythos_1b": dict(dim=2048, n_heads=16, kv_lora_rank=256, q_lora_rank=512),
}
# What must be shown, in the order of SIZES.
DECODE = {512: (6.0, 5.0), 4096: (25.0, 25.0)}
FORWARD = {1024: (2.0, 1.6), 2048: (3.0, 2.0)}
BACKWARD = {1024: (1.8, 1.5), 2048: (3.0, 2.0)}
MEMORY, COMPOSED = (0.25, 0.25), (1.1, 1.0)
LONGEST = 2048
SECONDS = 6.0  # of sampling per row, at least three rounds


def run(session: Session) -> dict:
    rows: list[Requirement] = []
    with session.progress.stage("mla: one layer, upstream, composed and ours in turn") as tick:
        for at, (size, fields) in enumerate(SIZES.items()):
            layers, missing = make_layers(fields, session.device)
            measure(session, size, at, layers, missing, rows, tick)
    return {"sizes": SIZES, "dtype": "float32", "requirements": [r.as_dict() for r in rows]}


def measure(session: Session, size: str, at: int, layers: dict, missing: str, rows: list, tick: Callable) -> None:
    def timed(name: str, bar: float, laps: dict[str, Lap], other: str = "upstream") -> None:
        least, budget = (1, 0.0) if session.quick else (3, SECONDS)
        samples = interleave(laps, session.clock, least, 1000, budget, tick=tick)
        ratio: Optional[dict] = speedup(samples[other], samples["ours"]) if other in samples else None
        detail = f"{ratio['low']:.3g} .. {ratio['high']:.3g} in {ratio['n']} rounds" if ratio else missing
        rows.append(Requirement(f"{size}: {name}", bar, ratio and ratio["median"], f"x {other}", True, detail=detail))

    def pick(*names: str) -> dict[str, "Layer"]:
        return {n: layers[n] for n in names if n in layers}

    for cached, bars in DECODE.items():
        laps = {n: layer.decoding(cached) for n, layer in pick("upstream", "ours").items()}
        timed(f"decode, {cached} cached tokens", bars[at], laps)
    for tokens, bars in FORWARD.items():
        laps = {n: layer.prefill(tokens) for n, layer in pick("upstream", "ours").items()}
        timed(f"prefill forward, T={tokens}", bars[at], laps)
    for tokens, bars in BACKWARD.items():
        laps = {n: layer.training(tokens) for n, layer in pick("upstream", "ours").items()}
        timed(f"forward + backward, T={tokens}", bars[at], laps)
    laps = {n: layer.training(LONGEST) for n, layer in pick("composed", "ours").items()}
    timed(f"forward + backward, T={LONGEST}", COMPOSED[at], laps, "composed")
    if session.device.type == "cpu":
        peaks = {n: peak_bytes(layer.training(LONGEST).run) for n, layer in layers.items()}
        share = peaks["ours"] / peaks["upstream"] if "upstream" in peaks else None
        rows.append(Requirement(
            f"{size}: peak extra memory, forward + backward, T={LONGEST}", MEMORY[at], share, "of upstream's",
            timing=False, higher=False, detail=", ".join(f"{n} {p / 2**20:.0f} MiB" for n, p in peaks.items()),
        ))  # fmt: skip


class Layer:
    """One contender: a module, and the mask and the cache that it takes."""

    def __init__(self, module: nn.Module, cfg: MythosConfig, device: torch.device, mask: Callable, cache: Callable):
        self.module, self.cfg, self.device = module.to(device), cfg, device
        self.mask, self.cache = mask, cache

    def inputs(self, tokens: int, start: int = 0) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        table = rotary_table(self.cfg.qk_rope_head_dim, start + tokens, self.cfg.rope_theta).to(self.device)
        return torch.randn(1, tokens, self.cfg.dim, device=self.device), table[start:]

    def prefill(self, tokens: int) -> Lap:
        x, freqs_cis = self.inputs(tokens)
        mask = self.mask(tokens)

        @torch.no_grad()
        def forward() -> None:
            self.module(x, freqs_cis, mask)

        return Lap(forward)

    def training(self, tokens: int) -> Lap:
        x, freqs_cis = self.inputs(tokens)
        x.requires_grad_()
        mask, grad = self.mask(tokens), torch.randn_like(x)

        def step() -> None:
            self.module(x, freqs_cis, mask).backward(grad)
            for p in (x, *self.module.parameters()):
                p.grad = None

        return Lap(step)

    def decoding(self, cached: int) -> Lap:
        x, freqs_cis = self.inputs(1, cached)
        cache, reset = self.cache(cached)

        @torch.no_grad()
        def step() -> None:
            self.module(x, freqs_cis, CausalMask(cached, 1) if isinstance(cache, KVCache) else None, cache, "layer")

        return Lap(step, reset)


def make_layers(fields: dict, device: torch.device) -> tuple[dict[str, Layer], str]:
    """Contenders with equal weights, and why upstream is missing if it is."""
    cfg = MythosConfig(**fields, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64)
    torch.manual_seed(0)
    reference = openmythos.MLAttention(cfg)
    weights = reference.state_dict()
    composed = openmythos.MLAttention(cfg)
    composed.load_state_dict(weights)
    composed.attend = types.MethodType(_sdpa, composed)

    def our_cache(cached: int):
        cache = KVCache(capacity=cached + 1)
        x = torch.randn(1, 8, cfg.dim, device=device)
        ours.module(x, rotary_table(cfg.qk_rope_head_dim, 8, cfg.rope_theta).to(device), None, cache, "layer")
        entry = cache["layer"]
        for tensor in entry.tensors.values():
            tensor.normal_()
        entry.lengths = [cached]
        return cache, lambda: entry.truncate([cached])

    def lazy(tokens: int) -> CausalMask:
        return CausalMask(0, tokens)

    ours = Layer(accelerate(reference), cfg, device, lazy, torch.no_grad()(our_cache))
    layers = {"composed": Layer(composed, cfg, device, lazy, our_cache), "ours": ours}
    try:
        upstream = load_upstream()
    except ImportError as error:
        return layers, str(error)
    theirs = upstream.MLAttention(cfg)
    theirs.load_state_dict(weights)

    def their_cache(cached: int):
        held = dict(
            c_kv=torch.randn(1, cached, cfg.kv_lora_rank, device=device),
            k_rope=torch.randn(1, cached, cfg.n_heads, cfg.qk_rope_head_dim, device=device),
        )
        cache = {"layer": held}
        return cache, lambda: cache.update(layer=held)

    def their_mask(tokens: int) -> Tensor:
        return torch.full((1, 1, tokens, tokens), float("-inf"), device=device).triu(1)

    return {"upstream": Layer(theirs, cfg, device, their_mask, their_cache), **layers}, ""


def _sdpa(self: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: CausalMask) -> Tensor:
    """The reference's `attend` on PyTorch's fused attention."""
    v = F.pad(v, (0, q.shape[-1] - self.v_dim))
    out = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)), is_causal=True)
    return out[..., : self.v_dim].transpose(1, 2).flatten(2)


def peak_bytes(step: Callable[[], object]) -> int:
    """The most bytes that a call held at once beyond what was there before, by the allocator's own events."""
    step()  # whatever is allocated once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
