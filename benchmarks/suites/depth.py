"""Time against loop depth: training step, prefill and decode of the four contenders."""

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
# Seconds of sampling for each workload at each depth, and the least and most rounds. Nothing here is a requirement, so
# a slow machine takes LEAST rounds while there is time, and one round after that.
BUDGET_S, LEAST, MOST = 1.5, 3, 15
COMPILING_S = 110  # the compile time on a slow machine; with less time left, the compiled contender is left out
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
        missing["compiled"] = "left out of a quick run, which is shorter than compiling takes"
    elif "compiled" in contenders and session.left() < COMPILING_S:
        del contenders["compiled"]
        missing["compiled"] = "left out: no time left to compile; python -m benchmarks --only depth includes it"
    notes = {name: contender.note for name, contender in contenders.items()}
    workloads = Workloads(session, contenders, missing)
    seconds: dict = {workload: {} for workload in WORKLOADS}
    cells = [(depth, workload) for depth in depths for workload in WORKLOADS]
    for i, (depth, workload) in enumerate(cells):
        for contender in contenders.values():
            run_to_full_depth(contender, depth)
        share = session.left() * (2 + depth) / sum(2 + d for d, _ in cells[i:])  # deeper cells take longer
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


def each(seconds: dict, summarize: Callable[[dict], dict]) -> dict:
    """Applies `summarize` to the samples of every workload and depth."""
    return {work: {depth: summarize(x) for depth, x in by_depth.items()} for work, by_depth in seconds.items()}


def over_upstream(samples: dict[str, list[float]]) -> dict:
    if "upstream" not in samples:
        return {}
    return {name: speedup(samples["upstream"], values) for name, values in samples.items() if name != "upstream"}


class Workloads:
    """Training step, prefill and decode of all contenders, on equal input.

    If the first call of the compiled contender fails, it is removed from `contenders`, and `missing` says why.
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
        """Returns contender -> seconds of interleaved rounds: at least one round, and at most `share` seconds."""
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
        """The contender's lap and the result of its first run, which compiles; None if that run failed."""
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
        # With rate 0 no weight changes, so every contender and depth has the same weights and the same routing.
        run = contender.training(self.train_data, depth, STEPS_AT_MOST, lr=0.0, router_rate=0.0)
        return Lap(lambda: torch.tensor(next(run).loss))

    def _prefill(self, contender: Contender, depth: int) -> Lap:
        return Lap(lambda: contender.prefill(self.prompt, depth))

    def _decode(self, contender: Contender, depth: int) -> Lap:
        token = self.cached[:, -1:]
        cache = contender.cached(self.cached, depth)
        return Lap(lambda: contender.decode(token, cache, depth), cache.rewind)
