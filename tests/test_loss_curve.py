"""The picture of a loss."""

import math

import numpy as np
import pytest

from stable_cascade_nodes.nodes.loss_curve import SIZE, loss_curve, relative_errors, smoothed, ticks


def line(picture):
    """For each column of pixels from left to right, how high the smoothed line is, 0 at the bottom; NaN without one."""
    pixels = np.asarray(picture).astype(int)
    blue = (pixels[..., 2] - pixels[..., 0] > 100) & (pixels[..., 2] < 200)
    rows = np.arange(len(pixels))[::-1, None]
    with np.errstate(invalid="ignore"):
        return (blue * rows).sum(0) / blue.sum(0)


def test_the_line_follows_the_losses():
    falling = line(loss_curve([1 - 0.009 * step for step in range(100)]))
    there = np.flatnonzero(~np.isnan(falling))
    assert there.min() < 80 and there.max() > SIZE[0] - 30
    assert falling[there[0]] > falling[there[len(there) // 2]] + 80 > falling[there[-1]] + 160
    rising = line(loss_curve([step + 1.0 for step in range(100)]))
    assert rising[there[-5]] > rising[there[5]] + 200


def test_a_run_that_is_not_over_fills_its_share():
    there = np.flatnonzero(~np.isnan(line(loss_curve([0.5, 0.4, 0.3, 0.2] * 25, 200))))
    assert there.max() == pytest.approx((68 + SIZE[0] - 20) / 2, abs=4)


def test_single_outliers_do_not_flatten_the_rest():
    losses = [1.0 + 0.1 * math.sin(step) for step in range(200)]
    losses[50] = 1000.0
    assert max(smoothed(losses)) < 1.3
    shown = line(loss_curve(losses))
    assert np.nanmax(shown) < SIZE[1] and np.nanmin(shown) > 100


def test_smoothing_keeps_a_constant_and_halves_noise():
    assert smoothed([0.25] * 30) == pytest.approx([0.25] * 30)
    noisy = [step % 2 for step in range(200)]
    assert max(abs(value - 0.5) for value in smoothed(noisy)) < 0.1


@pytest.mark.parametrize("losses", [[0.5], [0.0, 0.0], [-1.0, -2.0], [1e-9, 2e-9], [1e9, 3e9]])
def test_any_losses_can_be_drawn(losses):
    picture = loss_curve(losses)
    assert picture.size == SIZE and not np.isnan(line(picture)).all()


def test_a_run_that_goes_on_begins_at_its_step():
    assert np.asarray(loss_curve([0.5, 0.4], first=501)).tolist() != np.asarray(loss_curve([0.5, 0.4])).tolist()
    there = np.flatnonzero(~np.isnan(line(loss_curve([0.5, 0.4, 0.3] * 10, 560, first=501))))
    assert there.min() < 80 and there.max() == pytest.approx((68 + SIZE[0] - 20) / 2, abs=12)


def test_noise_levels_do_not_hide_that_a_run_learns():
    random = np.random.default_rng(0)
    levels = [random.uniform(-9, 9, 2) for _ in range(200)]
    shares = np.exp(-np.arange(200) / 100)
    errors = [share * np.exp(level / 4) for share, level in zip(shares, levels, strict=True)]
    raw, relative = np.array([step.mean() for step in errors]), np.array(relative_errors(errors, levels))
    assert np.corrcoef(raw, shares)[0, 1] < 0.6
    assert np.corrcoef(relative, shares)[0, 1] > 0.99
    assert relative[0] / relative[-1] == pytest.approx(shares[0] / shares[-1], rel=0.1)
    assert relative_errors([np.array([0.3, 0.3])], [np.array([1.0, 2.0])]) == pytest.approx([1.0])
    assert np.isfinite(relative_errors([np.zeros(1), np.ones(1)], [np.ones(1), np.ones(1)])).all()


def test_ticks_are_round_and_inside():
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert ticks(1, 100) == pytest.approx([20, 40, 60, 80, 100])
    assert ticks(-0.3, 0.1) == pytest.approx([-0.3, -0.2, -0.1, 0, 0.1])
    assert ticks(0.0123, 0.0456) == pytest.approx([0.02, 0.03, 0.04])


def test_no_losses_are_refused():
    with pytest.raises(ValueError, match="no losses to draw"):
        loss_curve([])
