"""Compute that follows depth: what halted positions, exits and the engine save, against the ideal."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F

from benchmarks.forced_depth import force_depths, geometric_depths
from benchmarks.models import HEADLINE
from benchmarks.session import Requirement, Session, speed_requirement
from benchmarks.timing import Lap, interleave, speedup
from openmythos import KVCache, MythosConfig, OpenMythos
from openmythos.ragged import RAGGED_KEY
from openmythos.training import make_optimizer
from openmythos_kernels import accelerate
from openmythos_kernels.serve import Engine, Speculation, speculative_stream

LOOPS, MEAN = 16, 4.0
SLOTS, REQUESTS, NEW = 16, 64, 32
PROMPT, TRAIN, CACHED = (8, 256), (2, 256), 512
DRAFT = (1, 4)  # loops of a draft, drafted tokens
TRAIN_STEPS = 120
PASSAGE = 1024  # bytes that so few steps learn in part; of the whole text they learn its most frequent byte


def run(session: Session) -> dict:
    models = Models(session)
    result: dict = {"model": HEADLINE, "mean_depth": models.mean_depth}
    rows = []
    for name, least in (("prompt", 1 / 0.34), ("train", 1 / 0.42), ("decode", 3.0)):
        with session.progress.stage(f"depth_saved: {name}") as tick:
            samples = interleave(models.laps(name), session.clock, *_rounds(session), warmup=1, tick=tick)
        saved, ideal = (speedup(samples["all"], samples[which]) for which in ("ours", "mean"))
        result[name] = {"seconds": samples, "speedup": saved, "speedup_of_mean": ideal}
        detail = f"4 loops for all: {ideal['median']:.3g}; "
        rows.append(speed_requirement(f"{name}, mean depth 4 of 16", least, saved, "x all 16 loops", detail=detail))
    with session.progress.stage("depth_saved: caches"):
        result["cache"] = models.caches()
    for kept, most in (("each", 0.27), ("last", 0.07)):
        share = result["cache"][kept] / result["cache"]["all"]
        rows.append(Requirement(f'looped cache, loops="{kept}"', most, share, "x all 16 loops", False, higher=False))
    with session.progress.stage("depth_saved: engine") as tick:
        result["engine"] = engine = models.engine(*_rounds(session), tick)
    rows.append(speed_requirement("engine", 2.0, engine["speedup"], "x lock-step batches of 16"))
    rows.append(speed_requirement("engine", 1.0, engine["speedup_over_all_loops"], "x batches through all loops"))
    name = "engine, share of slots / tick / mean depth"
    rows.append(Requirement(name, 0.85, engine["of_ideal"], "of the ideal", timing=True))
    result["speculation"] = {}
    for name, text in {"text": session.text, "passage": session.text[:PASSAGE]}.items():
        with session.progress.stage(f"depth_saved: self-speculation, {name}") as tick:
            spoken = speculation(session, text, *_rounds(session), tick)
        result["speculation"][name] = spoken
        # A model that repeats one byte drafts it right every time: what others gain is in the row of the passage.
        detail = f"{spoken['tokens_a_round']:.1f} tokens a round, {spoken['bytes']} different ones; "
        row = f"self-speculation, {name}"
        rows.append(Requirement(f"{row}: greedy tokens that differ", 0, spoken["differ"], "", False, False))
        rows.append(speed_requirement(row, 1.8, spoken["speedup"], "x plain decoding", detail=detail))
    result["requirements"] = [row.as_dict() for row in rows]
    return result


def _rounds(session: Session) -> tuple[int, int, float]:
    """Least and most rounds, and seconds after which no more begin."""
    return (2, 3, 2.0) if session.quick else (5, 15, 20.0)


class Models:
    """The headline's model with positions of geometric depths, and the same where every position runs all loops."""

    def __init__(self, session: Session):
        torch.manual_seed(0)
        model = OpenMythos(MythosConfig(**HEADLINE, halting="freeze"))
        depths = geometric_depths(model.cfg.vocab_size, MEAN, LOOPS)
        self.mean_depth = depths.double().mean().item()
        deep = OpenMythos(MythosConfig(**HEADLINE))
        deep.load_state_dict(model.state_dict())
        force_depths(model, depths)
        force_depths(deep, torch.full_like(depths, 10**6))
        self.ours, self.all = (accelerate(m.to(session.device)).eval() for m in (model, deep))
        draw = torch.Generator().manual_seed(0)
        vocab = model.cfg.vocab_size
        self.ids = {
            name: torch.randint(vocab, shape, generator=draw).to(session.device)
            for name, shape in {"prompt": PROMPT, "train": (TRAIN[0], TRAIN[1] + 1), "decode": (1, CACHED)}.items()
        }
        self.prompts = [torch.randint(vocab, (2,), generator=draw).tolist() for _ in range(REQUESTS)]
        # Tokens that are fed, whatever the models predict, so that all see the same depths: geometric, with this mean.
        fed = torch.arange(32) * vocab // 32 + vocab // 64
        self.tokens = depths.argsort(stable=True)[fed][torch.randperm(32, generator=draw)][None].to(session.device)

    def laps(self, name: str) -> dict[str, Lap]:
        """Ours, all loops, and the mean depth for every position: as many loops, without the cost of choosing rows."""
        contender = getattr(self, f"_{name}")
        return {
            "ours": contender(self.ours, LOOPS),
            "all": contender(self.all, LOOPS),
            "mean": contender(self.all, int(MEAN)),
        }

    def _prompt(self, model, loops: int) -> Lap:
        return Lap(torch.no_grad()(lambda: model(self.ids["prompt"], n_loops=loops)))

    def _train(self, model, loops: int) -> Lap:
        ids = self.ids["train"]

        def step() -> None:
            model.train()
            model.zero_grad()
            F.cross_entropy(model(ids[:, :-1], n_loops=loops).flatten(0, 1), ids[:, 1:].flatten()).backward()
            model.eval()

        return Lap(step, model.zero_grad)

    def _decode(self, model, loops: int) -> Lap:
        cache = KVCache(CACHED + self.tokens.shape[1])
        with torch.no_grad():
            model(self.ids["decode"], kv_cache=cache, n_loops=loops)
        token = model.decoder(cache, n_loops=loops)  # as `generate` decodes

        @torch.no_grad()
        def decode() -> None:
            for ids in self.tokens.split(1, 1):
                token(ids)

        return Lap(decode, lambda: cache.truncate([CACHED]))

    @torch.no_grad()
    def caches(self) -> dict[str, int]:
        """Bytes of the looped layers' caches after the prompt."""
        found = {}
        for name, model, cache in (
            ("each", self.ours, KVCache()),
            ("last", self.ours, KVCache(loops="last")),
            ("all", self.all, KVCache(PROMPT[1])),
        ):
            model(self.ids["prompt"], kv_cache=cache)
            looped = [entry for key, entry in cache.items() if key.startswith(RAGGED_KEY)]
            found[name] = sum(entry.nbytes() for entry in looped)
        return found

    def engine(self, least: int, most: int, budget_s: float, tick) -> dict:
        """Tokens per second of the engine, and of `generate` on batches of as many rows, for the same requests.

        A batch of `lock_step` waits for its deepest row; rows that have halted are not computed. One of `all_loops`
        runs every loop for every row.
        """
        options = dict(temperature=4.0, top_k=0)  # close to uniform: tokens of all depths follow each other
        engine = Engine(self.ours, slots=SLOTS)
        depths: list[int] = []
        ticks: list[float] = []

        def served() -> None:
            handles = [engine.submit(p, NEW, seed=i, **options) for i, p in enumerate(self.prompts)]
            more = True
            while more:
                full = engine.active == SLOTS
                start = time.perf_counter()
                more = engine.step()
                if full and engine.active == SLOTS:
                    ticks.append(time.perf_counter() - start)
            depths[:] = [d for handle in handles for d in handle.depths]

        def generated(model) -> None:
            for first in range(0, REQUESTS, SLOTS):
                model.generate(torch.tensor(self.prompts[first : first + SLOTS]), NEW, seed=first, **options)

        laps = {
            "engine": Lap(served),
            "lock_step": Lap(partial(generated, self.ours)),
            "all_loops": Lap(partial(generated, self.all)),
        }
        samples = interleave(laps, _wall, least, most, budget_s, warmup=1, tick=tick)
        tick_s, mean = median(ticks), sum(depths) / len(depths)
        per_s = len(depths) / median(samples["engine"])  # of all tokens that went through the loop
        return {
            "seconds": samples,
            "speedup": speedup(samples["lock_step"], samples["engine"]),
            "speedup_over_all_loops": speedup(samples["all_loops"], samples["engine"]),
            "mean_depth": mean,
            "tick_s": tick_s,
            "tokens_per_s": per_s,
            "of_ideal": per_s / (SLOTS / tick_s / mean),
        }


def speculation(session: Session, text: torch.Tensor, least: int, most: int, budget_s: float, tick) -> dict:
    """Self-speculation of a model trained at random depths on a text, against plain decoding."""
    torch.manual_seed(0)
    fields = {**HEADLINE, "halting": "off", "max_seq_len": 512}
    model = accelerate(OpenMythos(MythosConfig(**fields)))
    optimizer = make_optimizer(model)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    data, draw = replace(session, text=text).batches(4, 64), torch.Generator().manual_seed(0)
    model.train()
    for step in range(20 if session.quick else TRAIN_STEPS):
        x, y = data[step]
        loops = int(torch.randint(1, LOOPS + 1, (1,), generator=draw))
        optimizer.zero_grad()
        F.cross_entropy(model(x, n_loops=loops).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
        tick()
    model.eval()
    prompt = data[TRAIN_STEPS + 1][0][0].tolist()
    streams: dict[str, Speculation] = {}
    found: dict[str, list[int]] = {}

    def spoken(name: str, draft: tuple[int, int]) -> None:
        options = dict(n_loops=LOOPS, temperature=0, speculate=draft)
        streams[name] = speculative_stream(model, prompt, 64, **options)
        found[name] = list(streams[name])

    laps = {"plain": Lap(partial(spoken, "plain", (1, 0))), "speculative": Lap(partial(spoken, "speculative", DRAFT))}
    samples = interleave(laps, _wall, least, most, budget_s, warmup=1, tick=tick)
    differ = sum(a != b for a, b in zip(found["plain"], found["speculative"]))
    drafts = streams["speculative"]
    return {
        "seconds": samples,
        "speedup": speedup(samples["plain"], samples["speculative"]),
        "differ": differ,
        "tokens_a_round": 1 + drafts.accepted / drafts.rounds,
        "bytes": len(set(found["plain"])),
    }


def _wall(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
