"""A training run: from a configuration to a trained model, resumable at any moment."""

from __future__ import annotations

import importlib
import json
import math
import signal
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from tqdm import tqdm

from openmythos.config import MythosConfig, setting
from openmythos.parallel import accumulating, clip_grad_norm_, parallelize, unwrap
from openmythos.parallel import checkpoint as saved
from openmythos.routing import recording_routing, routing_stats
from openmythos.sizes import outline
from openmythos.training.checkpoint import save_checkpoint
from openmythos.training.config import TrainConfig, differences
from openmythos.training.estimate import flops, measured_peak
from openmythos.training.files import replacing
from openmythos.training.log import Log
from openmythos.training.optimizers import Average, make_optimizer
from openmythos.training.ranks import Ranks
from openmythos.training.text import open_text
from openmythos.training.trainer import Step, Trainer, evaluate

CONFIG = "config.json"


class Diverged(ArithmeticError):
    """A run ended because its loss or gradient was not finite for too many steps in a row."""


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        out: folder of the run. steps: those done. finished: whether these are all; False after SIGTERM.
        held_out: loss of held-out text at the end, in nats per token; None if the run did not finish.
        seconds: of training, over all parts of a resumed run.
    """

    out: Path
    steps: int
    finished: bool
    held_out: float | None
    seconds: float


def run(config: TrainConfig) -> Result:
    """Trains a model as `config` says, or goes on where an earlier call was stopped, by whatever.

    In `config.out` it writes config.json, log.jsonl, checkpoints/, and at the end model.pt, which `load_model` reads.
    Under `torchrun` every rank calls it.

    Raises:
        ValueError: naming the key, before anything is trained: what does not fit the model, the text, the ranks or
            the run that is in `out` already.
        Diverged: after `config.patience` steps in a row that were not finite. The last checkpoint stays.
        OSError: what cannot be written; earlier checkpoints stay.
    """
    ranks = Ranks.start(config.device)
    try:
        job = Run(config, ranks)
        result = job.train()
    finally:
        ranks.end()
    if result.finished and ranks.first:
        job.export()
    return result


class Run:
    """The parts of a run, made in order; `train` runs its steps."""

    def __init__(self, config: TrainConfig, ranks: Ranks):
        self.config, self.ranks = config, ranks
        cfg = config.check(ranks.ranks)
        self.out = Path(config.out)
        self.folder = self.out / "checkpoints"
        self.tree = json.loads(json.dumps(asdict(config)))
        self._check_folder()
        text, self.held_out = open_text(config, cfg, ranks)
        self.wrapped = wrapped = build_model(config, cfg, ranks)
        self.model = unwrap(wrapped)
        rounding = config.precision.stochastic_rounding
        self.optimizer = make_optimizer(self.model, config=config.optimizer, stochastic_rounding=rounding)
        self.average = Average(self.model, config.optimizer.ema) if config.optimizer.ema else None
        self.trainer = Trainer(
            wrapped,
            text,
            config.steps,
            optimizer=self.optimizer,
            depth=config.depth if hasattr(self.model, "recurrent") else None,
            loss=config.loss,
            optimization=config.optimizer,
            options={name: True for name, wanted in asdict(config.memory).items() if wanted},
            autocast=config.precision.mode == "autocast",
            accumulate=config.accumulate,
            seed=config.seed,
            rank=ranks.rank,
            ranks=ranks.ranks,
            clip=lambda _, largest: clip_grad_norm_(self.model, largest),
            part=lambda: accumulating(wrapped),
            mean=ranks.mean,
        )
        self.state: dict[str, Any] = {"step": 0, "skipped": 0, "in_a_row": 0, "seconds": 0.0, "flops": 0.0}
        if saved.latest(self.folder) is not None:
            extra = saved.load(self.folder, wrapped, self.optimizer)
            self.state = extra["state"]
            if self.average is not None:
                self.average.load(extra["average"])
        self.work = flops(cfg, config.tokens)
        self.peak = measured_peak(ranks.device, config.precision.products) if ranks.first else math.inf
        self.before, self.began = self.state["seconds"], time.perf_counter()

    def _check_folder(self) -> None:
        """Makes the folder of the run; refuses one that holds another run."""
        path, newest = self.out / CONFIG, saved.latest(self.folder)
        if newest is not None and not self.config.resume:
            raise ValueError(f"resume = False: {self.out} holds checkpoints, {newest.name} the newest; expected none")
        found = differences(json.loads(path.read_text()), self.tree) if newest is not None and path.exists() else []
        if found:
            raise ValueError(f"out = {self.out}: holds another run: {'; '.join(found)}; expected the same")
        self.ranks.wait()  # no rank writes before all have looked
        if self.ranks.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as part:
                part.write_text(json.dumps(self.tree, indent=1) + "\n")
        self.ranks.wait()

    def seconds(self) -> float:
        """Of training, over all parts of a resumed run."""
        return self.before + time.perf_counter() - self.began

    def train(self) -> Result:
        """Runs the steps that are left."""
        config, state = self.config, self.state
        log = self._log() if self.ranks.first else None
        hidden = not (self.ranks.first and config.log.progress)
        held_out = None
        with _signals() as came, tqdm(total=config.steps, initial=state["step"], disable=hidden, unit="step") as bar:
            while state["step"] < config.steps:
                record = self.trainer.step(state["step"])
                self._count(record)
                if log is not None and (record.step % config.log.every == 0 or record.skipped):
                    self._record(log, bar, record)
                bar.update()
                if state["in_a_row"] >= config.patience:
                    raise Diverged(self._diverged())
                last = record.step == config.steps
                if last or _due(record.step, config.evaluation.every):
                    held_out = self._evaluate(log, bar)
                stop = self.ranks.any(bool(came))
                # A state that may be broken replaces none that is good.
                if (last or stop or _due(record.step, config.checkpoint.every)) and not state["in_a_row"]:
                    self.save()
                if stop:
                    break
            saved.finish()
            finished = state["step"] == config.steps
            if finished and held_out is None:  # resumed at its end, where the log has the loss already
                held_out = self._evaluate(None, bar)
        if log is not None:
            log.close()
        return Result(self.out, state["step"], finished, held_out, self.seconds())

    def save(self) -> None:
        """Writes a checkpoint."""
        self.state["seconds"] = self.seconds()
        extra = {"state": dict(self.state)} | ({} if self.average is None else {"average": self.average.weights})
        asked, step = self.config.checkpoint, self.state["step"]
        saved.save(self.folder, self.wrapped, self.optimizer, extra, step, keep=asked.keep, wait=not asked.asynchronous)

    def _log(self) -> Log:
        how = {name: getattr(self.config.log, name) for name in ("tensorboard", "wandb")}
        return Log(self.out, self.state["step"], config=self.tree, **how)

    def _count(self, record: Step) -> None:
        state = self.state
        state["step"] = record.step
        state["skipped"] += int(record.skipped)
        state["in_a_row"] = state["in_a_row"] + 1 if record.skipped else 0
        state["flops"] += self._flops(record)
        if self.average is not None and not record.skipped:
            self.average.update(record.step - 1)

    def _flops(self, record: Step) -> float:
        """Those of a step, over all ranks."""
        graded = self.config.depth.gradient_loops
        each = self.config.loss.predicts_each
        return self.work.training(record.depth, graded, each) * self.config.batch * self.config.tokens

    def _record(self, log: Log, bar: tqdm, record: Step) -> None:
        tokens = self.config.batch * self.config.tokens
        mfu = self._flops(record) * record.tokens_per_second / tokens / (self.peak * self.ranks.ranks)
        line: dict[str, Any] = {**record._asdict(), **record.parts}
        del line["parts"]
        line |= {"tokens": record.step * tokens, "seconds": round(self.seconds(), 3), "flops": self.state["flops"]}
        line |= {"mfu": round(mfu, 4), "skipped": self.state["skipped"]}
        if _due(record.step, self.config.log.routing_every):
            line["routing"] = self._routing()
        log.write({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()})
        skipped = f" skipped {self.state['skipped']}" if self.state["skipped"] else ""
        depth = f" depth {record.depth:.1f}" if record.depth else ""
        rate = f"{record.tokens_per_second:.0f} tok/s mfu {mfu:.0%}"
        bar.set_postfix_str(f"loss {record.loss:.3f}{depth} {rate}{skipped}")

    @torch.no_grad()
    def _routing(self) -> dict[str, Any]:
        """Of held-out text: by layer the balance of its experts and their overlap between neighbouring loops; and where
        positions halt, the mean number of loops that they run."""
        ids, training, found = self.held_out[0][0], self.model.training, {}
        halts = hasattr(self.model, "recurrent") and setting(self.model.cfg, "halting") != "off"
        self.model.eval()
        with recording_routing(self.model):
            out = self.model(ids, **self._evaluated(), **({"return_ponder": True} if halts else {}))
        self.model.train(training)
        if halts:
            found["depth"] = (out[1].ceil() - 1).mean().item()  # N + R with 0 < R <= 1
        for name, stats in routing_stats(self.model).items():
            overlap = [stats.overlap[t, t + 1].item() for t in range(len(stats.entropy) - 1)]
            found[name] = {"entropy": stats.entropy.tolist(), "overlap": overlap}
        return found

    def _evaluate(self, log: Log | None, bar: tqdm) -> float:
        with self._averaged():
            loss = evaluate(
                self.model,
                self.held_out,
                self.config.evaluation.batches,
                **self._evaluated(),
                bf16=self.config.precision.mode == "autocast",
                chunk=self.config.loss.chunk,
                mean=self.ranks.mean,
            )
        if log is not None:
            log.write({"step": self.state["step"], "held_out": loss})
            if not bar.disable:
                bar.write(f"step {self.state['step']}: held-out loss {loss:.4f} nats per token")
        return loss

    def _evaluated(self) -> dict[str, Any]:
        """The model's arguments in evaluation."""
        return {"n_loops": self.config.depth.evaluation_loops} if hasattr(self.model, "recurrent") else {}

    def export(self) -> None:
        """Writes model.pt, of the averaged weights if there are any. One process does it, alone."""
        plan = self.config.parallel
        if plan.shard > 1 or plan.expert > 1:  # this rank has a part of the model, the checkpoint all of it
            saved.export(self.folder, self.out / "model.pt")
            return
        with self._averaged():
            save_checkpoint(self.out / "model.pt", self.model, step=self.state["step"])

    @contextmanager
    def _averaged(self):
        """The model has the averaged weights inside, if there are any."""
        if self.average is None:
            yield
            return
        self.average.swap()
        try:
            yield
        finally:
            self.average.swap()

    def _diverged(self) -> str:
        return (
            f"step {self.state['step']}: {self.state['in_a_row']} steps in a row had a loss or gradient that is not "
            f"finite; the newest checkpoint is {saved.latest(self.folder) or 'none'}"
        )


def build_model(config: TrainConfig, cfg: MythosConfig, ranks: Ranks) -> nn.Module:
    """The model of a run on this rank, ready to train; its initial weights depend on the seed alone."""
    model = outline(cfg)
    if config.precision.mode == "bf16":
        model = model.to(torch.bfloat16)
    trains_halting = config.loss.prior_weight > 0
    wrapped = parallelize(model, config.parallel, device=ranks.device, seed=config.seed, trains_halting=trains_halting)
    if config.fast:
        # The reference knows the fast modules by name alone, here and in `load_run`.
        importlib.import_module("openmythos_kernels").accelerate(unwrap(wrapped))
    return wrapped


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@contextmanager
def _signals():
    """A list that is empty until SIGTERM or SIGINT comes; a second one acts as it would without."""
    came: list[int] = []
    before: dict[int, Any] = {}

    def note(number, frame):
        came.append(number)
        signal.signal(number, before[number])

    try:
        for number in map(int, (signal.SIGTERM, signal.SIGINT)):
            before[number] = signal.signal(number, note)
    except ValueError:  # not the main thread: signals are its business
        pass
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
