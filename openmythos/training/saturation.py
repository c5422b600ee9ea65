"""Loss by number of loops, and the exponential that it saturates along."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Saturation(NamedTuple):
    """loss(T) = floor + gain * exp(-rate * T)

    Attributes:
        floor: loss after infinitely many loops. gain, rate: see above. rmse: of the fit, in nats.
    """

    floor: float
    gain: float
    rate: float
    rmse: float

    def __call__(self, loops):
        return self.floor + self.gain * np.exp(-self.rate * np.asarray(loops, dtype=float))


def fit_saturation(losses: Mapping[int, float]) -> Saturation:
    """The least-squares fit to losses by number of loops.

    For each rate the best floor and gain solve a linear problem, so that only the rate is searched.

    Raises:
        ValueError: fewer than four numbers of loops.
    """
    if len(losses) < 4:
        raise ValueError(f"losses: of {len(losses)} numbers of loops: must be of at least 4, for three unknowns")
    loops, loss = np.array(list(losses), dtype=float), np.array(list(losses.values()), dtype=float)

    def at(rate: float) -> Saturation:
        basis = np.stack([np.ones_like(loops), np.exp(-rate * (loops - loops.min()))], axis=1)
        (floor, gain), *_ = np.linalg.lstsq(basis, loss, rcond=None)
        error = basis @ np.array([floor, gain]) - loss
        scaled = gain * float(np.exp(min(rate * loops.min(), 700.0)))
        return Saturation(float(floor), float(scaled), float(rate), float(np.sqrt(np.mean(error**2))))

    rates = np.geomspace(1e-3, 10, 400)
    for _ in range(3):  # each pass looks closer around the best rate of the one before
        best = min(map(at, rates), key=lambda fit: fit.rmse)
        near = int(np.searchsorted(rates, best.rate))
        rates = np.geomspace(rates[max(near - 1, 0)], rates[min(near + 1, len(rates) - 1)], 100)
    return best


def plot_saturation(
    losses: Mapping[int, float], fit: Saturation | None, path: str | Path, trained: float | None = None
) -> None:
    """Draws loss by number of loops and the fit. Needs matplotlib.

    Args:
        trained: mean number of loops in training, marked where it is given.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(list(losses), list(losses.values()), "o", label="held-out text")
    if fit is not None:
        dense = np.geomspace(min(losses), max(losses), 200)
        text = f"{fit.floor:.3f} + {fit.gain:.3f} exp(-{fit.rate:.3g} T), rmse {fit.rmse:.1e}"
        axes.plot(dense, fit(dense), "-", lw=1, label=text)
    if trained is not None:
        axes.axvline(trained, ls=":", color="grey", label=f"trained with {trained:g} loops on average")
    axes.set(xlabel="loops", ylabel="loss, nats per token", xscale="log")
    axes.set_xticks(list(losses), [str(n) for n in losses])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
