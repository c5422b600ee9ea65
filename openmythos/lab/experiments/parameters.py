"""E7: how many parameters a dense model needs for a looped model's loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from openmythos.lab.experiment import Experiment, Result, Run, Settings, Verdict
from openmythos.lab.statistics import bootstrap, seeds_said
from openmythos.lab.text import TRAININGS, changed, config, each_training, left_over, loss_of, trained
from openmythos.sizes import measure
from openmythos.training.estimate import flops

LONGER = 2  # times the steps, for a dense model to spend about what a looped one does


def scale(
    name: str, training: Mapping[str, Any], looped: Sequence[int], dense: Sequence[int], layers: int, batches: int
) -> dict[str, Any]:
    """Settings: `looped` and `dense` are widths; `layers` those of a dense model, as many as a looped one has."""
    base = changed(TRAININGS[name], **training)
    loops = base["model"]["max_loop_iters"]

    def wide(dim: int) -> dict[str, Any]:
        return {"dim": dim, "ffn_dim": dim * 8 // 3}

    trainings = {}
    for dim in looped:
        depth = {"sampling": "fixed", "mean": loops}
        trainings[f"looped-{dim}"] = changed(base, model=wide(dim), depth=depth)
    for dim in dense:
        for times in (1, LONGER):
            model = {**wide(dim), "n_layers": layers}
            one = {**changed(base, model=model, steps=times * base["steps"]), "depth": None}
            trainings[f"dense-{dim}-data{times}"] = one
    return {"trainings": trainings, "reading": {"rows": base["batch"], "batches": batches}}


_TINY = {
    "model": {"max_seq_len": 64, "qk_rope_head_dim": 8},
    "steps": 400,
    "batch": 16,
    "tokens": 64,
    "fast": False,  # the plain modules are quicker at these widths
}

SCALES = {
    "smoke": scale("smoke", {"steps": 10, "fast": False}, [16, 24], [16, 24, 32], 3, 2),
    "small": scale("small", _TINY, [32, 48, 64, 96], [32, 56, 88, 136], 3, 32),
    "medium": scale("medium", {}, [256, 384, 512, 768], [256, 448, 704, 1088], 6, 16),
    "large": scale("large", {}, [512, 768, 1024, 1536], [512, 896, 1408, 2176], 12, 16),
}


def runs(settings: Settings, seeds: Sequence[int]) -> list[Run]:
    return each_training(compute, settings, seeds, ["reading"], lambda name, training: {"kind": name.split("-")[0]})


def compute(settings: Settings, tick: Callable[[int, int], None]) -> dict[str, Any]:
    training = settings["training"]
    model, record = trained(training, tick)
    return {
        **record,
        "loss": loss_of(model, training, settings["reading"]),
        "tokens": training["steps"] * training["batch"] * training["tokens"],
    }


class Ladder(NamedTuple):
    """Runs of one kind, (n,) each: parameters, tokens, FLOPs, held-out loss."""

    parameters: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray
    loss: np.ndarray


def ladder(results: Sequence[Result], kind: str) -> Ladder:
    mine = [one.found for one in results if one.settings["kind"] == kind]
    names = ("parameters", "tokens", "flops", "loss")
    return Ladder(*(np.array([one[name] for one in mine], dtype=float) for name in names))


def _basis(parameters: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """(n, 4): a parabola in log parameters and a line in log tokens, which describe a ladder of this length."""
    n = np.log(parameters / 1e5)
    return np.stack([np.ones_like(n), n, n**2, np.log(tokens / 1e6)], axis=1)


class Need(NamedTuple):
    """Of each looped run, (n,) each: parameters of the dense model with its loss over its own, at equal data and at
    equal FLOPs; and whether the dense model at equal data is larger than any that was trained."""

    data: np.ndarray
    flops: np.ndarray
    beyond: np.ndarray


class Comparison:
    """Two ladders, and what a dense model needs for each looped run's loss.

    Args:
        per_token: parameters of dense models -> FLOPs of training on a token.
    """

    def __init__(self, looped: Ladder, dense: Ladder, per_token: Callable[[np.ndarray], np.ndarray]):
        self.looped, self.dense = looped, dense
        self.sizes = np.geomspace(dense.parameters.min() / 4, dense.parameters.max() * 4, 600)
        self._fitting = np.linalg.pinv(_basis(dense.parameters, dense.tokens))
        self._at_data = np.stack([_basis(self.sizes, np.full_like(self.sizes, n)) for n in looped.tokens])
        self._at_flops = np.stack([_basis(self.sizes, spent / per_token(self.sizes)) for spent in looped.flops])

    def needed(self, looped_loss: np.ndarray, dense_loss: np.ndarray) -> Need:
        """With these losses, (n,) each, in place of the ladders' own."""
        fit = self._fitting @ dense_loss
        data, equal = (self._first_below(basis @ fit, looped_loss) for basis in (self._at_data, self._at_flops))
        beyond = data > self.dense.parameters.max() * 1.001
        return Need(data / self.looped.parameters, equal / self.looped.parameters, beyond)

    def _first_below(self, curves: np.ndarray, losses: np.ndarray) -> np.ndarray:
        """(n,): the least size whose predicted loss, of curves (n, sizes), is not above; an end if none is between."""
        over = curves - losses[:, None]
        below = over <= 0
        below[:, -1] = True
        last = below.argmax(1)
        row, first = np.arange(len(losses)), np.maximum(last - 1, 0)
        drop = over[row, first] - over[row, last]
        part = np.clip(over[row, first] / np.where(drop > 0, drop, 1.0), 0, 1)  # of the step between the two sizes
        part = np.where(last == 0, 0.0, part)
        return np.exp((1 - part) * np.log(self.sizes[first]) + part * np.log(self.sizes[last]))

    def intervals(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Bootstrap intervals of the mean ratio at equal data and at equal FLOPs.

        What the ladders' smooth curves leave over is drawn again.
        """
        count = len(self.looped.loss)
        # One fit for both kinds: their noise is the same, and each alone leaves few degrees of freedom.
        basis = np.zeros((count + len(self.dense.loss), 7))
        basis[:count, :3] = _basis(self.looped.parameters, self.looped.tokens)[:, :3]
        basis[count:, 3:] = _basis(self.dense.parameters, self.dense.tokens)
        fitted, rest = left_over(np.concatenate((self.looped.loss, self.dense.loss)), basis)

        def interval(which: int) -> tuple[float, float]:
            def ratio(drawn: np.ndarray) -> float:
                loss = fitted + drawn
                return mean_ratio(self.needed(loss[:count], loss[count:])[which])

            return bootstrap(ratio, rest.tolist())

        return interval(0), interval(1)


def mean_ratio(ratios: np.ndarray) -> float:
    return float(np.exp(np.log(ratios).mean()))


def judge(settings: Settings, results: Sequence[Result]) -> Verdict:
    columns = ["model", "parameters", "seed", "tokens", "FLOPs", "loss"]
    rows = [
        [one.key.rsplit("-seed", 1)[0], one.found["parameters"], one.settings["seed"], one.found["tokens"]]
        + [f"{one.found['flops']:.2e}", round(one.found["loss"], 4)]
        for one in results
    ]
    wanted = len(settings["trainings"])
    seeds = sorted({one.settings["seed"] for one in results})
    whole = [s for s in seeds if sum(one.settings["seed"] == s for one in results) == wanted]
    if not whole:
        return Verdict("undecided", "No seed has both ladders yet.", {}, columns, rows)
    counted = [one for one in results if one.settings["seed"] in whole]
    looped, dense = ladder(counted, "looped"), ladder(counted, "dense")
    if not np.isfinite([*looped.loss, *dense.loss]).all():
        return Verdict("undecided", "A loss of the ladders is not finite.", {}, columns, rows)
    comparison = Comparison(looped, dense, dense_flops(settings))
    need = comparison.needed(looped.loss, dense.loss)
    (low, high), (low_equal, high_equal) = comparison.intervals()
    ratio, equal = mean_ratio(need.data), mean_ratio(need.flops)
    spent = float(np.median(looped.flops / looped.parameters) / np.median((dense.flops / dense.parameters)[::2]))
    figures: dict[str, float | None] = {
        "ratio": ratio,
        "low": low,
        "high": high,
        "ratio_equal_flops": equal,
        "low_equal_flops": low_equal,
        "high_equal_flops": high_equal,
        "looped_flops_per_parameter": spent,
    }
    because = (
        f"At equal data a dense model needs {ratio:.2f} times a looped model's parameters for its loss (95 % interval "
        f"{low:.2f} to {high:.2f}); at equal FLOPs {equal:.2f} times ({low_equal:.2f} to {high_equal:.2f}). The looped "
        f"models spend {spent:.1f} times the FLOPs per parameter and token. {seeds_said(len(whole))}."
    )
    if need.beyond.any():
        because += f" {int(need.beyond.sum())} of {len(need.beyond)} are extrapolated beyond the largest dense model."
    return Verdict("holds" if low > 1 else "rejected", because, figures, columns, rows)


def dense_flops(settings: Settings) -> Callable[[np.ndarray], np.ndarray]:
    """Parameters of a dense model of the ladder -> FLOPs of training on a token, interpolated in logarithms."""
    pairs = {}
    for name, training in settings["trainings"].items():
        if name.startswith("dense") and name.endswith("data1"):
            cfg = config(training)
            cost = flops(cfg, training["tokens"])
            pairs[_parameters(cfg)] = cost.training(0.0, None)
    x, y = np.log(sorted(pairs)), np.log([pairs[n] for n in sorted(pairs)])
    slope, start = np.polyfit(x, y, 1)
    return lambda parameters: np.exp(start + slope * np.log(parameters))


def _parameters(cfg: Any) -> int:
    return measure(cfg).parameters


def draw(settings: Settings, results: Sequence[Result], axes: Any) -> None:
    marks = {"looped": ("o", "tab:blue"), "dense": ("s", "tab:orange")}
    for kind, (mark, color) in marks.items():
        mine = [one for one in results if one.settings["kind"] == kind]
        for times in sorted({one.found["tokens"] for one in mine}):
            same = sorted((o for o in mine if o.found["tokens"] == times), key=lambda one: one.found["parameters"])
            x, y = [o.found["parameters"] for o in same], [o.found["loss"] for o in same]
            first = times == min(one.found["tokens"] for one in results)
            label = f"{kind}, {times / 1e6:.2g} million tokens"
            axes.plot(x, y, mark + ("-" if first else ":"), color=color, mfc=color if first else "none", label=label)
    axes.set(xscale="log", xlabel="parameters", ylabel="loss, nats per token")
    if results:
        axes.legend()


EXPERIMENT = Experiment(
    name="parameters",
    number="E7",
    title="Parameters",
    claim="A looped model reaches the loss of a dense model with more parameters on the same data.",
    rule="Rejected if the 95 % bootstrap interval of the parameter ratio, dense over looped at equal loss and "
    "equal data, includes 1 or lies below. The ratio at equal FLOPs stands beside it and decides nothing.",
    limits="Small models and little data, where more parameters cannot show all they can hold. Equal data is not "
    "equal compute: the looped models spend about twice as much on a token. The pair that Parcae published "
    "(arXiv 2604.12946) reads: 770M looped against 1.3B dense, Core 25.07 against 25.45, perplexity 12.49 "
    "against 11.95, on equal data; a pair of that shape (rdt_770m, dense_1_3b) spends 1.9 times the dense "
    "model's training FLOPs on a token with gradients through all 8 loops, 1.4 times with gradients through "
    "4.",
    scales=SCALES,
    seeds=3,
    runs=runs,
    judge=judge,
    draw=draw,
)
