"""The two figures, drawn with matplotlib for a light and a dark theme."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import accumulate
from statistics import median

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks.contenders import LABELS
from benchmarks.report.theme import COLORS

# Shorter than the tables' labels, since they stand beside the lines.
SHORT = {"upstream": "open-mythos", "reference": "reference", "compiled": "torch.compile", "ours": "ours"}
LABEL_GAP = 0.068  # the least distance between two labels, as a share of the panel's height
EQUAL_WITHIN, EQUAL_STEPS = 1e-4, 50
SMOOTH = 15  # steps of the running mean that smooths the losses


def figures(results: dict) -> dict[str, dict[str, bytes]]:
    """Returns figure name -> theme -> PNG bytes."""
    made: dict[str, Callable] = {}
    suites = results["suites"]
    if "depth" in suites:
        made["depth"] = lambda color: depth_figure(suites["depth"], results["machine"], color)
    if "train" in suites:
        made["train"] = lambda color: train_figure(suites["train"], results["machine"], color)
    return {name: {theme: _png(draw, COLORS[theme]) for theme in COLORS} for name, draw in made.items()}


def depth_figure(suite: dict, machine: dict, color: dict):
    """Time against loop depth: one panel per workload, one labeled line per contender, with the samples' quartiles."""
    figure, panels = plt.subplots(1, 3, figsize=(14.5, 4.9))
    depths = suite["depths"]
    for panel, (workload, title) in zip(panels, suite["workloads"].items()):
        ends = {}
        for name in LABELS:
            samples = [suite["seconds"][workload][depth].get(name) for depth in depths]
            if None in samples:
                continue
            ms = [1e3 * median(values) for values in samples]
            low, high = zip(*(_quartiles(values) for values in samples))
            panel.fill_between(depths, low, high, color=color[name], alpha=0.18, linewidth=0)
            width = 2.6 if name == "ours" else 1.7
            panel.plot(depths, ms, color=color[name], linewidth=width, marker="o", markersize=4.5, zorder=3)
            ends[name] = ms[-1]
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(depths, [str(d) for d in depths])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xlim(depths[0] * 0.87, depths[-1] * 1.15)
        panel.margins(y=0.12)
        panel.yaxis.set_major_formatter(FuncFormatter(_plain))
        panel.yaxis.set_minor_formatter(FuncFormatter(_some))
        panel.set_title(title[0].upper() + title[1:], loc="left", fontsize=11.5, fontweight="bold")
        panel.set_xlabel("loops")
        _label_ends(panel, ends, suite["speedup"][workload][depths[-1]], color)
    panels[0].set_ylabel("milliseconds")
    figure.suptitle("Time against loop depth", x=0.012, ha="left", fontsize=15, fontweight="bold")
    shape = suite["model"]
    where = f"{machine['device']}: {machine['device_name']}, threads: {machine['threads']}, float32"
    what = (
        f"dim {shape['dim']}, {shape['n_heads']} heads, {shape['n_experts']} experts, top {shape['n_experts_per_tok']}"
    )
    figure.text(
        0.012,
        0.895,
        f"{where}. Model: {what}. Medians of interleaved runs; lower is faster.",
        color=color["faint"],
        fontsize=10,
    )
    figure.subplots_adjust(left=0.05, right=0.9, top=0.80, bottom=0.115, wspace=0.7)
    return figure


def _label_ends(panel, ends: dict[str, float], speedups: dict, color: dict) -> None:
    """Labels each line at its right end with its name and its speedup over upstream, without overlaps."""
    to_axes = panel.transData + panel.transAxes.inverted()
    wanted = {name: to_axes.transform((1, y))[1] for name, y in ends.items()}
    for name, y in spread_labels(wanted, LABEL_GAP).items():
        text = SHORT[name]
        if name in speedups:
            text += f" {speedups[name]['median']:.1f}x"
        weight = "bold" if name == "ours" else "normal"
        panel.text(
            1.02, y, text, transform=panel.transAxes, color=color[name], va="center", fontsize=10, fontweight=weight
        )


def spread_labels(wanted: dict[str, float], gap: float) -> dict[str, float]:
    """Moves labels as little as needed so that they are `gap` apart and keep their order."""
    order = sorted(wanted, key=wanted.get)
    # Labels that collide form a group, centered on the mean of its members.
    groups: list[list[str]] = []
    for name in order:
        groups.append([name])
        while len(groups) > 1 and _bottom(groups[-1], wanted, gap) - _top(groups[-2], wanted, gap) < gap:
            groups[-2:] = [groups[-2] + groups[-1]]
    return {name: _bottom(group, wanted, gap) + i * gap for group in groups for i, name in enumerate(group)}


def _bottom(group: list[str], wanted: dict, gap: float) -> float:
    return sum(wanted[name] for name in group) / len(group) - gap * (len(group) - 1) / 2


def _top(group: list[str], wanted: dict, gap: float) -> float:
    return _bottom(group, wanted, gap) + gap * (len(group) - 1)


def train_figure(suite: dict, machine: dict, color: dict):
    """Loss by step; below it, the distance from the reference's loss (ours and the control's); and loss by seconds."""
    figure = plt.figure(figsize=(13.5, 5.2))
    grid = figure.add_gridspec(2, 2, height_ratios=(2, 1.15), hspace=0.16, wspace=0.16)
    by_step = figure.add_subplot(grid[0, 0])
    below = figure.add_subplot(grid[1, 0], sharex=by_step)
    by_time = figure.add_subplot(grid[:, 1])
    steps = range(1, len(suite["difference"]) + 1)
    for name, width, alpha in (("reference", 4.5, 0.55), ("ours", 1.3, 1.0)):
        curve = suite["losses"][name]
        by_step.plot(steps, curve, color=color[name], linewidth=width, alpha=alpha, label=SHORT[name])
        seconds = list(accumulate(suite["seconds"][name]))
        by_time.plot(seconds, _running_mean(curve), color=color[name], linewidth=2.2)
        ratio = f", {suite['speedup']['median']:.2f}x a step" if name == "ours" else ""
        by_time.plot(seconds[-1], _running_mean(curve)[-1], "o", color=color[name])
        by_time.annotate(
            f"{SHORT[name]}: {seconds[-1]:.1f} s{ratio}",
            (seconds[-1], _running_mean(curve)[-1]),
            xytext=(0, 12 if name == "reference" else 26),
            textcoords="offset points",
            ha="right",
            color=color[name],
            fontsize=10,
            fontweight="bold",
        )
    by_step.legend(frameon=False, loc="upper right")
    by_step.tick_params(labelbottom=False)
    by_step.set_title("Loss, nats per byte", loc="left", fontsize=11.5, fontweight="bold")
    # A difference of exactly 0 has no logarithm and is drawn at the bottom.
    floor = 1e-8
    for apart, name, label in (
        ("control", "reference", "reference with weights one ulp apart"),
        ("difference", "ours", "ours"),
    ):
        below.plot(steps, [max(d, floor) for d in suite[apart]], color=color[name], linewidth=1.2, label=label)
    below.legend(frameon=False, loc="lower right", fontsize=8.5)
    below.set_yscale("log")
    below.set_ylim(bottom=floor / 2)
    below.axhline(EQUAL_WITHIN, color=color["faint"], linewidth=1, linestyle=(0, (4, 3)))
    below.annotate(
        "1e-4",
        (len(steps), EQUAL_WITHIN),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        color=color["faint"],
        fontsize=9,
        annotation_clip=False,
    )
    below.axvspan(1, min(EQUAL_STEPS, len(steps)), color=color["faint"], alpha=0.13, linewidth=0)
    below.set_title("Distance from the reference's loss", loc="left", fontsize=10.5, fontweight="bold")
    below.set_xlabel("step")
    below.set_xlim(1, len(steps))
    by_time.set_title(
        f"Loss by seconds of training (mean of {SMOOTH} steps)", loc="left", fontsize=11.5, fontweight="bold"
    )
    by_time.set_xlabel("seconds")
    figure.suptitle(
        "The same training, with and without the fast modules", x=0.012, ha="left", fontsize=15, fontweight="bold"
    )
    what = f"{suite['corpus']}, {suite['batch'][0]} x {suite['batch'][1]} bytes a step, {suite['loops']} loops, float32"
    figure.text(
        0.012,
        0.905,
        f"{what}. Equal seed and batches. {machine['device']}: {machine['device_name']}.",
        color=color["faint"],
        fontsize=10,
    )
    figure.subplots_adjust(left=0.052, right=0.985, top=0.82, bottom=0.1)
    return figure


def _running_mean(values: list[float]) -> list[float]:
    windows = [values[max(0, i - SMOOTH + 1) : i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _quartiles(seconds: list[float]) -> tuple[float, float]:
    ordered = [1e3 * s for s in sorted(seconds)]
    return ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]


def _plain(value: float, _) -> str:
    return f"{value:g}"


def _some(value: float, _) -> str:
    """Labels 2 and 5 of each decade: all labels would collide, and without any, a narrow range would have none."""
    return f"{value:g}" if f"{value:e}"[0] in "25" and f"{value:e}"[2:5] == "000" else ""


def _png(draw: Callable, color: dict) -> bytes:
    style = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "figure.facecolor": color["ground"],
        "axes.facecolor": color["ground"],
        "text.color": color["ink"],
        "axes.labelcolor": color["ink"],
        "axes.edgecolor": color["line"],
        "grid.color": color["line"],
        "xtick.color": color["faint"],
        "ytick.color": color["faint"],
        "grid.linewidth": 0.7,
    }
    with plt.rc_context(style):
        figure = draw(color)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=150)
        plt.close(figure)
    return out.getvalue()
