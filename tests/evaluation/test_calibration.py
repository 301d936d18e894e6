"""Simulated steps whose true values are known."""

import math

import numpy as np
import pytest

from mmprm_jax.evaluation.calibration import calibrate


def test_by_hand():
    # bins [0.1, 0.2) and [0.9, 1]: |0.1 - 0.5| and |0.95 - 1|
    got = calibrate([0.1, 0.1, 0.9, 1.0], [2, 0, 2, 2], [2, 2, 2, 2])
    assert got["ece"] == pytest.approx(0.5 * 0.4 + 0.5 * 0.05)
    assert got["brier"] == pytest.approx((0.81 + 0.01 + 0.01 + 0) / 4)
    assert got["squared_error_raw"] == got["brier"]  # every k/n is 0 or 1
    assert got["brier_perfect"] == 0
    assert [(b["steps"], b["score"], b["value"]) for b in got["diagram"]] == [(2, 0.1, 0.5), (2, 0.95, 1.0)]
    assert (got["steps"], got["rollouts"]) == (4, 8)


@pytest.fixture(scope="module")
def world():
    """True values p, and k of n rollouts each."""
    rng = np.random.default_rng(0)
    p, n = rng.beta(1, 1, 6_000), rng.integers(2, 9, 6_000)
    return p, rng.binomial(n, p), n


def test_a_perfect_prm_looks_perfect(world):
    p, k, n = world
    got = calibrate(p, k, n)
    assert got["squared_error"] == pytest.approx(0, abs=0.005)
    assert got["squared_error_raw"] == pytest.approx(np.mean(p * (1 - p) / n), rel=0.05)  # noise, not error
    assert got["brier"] == pytest.approx(1 / 6, abs=0.01)  # E p (1 - p), p uniform
    assert got["brier_perfect"] == pytest.approx(1 / 6, abs=0.01)
    assert got["ece"] < 2 * got["ece_perfect"] < 0.02


def test_the_error_of_a_prm_is_measured_without_the_noise(world):
    p, k, n = world
    for shift in (0.1, 0.3):
        s = 0.2 + 0.4 * p + shift
        got = calibrate(s, k, n)
        assert got["squared_error"] == pytest.approx(np.mean((s - p) ** 2), abs=0.006)  # four standard errors
        assert got["brier"] - got["brier_perfect"] == pytest.approx(got["squared_error"])


def test_the_ece_of_a_perfect_prm_is_what_is_expected():
    """Few steps and rollouts: the ECE is far from 0 though nothing is wrong."""
    rng, found = np.random.default_rng(1), []
    s = rng.random(60)
    for _ in range(200):
        got = calibrate(s, rng.binomial(4, s), np.full(60, 4))
        found.append(got["ece"])
    assert got["ece_perfect"] > 0.05
    assert np.mean(found) == pytest.approx(got["ece_perfect"], rel=0.1)


def test_single_rollouts_tell_nothing_of_the_floor():
    got = calibrate([0.5, 0.5], [0, 1], [1, 1])
    assert got["brier"] == 0.25 and math.isnan(got["brier_perfect"]) and math.isnan(got["squared_error"])


def test_single_rollouts_beside_others_are_left_out_of_the_floor():
    got = calibrate([0.5, 1.0], [1, 1], [2, 1])
    assert got["brier_perfect"] == 0.5  # 1 of 2: p (1 - p) estimated by k (n - k) / (n (n - 1))
    assert got["squared_error"] == 0.25 - 0.5 and got["brier"] == 0.125


@pytest.mark.parametrize(
    "bad", [([], [], []), ([1.1], [0], [1]), ([0.5], [2], [1]), ([0.5], [0], [0]), ([0.5], [0, 1], [1])]
)
def test_misuse_is_refused(bad):
    with pytest.raises(ValueError, match="must"):
        calibrate(*bad)
