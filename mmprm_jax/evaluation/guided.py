"""Search guided by the PRM, one step at a time, compared with Best-of-N at equal tokens.

- ``beam``: of all continuations by one step, the ``beams / width`` of the highest score go on, each with ``width``
  continuations (arXiv 2408.03314, section 5.2).
- ``dvts``: ``beams / width`` searches that do not see each other, each keeps its best continuation (diverse verifier
  tree search of Hugging Face's search-and-learn).
- ``lookahead``: ``beam``, but a continuation is scored after ``ahead`` more steps, sampled greedily and thrown away
  (arXiv 2408.03314).

A score is the PRM's, by one aggregator, over all steps so far. A finished solution keeps its place among the others and
is not continued; the answer is the finished solution with the highest score at the end. Equal continuations of a
problem count once. Every token that was sampled counts, those of the lookahead too; what the PRM reads does not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from mmprm_jax.data.prompts import final_answer
from mmprm_jax.evaluation import best_of_n, statistics
from mmprm_jax.records import Problem, Request, Rollout, ScoredCandidate, UserError

Segments = tuple[str, ...]
# The value of each solution so far of each problem; higher is better.
Value = Callable[[Sequence[tuple[Problem, Sequence[Segments]]]], list[list[float]]]


@dataclasses.dataclass(frozen=True)
class Method:
    """How to search. Raises UserError on sizes that do not go together."""

    beams: int  # continuations of a problem that are scored in a round
    width: int  # continuations of each solution that goes on
    independent: bool = False  # DVTS
    ahead: int = 0  # steps of the lookahead

    def __post_init__(self) -> None:
        if self.width < 1 or self.beams < 1 or self.beams % self.width:
            raise UserError(f"guided: width {self.width} must divide the {self.beams} beams")

    @property
    def searches(self) -> int:
        """That a problem has, independent of each other."""
        return self.beams // self.width if self.independent else 1

    @property
    def kept(self) -> int:
        """Solutions of a search that go on."""
        return 1 if self.independent else self.beams // self.width


METHODS: Mapping[str, Callable[[int, int, int], Method]] = {
    "beam": lambda beams, width, ahead: Method(beams, width),
    "dvts": lambda beams, width, ahead: Method(beams, width, independent=True),
    "lookahead": lambda beams, width, ahead: Method(beams, width, ahead=ahead),
}


class Steps(Protocol):
    """Samples continuations by one step; a rollout without segments could not finish its step."""

    def solve(self, requests: Sequence[Request]) -> list[list[tuple[Rollout, float]]]:
        """The rollouts of each request, in order (see ``LocalSampler.solve``)."""


@dataclasses.dataclass(frozen=True)
class Guided:
    """What a search found for one problem."""

    problem_id: str
    segments: Segments  # empty: no solution was finished
    correct: bool
    score: float | None  # None: no solution was finished
    n_tokens: int  # sampled by the search


@dataclasses.dataclass(frozen=True)
class _Path:
    segments: Segments = ()
    correct: bool = False
    score: float = 0.0

    @property
    def finished(self) -> bool:
        return final_answer(self.segments) is not None


def search(
    problems: Sequence[Problem], method: Method, steps: Steps, greedy: Steps, value: Value, depth: int
) -> list[Guided]:
    """Searches all problems at once, at most ``depth`` steps deep; one ``Guided`` for each.

    steps: samples the continuations; greedy: those of the lookahead.
    """
    by_id = {p.id: p for p in problems}
    beams = {(p.id, i): [_Path()] for p in problems for i in range(method.searches)}
    tokens = dict.fromkeys(by_id, 0)
    for _ in range(depth):
        open_paths = [(key, path) for key, paths in beams.items() for path in paths if not path.finished]
        if not open_paths:
            break
        first = method.beams // method.searches
        requests = [
            Request(by_id[name], path.segments, method.width if path.segments else first, repeat=number)
            for (name, number), path in open_paths
        ]
        grown: dict[Any, dict[Segments, _Path]] = {key: {} for key, _ in open_paths}
        for (key, path), group in zip(open_paths, steps.solve(requests), strict=True):
            for rollout, _ in group:
                tokens[key[0]] += rollout.n_tokens
                if rollout.segments:
                    segments = path.segments + rollout.segments[:1]
                    grown[key].setdefault(segments, _Path(segments, rollout.correct))
        for key, found in _score_paths(by_id, grown, method.ahead, greedy, value, tokens).items():
            stay = [path for path in beams[key] if path.finished]
            # Stable: of equal scores the one that was there, or was sampled, first.
            beams[key] = sorted(stay + found, key=lambda path: -path.score)[: method.kept]
    return [_best(p, [x for i in range(method.searches) for x in beams[p.id, i]], tokens[p.id]) for p in problems]


def _score_paths(
    by_id: Mapping[str, Problem], grown: Mapping[Any, Mapping[Segments, _Path]], ahead: int, greedy: Steps,
    value: Value, tokens: dict[str, int],
) -> dict[Any, list[_Path]]:  # fmt: skip
    """The paths with their scores; adds the tokens of the lookahead to ``tokens``."""
    ends: dict[Any, dict[Segments, Segments]] = {key: {s: s for s in paths} for key, paths in grown.items()}
    for _ in range(ahead):
        reached = {(key[0], end) for key, found in ends.items() for end in found.values() if final_answer(end) is None}
        requests = [Request(by_id[name], end, 1) for name, end in sorted(reached)]
        further = {}
        for request, ((rollout, _),) in zip(requests, greedy.solve(requests) if requests else [], strict=True):
            tokens[request.problem.id] += rollout.n_tokens
            further[request.problem.id, request.prefix] = request.prefix + rollout.segments[:1]
        ends = {key: {s: further.get((key[0], end), end) for s, end in found.items()} for key, found in ends.items()}
    keys = [key for key, paths in grown.items() if paths]
    values = value([(by_id[key[0]], list(ends[key].values())) for key in keys])
    scored: dict[Any, list[_Path]] = {key: [] for key in grown}
    for key, found in zip(keys, values, strict=True):
        scored[key] = [dataclasses.replace(p, score=v) for p, v in zip(grown[key].values(), found, strict=True)]
    return scored


def _best(problem: Problem, paths: Sequence[_Path], tokens: int) -> Guided:
    finished = [path for path in paths if path.finished]
    if not finished:
        return Guided(problem.id, (), False, None, tokens)
    best = max(finished, key=lambda path: path.score)
    return Guided(problem.id, best.segments, best.correct, best.score, tokens)


def compare(found: Sequence[Guided], scored: Sequence[Sequence[ScoredCandidate]], aggregator: str) -> dict[str, Any]:
    """A search against Best-of-N with the same PRM on the same problems, at the least N that has as many tokens.

    scored: the stored candidates of each problem, in the order of ``found``. Where there are too few of them for that
    N, all are taken and ``enough`` is False.
    """
    accuracy = np.array([x.correct for x in found], np.float64)
    spent = float(np.mean([x.n_tokens for x in found]))
    each = float(np.mean([x.candidate.n_tokens for group in scored for x in group]))
    n, available = max(1, math.ceil(spent / each)), max(map(len, scored))
    other = best_of_n.per_problem(scored, min(n, available))["prm"][aggregator]
    return {
        **statistics.summary(accuracy),
        "tokens": spent,
        "unfinished": float(np.mean([x.score is None for x in found])),
        "best_of_n": {**statistics.summary(other), "n": min(n, available), "tokens": min(n, available) * each},
        "enough": n <= available,
        "paired": statistics.paired(accuracy, other),
    }


def format_table(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """For people, accuracies in %."""
    lines = [
        "| search | accuracy | tokens per problem | Best-of-N, at least as many tokens | difference |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, x in figures.items():
        other, low_high = x["best_of_n"], [f"{100 * v:+.1f}" for v in x["paired"]["ci95"]]
        few = "" if x["enough"] else " (all there are)"
        lines.append(
            f"| {name} | {_percent(x)} | {x['tokens']:.0f} | N = {other['n']}{few}: {_percent(other)},"
            f" {other['tokens']:.0f} | {100 * x['paired']['difference']:+.1f} [{', '.join(low_high)}] |"
        )
    return "\n".join(lines)


def _percent(x: Mapping[str, Any]) -> str:
    low, high = (100 * v for v in x["ci95"])
    return f"{100 * x['accuracy']:.1f} [{low:.1f}, {high:.1f}]"
