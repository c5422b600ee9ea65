"""Bytes that the Triton kernels move, counted in Triton's interpreter: no time is measured and no GPU needed.

Loads are counted wherever they would be served from: what a GPU's caches spare is not taken off.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable

import torch

from benchmarks.session import Requirement, Session
from openmythos import variants
from openmythos_kernels.ops.moe import moe_experts
from openmythos_kernels.runtime import backends
from openmythos_kernels.verify.specification import Inputs, Specification
from openmythos_kernels.verify.specs import loop_step as step_spec
from openmythos_kernels.verify.specs import mla_attention as attention_spec
from openmythos_kernels.verify.specs import moe_experts as experts_spec
from openmythos_kernels.verify.traffic import Launch, traffic

HELD_WHOLE = ("mythos_1b", "mythos_3b", "mythos_10b")
CACHE = dict(heads=16, latent=256, rope=32, capacity=4096, held=4000)  # heads and widths of mythos_1b
DECODING = {"16 rows": 16, "one row": 1}
EXPERTS = dict(tokens=1, dim=64, inner=32, experts=8, k=2, shared=1)


def run(session: Session) -> dict:
    missing = "" if importlib.util.find_spec("triton") else "triton is not installed"
    with session.progress.stage("traffic: bytes moved by the Triton kernels"):
        found = {} if missing else _in_the_interpreter()
    wide = f"{found['wide']['backward']:.3g} where rows are wider" if found else ""
    alone = f"{found['one row']['read']:.3g} for one row, whose keys more programs divide" if found else ""
    rows = []

    def row(name: str, required: float, key: str, work: str, unit: str, detail: str = "") -> None:
        value = found[key][work] if found else None
        rows.append(Requirement(name, required, value, unit, timing=False, higher=False, detail=missing or detail))

    for variant in HELD_WHOLE:
        row(f"Triton loop step forward, {variant}", 7, variant, "forward", "passes over (N, D)")
        row(f"Triton loop step backward, {variant}", 12, variant, "backward", "passes over (N, D)", wide)
    row("Triton decoding, bytes read by 16 rows of 4000 tokens", 1.1, "16 rows", "read", "x their cache", alone)
    row("Triton experts at one token, bytes read", 1.1, "moe_experts", "read", "x the chosen weights")
    return {"missing": missing, "found": found, "requirements": [r.as_dict() for r in rows]}


def _in_the_interpreter() -> dict:
    """`measure()` of another process, as Triton decides when it is imported whether it interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "benchmarks.suites.traffic"]
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure() -> dict[str, dict[str, float]]:
    dims = {name: variants.VARIANTS[name]().dim for name in HELD_WHOLE}
    steps = {name: loop_step(dim) for name, dim in (*dims.items(), ("wide", 2 * max(dims.values())))}
    decoding = {name: {"read": cache_read(rows)} for name, rows in DECODING.items()}
    return {**steps, **decoding, "moe_experts": {"read": weights_read()}}


def loop_step(dim: int) -> dict[str, float]:
    """Passes over tensors with a row per position."""
    d = step_spec.SPECIFICATION
    inputs = _inputs(d, dict(tokens=3, dim=dim, rank=2))
    leaves = {name: inputs[name].requires_grad_() for name in d.differentiable}
    with backends.forcing("triton"):
        with traffic() as forward:
            outputs = d.fast(**{**inputs, **leaves})
        graded = [x for x in outputs.values() if x.requires_grad]
        with traffic() as backward:
            torch.autograd.grad(graded, list(leaves.values()), [torch.ones_like(x) for x in graded])

    def passes(launches: list[Launch]) -> float:
        pairs = ((x, name) for x in launches for name, size in x.sizes.items() if size == inputs["h"].nbytes)
        return sum(x.loaded.get(name, 0) + x.stored.get(name, 0) for x, name in pairs) / inputs["h"].nbytes

    return {"forward": passes(forward), "backward": passes(backward)}


def cache_read(rows: int) -> float:
    """All loads of attention over latents, over the bytes that the rows hold."""
    d = next(d for d in attention_spec.SPECIFICATIONS if d.name == "mla_attend_latent")
    inputs = _inputs(d, dict(CACHE, rows=rows))
    held = rows * CACHE["held"] * (inputs["latent_cache"][0, 0].nbytes + inputs["rope_cache"][0, 0].nbytes)
    return _loaded(d.fast, inputs) / held


def weights_read() -> float:
    """All loads of the mixture at one token, over the bytes of its K experts' weights and the shared expert's."""
    d = next(d for d in experts_spec.SPECIFICATIONS if d.name == "moe_experts")
    inputs = _inputs(d, EXPERTS)
    lists = [value for value in inputs.values() if isinstance(value, list)]
    routed, shared = (sum(x[0].nbytes for x in lists if len(x) == n) for n in (EXPERTS["experts"], EXPERTS["shared"]))
    with torch.no_grad():
        return _loaded(moe_experts, inputs) / (EXPERTS["k"] * routed + EXPERTS["shared"] * shared)


def _inputs(d: Specification, sizes: dict) -> Inputs:
    return d.make(sizes, torch.float16, torch.device("cpu"), torch.Generator().manual_seed(0))


def _loaded(call: Callable, inputs: Inputs) -> int:
    with backends.forcing("triton"), traffic() as launches:
        call(**inputs)
    return sum(x.bytes_loaded for x in launches)


if __name__ == "__main__":
    json.dump(measure(), sys.stdout)
