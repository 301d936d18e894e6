"""Aggregators against values worked out by hand."""

import math

import numpy as np
import pytest

from mmprm_jax.evaluation.aggregate import AGGREGATORS, EPS, vote_weight


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("min", 0.2),
        ("mean", 0.5),
        ("product", math.log(0.08)),  # 0.5 * 0.8 * 0.2
        ("last", 0.2),
        ("max", 0.8),
        ("sum_log_odds", 0.0),  # odds 1, 4, 1/4
        ("mean_odds", 1.75),  # 5.25 / 3
    ],
)
def test_known_values(name, expected):
    assert AGGREGATORS[name](np.array([0.5, 0.8, 0.2])) == pytest.approx(expected, abs=1e-12)


def test_the_names_and_their_order():
    assert list(AGGREGATORS) == ["min", "mean", "product", "last", "max", "sum_log_odds", "mean_odds"]


@pytest.mark.parametrize("name", AGGREGATORS)
def test_zero_and_one_are_finite_and_ordered(name):
    low, middle, high = (AGGREGATORS[name](np.array([s, s])) for s in (0.0, 0.5, 1.0))
    assert -math.inf < low < middle < high < math.inf
    assert AGGREGATORS[name](np.array([0.0, 1.0])) <= high


def test_odds_are_clipped_at_eps():
    assert AGGREGATORS["mean_odds"](np.array([1.0])) == pytest.approx((1 - EPS) / EPS)
    assert AGGREGATORS["sum_log_odds"](np.array([0.0, 1.0])) == pytest.approx(0, abs=1e-9)


def test_a_long_product_does_not_underflow():
    assert AGGREGATORS["product"](np.full(1000, 0.1)) == pytest.approx(-1000 * math.log(10))


@pytest.mark.parametrize("name", AGGREGATORS)
def test_an_empty_solution_never_wins(name):
    assert AGGREGATORS[name](np.array([])) == -math.inf
    assert vote_weight(name, np.array([-math.inf])) == [0.0]


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize("bad", [[0.5, math.nan], [-0.01], [1.01], [[0.5]]])
def test_bad_scores_are_refused(name, bad):
    with pytest.raises(ValueError, match="step scores"):
        AGGREGATORS[name](np.array(bad))


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize("p", [0.25, 0.5, 0.9])
def test_the_weight_of_one_step_is_its_score(name, p):
    """Product, sigmoid(log odds) and odds / (1 + odds) all invert to p."""
    assert vote_weight(name, np.array([AGGREGATORS[name](np.array([p]))])) == pytest.approx([p], rel=1e-12)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_weights_lie_in_the_unit_interval(name):
    values = np.array([AGGREGATORS[name](np.full(500, p)) for p in (0.0, 0.3, 1.0)])
    weights = vote_weight(name, values)
    assert np.all((weights >= 0) & (weights <= 1)) and np.all(np.diff(weights) >= 0)


def test_saturated_scores_have_the_odds_of_a_million():
    """One of them outweighs what float32 can tell, and not everything else."""
    assert AGGREGATORS["sum_log_odds"](np.array([1.0])) == pytest.approx(np.log(1e6))
    assert AGGREGATORS["sum_log_odds"](np.array([0.0])) == pytest.approx(-np.log(1e6))
    assert AGGREGATORS["mean_odds"](np.array([1.0, 0.0])) == pytest.approx(5e5, rel=1e-5)
