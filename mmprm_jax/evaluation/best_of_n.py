"""Best-of-N: how often each selector picks a right solution among the first N sampled ones of a problem.

The candidates of a problem are independent samples, so every selector sees the same first N. Nothing is drawn at
random: a choice that is left open (random, unique, ties) counts with its exact expectation, so an accuracy depends
neither on a seed nor on the order of the candidates. The original draws from an unseeded generator and lets the first
of tied candidates win.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mmprm_jax.evaluation import aggregate
from mmprm_jax.records import ScoredCandidate

Problems = Sequence[Sequence[ScoredCandidate]]

_TIE = 1e-12  # relative; sums of the same numbers in another order differ by rounding only


@dataclasses.dataclass(frozen=True)
class _Arrays:
    """Candidates as arrays [P, N]; ``valid`` is False where a problem has fewer than N."""

    valid: np.ndarray  # bool
    correct: np.ndarray  # float64, 0 or 1
    answer: np.ndarray  # int; equal within a problem iff the answers are equal; -1: no answer
    solution: np.ndarray  # int; equal within a problem iff the texts are equal
    logprob: np.ndarray  # float64, nats
    scores: dict[str, np.ndarray]  # aggregator -> float64


def _ids(values: Iterable[Any]) -> list[int]:
    """Numbers equal values equally; None becomes -1."""
    seen: dict[Any, int] = {}
    return [-1 if v is None else seen.setdefault(v, len(seen)) for v in values]


def _arrays(problems: Problems, n: int) -> _Arrays:
    shape = (len(problems), n)
    arrays = _Arrays(
        valid=np.zeros(shape, bool),
        correct=np.zeros(shape),
        answer=np.full(shape, -1),
        solution=np.full(shape, -1),
        logprob=np.full(shape, -np.inf),
        scores={name: np.full(shape, -np.inf) for name in aggregate.AGGREGATORS},
    )
    for p, scored in enumerate(problems):
        scored = scored[:n]
        m = len(scored)
        candidates = [s.candidate for s in scored]
        arrays.valid[p, :m] = True
        arrays.correct[p, :m] = [c.correct for c in candidates]
        arrays.answer[p, :m] = _ids(c.answer for c in candidates)
        arrays.solution[p, :m] = _ids(c.segments for c in candidates)
        arrays.logprob[p, :m] = [c.logprob for c in candidates]
        for name, function in aggregate.AGGREGATORS.items():
            arrays.scores[name][p, :m] = [function(np.asarray(s.scores)) for s in scored]
    return arrays


def _expectation(weight: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """[P, N] unnormalised probabilities of being picked -> [P] probability of a right pick; 0 where all are 0."""
    total = weight.sum(1)
    return (weight * correct).sum(1) / np.where(total > 0, total, 1)


def _tied(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """[P, N] bool: the valid candidates whose value is the largest of their problem."""
    top = np.where(valid, values, -np.inf).max(1, keepdims=True)
    return valid & (values >= top - _TIE * np.abs(top))


def _same(ids: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """[P, N, N] float64: 1 where two valid candidates have the same id."""
    return ((ids[:, :, None] == ids[:, None, :]) & valid[:, :, None] & valid[:, None, :]).astype(np.float64)


def _vote(weight: np.ndarray, same: np.ndarray, answered: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """[P] probability that the answer with the largest sum of weights is right; tied answers are equally likely."""
    votes = np.einsum("pij,pj->pi", same, weight)
    # each answer counts once, however many candidates give it
    return _expectation(_tied(votes, answered) / np.maximum(same.sum(2), 1), correct)


def per_problem(problems: Problems, n: int) -> dict[str, Any]:
    """Accuracy of each selector on each problem, float64 [P] in [0, 1], from its first ``n`` candidates.

    Keys: random; unique (uniform over the distinct texts); majority (vote of the extracted answers, compared as
    strings; no answer: no vote); policy_logprob (largest total log-probability); prm -> {aggregator: ...} (largest
    score); prm_weighted_majority -> {aggregator: ...} (a vote weighted by `aggregate.vote_weight`); oracle (any right).
    A problem with fewer candidates uses those it has; one with none is wrong everywhere.
    Raises ValueError for n < 1 and for scores outside [0, 1].
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, found {n}")
    x = _arrays(problems, n)
    answered = x.valid & (x.answer >= 0)
    same = _same(x.answer, answered)
    copies = _same(x.solution, x.valid).sum(2)
    return {
        "random": _expectation(x.valid.astype(np.float64), x.correct),
        "unique": _expectation(x.valid / np.maximum(copies, 1), x.correct),
        "majority": _vote(np.ones_like(x.correct), same, answered, x.correct),
        "policy_logprob": _expectation(_tied(x.logprob, x.valid), x.correct),
        "prm": {name: _expectation(_tied(s, x.valid), x.correct) for name, s in x.scores.items()},
        "prm_weighted_majority": {
            name: _vote(aggregate.vote_weight(name, s), same, answered, x.correct) for name, s in x.scores.items()
        },
        "oracle": x.correct.max(1),
    }


def mean_and_stderr(values: np.ndarray) -> tuple[float, float]:
    """Mean of [P] values and its standard error std(ddof=1) / sqrt(P); NaN for P = 1. Raises ValueError for P = 0."""
    values = np.asarray(values, np.float64)
    if not values.size:
        raise ValueError("no problems to average over")
    stderr = values.std(ddof=1) / np.sqrt(values.size) if values.size > 1 else np.nan
    return float(values.mean()), float(stderr)


def _summary(values: Any) -> dict[str, Any]:
    if isinstance(values, dict):
        return {name: _summary(v) for name, v in values.items()}
    accuracy, stderr = mean_and_stderr(values)
    return {"accuracy": accuracy, "stderr": stderr}


def sizes(problems: Problems) -> list[int]:
    """The N to report: the powers of two below the largest number of candidates, and that number (16: 1 2 4 8 16)."""
    most = max((len(candidates) for candidates in problems), default=0)
    return [2**i for i in range(most.bit_length()) if 2**i < most] + [max(most, 1)]


def best_of_n(problems: Problems) -> dict[str, Any]:
    """``{str(N): {selector: {"accuracy", "stderr"}}}`` for N in `sizes`; selectors as in `per_problem`."""
    return {str(n): _summary(per_problem(problems, n)) for n in sizes(problems)}


def paired(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """Mean difference a - b of [P] accuracies on the same problems, its standard error and normal 95% interval."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"paired accuracies need equal shapes, found {a.shape} and {b.shape}")
    difference, stderr = mean_and_stderr(a - b)
    half = 1.959963984540054 * stderr
    return {"difference": difference, "stderr": stderr, "ci95": [difference - half, difference + half]}


def select_aggregator(dev_problems: Problems, n: int = 16) -> str:
    """The aggregator with the highest Best-of-n accuracy; of tied ones the first in AGGREGATORS. Use a held-out set."""
    accuracy = {name: mean_and_stderr(v)[0] for name, v in per_problem(dev_problems, n)["prm"].items()}
    best = max(accuracy.values())
    return next(name for name, value in accuracy.items() if value >= best - _TIE)


def step_auc(scores: Sequence[float], truths: Sequence[bool]) -> float:
    """Area under the ROC curve: P(a true step scores higher than a false one), ties counted half (Mann-Whitney).

    NaN if either class is empty. Raises ValueError for unequal lengths.
    """
    values, truth = np.asarray(scores, np.float64), np.asarray(truths, bool)
    if values.shape != truth.shape:
        raise ValueError(f"one truth per score: found {values.size} scores and {truth.size} truths")
    positive, negative = values[truth], np.sort(values[~truth])
    if not positive.size or not negative.size:
        return float("nan")
    wins = np.searchsorted(negative, positive, "left") + np.searchsorted(negative, positive, "right")
    return float(wins.mean() / (2 * negative.size))
