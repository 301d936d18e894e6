"""Intervals and tests for accuracies: closed forms where there are any, otherwise seeded.

Problems are the unit: they are independent, the candidates of one problem are not. An accuracy of one problem is a
number in [0, 1] (an expectation over what a selector leaves open).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from scipy import stats

RESAMPLES = 4000  # of a bootstrap; fewer above 20,000 units, where an interval is narrow anyway
_CELLS = 80_000_000  # of a table of draws, a byte each
FLIPS = 9999  # of a permutation test; fewer above 8,000 units
LEVEL = 0.95


def pass_at_k(n: int, c: int, k: int) -> float:
    """P(at least one of k candidates, drawn without replacement from n of which c are right, is right).

    1 - C(n-c, k) / C(n, k) (Chen et al., arXiv 2107.03374): the unbiased estimate of pass@k. In whole numbers, so that
    it neither overflows nor cancels. Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, found n={n}, c={c}, k={k}")
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


def mean_and_stderr(values: np.ndarray) -> tuple[float, float]:
    """Mean of [P] values and its standard error std(ddof=1) / sqrt(P); NaN for P = 1. Raises ValueError for P = 0."""
    values = np.asarray(values, np.float64)
    if not values.size:
        raise ValueError("no problems to average over")
    stderr = values.std(ddof=1) / np.sqrt(values.size) if values.size > 1 else np.nan
    return float(values.mean()), float(stderr)


@functools.lru_cache(maxsize=16)
def draws(count: int, seed: int = 0) -> np.ndarray:
    """How often each of ``count`` units is in each bootstrap sample, uint8 [resamples, count]; read-only."""
    rng, resamples = np.random.default_rng([seed, count]), max(200, min(RESAMPLES, _CELLS // count))
    found, step = np.empty((resamples, count), np.uint8), max(1, 4_000_000 // count)
    for i in range(0, resamples, step):
        part = found[i : i + step]
        drawn = rng.integers(0, count, part.shape) + count * np.arange(len(part))[:, None]
        part[:] = np.bincount(drawn.ravel(), minlength=part.size).reshape(part.shape)
    found.flags.writeable = False
    return found


def resampled_sums(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """Sums over bootstrap samples of the first axis, [P, ...] -> [resamples, ...]; the same samples for equal P."""
    values = np.asarray(values, np.float64)
    table, step = draws(len(values), seed), max(1, 4_000_000 // len(values))
    return np.concatenate([table[i : i + step].astype(np.float64) @ values for i in range(0, len(table), step)])


def interval(values: np.ndarray, seed: int = 0, level: float = LEVEL) -> list[float]:
    """Percentile bootstrap interval [low, high] of the mean of [P] values in [0, 1]; the problems are resampled.

    Where all values are 0, or all 1, every resample is the same; the far end is then Clopper and Pearson's exact one,
    1 - (alpha / 2)^(1 / P). Raises ValueError for P = 0.
    """
    values, tail = np.asarray(values, np.float64), (1 - level) / 2
    if not values.size:
        raise ValueError("no problems to resample")
    if np.all(values == 0):
        return [0.0, 1 - tail ** (1 / values.size)]
    if all_right(values):
        return [tail ** (1 / values.size), 1.0]
    return quantiles(resampled_sums(values, seed) / values.size, level)


def all_right(values: np.ndarray) -> bool:
    """Whether all accuracies are 1; shares of subsets, summed, may miss it by rounding."""
    return bool(np.all(values > 1 - 1e-9))


def quantiles(resampled: np.ndarray, level: float = LEVEL) -> list[float]:
    """The central interval that holds ``level`` of the resampled figures [B]; NaN among them are left out."""
    resampled = resampled[np.isfinite(resampled)]
    if not resampled.size:
        return [math.nan, math.nan]
    return [float(x) for x in np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])]


def summary(values: np.ndarray) -> dict[str, Any]:
    """accuracy, stderr and ci95 of [P] accuracies."""
    accuracy, stderr = mean_and_stderr(values)
    return {"accuracy": accuracy, "stderr": stderr, "ci95": interval(values)}


def paired(a: np.ndarray, b: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """a - b of [P] accuracies on the same problems: difference, stderr, ci95, wins, losses, p_value, test.

    ci95: percentile bootstrap over problems. p_value, two-sided, of "neither is better": McNemar's exact test where
    every problem is right or wrong; with fractions (ties) the permutation test that flips the signs of the differences
    (seeded, with the observed one counted: never 0). The two are the same test, exact or sampled.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"paired accuracies need equal shapes, found {a.shape} and {b.shape}")
    d = a - b
    difference, stderr = mean_and_stderr(d)
    wins, losses = int((d > 0).sum()), int((d < 0).sum())
    whole = bool(np.isin(d, (-1, 0, 1)).all())
    if whole:
        p = float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    else:
        p = _sign_flips(d, seed)
    return {
        "difference": difference,
        "stderr": stderr,
        "ci95": quantiles(resampled_sums(d, seed) / d.size),
        "wins": wins,
        "losses": losses,
        "p_value": p,
        "test": "mcnemar" if whole else "permutation",
    }


@functools.lru_cache(maxsize=2)
def _signs(count: int, seed: int) -> np.ndarray:
    flips = max(200, min(FLIPS, _CELLS // count))
    found = np.random.default_rng([seed, count, 1]).integers(0, 2, (flips, count), np.int8)
    found += found - 1
    return found


def _sign_flips(d: np.ndarray, seed: int) -> float:
    signs, step = _signs(d.size, seed), max(1, 4_000_000 // d.size)
    flipped = np.concatenate([signs[i : i + step].astype(np.float64) @ d for i in range(0, len(signs), step)])
    return float((1 + (np.abs(flipped) >= abs(d.sum()) - 1e-9).sum()) / (len(signs) + 1))
