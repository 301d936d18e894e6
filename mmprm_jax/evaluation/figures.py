"""Figures of scored candidates: what metrics.json and ``mmprm bon`` say of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from mmprm_jax import records
from mmprm_jax.data import digits
from mmprm_jax.evaluation import best_of_n, calibration, statistics
from mmprm_jax.records import Candidate, Problem, ScoredCandidate, StepExample

Figures = dict[str, Any]
Scored = list[list[ScoredCandidate]]


def selectors(
    problems: best_of_n.Problems, n: int, greedy: Sequence[bool] | None = None, without: Sequence[str] = (),
    key: best_of_n.Key = best_of_n.by_text,
) -> tuple[Figures, dict[str, Any]]:  # fmt: skip
    """(what can be said of any scored candidates, the accuracies of each problem at ``n``)."""
    each = best_of_n.per_problem(problems, n, key, without)
    if greedy is not None:
        each["greedy"] = np.asarray(greedy, np.float64)
    figures: Figures = {
        "n_problems": len(problems),
        "best_of_n": best_of_n.best_of_n(problems, key, without, greedy),
        "by_length": best_of_n.by_group(each, [best_of_n.length_group(group) for group in problems]),
    }
    if "majority" in each:
        others = {k: v for k, v in best_of_n.flat(each).items() if k not in ("majority", "oracle")}
        figures["against_majority"] = {k: statistics.paired(v, each["majority"]) for k, v in others.items()}
    return figures, each


def calibrate(steps: Sequence[StepExample], test: Scored) -> Figures | None:
    """Scores of the steps that have Monte Carlo estimates against these; None if there are none."""
    scores = {group[0].candidate.problem_id: group[0].scores for group in test if group}
    found = [
        (s, k, n) for x in steps for s, k, n in zip(scores[x.problem_id], x.k, x.n, strict=True) if n
    ]  # fmt: skip
    return calibration.calibrate(*np.array(found).T) if found else None


def control(blind: Scored, n: int, aggregator: str, random: np.ndarray) -> Figures:
    """Candidates that were scored without their image, against ``random`` (accuracies of each problem)."""
    found = best_of_n.per_problem(blind, n)["prm"][aggregator]
    difference = statistics.paired(found, random)
    accuracy, stderr = statistics.mean_and_stderr(found)
    return {
        "accuracy": accuracy,
        "stderr": stderr,
        "difference_to_random": difference["difference"],
        "difference_stderr": difference["stderr"],
    }


def policy_control(problems: Sequence[Problem], shuffled: epath.Path) -> Figures:
    """How often the policy is right about a problem when it sees the image of another one, and how often by chance.

    shuffled: the file of those candidates. Chance: the probability that a sampled answer equals the gold answer of a
    problem drawn independently.
    """
    groups: dict[str, list[Candidate]] = {}
    for x in records.read(shuffled, Candidate):
        groups.setdefault(x.problem_id, []).append(x)
    accuracy, stderr = statistics.mean_and_stderr(
        np.array([np.mean([x.correct for x in groups[p.id]]) for p in problems])
    )
    answers = Counter(x.answer for g in groups.values() for x in g)
    gold = Counter(p.answer for p in problems)
    chance = sum(answers[a] * gold[a] for a in gold) / (answers.total() * gold.total())
    return {"accuracy": accuracy, "stderr": stderr, "chance": chance}


def with_truth(truth_file: epath.Path, problems: Sequence[Problem], test: Scored, each: dict[str, Any]) -> Figures:
    """What can be said where the true state of each step is known: of the embedded problems. Else nothing."""
    if not truth_file.exists():
        return {}
    truth = {t.id: t for t in records.read(truth_file, digits.Truth)}
    pairs = [
        pair
        for group in test
        for x in group
        for pair in zip(x.scores, digits.steps_right(truth[x.candidate.problem_id], x.candidate.segments), strict=False)
    ]
    tricky = [str(truth[p.id].tricky) for p in problems]
    return {
        "step_auc": best_of_n.step_auc([s for s, _ in pairs], [t for _, t in pairs]),
        "by_tricky_sites": best_of_n.by_group(each, tricky),  # sites at which the demonstrations' habits apply
    }
