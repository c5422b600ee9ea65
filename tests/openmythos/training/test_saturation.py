import math

import pytest

from openmythos.training.saturation import fit_saturation, plot_saturation


def test_the_fit_finds_the_curve_that_made_the_losses():
    losses = {t: 1.645 + 0.87 * math.exp(-0.42 * t) for t in (1, 2, 3, 4, 6, 8, 12)}
    fit = fit_saturation(losses)
    assert (fit.floor, fit.gain, fit.rate) == (
        pytest.approx(1.645, abs=1e-4), pytest.approx(0.87, abs=1e-3), pytest.approx(0.42, abs=1e-3)
    )  # fmt: skip
    assert fit.rmse < 1e-5
    assert fit([2])[0] == pytest.approx(losses[2], abs=1e-4)


def test_a_loss_that_rises_again_has_a_visible_misfit():
    fit = fit_saturation({1: 1.7, 2: 1.5, 4: 1.4, 8: 1.5, 16: 1.7})
    assert fit.rmse > 0.05


def test_three_losses_are_too_few():
    with pytest.raises(ValueError, match="losses: of 3 numbers of loops: must be of at least 4"):
        fit_saturation({1: 2.0, 2: 1.5, 4: 1.4})


def test_the_picture_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    losses = {1: 1.7, 2: 1.5, 4: 1.4, 8: 1.39}
    plot_saturation(losses, fit_saturation(losses), tmp_path / "loops.png", trained=4)
    assert (tmp_path / "loops.png").stat().st_size > 1000
