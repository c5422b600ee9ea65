"""One latent-attention layer: decoding, prefill, training, and the memory of training, all in float32.

`upstream` is open-mythos' MLAttention with the causal mask that it builds. `composed` is the reference module with
PyTorch's scaled_dot_product_attention, its values padded to the width of the keys, as the fused CPU kernel requires;
without padding, PyTorch takes a path that is several times slower. `ours` is the accelerated module. All three have
equal weights.

In the rows "its own mask", ours is upstream's module, accelerated, and called as upstream's model calls it: with a new
float tensor (1, 1, T, T) for every forward, so that every sample includes the time to recognize the mask.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import openmythos
from benchmarks.apart import apart
from benchmarks.session import Requirement, Session, speed_requirement
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
LONGEST = 2048
# The kind of a row, its name, and token count -> required speedups, in the order of SIZES. A kind is a method of
# `Layer`, "masked " and a method, or "composed": training, compared with the contender of that name.
ROWS = (
    ("decoding", "decode, {} cached tokens", {512: (6.0, 5.0), 4096: (25.0, 25.0)}),
    ("prefill", "prefill forward, T={}", {1024: (2.0, 1.6), 2048: (3.0, 2.0)}),
    ("training", "forward + backward, T={}", {1024: (1.8, 1.5), 2048: (3.0, 2.0)}),
    ("composed", "forward + backward, T={}", {LONGEST: (1.1, 1.0)}),
    ("masked prefill", "prefill forward, its own mask, T={}", {LONGEST: (3.0,)}),
    ("masked training", "forward + backward, its own mask, T={}", {LONGEST: (2.5,)}),
)
MEMORY = (0.25, 0.25)
SECONDS = 6.0  # of sampling per row, in at least three rounds


def run(session: Session) -> dict:
    rows, cpu = [], session.device.type == "cpu"
    total = sum(len(required) for _, _, bars in ROWS for required in bars.values()) + len(SIZES) * cpu
    with session.progress.stage("mla: each row in a separate process", total) as tick:
        for at, size in enumerate(SIZES):
            for kind, name, bars in ROWS:
                for tokens, required in bars.items():
                    if at >= len(required):
                        continue
                    samples, missing = apart(measure, session, size, kind, tokens)
                    rows.append(row(f"{size}: {name.format(tokens)}", required[at], samples, missing))
                    tick()
            if cpu:
                rows.append(memory(size, MEMORY[at], apart(measure_memory, session, size)))
                tick()
    return {"sizes": SIZES, "dtype": "float32", "requirements": [r.as_dict() for r in rows]}


def row(name: str, required: float, samples: dict[str, list[float]], missing: str) -> Requirement:
    other = next((n for n in samples if n != "ours"), "upstream")
    ratio: dict | None = speedup(samples[other], samples["ours"]) if other in samples else None
    return speed_requirement(name, required, ratio, f"x {other}", missing)


def measure(session: Session, size: str, kind: str, tokens: int) -> tuple[dict[str, list[float]], str]:
    """Returns seconds of ours and of the other contender of this kind, and why upstream is missing, if it is."""
    layers, missing = make_layers(SIZES[size], session.device)
    other = "composed" if kind == "composed" else "upstream"
    work = "training" if kind == "composed" else kind.removeprefix("masked ")
    if kind.startswith("masked") and "upstream" in layers:
        layers["upstream"].anew = True
        layers["ours"] = copy.copy(layers["upstream"])
        layers["ours"].module = accelerate(copy.deepcopy(layers["upstream"].module))
    laps = {n: getattr(layers[n], work)(tokens) for n in (other, "ours") if n in layers}
    least, budget = (1, 0.0) if session.quick else (3, SECONDS)
    return interleave(laps, session.clock, least, 1000, budget), missing


def measure_memory(session: Session, size: str) -> dict[str, int]:
    """Returns contender -> peak bytes of a forward and backward."""
    layers, _ = make_layers(SIZES[size], session.device)
    return {name: peak_bytes(layer.training(LONGEST).run) for name, layer in layers.items()}


def memory(size: str, required: float, peaks: dict[str, int]) -> Requirement:
    share = peaks["ours"] / peaks["upstream"] if "upstream" in peaks else None
    return Requirement(
        f"{size}: peak extra memory, forward + backward, T={LONGEST}",
        required,
        share,
        "of upstream's",
        timing=False,
        higher=False,
        detail=", ".join(f"{n} {p / 2**20:.0f} MiB" for n, p in peaks.items()),
    )


class Layer:
    """One contender: a module, its kind of mask and its kind of cache.

    Attributes:
        anew: whether every lap gets a new mask, which is made untimed.
    """

    anew = False

    def __init__(self, module: nn.Module, cfg: MythosConfig, device: torch.device, mask: Callable, cache: Callable):
        self.module, self.cfg, self.device = module.to(device), cfg, device
        self.mask, self.cache = mask, cache

    def inputs(self, tokens: int, start: int = 0) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        table = rotary_table(self.cfg.qk_rope_head_dim, start + tokens, self.cfg.rope_theta).to(self.device)
        return torch.randn(1, tokens, self.cfg.dim, device=self.device), table[start:]

    def prefill(self, tokens: int) -> Lap:
        x, freqs_cis = self.inputs(tokens)
        masks = [self.mask(tokens)]

        @torch.no_grad()
        def forward() -> None:
            self.module(x, freqs_cis, masks[-1])

        return Lap(forward, self._next(masks, tokens))

    def training(self, tokens: int) -> Lap:
        x, freqs_cis = self.inputs(tokens)
        x.requires_grad_()
        masks, grad = [self.mask(tokens)], torch.randn_like(x)

        def step() -> None:
            self.module(x, freqs_cis, masks[-1]).backward(grad)
            for p in (x, *self.module.parameters()):
                p.grad = None

        return Lap(step, self._next(masks, tokens))

    def _next(self, masks: list, tokens: int) -> Callable | None:
        """A function that replaces the mask by a new one; None if one mask serves all laps."""
        return (lambda: masks.__setitem__(-1, self.mask(tokens))) if self.anew else None

    def decoding(self, cached: int) -> Lap:
        x, freqs_cis = self.inputs(1, cached)
        cache, reset = self.cache(cached)

        @torch.no_grad()
        def step() -> None:
            self.module(x, freqs_cis, CausalMask(cached, 1) if isinstance(cache, KVCache) else None, cache, "layer")

        return Lap(step, reset)


def make_layers(fields: dict, device: torch.device) -> tuple[dict[str, Layer], str]:
    """Returns the contenders, with equal weights, and why upstream is missing, if it is."""
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
    """The reference's `attend`, computed by PyTorch's fused attention."""
    v = F.pad(v, (0, q.shape[-1] - self.v_dim))
    out = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)), is_causal=True)
    return out[..., : self.v_dim].transpose(1, 2).flatten(2)


def peak_bytes(step: Callable[[], object]) -> int:
    """The peak of the bytes that a call allocates, counted from the allocator's events."""
    step()  # so that one-time allocations do not count
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
