"""The search and the labels of the original MM-PRM, its quirks included: mode ``paper``.

``search`` is a coroutine (``flight.Coroutines``). What it does differently from ``omegaprm``: search nodes are
never merged, so a prefix that is met again is sampled again; empty rollouts are candidates (and, being short, the best
ones); lengths are words; nodes hold several steps; ties go by heap order; and every step of a right rollout counts as
right without an estimate. Source: MM-PRM's ``omegaprm.py``, ``traverse.py`` and ``prm_data_format.py``.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
import zlib
from collections import Counter
from collections.abc import Generator
from typing import Any

import numpy as np

from mmprm_jax.records import Node, Problem, Request, Rollout, StepExample, Tree, UserError
from mmprm_jax.search.labels import LabelSettings
from mmprm_jax.search.settings import Answers, Search, Settings, Steps


@dataclasses.dataclass(eq=False)
class _State:
    """A node under construction, ordered as the original orders its states: by visits alone."""

    index: int
    parent: int
    segments: Steps
    prefix: Steps
    k: int = 0
    rollouts: tuple[Rollout, ...] = ()
    live: dict[Steps, int] = dataclasses.field(default_factory=dict)  # wrong, not yet selected -> rollout
    children: list[_State] = dataclasses.field(default_factory=list)
    visits: int = 0

    def __lt__(self, other: _State) -> bool:
        return self.visits < other.visits


class _Builder:
    """The growing tree of one problem, and the original's heap of candidates."""

    def __init__(self, problem: Problem, settings: Settings) -> None:
        self.problem, self.settings = problem, settings
        self.states: list[_State] = []
        self.searches: list[tuple[int, int]] = []
        self.rollouts = 0
        self.repeats: Counter[Steps] = Counter()
        self.heap: list[tuple[float, _State, Steps]] = []  # stale entries stay: the order of ties depends on them
        self.priorities: dict[tuple[int, Steps], float] = {}

    def add(self, parent: _State | None, segments: Steps) -> _State:
        prefix = (parent.prefix if parent else ()) + segments
        state = _State(len(self.states), parent.index if parent else -1, segments, prefix)
        self.states.append(state)
        if parent:
            parent.children.append(state)
        return state

    def estimate(self, state: _State) -> Generator[list[Request], Answers, None]:
        """Samples the rollouts of a state; the wrong ones become candidates unless all are wrong."""
        prefix, n = tuple(step.strip() for step in state.prefix), self.settings.num_rollouts
        (rollouts,) = yield [Request(self.problem, prefix, n, self.repeats[prefix])]
        if len(rollouts) != n:
            raise ValueError(f"problem {self.problem.id}: {n} rollouts were requested, {len(rollouts)} came")
        self.repeats[prefix] += 1
        self.rollouts += n
        state.rollouts, state.k = tuple(rollouts), sum(r.correct for r in rollouts)
        for i, rollout in enumerate(rollouts):
            if not rollout.correct:
                state.live.setdefault(rollout.segments, i)
        self.push(state)

    def push(self, state: _State) -> None:
        """Scores the candidates of a state as of now."""
        if not state.k:
            return
        s, mc = self.settings, state.k / len(state.rollouts)
        u = s.c_puct * math.sqrt(len(self.searches)) / (1 + state.visits)
        for rollout in state.live:
            words = len("\n".join(rollout).split())
            priority = (s.alpha ** (1 - mc)) * (s.beta ** (words / s.length_scale)) + u
            heapq.heappush(self.heap, (-priority, state, rollout))
            self.priorities[state.index, rollout] = priority

    def pop(self) -> tuple[_State, int]:
        """Takes the best candidate."""
        while True:
            negative, state, rollout = heapq.heappop(self.heap)
            if self.priorities.get((state.index, rollout)) == -negative:
                del self.priorities[state.index, rollout]
                return state, state.live.pop(rollout)

    def locate_error(self, state: _State, rollout: Steps) -> Generator[list[Request], Answers, None]:
        """Binary search over a wrong rollout. Its last step alone is judged, not sampled: wrong once more."""
        left, right = 0, len(rollout) - 1
        while left <= right:
            middle = (left + right) // 2
            child = self.add(state, rollout[left : middle + 1])
            if not left == right == len(rollout) - 1:
                yield from self.estimate(child)
            if child.k == 0:
                right = middle - 1
            else:
                state, left = child, middle + 1

    def rescore(self, state: _State) -> None:
        """Pushes every live candidate anew, depth first."""
        self.push(state)
        for child in state.children:
            self.rescore(child)

    def tree(self) -> Tree:
        nodes = [Node(s.parent, s.segments, s.k, len(s.rollouts), s.visits, s.rollouts) for s in self.states]
        return Tree(self.problem, tuple(nodes), tuple(self.searches))


def search(problem: Problem, settings: Settings) -> Search:
    """Grows the tree of one problem as the original does; see ``flight.Coroutines`` for the protocol.

    A node that was judged, not sampled, has n = 0 and counts as wrong.
    """
    builder = _Builder(problem, settings)
    root = builder.add(None, ())
    yield from builder.estimate(root)
    while len(builder.searches) < settings.max_searches and builder.rollouts < settings.rollout_budget:
        if not builder.priorities:
            break
        state, rollout = builder.pop()
        yield from builder.locate_error(state, state.rollouts[rollout].segments)
        builder.searches.append((state.index, rollout))
        state.visits += 1
        builder.rescore(root)
    return builder.tree()


def original_tree(tree: Tree) -> dict[str, Any]:
    """The tree as the original writes it to a file: right rollouts are leaves of value 1.0 in front of the others."""
    children: list[list[int]] = [[] for _ in tree.nodes]
    for i, node in enumerate(tree.nodes[1:], 1):
        children[node.parent].append(i)

    def build(i: int) -> dict[str, Any]:
        node = tree.nodes[i]
        right, wrong = (
            [list(steps) for steps in dict.fromkeys(r.segments for r in node.rollouts if r.correct == kind)]
            for kind in (True, False)
        )
        leaf = {"mc_value": 1.0, "visit_count": 0, "correct_rollouts": [], "incorrect_rollouts": [], "children": []}
        return {
            "mc_value": node.k / node.n if node.n else 0.0,
            "visit_count": node.visits,
            "correct_rollouts": right,
            "incorrect_rollouts": wrong,
            "children": [{"partial_solution": steps, **leaf} for steps in right]
            + [{"partial_solution": list(tree.nodes[c].segments), **build(c)} for c in children[i]],
        }

    p = tree.problem
    if len(p.images) > 1:
        raise UserError(f"problem {p.id}: {len(p.images)} images; a tree of the original's has one")
    return {"question": p.question, "answer": p.answer, "image_path": p.images[0] if p.images else None, **build(0)}


def solutions(tree: Tree) -> tuple[list[StepExample], list[StepExample]]:
    """The original's labelled solutions of one tree: (ending wrong, ending right), distinct, before its balancing.

    One segment and one label per node, a node's steps joined by blank lines. A path ends at the first node without a
    right rollout, or at a right rollout, all of whose steps count as right. Left out: paths of ten words or fewer, and
    trees that are all right or all wrong.
    """
    root, problem = tree.nodes[0], tree.problem
    if root.k in (0, root.n):
        return [], []
    children: list[list[int]] = [[] for _ in tree.nodes]
    for i, node in enumerate(tree.nodes[1:], 1):
        children[node.parent].append(i)
    found: tuple[dict[Steps, StepExample], dict[Steps, StepExample]] = ({}, {})

    def end(path: list[tuple[Steps, int, int]], right: bool) -> None:
        segments = tuple("\n\n".join(step.strip() for step in steps) for steps, _, _ in path)
        if len("<prm>\n\n".join((*segments, "")).split(" ")) <= 10:
            return
        name = f"{problem.id}/{'right' if right else 'wrong'}.{len(found[right])}"
        k, n = tuple(k for _, k, _ in path), tuple(n for _, _, n in path)
        example = StepExample(name, problem.id, problem.question, segments, k, n, problem.images)
        found[right].setdefault(segments, example)

    def walk(i: int, path: list[tuple[Steps, int, int]]) -> None:
        for steps in dict.fromkeys(r.segments for r in tree.nodes[i].rollouts if r.correct):
            end([*path, (steps, 1, 1)], right=True)
        for c in children[i]:
            node = tree.nodes[c]
            further = [*path, (node.segments, node.k, max(node.n, 1))]
            if node.k:
                walk(c, further)
            else:
                end(further, right=False)

    walk(0, [])
    return list(found[False].values()), list(found[True].values())


def step_examples(tree: Tree, settings: LabelSettings, seed: int) -> list[StepExample]:
    """The original's training examples of one tree: all solutions ending wrong, at most as many ending right.

    Which ones depends on the seed and the problem's id only. Of ``settings`` nothing is used but ``balance``.
    """
    wrong, right = solutions(tree)
    if settings.balance and len(right) >= len(wrong):
        rng = np.random.default_rng((seed, zlib.crc32(tree.problem.id.encode())))
        right = [right[i] for i in rng.permutation(len(right))[: len(wrong)]]
    return wrong + right
