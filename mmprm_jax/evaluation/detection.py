"""Which step is the first wrong one? ProcessBench's F1 and VisualProcessBench's macro-F1.

A step counts as right when its score is at least the threshold. The threshold is chosen on held-out rows only: another
file, or a seeded share of the rows, which then is no part of the figures (PEERS.md A3: chosen on the evaluated file
itself, a figure is too good).

ProcessBench (rows with ``label``: the index of the first wrong step, -1: none): the prediction is the first step below
the threshold. F1 is the harmonic mean of the accuracies on rows with and without an error; the benchmark's average is
the mean over its sources.

VisualProcessBench (rows with ``labels``: 1 right, -1 wrong, 0 neutral and ignored): macro-F1 is the mean of the F1 of
the right and of the wrong steps. Two overall figures are in use and both are given: over all steps pooled, and the mean
of the sources' macro-F1 weighted by their steps.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from etils import epath

from mmprm_jax.evaluation import calibration, statistics
from mmprm_jax.evaluation.stored import iter_rows, parse_scores
from mmprm_jax.records import UserError

MAX_ROLLOUTS = 10**9  # behind a step


@dataclasses.dataclass(frozen=True)
class Row:
    """One solution with the scores of its steps and what is known of them: exactly one of label, labels, counts."""

    id: str
    source: str
    scores: tuple[float, ...]
    label: int | None = None  # index of the first wrong step, -1: none
    labels: tuple[int, ...] | None = None  # 1 right, 0 neutral, -1 wrong
    counts: tuple[tuple[int, int], ...] | None = (
        None  # (k, n): k of n rollouts from this step on were right; n = 0: none
    )
    named: bool = True  # False: the file has no id for it, ``id`` is its place there

    @property
    def first_error(self) -> int:
        """The ``label`` of a row that has one."""
        assert self.label is not None
        return self.label


def read(path: epath.PathLike, truth: epath.PathLike | None = None) -> tuple[list[Row], list[str]]:
    """(rows, a line for each bad row) of a file {id, source, scores, and one of: label; labels; k and n}.

    truth: a file with all but the scores, joined by id; ``path`` may then be what `mmprm score` writes, and ``truth``
    what `mmprm prepare` makes of a benchmark (``StepDetectionExample``; its category is the source here).
    Raises UserError if no row is good, if an id is twice in ``truth``, and if every label 0 must be a mistake (there is
    no -1 beside them).
    """
    rows, bad = [], []
    known: dict[str, Any] = {}
    for _, row in () if truth is None else iter_rows(truth):
        if _named(row) and known.setdefault(str(row["id"]), row) is not row:
            raise UserError(f"{truth}: the id {row['id']!r:.80} is there twice; rows are joined by it")
    for where, row in iter_rows(path):
        try:
            if isinstance(row, ValueError):
                raise row
            if truth is not None:
                if not _named(row) or str(row["id"]) not in known:
                    raise ValueError(f"{truth} has no row of that id")
                row = known[str(row["id"])] | {"scores": row.get("scores")}
            rows.append(_row(row, where))
        except (ValueError, TypeError) as error:
            bad.append(f"{path}, {where}: {error}")
    if not rows:
        raise UserError("; ".join(bad[:3]) or f"{path}: is empty")
    steps = [x for row in rows for x in row.labels or ()]
    if 0 in steps and -1 not in steps:
        raise UserError(f"{path}: labels has 0 but no -1; a wrong step is -1, 0 is neutral and ignored")
    return rows, bad


def _named(row: Any) -> bool:
    return isinstance(row, dict) and row.get("id") is not None


def _row(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, found {type(row).__name__}")
    scores = row.get("scores")
    if isinstance(scores, list) and len(scores) == 1 and isinstance(scores[0], list):
        scores = scores[0]  # what `mmprm score` writes for one candidate
    scores = parse_scores(scores, "scores")
    if "first_error" in row:  # a StepDetectionExample
        row = {**row, "source": row.get("category")}
        row |= {"label": row["first_error"], "labels": None if row["first_error"] is not None else row.get("labels")}
    kinds = [key for key in ("label", "labels", "k") if row.get(key) is not None]
    if len(kinds) != 1:
        raise ValueError(f"one of label, labels, k (with n) is needed, found {', '.join(kinds) or 'none'}")
    known: dict[str, Any] = {}
    if kinds == ["label"]:
        known["label"] = _integers([row["label"]], "label", -1, len(scores) - 1)[0]
    elif kinds == ["labels"]:
        known["labels"] = _integers(row["labels"], "labels", -1, 1, len(scores))
    else:
        n = _integers(row.get("n"), "n", 0, MAX_ROLLOUTS, len(scores))
        k = _integers(row["k"], "k", 0, MAX_ROLLOUTS, len(scores))
        if any(a > b for a, b in zip(k, n, strict=True)):
            raise ValueError("k must not be larger than n")
        known["counts"] = tuple(zip(k, n, strict=True))
    name, source = row.get("id"), row.get("source")
    named = name is not None
    return Row(str(name) if named else where, "" if source is None else str(source), scores, named=named, **known)


def _integers(values: Any, key: str, low: int, high: int, length: int | None = None) -> tuple[int, ...]:
    if not isinstance(values, list) or (length is not None and len(values) != length):
        raise ValueError(f"{key} must be a list with a whole number for each score")
    for value in values:
        if type(value) is not int or not low <= value <= high:  # true and false are ints too
            raise ValueError(f"{key} must be whole numbers from {low} to {high}, found {value!r:.80}")
    return tuple(values)


def split(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(held out, the rest). By a hash of seed and id: rows of one id stay together, and the order does not matter."""

    def held_out(name: str) -> bool:
        digest = hashlib.blake2b(f"{seed}\x1f{name}".encode(errors="backslashreplace"), digest_size=8).digest()
        return int.from_bytes(digest) < share * 2**64

    return [r for r in rows if held_out(r.id)], [r for r in rows if not held_out(r.id)]


# ------------------------------------------------------------------------------------------------- F1


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.full(np.broadcast(a, b).shape, np.nan), where=np.asarray(b) > 0)


def first_error_f1(counts: np.ndarray) -> np.ndarray:
    """[..., 4] (found, wrong, passed, right) -> harmonic mean of found / wrong and passed / right; NaN for 0 / 0."""
    found, wrong, passed, right = np.moveaxis(np.asarray(counts, np.float64), -1, 0)
    a, b = _ratio(found, wrong), _ratio(passed, right)
    return np.where(a + b == 0, 0.0, _ratio(2 * a * b, a + b))


def macro_f1(counts: np.ndarray) -> np.ndarray:
    """[..., 4] (true right, false right, true wrong, false wrong) -> mean of both classes' F1.

    A class that is neither there nor predicted is left out of the mean.
    """
    tr, fr, tw, fw = np.moveaxis(np.asarray(counts, np.float64), -1, 0)
    each = np.stack([_ratio(2 * tr, 2 * tr + fr + fw), _ratio(2 * tw, 2 * tw + fw + fr)])
    return _ratio(np.nansum(each, 0), np.isfinite(each).sum(0))


def first_error_counts(rows: Sequence[Row], threshold: float) -> np.ndarray:
    """[R, 4] for ``first_error_f1``."""
    found = []
    for row in rows:
        guess = next((i for i, s in enumerate(row.scores) if s < threshold), -1)
        hit = float(guess == row.label)
        found.append((hit, 1.0, 0.0, 0.0) if row.first_error >= 0 else (0.0, 0.0, hit, 1.0))
    return np.array(found).reshape(-1, 4)


def step_counts(rows: Sequence[Row], threshold: float) -> np.ndarray:
    """[R, 4] for ``macro_f1``."""
    found = []
    for row in rows:
        right, sure = np.array(row.labels) == 1, np.array(row.labels) != 0
        guess = np.array(row.scores) >= threshold
        found.append([(m & sure).sum() for m in (guess & right, guess & ~right, ~guess & ~right, ~guess & right)])
    return np.array(found, np.float64).reshape(-1, 4)


# ------------------------------------------------------------------------------------------------- thresholds


def first_error_threshold(rows: Sequence[Row]) -> float:
    """The threshold of the largest F1 over all ``rows``; of equally good ones the middle of the first stretch.

    A row with its first error at e is right for thresholds in (score_e, least score before e], a right one for those up
    to its least score: so the F1 changes at these scores only. Raises UserError without both kinds of rows.
    """
    opens, closes, passes = [], [], []
    for row in rows:
        error = row.first_error
        before = min(row.scores[:error] if error >= 0 else row.scores, default=np.inf)
        if error < 0:
            passes.append(before)
        elif row.scores[error] < before:
            opens.append(row.scores[error])
            closes.append(before)
    wrong = sum(row.first_error >= 0 for row in rows)
    if not wrong or not passes:
        raise UserError(
            "the held-out rows have no solution without an error, or none with one; hold out others or more"
        )

    def counts(t: np.ndarray) -> np.ndarray:
        hits = np.searchsorted(np.sort(opens), t, "left") - np.searchsorted(np.sort(closes), t, "left")
        passed = len(passes) - np.searchsorted(np.sort(passes), t, "left")
        return np.stack([hits, np.full(len(t), wrong), passed, np.full(len(t), len(passes))], -1)

    return _middle(opens + closes + passes, lambda t: first_error_f1(counts(t)))


def step_threshold(rows: Sequence[Row]) -> float:
    """The threshold of the largest macro-F1 over the steps of all ``rows``, in the same way. Raises UserError."""
    pairs = [(s, x) for row in rows for s, x in zip(row.scores, row.labels or (), strict=True) if x]
    right, wrong = (np.sort([s for s, x in pairs if x == which]) for which in (1, -1))
    if not right.size or not wrong.size:
        raise UserError("the held-out rows have no right steps, or no wrong ones; hold out others or more")

    def counts(t: np.ndarray) -> np.ndarray:
        below = np.searchsorted(right, t, "left"), np.searchsorted(wrong, t, "left")
        return np.stack([right.size - below[0], wrong.size - below[1], below[1], below[0]], -1)

    return _middle([s for s, _ in pairs], lambda t: macro_f1(counts(t)))


def _middle(scores: Iterable[float], value: Callable[[np.ndarray], np.ndarray]) -> float:
    """The middle of the first stretch between neighbouring scores on which ``value`` is largest."""
    edges = np.unique(np.clip([0.0, 1.0, *scores], 0, 1))
    at = np.concatenate([(edges[:-1] + edges[1:]) / 2, [0.0, 1.0]])  # the ends matter to scores of exactly 0 and 1
    found = value(at)
    return float(at[int(np.argmax(found >= np.nanmax(found) - 1e-12))])


# ------------------------------------------------------------------------------------------------- figures


def _figures(
    rows: Sequence[Row], per_row: np.ndarray, f1: Callable[[np.ndarray], np.ndarray], weighted: bool
) -> dict[str, Any]:
    """F1 pooled, by source and over sources, each with its bootstrap interval (rows are resampled).

    weighted: the mean over sources is by their steps; otherwise every source counts the same. NaN where undefined.
    """
    names = sorted({row.source for row in rows})
    sources = np.array([row.source for row in rows])

    def sums(counts: np.ndarray) -> np.ndarray:
        """[1 + resamples, 4]: first those of the rows themselves."""
        return np.concatenate([counts.sum(0, keepdims=True), statistics.resampled_sums(counts)])

    values, weights = [], []
    for name in names:
        part = sums(np.where((sources == name)[:, None], per_row, 0))
        values.append(f1(part))
        weights.append(part.sum(-1) if weighted else np.ones(len(part)))

    def with_interval(x: np.ndarray) -> dict[str, Any]:
        return {"f1": float(x[0]), "ci95": statistics.quantiles(x[1:])}

    result = {"rows": len(rows), "pooled": with_interval(f1(sums(per_row)))}
    total = np.sum(weights, 0)
    counted = np.where(np.array(weights) == 0, 0, values)  # without a judged step a source has neither F1 nor weight
    result["mean_of_sources"] = with_interval(_ratio(np.sum(counted * weights, 0), total))
    result["sources"] = {
        name: {"rows": int((sources == name).sum())} | with_interval(x) for name, x in zip(names, values, strict=True)
    }
    return result


KINDS = {
    "label": ("process_bench", first_error_threshold, first_error_counts, first_error_f1, False),
    "labels": ("visual_process_bench", step_threshold, step_counts, macro_f1, True),
}


def evaluate(
    rows: Sequence[Row], dev: Sequence[Row] | None, threshold: float | None, share: float = 0.2, seed: int = 0
) -> dict[str, Any]:
    """The figures of each kind of row that there is: process_bench, visual_process_bench, calibration.

    dev: held-out rows for the thresholds; None: a share of ``rows``, by ``seed``. threshold: a given one; nothing is
    held out then. Raises UserError if a threshold cannot be chosen.
    """
    result: dict[str, Any] = {}
    for key, (name, choose, count, f1, weighted) in KINDS.items():
        tested = [row for row in rows if getattr(row, key) is not None]
        if not tested:
            continue
        t, held_out = threshold, 0
        if t is None:
            if dev is None:
                chosen_on, tested = split(tested, share, seed)
            else:
                chosen_on = [row for row in dev if getattr(row, key) is not None]
                both = {row.id for row in chosen_on if row.named} & {row.id for row in tested if row.named}
                if both:
                    raise UserError(f"{len(both)} ids are in the held-out file too, e.g. {sorted(both)[0]}")
            t, held_out = choose(chosen_on), len(chosen_on)
        if not tested:
            raise UserError(f"{name}: no rows are left to test on; hold out fewer")
        result[name] = {"threshold": t, "held_out_rows": held_out, "threshold_given": threshold is not None}
        result[name] |= _figures(tested, count(tested, t), f1, weighted)
    counted = [(s, k, n) for row in rows if row.counts for s, (k, n) in zip(row.scores, row.counts, strict=True) if n]
    if counted:
        result["calibration"] = calibration.calibrate(*np.array(counted).T)
    return result
