"""Aggregators: the step scores of one solution -> one number, higher is better (MM-PRM, arXiv 2505.13427, section 4).

Input: [S] scores in [0, 1]. Output: a float; an empty solution gets -inf, so that it never beats one with steps.

    min           min_i s_i                      mean       (1/S) sum_i s_i
    last          s_S                            max        max_i s_i
    product       log prod_i s_i = sum_i log s_i (the log: no underflow, the same order)
    sum_log_odds  sum_i log(s_i / (1 - s_i))     mean_odds  (1/S) sum_i s_i / (1 - s_i)

Unlike the original's, they take 0 and 1 (it stops at log 0 and uses -9999), an empty solution does not score 0 (which
beats every sum of logarithms there), and ties are left to the caller (there the first candidate wins).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

EPS = 1e-6  # odds lie in [1e-6, 1e6]: one saturated float32 score cannot outweigh everything else
_TINY = float(np.finfo(np.float64).tiny)


def _odds(scores: np.ndarray) -> np.ndarray:
    p = np.clip(scores, EPS, 1 - EPS)
    return p / (1 - p)


def _checked(function: Callable[[np.ndarray], float]) -> Callable[[np.ndarray], float]:
    """Adds what all aggregators share: float64, -inf for no steps, ValueError for scores outside [0, 1] or NaN."""

    def aggregate(scores: np.ndarray) -> float:
        scores = np.asarray(scores, np.float64)
        if scores.ndim != 1:
            raise ValueError(f"step scores must be one-dimensional, found shape {scores.shape}")
        if not np.all((scores >= 0) & (scores <= 1)):
            raise ValueError("step scores must lie in [0, 1] and not be NaN")
        return float(function(scores)) if scores.size else -np.inf

    return aggregate


AGGREGATORS: dict[str, Callable[[np.ndarray], float]] = {
    "min": _checked(np.min),
    "mean": _checked(np.mean),
    "product": _checked(lambda s: np.log(np.maximum(s, _TINY)).sum()),
    "last": _checked(lambda s: s[-1]),
    "max": _checked(np.max),
    "sum_log_odds": _checked(lambda s: np.log(_odds(s)).sum()),
    "mean_odds": _checked(lambda s: _odds(s).mean()),
}


def vote_weight(name: str, values: np.ndarray) -> np.ndarray:
    """Maps values of aggregator ``name`` (any shape) to voting weights in [0, 1]; -inf (no steps) maps to 0.

    sum_log_odds: sigmoid(x); mean_odds: x / (1 + x); product: exp(x), the product itself; the others: the value.
    """
    values = np.asarray(values, np.float64)
    if name == "product":
        return np.exp(values)
    if name == "sum_log_odds":
        return np.exp(-np.logaddexp(0, -values))
    values = np.maximum(values, 0)
    return values / (1 + values) if name == "mean_odds" else values
