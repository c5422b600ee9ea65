"""Time against loop depth: training step, prefill and decode, four contenders side by side."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.contenders import LABELS, Contender, build, check_agreement, run_to_full_depth
from benchmarks.models import HEADLINE
from benchmarks.session import Session
from benchmarks.timing import Lap, interleave, speedup, spread

DEPTHS, QUICK_DEPTHS = (1, 2, 4, 8, 16), (1, 4)
TRAIN_TOKENS = 128
PREFILL_TOKENS = 256
CACHED_TOKENS = 512
# Seconds of sampling for each workload at each depth, and rounds: nothing here is a requirement, so that on a slow
# machine the least are taken as long as there is time, and then one.
BUDGET_S, LEAST, MOST = 1.5, 3, 15
COMPILING_S = 110  # a slow machine compiles for so long, and is left to measure the others where it cannot afford it
STEPS_AT_MOST = 1 + MOST
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
    elif "compiled" in contenders and session.left() < COMPILING_S:
        del contenders["compiled"]
        missing["compiled"] = "left out: no time to compile on this machine; python -m benchmarks --only depth has it"
    notes = {name: contender.note for name, contender in contenders.items()}
    workloads = Workloads(session, contenders, missing)
    seconds: dict = {workload: {} for workload in WORKLOADS}
    cells = [(depth, workload) for depth in depths for workload in WORKLOADS]
    for i, (depth, workload) in enumerate(cells):
        for contender in contenders.values():
            run_to_full_depth(contender, depth)
        share = session.left() * (2 + depth) / sum(2 + d for d, _ in cells[i:])  # what is deeper takes longer
        seconds[workload][depth] = workloads.measure(workload, depth, share)
    return {
        "model": HEADLINE,
        "workloads": WORKLOADS,
        "depths": list(depths),
        "missing": missing,
        "notes": notes,
        "seconds_until_compiled": workloads.first_call_s.get("compiled"),
        "results_apart": workloads.apart,
        "seconds": seconds,
        "median": each(seconds, lambda samples: {name: spread(values) for name, values in samples.items()}),
        "speedup": each(seconds, over_upstream),
        "requirements": [],
    }


def each(seconds: dict, summarise: Callable[[dict], dict]) -> dict:
    """Applies `summarise` to the samples of every workload and depth."""
    return {work: {depth: summarise(x) for depth, x in by_depth.items()} for work, by_depth in seconds.items()}


def over_upstream(samples: dict[str, list[float]]) -> dict:
    if "upstream" not in samples:
        return {}
    return {name: speedup(samples["upstream"], values) for name, values in samples.items() if name != "upstream"}


class Workloads:
    """Training step, prefill and decode of all contenders, on equal input.

    A contender whose first call of a workload fails (compilers do) leaves `contenders`
    for good, and `missing` says why.
    """

    def __init__(self, session: Session, contenders: dict[str, Contender], missing: dict[str, str]):
        self.session = session
        self.contenders = contenders
        self.missing = missing
        self.first_call_s = dict.fromkeys(contenders, 0.0)
        self.apart: dict[str, dict] = {workload: {} for workload in WORKLOADS}
        self.train_data = session.batches(1, TRAIN_TOKENS)
        self.prompt = session.batches(1, PREFILL_TOKENS)[0][0]
        self.cached = session.batches(1, CACHED_TOKENS)[0][0]

    def measure(self, workload: str, depth: int, share: float) -> dict[str, list[float]]:
        """contender -> seconds, sampled side by side, for `share` seconds at most where that is longer than one
        round."""
        label = f"depth {depth:2}: {WORKLOADS[workload]}"
        with self.session.progress.stage(label) as tick:
            laps, results = {}, {}
            for name in list(self.contenders):
                warmed = self._warm(name, workload, depth)
                if warmed is not None:
                    laps[name], results[name] = warmed
                tick()
            self.apart[workload][depth] = check_agreement(results)
            budget, most = (0.5, 3) if self.session.quick else (BUDGET_S, MOST)
            clock = self.session.clock
            samples = interleave(laps, clock, 1, 1, 0, warmup=0, tick=tick)
            round_s = sum(map(sum, samples.values()))
            least = LEAST - 1 if share > LEAST * round_s else 0
            more = interleave(laps, clock, least, most - 1, min(budget, share) - round_s, warmup=0, tick=tick)
            return {name: samples[name] + more[name] for name in samples}

    def _warm(self, name: str, workload: str, depth: int):
        """The contender's lap, run once (which compiles what is to be compiled), and what that gave; None if it
        failed."""
        start = time.monotonic()
        try:
            lap = getattr(self, f"_{workload}")(self.contenders[name], depth)
            result = lap.run()
            if lap.reset is not None:
                lap.reset()
        except Exception as error:
            if name != "compiled":
                raise
            self.missing[name] = f"{workload} at depth {depth}: {type(error).__name__}: {str(error).splitlines()[0]}"
            del self.contenders[name]
            return None
        self.first_call_s[name] += time.monotonic() - start
        return lap, result

    def _train(self, contender: Contender, depth: int) -> Lap:
        # Nothing moves, so that every contender and depth meets the same weights and the same routing.
        run = contender.training(self.train_data, depth, STEPS_AT_MOST, lr=0.0, router_rate=0.0)
        return Lap(lambda: torch.tensor(next(run).loss))

    def _prefill(self, contender: Contender, depth: int) -> Lap:
        return Lap(lambda: contender.prefill(self.prompt, depth))

    def _decode(self, contender: Contender, depth: int) -> Lap:
        token = self.cached[:, -1:]
        cache = contender.cached(self.cached, depth)
        return Lap(lambda: contender.decode(token, cache, depth), cache.rewind)
