"""E3: adaptive computation time as the public package has it, without it, and repaired."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from openmythos.lab.experiment import Experiment, Result, Run, Settings, Verdict
from openmythos.lab.experiments import hops
from openmythos.lab.statistics import summary
from openmythos.lab.tasks.chaser import Chaser

SETTINGS = ("nodes", "trained", "rows", "steps", "lr", "warmup", "curriculum", "questions")
REPAIRED = "repaired"
PUBLISHED = dict(halting="evolve", act_remainder="drop", halt_bias=0.0)
VARIANTS = {
    # The public package's update and ACT; what it has beside (experts, LoRA) is left out, as in E1.
    "published": dict(injection="mythos", **PUBLISHED),
    # Its ACT with the update that E1 finds to work, so that nothing but ACT is between this one and the next.
    "published-concat": dict(injection="concat", **PUBLISHED),
    "without": dict(injection="concat", halting="off"),
    # Trained without ACT, then tuned with it: a halting probability that begins at 0.05 a loop, what halts freezes, and
    # the last loop gets all that is left.
    REPAIRED: dict(injection="concat", halting="off", act_remainder="last", halt_bias=-3.0),
}


def _scale(scale: str, **changes: Any) -> dict[str, Any]:
    base = hops.SCALES[scale]
    return {
        **{name: base[name] for name in SETTINGS},
        "model": base["model"],
        "variants": VARIANTS,
        "tune": {"steps": 300, "lr": 1e-3},
        "asked": 4,
        "loops": [2, 3, 4, 6, 8, 12, 16, 24],
        **changes,
    }


SCALES = {
    "smoke": _scale("smoke", asked=2, loops=[2, 3, 4], steps=150, tune={"steps": 20, "lr": 1e-3}),
    "small": _scale("small"),
    "medium": _scale("medium"),
    "large": _scale("large"),
}


def runs(settings: Settings, seeds: Sequence[int]) -> list[Run]:
    """Every variant with the first seed, then with the next."""
    shared = {k: v for k, v in settings.items() if k != "variants"}
    return [
        Run(f"{name}-seed{seed}", {**shared, "name": name, "model": {**shared["model"], **change}, "seed": seed}, train)
        for seed in seeds
        for name, change in settings["variants"].items()
    ]


def train(settings: Settings, tick: Callable[[int, int], None]) -> dict[str, Any]:
    """Trains as E1 does, and tunes with ACT what is to be repaired; accuracies by number of hops, and the loss at
    `asked` hops by number of loops."""
    chaser, steps, tune = Chaser(settings), settings["steps"], settings["tune"]
    repairs = settings["name"] == REPAIRED
    total = steps + tune["steps"] * repairs
    for step in chaser.train(steps):
        tick(step, total)
    if repairs:
        chaser.options["exit"] = "act"
        for step in chaser.tune(**tune):
            tick(steps + step, total)
    accuracy = {str(k): chaser.accuracy(k) for k in [*range(1, settings["trained"] + 1), 2 * settings["trained"]]}
    losses = {str(n): chaser.loss(settings["asked"], n) for n in settings["loops"]}
    return {"accuracy": accuracy, "losses": losses, "parameters": chaser.parameters}


# The thresholds of claim and rule.
FLAT = 1e-3  # nats
EXCEEDS = 0.9
SEEDS_TO_REJECT = 2


def judge(settings: Settings, results: Sequence[Result]) -> Verdict:
    """See `EXPERIMENT.rule`."""
    asked = str(settings["asked"])
    of = {name: [r for r in results if r.settings["name"] == name] for name in settings["variants"]}
    accuracy = {name: [r.found["accuracy"][asked] for r in some] for name, some in of.items()}
    ranges = {name: [_range(r) for r in some] for name, some in of.items()}
    medians = {name: summary(values).median for name, values in accuracy.items() if values}
    spread = {name: summary(values).median for name, values in ranges.items() if values}
    exceeding = sum(value > EXCEEDS for value in accuracy["published"])
    figures: dict[str, float | None] = {}
    for name in settings["variants"]:
        figures[f"{name}: accuracy at {asked} hops"] = medians.get(name)
        figures[f"{name}: range of the loss"] = spread.get(name)
    flat = bool(ranges["published"]) and max(ranges["published"]) < FLAT
    work = all(medians.get(name, 0.0) > EXCEEDS and spread.get(name, 0.0) >= FLAT for name in ("without", REPAIRED))
    if exceeding >= SEEDS_TO_REJECT:
        outcome = "rejected"
    elif flat and work and not exceeding:
        outcome = "holds"
    else:
        outcome = "undecided"
    said = "; ".join(f"{name} {medians[name]:.3f} and {spread[name]:.2g} nats" for name in medians)
    because = f"accuracy at {asked} hops and range of the loss over loops (medians): {said or 'none yet'}"
    columns = ["variant", "seed", *(f"k = {k}" for k in _hops(settings)), "range of the loss"]
    columns += [f"loss, {n} loops" for n in settings["loops"]]
    rows = [
        [r.settings["name"], r.settings["seed"], *(r.found["accuracy"][k] for k in _hops(settings)), _range(r)]
        + [r.found["losses"][str(n)] for n in settings["loops"]]
        for r in results
    ]
    return Verdict(outcome, because, figures, columns, rows)  # type: ignore[arg-type]


def _hops(settings: Settings) -> list[str]:
    return [str(k) for k in [*range(1, settings["trained"] + 1), 2 * settings["trained"]]]


def _range(result: Result) -> float:
    losses = result.found["losses"].values()
    return max(losses) - min(losses)


def draw(settings: Settings, results: Sequence[Result], axes: Any) -> None:
    """The loss by number of loops, a line for each variant and seed."""
    for colour, name in enumerate(settings["variants"]):
        for i, result in enumerate(r for r in results if r.settings["name"] == name):
            line = [result.found["losses"][str(n)] for n in settings["loops"]]
            axes.plot(settings["loops"], line, "-o", ms=3, color=f"C{colour}", label=name if i == 0 else None)
    axes.axvline(settings["asked"], color="grey", ls=":", lw=1)
    axes.set(xlabel="loops", ylabel=f"loss at {settings['asked']} hops, nats", xscale="log")
    axes.set_xticks(settings["loops"], [str(n) for n in settings["loops"]])
    axes.minorticks_off()
    axes.legend(fontsize=8)


EXPERIMENT = Experiment(
    name="act",
    number="E3",
    title="Adaptive computation time as published",
    claim="With the public package's ACT the loss does not depend on the number of loops (its range over 2 to 24 "
    "loops is below 0.001 nats) and pointer chasing fails. Without ACT neither is so, nor with ACT repaired: a model "
    "trained without it is tuned with it, halting begins at a probability of 0.05, what halts freezes, and the last "
    "loop gets all that is left.",
    rule="The public package's ACT answers 4 hops with an accuracy above 0.9 in two of five seeds.",
    limits="One synthetic task at toy width, without experts and LoRA, from one initialization and learning rate. ACT "
    "might work with another; the claim is of what the package ships. The models without ACT and with the repaired one "
    "have the update of E1's best variant; the package's update rarely learns this task in so few steps even without "
    "ACT, so that its failure has two causes, of which published-concat separates one.",
    scales=SCALES,
    seeds=5,
    runs=runs,
    judge=judge,
    draw=draw,
)
