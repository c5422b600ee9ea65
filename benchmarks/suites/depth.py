"""Time against loop depth: training step, prefill and decode, four contenders side by side."""

from __future__ import annotations

import torch

from benchmarks.contenders import LABELS, agreement, build, run_to_full_depth
from benchmarks.models import HEADLINE
from benchmarks.session import Session
from benchmarks.timing import Lap, interleave, speedup, spread

DEPTHS, QUICK_DEPTHS = (1, 2, 4, 8, 16), (1, 4)
TRAIN_TOKENS = 128
PREFILL_TOKENS = 256
CACHED_TOKENS = 512
# Seconds of sampling for each workload at each depth, and the rounds that are taken whatever they cost.
BUDGET_S, LEAST, MOST = 3.0, 3, 15
WORKLOADS = {
    "train": f"training step (1 x {TRAIN_TOKENS} tokens)",
    "prefill": f"prefill ({PREFILL_TOKENS} tokens)",
    "decode": f"decode (1 token, {CACHED_TOKENS} cached)",
}


def run(session: Session) -> dict:
    depths = QUICK_DEPTHS if session.quick else DEPTHS
    names = [name for name in LABELS if not (session.quick and name == "compiled")]
    contenders, missing = build(HEADLINE, names, session.device)
    if session.quick:
        missing["compiled"] = "left out of a quick run: compiling takes longer than that run may"
    bench = Bench(session, contenders, missing)
    seconds: dict = {workload: {} for workload in WORKLOADS}
    for depth in depths:
        for contender in contenders.values():
            run_to_full_depth(contender, depth)
        for workload in WORKLOADS:
            seconds[workload][depth] = bench.measure(workload, depth)
    return {
        "model": HEADLINE,
        "workloads": WORKLOADS,
        "depths": list(depths),
        "missing": missing,
        "notes": {name: contender.note for name, contender in contenders.items()},
        "compile_seconds": bench.compile_seconds,
        "logits_apart": bench.apart,
        "seconds": seconds,
        "medians": nested(seconds, lambda samples: {name: spread(values) for name, values in samples.items()}),
        "speedup": nested(seconds, over_upstream),
        "requirements": [],
    }
