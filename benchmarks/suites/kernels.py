"""Each kernel family alone on a GPU, in bfloat16 at mythos_1b's sizes, against open-mythos, PyTorch and the roofline.

`upstream` is open-mythos' module or chain. `pytorch` is the fastest composition of PyTorch ops that computes the same:
torch.compile for the loop step, scaled_dot_product_attention for attention, grouped_mm for experts. A time is the
device's time for several calls from Python, per call, so either the device or Python may be the limit. Rows named
`graph` replay the calls as one CUDA graph, which leaves the time of the device alone. The bound is the bandwidth of a
copy or the rate of a large bfloat16 product, both measured on this GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import openmythos
from benchmarks.session import Session
from benchmarks.suites import loop
from benchmarks.timing import Lap, interleave, speedup, without_gradients
from benchmarks.upstream import load_upstream
from openmythos import KVCache
from openmythos.attention import CausalMask
from openmythos.layers import rotary_table
from openmythos.variants import mythos_1b
from openmythos_kernels import accelerate
from openmythos_kernels.ops import mla
from openmythos_kernels.runtime import unproven
from openmythos_kernels.runtime.backends import forcing, unavailable

DTYPE = torch.bfloat16
STEP_ROWS, STEP_DIM = 8192, 2048
PASSES = {"forward": 7, "forward + backward": 19}  # over (rows, dim): 7 forward, 12 backward
ATTENTION = ((4, 2048), (2, 4096))  # batch, tokens
DECODE = ((1, 4096), (64, 4096))  # batch, cached tokens
EXPERTS = (1, 64, 4096)  # tokens
COPY_BYTES, GEMM_SIZE = 1 << 30, 8192
SECONDS = 0.7  # of sampling per row
SAMPLE = 30e-3  # seconds of calls per sample, but at most MOST calls; the first of them waits for Python
MOST = 10
STEP_WAYS = ("cuda", "cuda, unproven", "triton", "triton, unproven")  # of the loop step
GRAPHED = ("ours", "pytorch", *STEP_WAYS)  # can be captured; open-mythos' experts wait for the device
# The largest relative difference, in Frobenius norm. Rounding stays far below, unless it routes a token to another
# expert.
APART = 0.1


@dataclass
class Row:
    """Seconds per contender, and the seconds that the work takes at least."""

    name: str
    seconds: dict[str, list[float]]
    bound: float
    bound_is: str
    missing: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict:
        ours = median(self.seconds["ours"])
        over = {name: speedup(times, self.seconds["ours"]) for name, times in self.seconds.items() if name != "ours"}
        fastest = min(ours, median(self.seconds.get("ours, graph", [ours])))
        return dict(
            name=self.name,
            medians={name: median(times) for name, times in self.seconds.items()},
            over=over,
            share=self.bound / fastest,
            bound_is=self.bound_is,
            missing=self.missing,
            seconds=self.seconds,
        )


class Bench:
    """Times rows, and holds the two measured rates of the machine."""

    def __init__(self, session: Session):
        self.session = session
        source = torch.randn(COPY_BYTES // 4, device=session.device)
        target = torch.empty_like(source)
        a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE, device=session.device, dtype=DTYPE) for _ in range(2))
        laps = {"copy": Lap(lambda: target.copy_(source)), "product": Lap(lambda: a @ b)}
        times = interleave(laps, session.clock, 5, 20, SECONDS, warmup=2)
        self.bandwidth = 2 * COPY_BYTES / median(times["copy"])  # bytes/s, read and written
        self.flops = 2 * GEMM_SIZE**3 / median(times["product"])
        self.rows: list[Row] = []

    def measure(
        self, name: str, calls: dict[str, Callable], *, bytes_: float = 0, flops: float = 0, graphs=(), missing=()
    ):
        """Adds a row; the calls of contenders in `graphs` are also replayed as a CUDA graph."""
        with self.session.progress.stage(f"kernels: {name}") as tick:
            results = {who: first([call() for _ in range(3)][-1]) for who, call in calls.items()}
            for who, result in results.items():
                apart = float((result - results["ours"]).norm() / results["ours"].norm())
                if not apart < APART:
                    raise ArithmeticError(f"{name}: {who} is {apart:.2g} (relative) off ours: not measured")
            each = {who: min(MOST, max(1, int(SAMPLE / self.session.clock(call)))) for who, call in calls.items()}
            laps = {who: Lap(several(call, each[who])) for who, call in calls.items()}
            for who in set(graphs) & set(calls):
                each[f"{who}, graph"] = MOST
                laps[f"{who}, graph"] = Lap(captured(several(calls[who], MOST)))
            seconds = interleave(laps, self.session.clock, 3, 100, SECONDS, warmup=1, tick=tick)
        seconds = {who: [s / each[who] for s in samples] for who, samples in seconds.items()}
        by_bytes, by_flops = bytes_ / self.bandwidth, flops / self.flops
        bound_is = "bandwidth" if by_bytes >= by_flops else "matrix products"
        self.rows.append(Row(name, seconds, max(by_bytes, by_flops), bound_is, dict(missing)))


def several(call: Callable[[], object], times: int) -> Callable[[], None]:
    def calls() -> None:
        for _ in range(times):
            call()

    return calls


def first(result: object) -> Tensor:
    return (result if isinstance(result, Tensor) else result[0]).detach().float().flatten()


def captured(call: Callable[[], object]) -> Callable[[], object]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def run(session: Session) -> dict:
    if session.device.type != "cuda":
        return {"rows": [], "missing": "these rows need a GPU", "requirements": []}
    bench = Bench(session)
    cfg = mythos_1b()
    measure_step(bench)
    measure_attention(bench, cfg)
    measure_decode(bench, cfg)
    measure_experts(bench, cfg)
    return {
        "dtype": "bfloat16",
        "copy_gb_per_s": bench.bandwidth / 1e9,
        "tflop_per_s": bench.flops / 1e12,
        "rows": [row.as_dict() for row in bench.rows],
        "requirements": [],
    }


def measure_step(bench: Bench) -> None:
    """The fused loop step: `ours` is the backend that is chosen; every backend that can run is timed by name, too."""
    device = bench.session.device
    ours, theirs, why = loop.make_blocks(device, STEP_DIM)
    ours.to(DTYPE)
    chains, missing, blocks = {"ours": loop.our_chain(ours)}, {}, {"ours": ours}
    if theirs is None:
        missing = {"upstream": why, "pytorch": why}
    else:
        theirs.to(DTYPE)
        chains["upstream"] = loop.upstream_chain(theirs)
        chains["pytorch"] = torch.compile(loop.upstream_chain(theirs))
        blocks |= {"upstream": theirs, "pytorch": theirs}

    @contextlib.contextmanager
    def forced(name: str):
        backend, _, rest = name.partition(", ")
        with forcing(backend), unproven.allowing() if rest else contextlib.nullcontext():
            yield

    def by(name: str) -> Callable:
        def chain(*args):
            with forced(name):
                return chains["ours"](*args)

        return chain

    ways = [name for name in STEP_WAYS if not unavailable("loop_step", name.partition(", ")[0], "cuda")]
    chains |= {name: by(name) for name in ways}
    blocks |= dict.fromkeys(ways, ours)
    states = [torch.randn(1, STEP_ROWS, STEP_DIM, device=device, dtype=DTYPE) for _ in range(4)]
    cumulative_p = torch.rand(1, STEP_ROWS, device=device)
    inputs = (*states, cumulative_p, cumulative_p > 0.9)
    leaves = [x.clone().requires_grad_() for x in inputs[:5]] + [inputs[5]]
    grads = [torch.randn_like(x) for x in states[:3]]

    def forward(chain):
        with torch.no_grad():
            return chain(*inputs)

    def both(name: str):
        parameters = [p for k, p in blocks[name].named_parameters() if not k.startswith("block.")]
        chain = chains[name]

        def call():
            h, h_out, _, _, u = chain(*leaves)
            with forced(name) if name in ways else contextlib.nullcontext():
                return torch.autograd.grad((h, h_out, u), [*leaves[:5], *parameters], grads)

        return call

    size = f"{STEP_ROWS} x {STEP_DIM}"
    passes = STEP_ROWS * STEP_DIM * DTYPE.itemsize
    bench.measure(
        f"loop step {size}, forward",
        {n: lambda c=c: forward(c) for n, c in chains.items()},
        bytes_=PASSES["forward"] * passes,
        missing=missing,
        graphs=GRAPHED,
    )
    bench.measure(
        f"loop step {size}, forward + backward",
        {n: both(n) for n in chains},
        bytes_=PASSES["forward + backward"] * passes,
        missing=missing,
        graphs=GRAPHED,
    )


def measure_attention(bench: Bench, cfg) -> None:
    """Causal attention on projected queries and keys; the time of PyTorch includes concatenating its keys."""
    for B, T in ATTENTION:
        attention_rows(bench, cfg, B, T)


def attention_rows(bench: Bench, cfg, B: int, T: int) -> None:
    H, nope, rope, v = cfg.n_heads, cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
    shapes = (B, T, H, nope), (B, T, H, rope), (B, T, H, nope + v), (B, T, rope)
    inputs = [torch.randn(*s, device=bench.session.device, dtype=DTYPE).requires_grad_() for s in shapes]
    grad = torch.randn(B, T, H, v, device=bench.session.device, dtype=DTYPE)
    calls = {"ours": lambda: mla.attention(*inputs)[0], "pytorch": lambda: sdpa(*inputs, nope, v)}
    forward = {name: without_gradients(call) for name, call in calls.items()}
    flops = 2 * B * H * T * T / 2 * (nope + rope + v)
    bench.measure(f"attention, {B} x {T}, forward", forward, flops=flops, graphs=GRAPHED)
    both = {n: lambda c=c: torch.autograd.grad(c(), inputs, grad) for n, c in calls.items()}

    def once():
        with unproven.allowing():
            return both["ours"]()

    both["triton, unproven"] = once
    bench.measure(f"attention, {B} x {T}, forward + backward", both, flops=3.5 * flops, graphs=GRAPHED)


def sdpa(q_nope: Tensor, q_rope: Tensor, kv: Tensor, k_rope: Tensor, nope: int, v: int) -> Tensor:
    k_nope, value = kv.split([nope, v], -1)
    k = torch.cat((k_nope, k_rope.unsqueeze(2).expand(-1, -1, kv.shape[2], -1)), -1)
    q = torch.cat((q_nope, q_rope), -1)
    value = F.pad(value, (0, q.shape[-1] - v))  # flash attention requires equal widths
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, value)), is_causal=True)
    return out[..., :v].transpose(1, 2)


def measure_decode(bench: Bench, cfg) -> None:
    """A whole attention layer for one token per row."""
    device = bench.session.device
    reference = openmythos.MLAttention(cfg).to(device, DTYPE)
    theirs, missing = None, {}
    try:
        theirs = load_upstream().MLAttention(cfg).to(device, DTYPE)
        theirs.load_state_dict(reference.state_dict())
    except ImportError as error:
        missing["upstream"] = str(error)
    ours = accelerate(reference).eval()
    for B, cached in DECODE:
        decode_row(bench, cfg, B, cached, ours, theirs, missing)


def decode_row(bench: Bench, cfg, B: int, cached: int, ours: nn.Module, theirs: nn.Module | None, missing: dict):
    device = bench.session.device
    weights = sum(p.numel() for p in ours.parameters()) * DTYPE.itemsize
    table = rotary_table(cfg.qk_rope_head_dim, cfg.max_seq_len + 1, cfg.rope_theta).to(device)
    x = torch.randn(B, 1, cfg.dim, device=device, dtype=DTYPE)
    cache = KVCache(cached + 1)
    with torch.no_grad():
        ours(torch.randn(B, 8, cfg.dim, device=device, dtype=DTYPE), table[:8], CausalMask(0, 8), cache, "layer")
    entry = cache["layer"]
    for tensor in entry.tensors.values():
        tensor.normal_()
    # open-mythos caches latents before their norm: with unit rows, the norm changes nothing.
    entry.tensors["latent"] *= entry.tensors["latent"].square().mean(-1, keepdim=True).rsqrt()
    freqs = table[cached : cached + 1]

    def our_step():
        entry.lengths = [cached] * B
        return ours(x, freqs, CausalMask(cached, 1), cache, "layer")

    calls = {"ours": without_gradients(our_step)}
    if theirs is not None:
        held = dict(
            c_kv=entry.tensors["latent"][:, :cached].clone(),
            k_rope=entry.tensors["k_rope"][:, :cached].unsqueeze(2).repeat(1, 1, cfg.n_heads, 1),
        )
        calls["upstream"] = without_gradients(lambda: theirs(x, freqs, None, {"layer": dict(held)}, "layer"))
    row = cfg.kv_lora_rank + cfg.qk_rope_head_dim
    bytes_ = weights + B * cached * row * DTYPE.itemsize
    flops = 2 * B * cfg.n_heads * cached * (row + cfg.kv_lora_rank) + weights * B
    bench.measure(
        f"decode layer, {B} x 1, {cached} cached", calls, bytes_=bytes_, flops=flops, graphs=GRAPHED, missing=missing
    )


def measure_experts(bench: Bench, cfg) -> None:
    device, missing = bench.session.device, {}
    fields = dict(
        dim=cfg.dim,
        expert_dim=cfg.expert_dim,
        n_experts=cfg.n_experts,
        n_experts_per_tok=cfg.n_experts_per_tok,
        n_shared_experts=cfg.n_shared_experts,
    )
    with torch.device(device):
        layer = openmythos.MoEFFN(SimpleNamespace(**fields)).to(DTYPE)
    for p in layer.parameters():
        nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    stacked = Stacked(layer)
    contenders = {"pytorch": stacked, "ours": accelerate(layer)}
    try:
        upstream = load_upstream()
        with torch.device(device):
            theirs = upstream.MoEFFN(upstream.MythosConfig(**fields)).to(DTYPE)
        theirs.load_state_dict(layer.state_dict())
        contenders["upstream"] = theirs
    except ImportError as error:
        missing["upstream"] = str(error)
    for tokens in EXPERTS:
        experts_rows(bench, cfg, tokens, contenders, missing)


def experts_rows(bench: Bench, cfg, tokens: int, contenders: dict[str, nn.Module], missing: dict) -> None:
    x = torch.randn(1, tokens, cfg.dim, device=bench.session.device, dtype=DTYPE, requires_grad=True)
    dy = torch.randn_like(x)
    with torch.no_grad():
        used = contenders["ours"].route(x[0])[0].unique().numel()
    shared = cfg.n_experts_per_tok * cfg.expert_dim * cfg.n_shared_experts
    bytes_ = 3 * cfg.dim * (used * cfg.expert_dim + shared) * DTYPE.itemsize
    flops = 2 * tokens * 3 * cfg.dim * (cfg.n_experts_per_tok * cfg.expert_dim + shared)
    at = f"experts, {tokens} token{'s' * (tokens > 1)}"
    forward = {n: without_gradients(partial(m, x)) for n, m in contenders.items()}
    bench.measure(f"{at}, forward", forward, bytes_=bytes_, flops=flops, graphs=GRAPHED, missing=missing)

    def both(module: nn.Module) -> Callable:
        wanted = [x, *module.parameters()]
        return lambda: torch.autograd.grad(module(x), wanted, dy, allow_unused=True)

    every = 3 * cfg.dim * (cfg.n_experts * cfg.expert_dim + shared) * DTYPE.itemsize
    both_bytes = 2 * bytes_ + every  # the chosen weights are read twice, the gradients of all weights are written
    calls = {n: both(m.train()) for n, m in contenders.items()}
    bench.measure(
        f"{at}, forward + backward", calls, bytes_=both_bytes, flops=3 * flops, graphs=GRAPHED, missing=missing
    )
    for module in contenders.values():
        module.eval()


class Stacked(nn.Module):
    """A layer with stacked experts, computed by `torch._grouped_mm` on tokens sorted by expert; the shared experts are
    merged into one."""

    def __init__(self, layer: openmythos.MoEFFN):
        super().__init__()
        self.router, self.topk, self.n_experts = layer.router, layer.topk, layer.n_experts
        self.router_bias = layer.router_bias
        self.gate, self.up, self.down = (
            nn.Parameter(torch.stack([getattr(e, n).weight for e in layer.routed_experts]))
            for n in ("gate", "up", "down")
        )
        self.s_gate, self.s_up = (
            nn.Parameter(torch.cat([getattr(e, n).weight for e in layer.shared_experts])) for n in ("gate", "up")
        )
        self.s_down = nn.Parameter(torch.cat([e.down.weight for e in layer.shared_experts], 1))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        expert_idx, topk_weights = openmythos.MoEFFN.route(self, flat)
        chosen, order = expert_idx.flatten().sort()
        ends = torch.searchsorted(chosen, torch.arange(self.n_experts, device=x.device), right=True).to(torch.int32)
        rows = flat[order // self.topk]
        gate, up = (torch._grouped_mm(rows, w.transpose(1, 2), ends) for w in (self.gate, self.up))
        y = torch._grouped_mm(F.silu(gate) * up, self.down.transpose(1, 2), ends)
        y = y * topk_weights.flatten()[order].unsqueeze(-1)
        out = F.linear(F.silu(F.linear(flat, self.s_gate)) * F.linear(flat, self.s_up), self.s_down)
        return out.index_add(0, order // self.topk, y).view_as(x)
