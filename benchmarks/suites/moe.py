"""The mixture-of-experts layer alone, from one token to 2048, against open-mythos' layer and a sorted composition.

`upstream` is open-mythos' MoEFFN; `sorted` does the same in plain PyTorch without a call per slot and expert: argsort,
one call per expert that has tokens, index_add. Every contender has weights of its own, so that no turn finds them in a
cache where another has left them. `read` sums as many bytes as the chosen experts' weights hold: the floor at few
tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace

import torch
from torch import Tensor, nn

import openmythos
from benchmarks.apart import apart
from benchmarks.machine import GEMM_SIZE
from benchmarks.session import Requirement, Session
from benchmarks.timing import Lap, interleave, spread
from benchmarks.upstream import load_upstream
from openmythos_kernels import accelerate, use_huge_pages
from openmythos_kernels.nn import MoEFFN
from openmythos_kernels.verify.saved import saved_bytes

LAYER = SimpleNamespace(dim=512, expert_dim=256, n_experts=32, n_experts_per_tok=4, n_shared_experts=2)
SHARED_INNER = LAYER.expert_dim * LAYER.n_experts_per_tok
# tokens -> forward over upstream, forward + backward over upstream, forward + backward over the sorted composition
BARS = {1: (4.0, 1.2, 1.0), 8: (5.0, 2.0, 1.8), 64: (6.0, 4.0, 1.5), 512: (1.8, 1.9, 1.1)}
BANDWIDTH_BAR, GEMM_BAR, BF16_BAR = 0.5, 0.85, 2.0
MANY, FOR_BF16 = 2048, 512


def run(session: Session) -> dict:
    seconds: dict[str, dict] = {}
    rows = []
    with session.progress.stage("moe: each row in a process of its own", 2 * len(BARS) + 2) as tick:
        for tokens, bars in BARS.items():
            forward, missing = apart(measure_forward, session, tokens)
            tick()
            both, _ = apart(measure_both, session, tokens)
            tick()
            seconds[f"forward, {tokens}"], seconds[f"forward + backward, {tokens}"] = forward, both
            at = f"{tokens} tokens, " if tokens > 1 else "1 token, "
            rows += [
                row(at + "forward", bars[0], forward, "upstream", "ours", "x open-mythos", missing),
                row(at + "forward + backward", bars[1], both, "upstream", "ours", "x open-mythos", missing),
                row(at + "forward + backward", bars[2], both, "sorted", "ours", "x sorted PyTorch"),
            ]
            if "read" in forward:
                rows.append(row(at + "forward", BANDWIDTH_BAR, forward, "read", "ours", "of reading the weights"))
        seconds["many"], share = apart(measure_many, session)
        tick()
        seconds["bf16"] = apart(measure_bf16, session)
        tick()
    rows.append(
        row(f"{MANY} tokens, forward", GEMM_BAR, seconds["many"], "gemm", "ours", "of the GEMM rate", scale=share)
    )
    rows.append(
        row(f"{FOR_BF16} tokens, bfloat16 forward", BF16_BAR, seconds["bf16"], "float32", "bfloat16", "x our float32")
    )
    saved, needed = kept_and_needed(session.device)
    detail = f"{needed:,} bytes of x, pre-activations and routing at {FOR_BF16} tokens"
    rows.append(
        Requirement(
            "saved for backward", 0.0, float(saved - needed), "bytes more", timing=False, higher=False, detail=detail
        )
    )
    return {
        "layer": vars(LAYER),
        "missing": missing,
        "seconds": seconds,
        "saved": {"bytes": saved, "needed": needed},
        "requirements": [r.as_dict() for r in rows],
    }


def row(
    name: str, required: float, samples: dict, slow: str, fast: str, unit: str, missing: dict = {}, scale: float = 1.0
) -> Requirement:
    """A requirement on how many times faster `fast` is, in the median over rounds; `scale` if it does other work."""
    if slow not in samples:
        return Requirement(name, required, None, unit, timing=True, detail=missing.get(slow, ""))
    ratio = spread([scale * a / b for a, b in zip(samples[slow], samples[fast])])
    times = f"{1e3 * median(samples[slow]):.3g} and {1e3 * median(samples[fast]):.3g} ms"
    detail = f"{times}; {ratio['low']:.3g} .. {ratio['high']:.3g} in {ratio['n']} rounds"
    return Requirement(name, required, ratio["median"], unit, timing=True, detail=detail)


def make_layers(device: torch.device) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The contenders with equal weights, and who is missing and why."""
    torch.manual_seed(0)
    reference = openmythos.MoEFFN(LAYER)
    for p in reference.parameters():
        nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    layers, missing = {"ours": reference, "sorted": copy.deepcopy(reference)}, {}
    accelerate(layers["ours"])
    try:
        upstream = load_upstream()
        cfg = upstream.MythosConfig(**vars(LAYER))
        layers["upstream"] = upstream.MoEFFN(cfg)
        layers["upstream"].load_state_dict(reference.state_dict())
    except ImportError as error:
        missing["upstream"] = str(error)
    layers["sorted"].forward = lambda x, layer=layers["sorted"]: sorted_composition(layer, x)
    return {name: layer.to(device) for name, layer in layers.items()}, missing


def sorted_composition(layer: openmythos.MoEFFN, x: Tensor) -> Tensor:
    """The reference's layer, expert by expert in sorted order."""
    flat = x.reshape(-1, x.shape[-1])
    expert_idx, topk_weights = layer.route(flat)
    order = expert_idx.flatten().argsort()
    counts = torch.bincount(expert_idx.flatten(), minlength=layer.n_experts).tolist()
    token = order // layer.topk
    parts = flat[token].split(counts)
    y = torch.cat([layer.routed_experts[e](part) for e, part in enumerate(parts) if counts[e]])
    out = torch.zeros_like(flat).index_add(0, token, y * topk_weights.flatten()[order].unsqueeze(-1))
    for expert in layer.shared_experts:
        out = out + expert(flat)
    return out.view_as(x)


def measure_forward(session: Session, tokens: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds per contender, and who is missing and why."""
    layers, missing = make_layers(session.device)
    x = torch.randn(1, tokens, LAYER.dim, device=session.device)
    laps, results = {}, {}
    for name, layer in layers.items():
        layer.eval()
        laps[name] = Lap(without_gradients(layer, x))
        results[name] = laps[name].run()
    for result in results.values():
        torch.testing.assert_close(result, results["ours"], rtol=1e-3, atol=1e-4)
    if tokens <= 8:
        numbers = chosen_weights(layers["ours"], x)
        # 32 regions take turns, so that none is in a cache still.
        memory = torch.ones(max(1, (256 << 20) // (4 * numbers)), numbers, device=session.device)
        turn = iter(range(1 << 60))
        laps["read"] = Lap(lambda: memory[next(turn) % len(memory)].sum())
    return sampled(session, laps), missing


def chosen_weights(layer: MoEFFN, x: Tensor) -> int:
    """How many numbers the weights hold that x needs."""
    with torch.no_grad():
        chosen = layer.route(x.reshape(-1, x.shape[-1]))[0].unique().numel()
    return 3 * LAYER.dim * (chosen * LAYER.expert_dim + LAYER.n_shared_experts * SHARED_INNER)


def measure_both(session: Session, tokens: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    """As `measure_forward`, a forward and a backward of a training step; gradients are dropped between turns,
    untimed."""
    layers, missing = make_layers(session.device)
    x = torch.randn(1, tokens, LAYER.dim, device=session.device, requires_grad=True)
    dy = torch.randn(1, tokens, LAYER.dim, device=session.device)

    def lap(layer: nn.Module) -> Lap:
        def forget():
            layer.zero_grad(set_to_none=True)
            x.grad = None

        return Lap(lambda: layer(x).backward(dy), forget)

    laps = {name: lap(layer.train()) for name, layer in layers.items()}
    return sampled(session, laps), missing


def measure_many(session: Session) -> tuple[dict[str, list[float]], float]:
    """Many tokens against one large matrix product, and how much more arithmetic the layer does."""
    layer = make_layers(session.device)[0]["ours"].eval()
    x = torch.randn(1, MANY, LAYER.dim, device=session.device)
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE, device=session.device) for _ in range(2))
    laps = {"ours": Lap(without_gradients(layer, x)), "gemm": Lap(lambda: a @ b)}
    inner = LAYER.n_experts_per_tok * LAYER.expert_dim + LAYER.n_shared_experts * SHARED_INNER
    share = MANY * LAYER.dim * (3 * inner + LAYER.n_experts) / GEMM_SIZE**3
    return sampled(session, laps), share


def measure_bf16(session: Session) -> dict[str, list[float]]:
    layer = make_layers(session.device)[0]["ours"].eval()
    x = torch.randn(1, FOR_BF16, LAYER.dim, device=session.device)
    low = copy.deepcopy(layer).bfloat16()
    use_huge_pages(low.parameters())  # as `accelerate` did for the others
    laps = {"float32": Lap(without_gradients(layer, x)), "bfloat16": Lap(without_gradients(low, x.bfloat16()))}
    return sampled(session, laps)


def without_gradients(layer: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    def call():
        with torch.no_grad():
            return layer(x)

    return call


def sampled(session: Session, laps: dict[str, Lap]) -> dict[str, list[float]]:
    least, most, budget = (3, 5, 0.5) if session.quick else (9, 100, 4.0)
    return interleave(laps, session.clock, least, most, budget, warmup=2)


def kept_and_needed(device: torch.device) -> tuple[int, int]:
    """Bytes that a forward keeps for its backward, weights left out, and the bytes of what it needs."""
    layer = make_layers(device)[0]["ours"].train()
    x = torch.randn(1, FOR_BF16, LAYER.dim, device=device, requires_grad=True)
    N, K, S = FOR_BF16, LAYER.n_experts_per_tok, LAYER.n_shared_experts
    pre = 2 * N * (K * LAYER.expert_dim + S * SHARED_INNER)
    needed = x.element_size() * (x.numel() + pre + N * K) + 8 * N * K
    return saved_bytes(lambda: layer(x), layer.parameters()), needed
