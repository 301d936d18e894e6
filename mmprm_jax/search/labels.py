"""From search trees to step examples: whole solutions with Monte Carlo counts per step.

Counts, not labels: whether they become soft, hard or Beta-Binomial targets is the loss's choice. Only estimated steps
carry counts. MM-PRM instead labels all remaining steps of every correct rollout 1.0 without having estimated them,
which makes a lucky solution's wrong steps positives; here those steps have n = 0 and are masked.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from mmprm_jax import settings
from mmprm_jax.data.steps import final_answer
from mmprm_jax.records import StepExample, Tree
from mmprm_jax.schema import check


@dataclasses.dataclass(frozen=True)
class LabelSettings(settings.Labels):
    """Which solutions of a tree become examples. Raises ValueError if none could."""

    def __post_init__(self) -> None:
        check(self)


@dataclasses.dataclass(frozen=True)
class _Path:
    """A distinct solution of a tree."""

    name: str  # node.rollout
    segments: tuple[str, ...]
    k: tuple[int, ...]
    n: tuple[int, ...]
    correct: bool

    @property
    def estimated(self) -> int:
        """Steps with a Monte Carlo estimate; the final answer is not one of them."""
        return sum(n > 0 for n in self.n[:-1])

    def prefixes(self) -> set[tuple[str, ...]]:
        """The prefixes with a Monte Carlo estimate."""
        return {self.segments[: i + 1] for i, n in enumerate(self.n[:-1]) if n > 0}


def _paths(tree: Tree) -> list[_Path]:
    """The distinct solutions of a tree with at least one label, in the order of nodes and rollouts.

    An empty rollout ends in no solution. A solution without a final answer is unfinished: its last segment has no
    verified outcome and no label.
    """
    prefixes = [tree.prefix(i) for i in range(len(tree.nodes))]
    counts = {prefix: (node.k, node.n) for prefix, node in zip(prefixes, tree.nodes, strict=True)}
    found: dict[tuple[str, ...], _Path] = {}
    for i, node in enumerate(tree.nodes):
        for j, rollout in enumerate(node.rollouts):
            segments = prefixes[i] + rollout.segments
            if not rollout.segments or segments in found:
                continue
            steps = [counts.get(segments[:length], (0, 0)) for length in range(1, len(segments))]
            finished = final_answer(segments) is not None
            steps.append((int(rollout.correct), 1) if finished else (0, 0))
            k, n = zip(*steps, strict=True)
            found[segments] = _Path(f"{i}.{j}", segments, k, n, rollout.correct)
    return [path for path in found.values() if any(path.n)]


def _covering(paths: list[_Path], count: int) -> list[_Path]:
    """Up to ``count`` paths, one by one the path with the most estimated prefixes that no path before it has.

    Ties: the most estimated steps, then the order of ``paths``.
    """
    left = list(paths)
    covered: set[tuple[str, ...]] = set()
    chosen: list[_Path] = []
    while left and len(chosen) < count:
        best = max(left, key=lambda path: (len(path.prefixes() - covered), path.estimated))
        covered |= best.prefixes()
        left.remove(best)
        chosen.append(best)
    return chosen


def step_examples(tree: Tree, settings: LabelSettings, seed: int) -> list[StepExample]:
    """The step examples of one tree; none if its root is all right or all wrong (no contrast).

    k[i], n[i] are those of the node whose prefix is exactly segments[: i + 1], n = 0 if there is none; a final
    "<answer>" has its verified outcome (k = 1 or 0, n = 1). Solutions are taken so that they cover as many
    estimated prefixes as possible, ties in an order that depends on the seed and the problem's id only. ``balance``
    takes the same number of solutions ending right and ending wrong, at most max_paths // 2 of each. An example's id
    is problem/node.rollout.
    """
    root = tree.nodes[0]
    if root.k in (0, root.n):
        return []
    paths = _paths(tree)
    rng = np.random.default_rng((seed, zlib.crc32(tree.problem.id.encode())))
    shuffled = [paths[i] for i in rng.permutation(len(paths))]
    if settings.balance:
        right = [path for path in shuffled if path.correct]
        wrong = [path for path in shuffled if not path.correct]
        each = min(len(right), len(wrong), settings.max_paths // 2)
        chosen = [path for pair in zip(_covering(right, each), _covering(wrong, each), strict=True) for path in pair]
    else:
        chosen = _covering(shuffled, settings.max_paths)
    problem = tree.problem
    return [
        StepExample(f"{problem.id}/{p.name}", problem.id, problem.question, p.segments, p.k, p.n, problem.images)
        for p in chosen
    ]


def histogram(examples: Iterable[StepExample]) -> dict[str, Any]:
    """Numbers of examples, problems and labelled steps, and the labels k/n in 10 bins. Plain JSON types.

    Bin b holds b/10 <= k/n < (b + 1)/10, the last one also k/n = 1. Final answers count as labelled steps.
    """
    bins = [0] * 10
    count, problems = 0, set()
    for example in examples:
        count += 1
        problems.add(example.problem_id)
        for k, n in zip(example.k, example.n, strict=True):
            if n > 0:
                bins[min(9, int(10 * k // n))] += 1
    return {"histogram": bins, "steps": sum(bins), "examples": count, "problems": len(problems)}
