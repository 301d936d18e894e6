"""Closed forms, enumerations and simulations of known truth."""

import itertools
import math
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from mmprm_jax.evaluation import statistics


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_counts_the_subsets(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        hits = [any(i < c for i in chosen) for chosen in itertools.combinations(range(n), k)]
        assert statistics.pass_at_k(n, c, k) == pytest.approx(np.mean(hits), abs=1e-15)


def test_pass_at_k_neither_overflows_nor_cancels():
    assert statistics.pass_at_k(5000, 1, 2500) == 0.5
    assert statistics.pass_at_k(10_000, 1, 1) == 1e-4  # 1 - 0.9999 would be off in the 13th digit
    exact = 1 - Fraction(math.comb(900, 200), math.comb(1000, 200))
    assert statistics.pass_at_k(1000, 100, 200) == float(exact)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5), (0, 0, 1)])
def test_pass_at_k_refuses_what_is_no_count(n, c, k):
    with pytest.raises(ValueError, match=r"pass@k needs"):
        statistics.pass_at_k(n, c, k)


@pytest.mark.parametrize(("kind", "truth"), [("right or wrong", 0.8), ("fractions", 0.3)])
def test_the_interval_holds_the_truth_as_often_as_it_says(kind, truth):
    rng, hits, runs = np.random.default_rng(0), 0, 300
    for _ in range(runs):
        values = rng.random(100) < truth if kind == "right or wrong" else rng.beta(0.6, 1.4, 100)
        low, high = statistics.interval(values)
        hits += low <= truth <= high
    assert 0.91 <= hits / runs <= 0.98  # 0.95 and three standard errors


def test_the_interval_is_as_wide_as_the_normal_one_where_that_is_right():
    values = np.random.default_rng(1).random(2000) < 0.5
    low, high = statistics.interval(values)
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(2000), rel=0.05)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.002)


@pytest.mark.parametrize("count", [1, 8, 60])
def test_all_right_and_all_wrong_leave_a_doubt(count):
    low, high = statistics.interval(np.ones(count))
    assert high == 1 and low == pytest.approx(stats.binomtest(count, count).proportion_ci().low)
    low, high = statistics.interval(np.zeros(count))
    assert low == 0 and high == pytest.approx(stats.binomtest(0, count).proportion_ci().high)


def test_all_right_but_for_rounding():
    """A PRM that is right in each subset of 57 of 64: the shares of the subsets add up to 1 - 1e-16."""
    shares = np.full(60, 0.9999999999999999)
    assert statistics.interval(shares) == statistics.interval(np.ones(60))


def test_many_problems_are_compared_in_little_memory():
    d = np.random.default_rng(0).random(40_000) - 0.5
    tracemalloc.start()
    got = statistics.paired(d, np.zeros(d.size))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    normal = 2 * stats.norm.sf(abs(d.sum()) / np.sqrt((d**2).sum()))
    assert peak < 400e6 and got["p_value"] == pytest.approx(normal, abs=0.05)


def test_paired_difference_by_hand():
    got = statistics.paired(np.array([1, 1, 0, 1.0]), np.array([0, 1, 0, 0.0]))
    assert got["difference"] == 0.5 and (got["wins"], got["losses"]) == (2, 0)
    assert got["stderr"] == pytest.approx(math.sqrt(1 / 3) / 2)  # differences 1 0 0 1: variance 1/3
    assert got["ci95"] == [0.0, 1.0]
    assert got["test"] == "mcnemar" and got["p_value"] == 0.5  # two of two heads, two-sided


def test_mcnemar_by_hand():
    a = np.array([1.0] * 8 + [0.0] + [1.0] * 20 + [0.0] * 5)
    b = np.array([0.0] * 8 + [1.0] + [1.0] * 20 + [0.0] * 5)
    assert statistics.paired(a, b)["p_value"] == pytest.approx(2 * (1 + 9) / 2**9)
    assert statistics.paired(b, a)["p_value"] == pytest.approx(2 * (1 + 9) / 2**9)
    assert statistics.paired(a, a)["p_value"] == 1.0


def test_the_permutation_test_against_all_sign_flips():
    d = np.array([0.5, 1, -0.25, 1, 0.75, 0, -0.5, 1, 0.25, 1])
    got = statistics.paired(d, np.zeros(10))
    sums = [abs(np.dot(signs, d)) for signs in itertools.product([-1, 1], repeat=10)]
    exact = np.mean(np.array(sums) >= d.sum() - 1e-9)
    assert got["test"] == "permutation"
    assert got["p_value"] == pytest.approx(exact, abs=4 * math.sqrt(exact / statistics.FLIPS))


def test_a_sampled_p_value_is_never_0_and_depends_on_the_seed():
    assert statistics.paired(np.full(60, 0.5), np.zeros(60))["p_value"] == 1 / (statistics.FLIPS + 1)
    d = np.random.default_rng(4).random(50) - 0.4
    first, second = (statistics.paired(d, np.zeros(50), seed)["p_value"] for seed in (0, 1))
    assert first != second and abs(first - second) < 0.02


def test_an_interval_depends_little_on_the_seed():
    values = np.random.default_rng(5).random(200) < 0.5
    ends = np.array([statistics.interval(values, seed) for seed in range(10)])
    assert np.all(ends.std(axis=0) < 0.004)  # with 4,000 resamples 0.0015


def test_quantiles_leave_out_what_is_undefined():
    some = np.array([0.0, np.nan, 1.0, np.nan, 0.5])
    assert statistics.quantiles(some, level=1.0) == [0.0, 1.0]
    assert np.all(np.isnan(statistics.quantiles(np.array([np.nan]))))


def test_the_tests_are_as_careful_as_they_say():
    """Two selectors of equal accuracy: p < 0.05 in at most 5 % of the data sets; a better one is found."""
    rng = np.random.default_rng(2)
    null = [statistics.paired(rng.integers(0, 3, 80) / 2, rng.integers(0, 3, 80) / 2)["p_value"] for _ in range(300)]
    assert np.mean(np.array(null) < 0.05) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)
    assert np.mean(np.array(null) < 0.5) == pytest.approx(0.5, abs=0.1)
    better = statistics.paired((rng.random(300) < 0.7).astype(float), (rng.random(300) < 0.4).astype(float))
    assert better["p_value"] < 1e-4 and better["ci95"][0] > 0.15


def test_paired_needs_the_same_problems():
    with pytest.raises(ValueError, match="equal shapes"):
        statistics.paired(np.zeros(3), np.zeros(1))
    with pytest.raises(ValueError, match="no problems"):
        statistics.interval(np.zeros(0))
    with pytest.raises(ValueError, match="no problems"):
        statistics.mean_and_stderr(np.zeros(0))


def test_equal_data_give_equal_figures():
    values = np.random.default_rng(3).random(40)
    assert statistics.interval(values) == statistics.interval(values.copy())
    assert statistics.paired(values, values[::-1]) == statistics.paired(values, values[::-1])
    assert statistics.interval(values, seed=1) != statistics.interval(values)
