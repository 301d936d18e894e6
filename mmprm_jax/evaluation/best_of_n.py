"""Best-of-N: how often each selector picks a right solution among N sampled ones of a problem.

The n stored candidates of a problem are independent samples, so each N of them are as good a sample as the first N. An
accuracy at N is therefore the mean over *all* subsets of N: it has the same expectation and less variance, and at N = n
it is that of the candidates themselves. Selectors that rank candidates by a number have a closed form (sort them: the
best of a subset is candidate r if none of those above r is in it). A vote has none: it is exact where there are at most
256 subsets, and the mean over 256 seeded ones otherwise.

What a selector leaves open (random, unique, ties) counts with its exact expectation. The original draws from an
unseeded generator and lets the first of tied candidates win (``evaluation.paper``).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
import unicodedata
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mmprm_jax.answers.equivalence import NO_SETTINGS, compare, graded
from mmprm_jax.evaluation import aggregate
from mmprm_jax.evaluation.statistics import mean_and_stderr, summary
from mmprm_jax.records import Candidate, Grading, ScoredCandidate

Problems = Sequence[Sequence[ScoredCandidate]]
Key = Callable[[Candidate], Hashable]  # of one that has an answer; answers with equal keys count as one answer

SUBSETS = 256  # of N candidates, for a vote
_TIE = 1e-12  # relative; sums of the same numbers in another order differ by rounding only


def plain(answer: str) -> str:
    """An answer without what does not count: ``_composed``, no capitals."""
    return _composed(answer).casefold()


def _composed(answer: str) -> str:
    """Composed characters (not NFKC: 2² is not 22), no spaces around, one between."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", answer)).strip()


def by_text(candidate: Candidate) -> Hashable:
    """The default key: the ``plain`` answer."""
    return plain(candidate.answer or "")


def equivalent(problems: Problems, gradings: Mapping[str, Grading] | None = None) -> Key:
    r"""A key by which answers of one problem that say the same thing (0.5 and \frac{1}{2}) are equal.

    Two answers are, if the quick rules take either as a prediction of the other; and so are those equal to one answer.
    gradings: of problems, by id: with options "B" and the text of B are one answer, in that problem.
    """
    gradings = {name: grading for name, grading in (gradings or {}).items() if grading}
    parent: dict[tuple[str, str], tuple[str, str]] = {}  # (id of a problem with a grading, or "", and an answer)

    def place(candidate: Candidate) -> tuple[str, str]:
        if candidate.problem_id in gradings:  # where B may be a letter of the options, b may not
            return candidate.problem_id, _composed(candidate.answer or "")
        return "", plain(candidate.answer or "")

    def root(answer: tuple[str, str]) -> tuple[str, str]:
        while parent.get(answer, answer) != answer:
            answer = parent[answer]
        return answer

    for scored in problems:
        answers = sorted({place(s.candidate) for s in scored if s.candidate.answer is not None})
        settings = graded(gradings.get(answers[0][0], Grading())) if answers else NO_SETTINGS
        for one, other in itertools.combinations(answers, 2):
            first, second, a, b = root(one), root(other), one[1], other[1]
            if first != second and compare(a, b, settings) and compare(b, a, settings):
                parent[max(first, second)] = min(first, second)
    return lambda candidate: root(place(candidate))


@dataclasses.dataclass(frozen=True)
class _Arrays:
    """The n candidates of one problem."""

    correct: np.ndarray  # float64 [n], 0 or 1
    answers: np.ndarray  # float64 [n, classes]: 1 where the candidate gives that answer; no answer: a row of zeros
    texts: np.ndarray  # float64 [n, distinct texts]
    values: np.ndarray  # float64 [1 + aggregators, n]: what candidates are ranked by; the first is the log-probability
    weights: np.ndarray  # float64 [1 + aggregators, n]: what votes count; the first is a plain vote


def _one_hot(values: Iterable[Hashable]) -> np.ndarray:
    """float64 [n, distinct values]; None has no column."""
    seen: dict[Hashable, int] = {}
    ids = [-1 if v is None else seen.setdefault(v, len(seen)) for v in values]
    return (np.array(ids, int)[:, None] == np.arange(len(seen))).astype(np.float64)


def _arrays(scored: Sequence[ScoredCandidate], key: Key) -> _Arrays:
    candidates = [s.candidate for s in scored]
    scores = [np.asarray(s.scores) for s in scored]
    ranked = {name: np.array([f(s) for s in scores]) for name, f in aggregate.AGGREGATORS.items()}
    plain_votes = np.ones(len(scored))
    return _Arrays(
        correct=np.array([c.correct for c in candidates], np.float64),
        answers=_one_hot(None if c.answer is None else key(c) for c in candidates),
        texts=_one_hot(c.segments for c in candidates),
        values=np.array([[c.logprob for c in candidates], *ranked.values()], np.float64),
        weights=np.array([plain_votes, *(aggregate.vote_weight(name, v) for name, v in ranked.items())]),
    )


@functools.lru_cache(maxsize=256)
def _none_above(n: int, size: int) -> np.ndarray:
    """[n + 1]: P(a subset of ``size`` of n candidates lies within m given ones), for m = 0 to n."""
    return np.array([math.comb(m, size) / math.comb(n, size) for m in range(n + 1)])


def _best(values: np.ndarray, correct: np.ndarray, size: int) -> float:
    """P(the candidate of the largest value in a random subset is right); tied ones are equally likely."""
    order = np.argsort(-values, kind="stable")
    ranked, right = values[order], correct[order]
    with np.errstate(invalid="ignore"):  # -inf - -inf: a tie
        new = np.concatenate([[True], ranked[:-1] - ranked[1:] > _TIE * np.abs(ranked[:-1])])
    starts = np.flatnonzero(new)
    ends = np.append(starts[1:], len(ranked))
    within = _none_above(len(ranked), size)
    chance = within[len(ranked) - starts] - within[len(ranked) - ends]
    return float(chance @ (np.add.reduceat(right, starts) / (ends - starts)))


@functools.lru_cache(maxsize=256)
def _subsets(n: int, size: int) -> np.ndarray:
    """float64 [subsets, n] of 0 and 1: all subsets of ``size``, or ``SUBSETS`` seeded ones."""
    if math.comb(n, size) <= SUBSETS:
        chosen = np.array(list(itertools.combinations(range(n), size)))
    else:
        rng = np.random.default_rng([n, size])
        chosen = np.array([rng.permutation(n)[:size] for _ in range(SUBSETS)])
    found = np.zeros((len(chosen), n))
    np.put_along_axis(found, chosen, 1.0, axis=1)
    return found


def _share(chosen: np.ndarray, right: np.ndarray) -> np.ndarray:
    """[..., K] bool, [..., K] -> mean over the subsets (axis -2) of the mean of ``right`` over the chosen; none: 0."""
    count = chosen.sum(-1)
    return ((chosen * right).sum(-1) / np.maximum(count, 1)).mean(-1)


def _votes(x: _Arrays, subsets: np.ndarray) -> np.ndarray:
    """[1 + aggregators]: P(the answer with the largest sum of weights is right); tied answers are equally likely."""
    if not x.answers.shape[1]:
        return np.zeros(len(x.weights))
    given = subsets @ x.answers  # how many candidates of the subset give each answer
    right = (subsets * x.correct) @ x.answers / np.maximum(given, 1)
    votes = subsets @ (x.weights[:, :, None] * x.answers)
    top = votes.max(-1, keepdims=True)  # weights are not negative: no answer that was not given is above one that was
    tied = (given > 0) & (votes >= top - _TIE * top)
    return _share(tied, right)


def _unique(x: _Arrays, subsets: np.ndarray) -> float:
    given = subsets @ x.texts
    right = (subsets * x.correct) @ x.texts / np.maximum(given, 1)
    return float(_share(given > 0, right))


def _selected(x: _Arrays, n: int) -> np.ndarray:
    """Accuracies of one problem: random, unique, majority, log-probability, oracle, the PRMs, the weighted votes."""
    count = len(x.correct)
    if not count:
        return np.zeros(5 + 2 * len(aggregate.AGGREGATORS))
    size = min(n, count)
    subsets = _subsets(count, size)
    votes = _votes(x, subsets)
    best = [_best(values, x.correct, size) for values in x.values]
    oracle = _best(x.correct, x.correct, size)  # = pass@n
    return np.array([x.correct.mean(), _unique(x, subsets), votes[0], best[0], oracle, *best[1:], *votes[1:]])


def _named(rows: np.ndarray, without: Iterable[str]) -> dict[str, Any]:
    """[P, selectors] to the dictionary that ``per_problem`` returns."""
    names = list(aggregate.AGGREGATORS)
    random, unique, majority, logprob, oracle = rows[:, :5].T
    found = {
        "random": random,
        "unique": unique,
        "majority": majority,
        "policy_logprob": logprob,
        "prm": dict(zip(names, rows[:, 5 : 5 + len(names)].T, strict=True)),
        "prm_weighted_majority": dict(zip(names, rows[:, 5 + len(names) :].T, strict=True)),
        "oracle": oracle,
    }
    return {name: values for name, values in found.items() if name not in set(without)}


def per_problem(problems: Problems, n: int, key: Key = by_text, without: Iterable[str] = ()) -> dict[str, Any]:
    """Accuracy of each selector on each problem, float64 [P] in [0, 1], over all subsets of ``n`` of its candidates.

    Keys: random; unique (uniform over the distinct texts); majority (a vote of the extracted answers, equal where their
    ``key`` is; no answer: no vote); policy_logprob (largest total log-probability); prm -> {aggregator: ...} (largest
    score; ``last`` is the outcome baseline); prm_weighted_majority -> {aggregator: ...} (a vote weighted by
    `aggregate.vote_weight`); oracle (any right: pass@n). A problem with fewer candidates uses those it has; one with
    none is wrong everywhere. without: selectors to leave out, for want of what they need.
    Raises ValueError for n < 1 and for scores outside [0, 1].
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, found {n}")
    rows = [_selected(_arrays(scored, key), n) for scored in problems]
    return _named(np.array(rows).reshape(len(rows), 5 + 2 * len(aggregate.AGGREGATORS)), without)


def sizes(problems: Problems) -> list[int]:
    """The N to report: the powers of two below the largest number of candidates, and that number (16: 1 2 4 8 16)."""
    largest = max((len(candidates) for candidates in problems), default=0)
    return [2**i for i in range(largest.bit_length()) if 2**i < largest] + [max(largest, 1)]


def summarise(values: Any) -> dict[str, Any]:
    """`statistics.summary` of the [P] accuracies in (nested) dictionaries."""
    if isinstance(values, dict):
        return {name: summarise(v) for name, v in values.items()}
    return summary(values)


def best_of_n(
    problems: Problems, key: Key = by_text, without: Iterable[str] = (), greedy: Sequence[bool] | None = None
) -> dict[str, Any]:
    """``{str(N): {selector: {"accuracy", "stderr", "ci95"}}}`` for N in `sizes`; selectors as in `per_problem`.

    greedy: whether the solution decoded at temperature 0 is right, for each problem; it is the same for every N.
    """
    arrays, found = [_arrays(scored, key) for scored in problems], {}
    for n in sizes(problems):
        if not arrays:
            raise ValueError("no problems to average over")
        each = _named(np.array([_selected(x, n) for x in arrays]), without)
        if greedy is not None:
            each["greedy"] = np.asarray(greedy, np.float64)
        found[str(n)] = summarise(each)
    return found


def flat(values: dict[str, Any]) -> dict[str, Any]:
    """{"prm": {"min": x}} to {"prm.min": x}."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return found


def by_group(each: dict[str, Any], groups: Sequence[str]) -> dict[str, Any]:
    """Accuracies of the selectors (as `per_problem` returns them) in each group of problems, in the order of names."""
    labels = np.array(groups)
    return {
        name: {"n_problems": int((labels == name).sum())}
        | summarise({k: v[labels == name] for k, v in flat(each).items()})
        for name in sorted(set(groups), key=natural)
    }


def natural(name: str) -> list[Any]:
    """Sorts the numbers in names as numbers."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def length_group(scored: Sequence[ScoredCandidate]) -> str:
    """The mean number of steps of a problem's candidates, in bins that double: 0-1 steps, 2, 3-4, 5-8, 9-16, …"""
    steps = math.ceil(np.mean([len(s.scores) for s in scored]) - 1e-9) if scored else 0
    if steps <= 2:
        return "2 steps" if steps == 2 else "0-1 steps"
    top = 2 ** (steps - 1).bit_length()
    return f"{top // 2 + 1}-{top} steps"


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
