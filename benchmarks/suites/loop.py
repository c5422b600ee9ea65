"""What the loop costs apart from its transformer block: the fused step, exact trimming, and time against depth.

The step is everything in a loop but the transformer block: loop embedding, norm, LoRA, injection and halting. It is
timed on random states of 4096 tokens and 1024 channels. `upstream` is the chain of open-mythos' modules, `compiled` is
the same chain under torch.compile, and `copy` moves as many bytes as the step in its seven passes over (N, D).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

import openmythos
from benchmarks.apart import apart
from benchmarks.session import Requirement, Session, speed_requirement
from benchmarks.timing import Lap, interleave, speedup, spread
from benchmarks.upstream import load_upstream
from openmythos import MythosConfig
from openmythos.layers import rotary_table
from openmythos.recurrence import ACTState
from openmythos_kernels import accelerate
from openmythos_kernels import nn as fast

ROWS, DIM = 4096, 1024
PASSES_FORWARD = 7
# The samples of the step are pooled over several processes, since the share of open-mythos' temporaries that malloc
# keeps, instead of getting them from the system again, differs between processes.
PROCESSES, ROUNDS = 7, 12
# work and contender -> required speedup of ours over that contender
BARS = {
    ("forward", "upstream"): 8.0,
    ("forward", "compiled"): 1.5,
    ("forward + backward", "upstream"): 5.0,
    ("forward + backward", "compiled"): 1.3,
}
NAMES = {"upstream": "open-mythos' chain", "compiled": "open-mythos' chain, compiled"}
HALTING = dict(loops=16, halt_at=4, sequences=8, tokens=64, dim=512)
DEPTHS, QUICK_DEPTHS = (1, 2, 4, 8, 16, 32), (1, 8)
FLAT = 0.05


def run(session: Session) -> dict:
    rows, step = [], {}

    def row(name: str, required: float, ratio: dict | None, unit: str, higher: bool = True, why: str = "") -> None:
        rows.append(speed_requirement(name, required, ratio, unit, why, higher))

    with session.progress.stage("loop: each row in a separate process", len(BARS) + 3) as tick:
        step["share"] = apart(measure_share, session)
        tick()
        for (work, other), bar in BARS.items():
            parts = [apart(measure_step, session, work, other) for _ in range(1 if session.quick else PROCESSES)]
            samples, why = {name: [s for part, _ in parts for s in part[name]] for name in parts[0][0]}, parts[0][1]
            step[f"{work}, {other}"] = samples
            row(f"loop step {work}", bar, over(samples, other, "ours"), f"x {NAMES[other]}", why=why)
            tick()
        trimming = apart(measure_trimming, session)
        tick()
        depth = apart(measure_depth, session)
        tick()
    share = over(step["share"], "copy", "ours")
    row(f"share of copy bandwidth at {PASSES_FORWARD} passes", 0.7, share, "of copy")
    row(
        "half of the sequences halt at loop 4 of 16",
        0.7,
        over(trimming, "trimmed", "whole"),
        "of untrimmed time",
        False,
    )
    flat = Requirement(
        f"cost per loop, depths {DEPTHS[0]} .. {DEPTHS[-1]}", FLAT, depth["spread"], "apart", timing=True, higher=False
    )
    return {
        "rows": ROWS,
        "dim": DIM,
        "step": step,
        "trimming": trimming,
        "depth": depth,
        "requirements": [r.as_dict() for r in (*rows, flat)],
    }


def over(samples: dict[str, list[float]], slow: str, fast_: str) -> dict | None:
    return speedup(samples[slow], samples[fast_]) if slow in samples else None


# The step alone


def make_blocks(device: torch.device, dim: int = DIM) -> tuple[fast.RecurrentBlock, nn.Module | None, str]:
    """Our block and open-mythos' with equal parameters; None and the reason if open-mythos is not available."""
    cfg = MythosConfig(
        vocab_size=8,
        dim=dim,
        n_heads=1,
        n_kv_heads=1,
        max_seq_len=8,
        max_loop_iters=16,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=2,
        qk_nope_head_dim=2,
        v_head_dim=2,
        n_experts=1,
        n_experts_per_tok=1,
        n_shared_experts=0,
        expert_dim=2,
        lora_rank=8,
    )
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
    names = set(upstream.MythosConfig.__dataclass_fields__)
    theirs = upstream.RecurrentBlock(upstream.MythosConfig(**{k: v for k, v in vars(cfg).items() if k in names}))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs.to(device), ""


def upstream_chain(block: nn.Module) -> Callable[..., tuple[Tensor, ...]]:
    """One loop of open-mythos' block without its transformer block, up to the input of the next loop."""
    embed = load_upstream().loop_index_embedding

    def chain(
        h: Tensor, e: Tensor, f: Tensor, h_out: Tensor, cumulative_p: Tensor, halted: Tensor
    ) -> tuple[Tensor, ...]:
        h = block.injection(h, e, f + block.lora(f, 1))
        p = block.act(h)
        running = (~halted).float()
        weight = (
            torch.where(cumulative_p + p >= block.cfg.act_threshold, (1.0 - cumulative_p).clamp(min=0), p) * running
        )
        h_out = h_out + weight.unsqueeze(-1) * h
        cumulative_p = cumulative_p + p * running
        return (
            h,
            h_out,
            cumulative_p,
            halted | (cumulative_p >= block.cfg.act_threshold),
            block.norm(embed(h, 2, block.loop_dim) + e),
        )

    return chain


def our_chain(block: fast.RecurrentBlock) -> Callable[..., tuple[Tensor, ...]]:
    def chain(
        h: Tensor, e: Tensor, f: Tensor, h_out: Tensor, cumulative_p: Tensor, halted: Tensor
    ) -> tuple[Tensor, ...]:
        state = ACTState(h_out, cumulative_p, ~halted, cumulative_p)
        h, state, u = block.step(h, e, None, f, state, 1, False)
        return h, state.h_out, state.cumulative_p, ~state.running, u

    return chain


def random_states(device: torch.device) -> tuple[Tensor, ...]:
    """h, e, f, h_out, cumulative_p, and which positions have halted."""
    generator = torch.Generator(device).manual_seed(0)
    states = [torch.randn(1, ROWS, DIM, device=device, generator=generator) for _ in range(4)]
    cumulative_p = torch.rand(1, ROWS, device=device, generator=generator)
    return (*states, cumulative_p, cumulative_p > 0.9)


def measure_step(session: Session, work: str, other: str) -> tuple[dict[str, list[float]], str]:
    """Returns seconds of ours and of one other contender, or why that is missing. This process does nothing else."""
    ours, theirs, missing = make_blocks(session.device)
    laps = {"ours": Lap(working(work, our_chain(ours), ours))}
    if other == "compiled" and session.quick:
        missing = "left out of a quick run"
    elif theirs is not None:
        chain = upstream_chain(theirs)
        laps[other] = Lap(working(work, torch.compile(chain) if other == "compiled" else chain, theirs))
    if other == "compiled" and other in laps:
        try:
            compiled = laps[other].run()
            if work == "forward":
                torch.testing.assert_close(compiled, laps["ours"].run(), rtol=1e-3, atol=1e-3)
        except torch._dynamo.exc.TorchDynamoException as error:
            missing = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            del laps[other]
    return sampled(session, laps, ROUNDS), missing


def working(work: str, chain: Callable, block: nn.Module) -> Callable[[], object]:
    """A call of the chain: the forward alone, or with the gradients of all inputs and parameters."""
    inputs = random_states(block.act.halt.weight.device)
    if work == "forward":
        return torch.no_grad()(lambda: chain(*inputs))
    leaves = [x.requires_grad_() for x in inputs[:5]]
    grads = [torch.randn_like(x) for x in inputs[:3]]
    parameters = [p for k, p in block.named_parameters() if not k.startswith("block.")]

    def both() -> None:
        h, h_out, _, _, u = chain(*inputs)
        torch.autograd.grad((h, h_out, u), [*leaves, *parameters], grads)

    return both


def measure_share(session: Session) -> dict[str, list[float]]:
    """Returns seconds of ours and of copying as many bytes as it moves; checks ours against open-mythos first."""
    ours, theirs, _ = make_blocks(session.device)
    inputs = random_states(session.device)
    with torch.no_grad():
        if theirs is not None:
            expected = upstream_chain(theirs)(*inputs)
            for got, right in zip(our_chain(ours)(*inputs), expected):
                torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-3)
    # Ones, since unwritten zeros would all be read from one page.
    source = torch.ones(PASSES_FORWARD * ROWS * DIM // 2, device=session.device)
    target = torch.zeros_like(source)
    laps = {"copy": Lap(lambda: target.copy_(source)), "ours": Lap(working("forward", our_chain(ours), ours))}
    return sampled(session, laps)


def sampled(session: Session, laps: dict[str, Lap], rounds: int = 30) -> dict[str, list[float]]:
    least, most, budget = (3, 5, 2.0) if session.quick else (2 * rounds // 3, rounds, 4.0)
    return interleave(laps, session.clock, least, most, budget, warmup=3)


# The whole block


def make_whole(dim: int, tokens: int, device: torch.device) -> tuple[fast.RecurrentBlock, Tensor]:
    """A block with a dense core, whose halting logit is channel 0 of its input, and the rotary table."""
    cfg = MythosConfig(
        vocab_size=8,
        dim=dim,
        n_heads=8,
        n_kv_heads=1,
        max_seq_len=tokens,
        max_loop_iters=16,
        kv_lora_rank=128,
        q_lora_rank=256,
        qk_rope_head_dim=32,
        qk_nope_head_dim=32,
        v_head_dim=64,
        lora_rank=8,
        core_ffn="dense",
    )
    block = openmythos.RecurrentBlock(cfg)
    with torch.no_grad():
        block.norm.weight[0] = 0.0
        block.lora.B[:, 0] = 0.0
        block.block.attn.wo.weight[0] = 0.0
        block.block.ffn.down.weight[0] = 0.0  # channel 0 of the block's output is 0
        block.injection.log_A[0] = 30.0  # A = 0: the previous state does not count either
        block.injection.B[0] = 1.0
        block.act.halt.weight.zero_()
        block.act.halt.weight[0, 0] = 1.0
        block.act.halt.bias.zero_()
    return accelerate(block.to(device)), rotary_table(32, tokens, 10000.0).to(device)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def measure_trimming(session: Session) -> dict[str, list[float]]:
    """Returns seconds of the whole block with and without trimming; half of the sequences halt at loop 4 of 16."""
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
    least, most, budget = (2, 3, 2.0) if session.quick else (9, 30, 15.0)
    return interleave(laps, session.clock, least, most, budget)


def measure_depth(session: Session) -> dict:
    """Returns seconds per loop of the whole block at several depths, and how far apart the medians are.

    No position halts. All turns run the same number of loops, in one call or in several, since short turns are noisy.
    """
    block, freqs = make_whole(HALTING["dim"], HALTING["tokens"], session.device)
    e = torch.randn(HALTING["sequences"], HALTING["tokens"], HALTING["dim"], device=session.device)
    e[..., 0] = logit(1e-3)
    mask = openmythos.attention.CausalMask(0, HALTING["tokens"])
    depths = QUICK_DEPTHS if session.quick else DEPTHS

    def lap(depth: int) -> Lap:
        def call():
            with torch.no_grad():
                for _ in range(depths[-1] // depth):
                    block(e, e, freqs, mask, depth)

        return Lap(call)

    least, most, budget = (2, 3, 2.0) if session.quick else (9, 60, 120.0)
    samples = interleave({str(d): lap(d) for d in depths}, session.clock, least, most, budget)
    # Each depth is compared with the deepest of the same round, so that drift cancels.
    deepest = samples[str(depths[-1])]
    against = {d: speedup(values, deepest) for d, values in samples.items()}
    ratios = [ratio["median"] for ratio in against.values()]
    return {
        "per_loop": {d: spread([s / depths[-1] for s in values]) for d, values in samples.items()},
        "against_deepest": against,
        "spread": max(ratios) / min(ratios) - 1,
    }
