"""Exit depths of a model's positions: `with depth_stats(model) as stats: model(ids)`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

import openmythos
from openmythos.cache import KVCache
from openmythos.config import setting
from openmythos.exits import Exit
from openmythos.ragged import RAGGED_KEY


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

    With halting="off" only calls with an exit have depths. Tokens that an engine or `speculative_stream` serves are
    counted as they leave the loop; drafts that were rejected, and what was in the loop at a cancellation, are not.

    Raises:
        ValueError: the model has no recurrent block.
    """
    blocks = [m for m in model.modules() if isinstance(m, openmythos.RecurrentBlock)]
    if not blocks:
        raise ValueError("model: has no recurrent block")
    stats = DepthStats()
    for block in blocks:
        block.watchers = (*block.watchers, stats.note)
    try:
        yield stats
    finally:
        for block in blocks:
            block.watchers = tuple(watcher for watcher in block.watchers if watcher != stats.note)


@torch.no_grad()
def position_depths(model, input_ids: Tensor, n_loops: int | None = None, exit: Exit = None) -> Tensor:
    """(B, T) int64: the loops that each position of input_ids (B, T) runs, from one call of the model.

    Raises:
        ValueError: nothing halts in this model (halting="off"), and no exit decides.
    """
    halting = setting(model.cfg, "halting")
    if exit is None and halting == "off":
        raise ValueError('exit = None: a model with halting="off" has no depths; must be a rule')
    if exit is None and halting == "evolve":
        ponder = model(input_ids, n_loops=n_loops, return_ponder=True)[1]
        return (ponder.ceil() - 1).long()  # N + R with 0 < R <= 1
    cache = KVCache()
    model(input_ids, n_loops=n_loops, kv_cache=cache, exit=exit)
    return cache[RAGGED_KEY].last[:, : input_ids.shape[1]].long() + 1


def plot_positions(depths: Tensor, tokens: Sequence[str], path) -> None:
    """Writes the depth at each position of a text as an image to `path`; needs matplotlib.

    Args:
        depths: (T,), a row of `position_depths`.
        tokens: T pieces of text, which label the positions.

    Raises:
        ValueError: depths and tokens are not equally many.
    """
    if depths.dim() != 1 or len(depths) != len(tokens):
        raise ValueError(f"depths: got {tuple(depths.shape)}, must be ({len(tokens)},), one for each of the tokens")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(max(4, 0.16 * len(tokens)), 2.4))
    axes.bar(range(len(tokens)), depths.tolist(), width=0.9)
    axes.set_xticks(range(len(tokens)), [token.replace("\n", "\\n") for token in tokens], fontfamily="monospace")
    axes.set(ylabel="loops run", xlim=(-0.6, len(tokens) - 0.4), title=f"mean depth {depths.double().mean():.2f}")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


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
