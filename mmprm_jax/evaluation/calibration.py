"""Are step scores probabilities? Scores against Monte Carlo estimates: k of n rollouts from a prefix were right.

k / n is itself noisy: it misses the true value p by p (1 - p) / n on average (squared). What that noise adds is known,
so each figure comes with what a perfect PRM would get.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mmprm_jax.evaluation import statistics

BINS = 10


def calibrate(scores: np.ndarray, k: np.ndarray, n: np.ndarray, bins: int = BINS) -> dict[str, Any]:
    """Figures of [M] scores in [0, 1] with counts k of n, n >= 1.

    brier: mean of (s - y)^2 over single rollouts y, averaged over each step's n. brier_perfect: its unbiased estimate
    for s = p, k (n - k) / (n (n - 1)) (steps with n = 1 carry no estimate and are left out of it). squared_error: mean
    of (s - p)^2 = brier - brier_perfect, the noise taken out. squared_error_raw: mean of (s - k/n)^2, noise included.

    ece: sum over equally wide bins of share x |mean score - mean k/n|; ece_perfect: its expectation if every p were s,
    sum of share x sqrt(2 / pi) sigma, sigma^2 = mean of s (1 - s) / n over the bin, by its steps. diagram: for each bin
    that is not empty steps, score, value, ci95 (of the value; percentile bootstrap over steps).
    Raises ValueError for values out of range.
    """
    s, k, n = (np.asarray(x, np.float64) for x in (scores, k, n))
    if not (s.shape == k.shape == n.shape and s.ndim == 1 and s.size):
        raise ValueError("scores, k and n must be lists of the same length, not empty")
    if not (np.all((s >= 0) & (s <= 1)) and np.all((k >= 0) & (k <= n) & (n >= 1))):
        raise ValueError("scores must lie in [0, 1], and 0 <= k <= n with n >= 1")
    value, index = k / n, np.minimum((s * bins).astype(int), bins - 1)
    repeated = n > 1
    floor = k * (n - k) / (n * np.maximum(n - 1, 1))
    brier = (k * (1 - s) ** 2 + (n - k) * s**2) / n
    diagram, ece, perfect = [], 0.0, 0.0
    for i in range(bins):
        chosen = index == i
        if not chosen.any():
            continue
        share, score, mean = chosen.mean(), s[chosen].mean(), value[chosen].mean()
        sigma = np.sqrt((s[chosen] * (1 - s[chosen]) / n[chosen]).sum()) / chosen.sum()
        ece, perfect = ece + share * abs(score - mean), perfect + share * np.sqrt(2 / np.pi) * sigma
        ci95 = statistics.interval(value[chosen])
        diagram.append({"steps": int(chosen.sum()), "score": float(score), "value": float(mean), "ci95": ci95})
    return {
        "steps": int(s.size),
        "rollouts": int(n.sum()),
        "brier": float(brier.mean()),
        "brier_perfect": float(floor[repeated].mean()) if repeated.any() else float("nan"),
        "squared_error": float((brier - floor)[repeated].mean()) if repeated.any() else float("nan"),
        "squared_error_raw": float(((s - value) ** 2).mean()),
        "ece": float(ece),
        "ece_perfect": float(perfect),
        "diagram": diagram,
    }
