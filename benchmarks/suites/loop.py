"""What the loop costs beside its block: the fused step, exact trimming, and time against depth.

The step is timed on random states of 4096 tokens and 1024 channels, everything of a loop but the transformer block:
loop embedding, norm, LoRA, injection and halting. `upstream` is the chain of open-mythos' own modules, `compiled` the
same chain under torch.compile, `copy` moves as many bytes as the step at its seven passes over (N, D).
"""

from __future__ import annotations

import math
from typing import Callable, Optional

import torch
from torch import Tensor, nn

import openmythos
from benchmarks.session import Requirement, Session
from benchmarks.timing import Lap, interleave, speedup, spread
from benchmarks.upstream import load_upstream
from openmythos import MythosConfig
from openmythos.layers import rotary_table
from openmythos.recurrence import ACTState
from openmythos_kernels import accelerate
from openmythos_kernels import nn as fast

ROWS, DIM = 4096, 1024
PASSES_FORWARD = 7
HALTING = dict(loops=16, halt_at=4, sequences=8, tokens=64, dim=512)
DEPTHS, QUICK_DEPTHS = (1, 2, 4, 8, 16, 32), (1, 8)
FLAT = 0.05


def run(session: Session) -> dict:
    step, missing = measure_step(session)
    trimming = measure_trimming(session)
    depth = measure_depth(session)
    rows = []

    def row(name: str, required: float, ratio: Optional[dict], unit: str, higher: bool = True, why: str = "") -> None:
        detail = f"{ratio['low']:.3g} .. {ratio['high']:.3g} in {ratio['n']} rounds" if ratio else why
        rows.append(Requirement(name, required, ratio and ratio["median"], unit, timing=True, higher=higher, detail=detail))

    for work, bars in (("forward", (8.0, 1.5)), ("forward + backward", (5.0, 1.3))):
        for other, bar in zip(("upstream", "compiled"), bars):
            name = {"upstream": "open-mythos' chain", "compiled": "that chain compiled"}[other]
            row(f"loop step {work}", bar, over(step[work], other, "ours"), f"x {name}", why=missing.get(other, ""))
            if work == "forward" and (copied := over(step[work], other, "copy")):
                rows[-1].detail += f"; copying its {PASSES_FORWARD} passes: {copied['median']:.3g}"
    row("share of copy bandwidth at 7 passes", 0.7, over(step["forward"], "copy", "op"), "of copy")
    row("half of the sequences halt at loop 4 of 16", 0.7, over(trimming, "trimmed", "whole"), "of untrimmed time", False)
    flat = Requirement(
        f"cost per loop, depths {DEPTHS[0]} .. {DEPTHS[-1]}", FLAT, depth["spread"], "apart", timing=True, higher=False
    )
    return {
        "rows": ROWS,
        "dim": DIM,
        "missing": missing,
        "step": step,
        "trimming": trimming,
        "depth": depth,
        "requirements": [r.as_dict() for r in (*rows, flat)],
    }


def over(samples: dict[str, list[float]], slow: str, fast_: str) -> Optional[dict]:
    return speedup(samples[slow], samples[fast_]) if slow in samples else None


# The step alone


def make_blocks(device: torch.device, dim: int = DIM) -> tuple[fast.RecurrentBlock, Optional[nn.Module], str]:
    """Our block and open-mythos' with equal parameters; None and the reason where that is not installed."""
    cfg = MythosConfig(
        vocab_size=8, dim=dim, n_heads=1, n_kv_heads=1, max_seq_len=8, max_loop_iters=16, kv_lora_rank=8, q_lora_rank=8,
        qk_rope_head_dim=2, qk_nope_head_dim=2, v_head_dim=2, n_experts=1, n_experts_per_tok=1, n_shared_experts=0,
        expert_dim=2, lora_rank=8,
    )  # fmt: skip
    ours = openmythos.RecurrentBlock(cfg)
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if not name.startswith("block."):
                p.normal_(std=0.02 if p.dim() == 2 else 0.3)
    accelerate(ours.to(device))
    try:
        upstream = load_upstream()
    except ImportError as error:
        return ours, None, str(error)
    names = {f for f in upstream.MythosConfig.__dataclass_fields__}
    theirs = upstream.RecurrentBlock(upstream.MythosConfig(**{k: v for k, v in vars(cfg).items() if k in names}))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs.to(device), ""


def upstream_chain(block: nn.Module) -> Callable[..., tuple[Tensor, ...]]:
    """A loop of open-mythos' block without its transformer block, by its own modules; ends with the next loop's input."""
    embed = load_upstream().loop_index_embedding

    def chain(h: Tensor, e: Tensor, f: Tensor, h_out: Tensor, spent: Tensor, halted: Tensor) -> tuple[Tensor, ...]:
        h = block.injection(h, e, f + block.lora(f, 1))
        p = block.act(h)
        running = (~halted).float()
        weight = torch.where(spent + p >= block.cfg.act_threshold, (1.0 - spent).clamp(min=0), p) * running
        h_out = h_out + weight.unsqueeze(-1) * h
        spent = spent + p * running
        return h, h_out, spent, halted | (spent >= block.cfg.act_threshold), block.norm(embed(h, 2, block.loop_dim) + e)

    return chain


def our_chain(block: fast.RecurrentBlock) -> Callable[..., tuple[Tensor, ...]]:
    def chain(h: Tensor, e: Tensor, f: Tensor, h_out: Tensor, spent: Tensor, halted: Tensor) -> tuple[Tensor, ...]:
        state = ACTState(h_out, spent, ~halted, spent)
        h, state, u = block.step(h, e, None, f, state, 1, False)
        return h, state.h_out, state.spent, ~state.running, u

    return chain


def measure_step(session: Session) -> tuple[dict, dict]:
    """Seconds of forward and of forward + backward per contender, and who is missing and why."""
    device = session.device
    ours, theirs, why = make_blocks(device)
    chains, missing = {"ours": our_chain(ours)}, {}
    if theirs is None:
        missing["upstream"] = missing["compiled"] = why
    else:
        chains["upstream"] = upstream_chain(theirs)
        if session.quick:
            missing["compiled"] = "left out of a quick run"
        else:
            chains["compiled"] = torch.compile(upstream_chain(theirs))
    generator = torch.Generator(device).manual_seed(0)
    states = [torch.randn(1, ROWS, DIM, device=device, generator=generator) for _ in range(4)]
    spent = torch.rand(1, ROWS, device=device, generator=generator)
    inputs = (*states, spent, spent > 0.9)
    leaves = [x.clone().requires_grad_() for x in inputs[:5]] + [inputs[5]]
    grads = [torch.randn_like(x) for x in states[:3]]

    def forward(chain: Callable) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return chain(*inputs)

    def both(chain: Callable, parameters: list) -> None:
        h, h_out, _, _, u = chain(*leaves)
        torch.autograd.grad((h, h_out, u), [*leaves[:5], *parameters], grads)

    def parameters(name: str) -> list:
        block = ours if name == "ours" else theirs
        return [p for k, p in block.named_parameters() if not k.startswith("block.")]

    with session.progress.stage("loop: the step, all contenders once", 2 * len(chains)) as tick:
        try:
            for name in list(chains):
                results = forward(chains[name])
                if name == "ours":
                    expected = results
                torch.testing.assert_close(results[4], expected[4], rtol=1e-3, atol=1e-3)
                tick()
                both(chains[name], parameters(name))
                tick()
        except torch._dynamo.exc.TorchDynamoException as error:
            missing["compiled"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            del chains["compiled"]
    laps = {name: Lap(lambda chain=chain: forward(chain)) for name, chain in chains.items()}
    source = torch.zeros(PASSES_FORWARD * ROWS * DIM // 2, device=device)
    target = torch.zeros_like(source)
    laps["copy"] = Lap(lambda: target.copy_(source))
    laps["op"] = Lap(op_alone(ours, inputs))
    least, most, budget = (3, 5, 2.0) if session.quick else (20, 60, 8.0)
    step = {}
    with session.progress.stage("loop: step forward") as tick:
        step["forward"] = interleave(laps, session.clock, least, most, budget, warmup=3, tick=tick)
    laps = {name: Lap(lambda c=chain, p=parameters(name): both(c, p)) for name, chain in chains.items()}
    with session.progress.stage("loop: step forward + backward") as tick:
        step["forward + backward"] = interleave(laps, session.clock, least, most, budget, warmup=3, tick=tick)
    return step, missing


def op_alone(block: fast.RecurrentBlock, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """The op without the LoRA down-projection before it, which reads the block's output once more."""
    h, e, f, h_out, spent, halted = inputs
    low = block.lora.low(f, 1).detach()

    def call():
        with torch.no_grad():
            return block.fused(h, e, f, low, ACTState(h_out, spent, ~halted, spent), 1, False)

    return call


# The whole block


def make_whole(dim: int, tokens: int, device: torch.device) -> tuple[fast.RecurrentBlock, Tensor]:
    """A block with a dense core whose halting probability is read off channel 0 of its input, and the rotary table."""
    cfg = MythosConfig(
        vocab_size=8, dim=dim, n_heads=8, n_kv_heads=1, max_seq_len=tokens, max_loop_iters=16, kv_lora_rank=128,
        q_lora_rank=256, qk_rope_head_dim=32, qk_nope_head_dim=32, v_head_dim=64, lora_rank=8, core_ffn="dense",
    )  # fmt: skip
    block = openmythos.RecurrentBlock(cfg)
    with torch.no_grad():
        block.norm.weight[0] = 0.0
        block.lora.B[:, 0] = 0.0
        block.block.attn.wo.weight[0] = 0.0
        block.block.ffn.down.weight[0] = 0.0  # nothing reaches channel 0 of the block's output
        block.injection.log_A[0] = 30.0  # A = 0: nor does the state before
        block.injection.B[0] = 1.0
        block.act.halt.weight.zero_()
        block.act.halt.weight[0, 0] = 1.0
        block.act.halt.bias.zero_()
    return accelerate(block.to(device)), rotary_table(32, tokens, 10000.0).to(device)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def measure_trimming(session: Session) -> dict[str, list[float]]:
    """The whole block, half of the sequences halting at loop 4 of 16, with and without trimming."""
    size = HALTING
    block, freqs = make_whole(size["dim"], size["tokens"], session.device)
    e = torch.randn(size["sequences"], size["tokens"], size["dim"], device=session.device)
    e[::2, :, 0] = logit(1.0 / (size["halt_at"] - 0.5))
    e[1::2, :, 0] = logit(0.5 / size["loops"])
    mask = openmythos.attention.CausalMask(0, size["tokens"])

    def lap(trim: bool) -> Lap:
        def call():
            block.trim = trim
            with torch.no_grad():
                return block(e, e, freqs, mask, size["loops"])

        return Lap(call)

    laps = {"whole": lap(False), "trimmed": lap(True)}
    torch.testing.assert_close(laps["trimmed"].run(), laps["whole"].run(), rtol=1e-3, atol=1e-4)
    least, most, budget = (2, 3, 2.0) if session.quick else (7, 20, 8.0)
    with session.progress.stage("loop: half of the sequences halt early") as tick:
        return interleave(laps, session.clock, least, most, budget, warmup=1, tick=tick)


def measure_depth(session: Session) -> dict:
    """Seconds of the whole block per loop at several depths, nothing halting, and how far apart the medians are."""
    block, freqs = make_whole(HALTING["dim"], HALTING["tokens"], session.device)
    e = torch.randn(HALTING["sequences"], HALTING["tokens"], HALTING["dim"], device=session.device)
    e[..., 0] = logit(1e-3)
    mask = openmythos.attention.CausalMask(0, HALTING["tokens"])

    def lap(depth: int) -> Lap:
        def call():
            with torch.no_grad():
                return block(e, e, freqs, mask, depth)

        return Lap(call)

    depths = QUICK_DEPTHS if session.quick else DEPTHS
    least, most, budget = (2, 3, 2.0) if session.quick else (7, 20, 12.0)
    with session.progress.stage("loop: cost per loop against depth") as tick:
        samples = interleave({str(d): lap(d) for d in depths}, session.clock, least, most, budget, warmup=1, tick=tick)
    # Each depth against the deepest of its own round: the machine's drift cancels.
    per_loop = {d: [s / int(d) for s in values] for d, values in samples.items()}
    deepest = per_loop[str(depths[-1])]
    against = {d: speedup(values, deepest) for d, values in per_loop.items()}
    ratios = [ratio["median"] for ratio in against.values()]
    return {
        "seconds": samples,
        "per_loop": {d: spread(values) for d, values in per_loop.items()},
        "against_deepest": against,
        "spread": max(ratios) / min(ratios) - 1,
    }
