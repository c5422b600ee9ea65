"""The mixture-of-experts layer alone, from one token to 2048, against open-mythos' layer and sorted PyTorch.

`upstream` is open-mythos' MoEFFN. `sorted` computes the same in plain PyTorch without a call per slot and expert:
argsort, one call per expert that has tokens, index_add. Each contender has its own copy of the weights, so that none
finds them in a CPU cache where another left them. `read` sums as many bytes as the chosen experts' weights have, which
is the lower bound for few tokens.
"""

from __future__ import annotations

import copy
from functools import partial
from statistics import median
from types import SimpleNamespace

import torch
from torch import Tensor, nn

import openmythos
from benchmarks.apart import apart
from benchmarks.machine import GEMM_SIZE
from benchmarks.session import Requirement, Session, speed_requirement
from benchmarks.timing import Lap, interleave, spread, without_gradients
from benchmarks.upstream import load_upstream
from openmythos_kernels import accelerate, use_huge_pages
from openmythos_kernels.nn import MoEFFN
from openmythos_kernels.nn.paths.moe_experts import expert_weights
from openmythos_kernels.ops.moe import RepeatedExperts
from openmythos_kernels.verify.saved import saved_bytes

LAYER = SimpleNamespace(dim=512, expert_dim=256, n_experts=32, n_experts_per_tok=4, n_shared_experts=2)
SHARED_INNER = LAYER.expert_dim * LAYER.n_experts_per_tok
# tokens -> required speedup of: forward over upstream, forward + backward over upstream, forward + backward over sorted
BARS = {1: (4.0, 1.2, 1.0), 8: (5.0, 2.0, 1.8), 64: (6.0, 4.0, 1.5), 512: (1.8, 1.9, 1.1)}
BANDWIDTH_BAR, GEMM_BAR, BF16_BAR = 0.5, 0.85, 2.0
MANY, FOR_BF16 = 2048, 512
LOOPS, FEW, ONCE_BAR = 16, 64, 1.1


def run(session: Session) -> dict:
    seconds: dict[str, dict] = {}
    rows = []
    with session.progress.stage("moe: each row in a separate process", 2 * len(BARS) + 3) as tick:
        for tokens, bars in BARS.items():
            forward, missing = apart(measure_forward, session, tokens)
            tick()
            both, _ = apart(measure_both, session, tokens)
            tick()
            seconds[f"forward, {tokens}"], seconds[f"forward + backward, {tokens}"] = forward, both
            at, why = f"{tokens} tokens, " if tokens > 1 else "1 token, ", missing.get("upstream", "")
            rows += [
                row(at + "forward", bars[0], forward, "upstream", "ours", "x open-mythos", why),
                row(at + "forward + backward", bars[1], both, "upstream", "ours", "x open-mythos", why),
                row(at + "forward + backward", bars[2], both, "sorted", "ours", "x sorted PyTorch"),
            ]
            if "read" in forward:
                rows.append(row(at + "forward", BANDWIDTH_BAR, forward, "read", "ours", "of reading the weights"))
        seconds["many"], share = apart(measure_many, session)
        tick()
        seconds["bf16"] = apart(measure_bf16, session)
        tick()
        if session.device.type == "cpu":  # of a GPU's loops, `--only model` has a row
            seconds["loops"] = apart(measure_loops, session)
        tick()
    rows.append(
        row(f"{MANY} tokens, forward", GEMM_BAR, seconds["many"], "gemm", "ours", "of the GEMM rate", scale=share)
    )
    rows.append(
        row(f"{FOR_BF16} tokens, bfloat16 forward", BF16_BAR, seconds["bf16"], "float32", "bfloat16", "x our float32")
    )
    if "loops" in seconds:
        name = f"{LOOPS} loops of {FEW} tokens, backward"
        rows.append(row(name, ONCE_BAR, seconds["loops"], "each", "once", "x each loop adding its gradients"))
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
    name: str, required: float, samples: dict, slow: str, fast: str, unit: str, missing: str = "", scale: float = 1.0
) -> Requirement:
    """A requirement on how many times faster `fast` is than `slow`.

    Args:
        missing: why `slow` is not in `samples`, if it is not.
        scale: the work of `fast` relative to that of `slow`.
    """
    if slow not in samples:
        return speed_requirement(name, required, None, unit, missing)
    ratio = spread([scale * a / b for a, b in zip(samples[slow], samples[fast])])
    times = f"{1e3 * median(samples[slow]):.3g} and {1e3 * median(samples[fast]):.3g} ms; "
    return speed_requirement(name, required, ratio, unit, detail=times)


def make_layers(device: torch.device) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Returns the contenders, with equal weights, and contender -> reason for the missing ones."""
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
    layers["sorted"].forward = partial(sorted_composition, layers["sorted"])
    return {name: layer.to(device) for name, layer in layers.items()}, missing


def sorted_composition(layer: openmythos.MoEFFN, x: Tensor) -> Tensor:
    """The reference's layer, computed expert by expert on sorted tokens."""
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
    """Returns contender -> seconds of a forward, and contender -> reason for the missing ones."""
    layers, missing = make_layers(session.device)
    x = torch.randn(1, tokens, LAYER.dim, device=session.device)
    laps, results = {}, {}
    for name, layer in layers.items():
        layer.eval()
        laps[name] = Lap(without_gradients(partial(layer, x)))
        results[name] = laps[name].run()
    for result in results.values():
        torch.testing.assert_close(result, results["ours"], rtol=1e-3, atol=1e-4)
    if tokens <= 8:
        count = chosen_weights(layers["ours"], x)
        # The regions of 256 MiB take turns, so that none is still cached.
        memory = torch.ones(max(1, (256 << 20) // (4 * count)), count, device=session.device)
        turn = iter(range(1 << 60))
        laps["read"] = Lap(lambda: memory[next(turn) % len(memory)].sum())
    return sampled(session, laps), missing


def chosen_weights(layer: MoEFFN, x: Tensor) -> int:
    """The number of elements in the weights that `x` needs."""
    with torch.no_grad():
        chosen = layer.route(x.reshape(-1, x.shape[-1]))[0].unique().numel()
    return 3 * LAYER.dim * (chosen * LAYER.expert_dim + LAYER.n_shared_experts * SHARED_INNER)


def measure_both(session: Session, tokens: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    """As `measure_forward`, for a forward and a backward; gradients are freed between turns, untimed."""
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
    """Returns seconds of the layer at many tokens and of a large matrix product, and the ratio of their FLOPs."""
    layer = make_layers(session.device)[0]["ours"].eval()
    x = torch.randn(1, MANY, LAYER.dim, device=session.device)
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE, device=session.device) for _ in range(2))
    laps = {"ours": Lap(without_gradients(partial(layer, x))), "gemm": Lap(lambda: a @ b)}
    inner = LAYER.n_experts_per_tok * LAYER.expert_dim + LAYER.n_shared_experts * SHARED_INNER
    share = MANY * LAYER.dim * (3 * inner + LAYER.n_experts) / GEMM_SIZE**3
    return sampled(session, laps), share


def measure_bf16(session: Session) -> dict[str, list[float]]:
    layer = make_layers(session.device)[0]["ours"].eval()
    x = torch.randn(1, FOR_BF16, LAYER.dim, device=session.device)
    low = copy.deepcopy(layer).bfloat16()
    use_huge_pages(low.parameters())  # `accelerate` did the same for the float32 layer
    laps = {
        "float32": Lap(without_gradients(partial(layer, x))),
        "bfloat16": Lap(without_gradients(partial(low, x.bfloat16()))),
    }
    return sampled(session, laps)


def measure_loops(session: Session) -> dict[str, list[float]]:
    """The backward of loops of few tokens: one product for the routed weights' gradients, and each loop adding its."""
    layer = make_layers(session.device)[0]["ours"]
    parts = layer.routed_experts, layer.shared_experts
    lists = [weights for part in parts for weights in expert_weights(part)]
    x = torch.randn(LOOPS, FEW, LAYER.dim, device=session.device)
    with torch.no_grad():
        routed = [layer.route(tokens) for tokens in x]

    def lap(once: float) -> Lap:
        def forward() -> None:
            experts = RepeatedExperts(lists, once=once)
            calls = zip(x.clone().requires_grad_(), (r[0] for r in routed), (r[1] for r in routed))
            loss.append(sum(experts(*call).sum() for call in calls))

        def forget() -> None:
            layer.zero_grad(set_to_none=True)
            forward()

        loss: list[Tensor] = []
        forward()
        return Lap(lambda: loss.pop().backward(), forget)

    return sampled(session, {"once": lap(float("inf")), "each": lap(0)})


def sampled(session: Session, laps: dict[str, Lap]) -> dict[str, list[float]]:
    least, most, budget = (3, 5, 0.5) if session.quick else (9, 100, 4.0)
    return interleave(laps, session.clock, least, most, budget, warmup=2)


def kept_and_needed(device: torch.device) -> tuple[int, int]:
    """Returns the bytes that a forward saves for its backward, without weights, and the bytes that it needs to save."""
    layer = make_layers(device)[0]["ours"].train()
    x = torch.randn(1, FOR_BF16, LAYER.dim, device=device, requires_grad=True)
    N, K, S = FOR_BF16, LAYER.n_experts_per_tok, LAYER.n_shared_experts
    pre = 2 * N * (K * LAYER.expert_dim + S * SHARED_INNER)
    needed = x.element_size() * (x.numel() + pre + N * K) + 8 * N * K
    return saved_bytes(lambda: layer(x), layer.parameters()), needed
