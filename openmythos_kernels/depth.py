"""Exit depths of a model's positions: `with depth_stats(model) as stats: model(ids)`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

import openmythos
from openmythos.config import setting


class DepthStats:
    """Exit depths of the forward passes that it watched, over all recurrent blocks.

    Counts stay on the device until a figure is read.
    """

    def __init__(self) -> None:
        self._passes: list[list[tuple[Tensor, int]]] = []  # per pass and loop: positions that run, and computed ones

    def note(self, running: Tensor, t: int) -> None:
        """A watcher of a RecurrentBlock."""
        if t == 0:
            self._passes.append([])
        self._passes[-1].append((running.sum(), running.numel()))

    @property
    def histogram(self) -> list[int]:
        """[d - 1] is the number of positions that ran exactly d loops, until they halted or the loops ended."""
        deepest = max((len(loops) for loops in self._passes), default=0)
        counts = [0] * deepest
        for loops in self._passes:
            running = [int(n) for n, _ in loops] + [0]
            for d in range(len(loops)):
                counts[d] += running[d] - running[d + 1]
        return counts

    @property
    def mean_depth(self) -> float:
        counts = self.histogram
        return sum(d * n for d, n in enumerate(counts, 1)) / max(sum(counts), 1)

    def saved(self, n_loops: int) -> float:
        """The share of the block's work, positions times loops, that was not computed; n_loops: the allowed loops."""
        whole = sum(loops[0][1] for loops in self._passes) * n_loops
        return 1.0 - sum(computed for loops in self._passes for _, computed in loops) / whole if whole else 0.0

    def __str__(self) -> str:
        counts = self.histogram
        total, most = max(sum(counts), 1), max(counts, default=1) or 1
        rows = [f"{d:4}  {n / total:6.1%}  {'#' * round(40 * n / most)}" for d, n in enumerate(counts, 1)]
        return "\n".join([f"exit depth of {sum(counts)} positions, mean {self.mean_depth:.2f}", *rows])


@contextlib.contextmanager
def depth_stats(model: nn.Module) -> Iterator[DepthStats]:
    """Watches the recurrent blocks of `model` inside the context.

    Raises:
        ValueError: the model has no recurrent block, or one without halting, whose positions all run every loop.
    """
    blocks = [m for m in model.modules() if isinstance(m, openmythos.RecurrentBlock)]
    if not blocks or any(setting(block.cfg, "halting") == "off" for block in blocks):
        raise ValueError('model: has no recurrent block with halting (halting="off" has no exit depths)')
    stats = DepthStats()
    for block in blocks:
        block.watchers = (*block.watchers, stats.note)
    try:
        yield stats
    finally:
        for block in blocks:
            block.watchers = tuple(watcher for watcher in block.watchers if watcher != stats.note)


def plot_depths(stats: DepthStats, path) -> None:
    """Writes the histogram as an image to `path`; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    counts = stats.histogram
    figure, axes = plt.subplots(figsize=(6, 3))
    axes.bar(range(1, len(counts) + 1), counts)
    axes.set(xlabel="loops run", ylabel="positions", title=f"mean depth {stats.mean_depth:.2f}")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
