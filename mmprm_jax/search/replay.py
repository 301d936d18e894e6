"""Looking at a finished tree: which rollouts each of its searches could have chosen, and how it found the first error.

for search in replay(tree):
    print(search.chosen, search.probes, search.first_wrong)

A tree keeps what was sampled and in which order rollouts were selected. All else follows from the rules of
``search/tree.py``, which are applied here once more, and compared with what was selected.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from mmprm_jax import schema, settings
from mmprm_jax.records import Rollout, Tree, UserError
from mmprm_jax.search.tree import Constants, exploration, quality

_ROUNDING = 1e-5  # of float32 priorities, which lie near one


class Option(NamedTuple):
    """A rollout that waited when a search began. Its priority is q + u (OmegaPRM, section 3)."""

    node: int
    rollout: int  # its index in the node
    k: int  # right ones of the n rollouts of the node, when the search began
    n: int
    visits: int  # searches of the node before this one
    length: int  # of the rollout, in tokens
    q: float  # alpha^(1 - k/n) beta^(length / length_scale)
    u: float  # c_puct sqrt(all visits) / (1 + visits)


class Probe(NamedTuple):
    """A step of a binary search: the first wrong segment lies among left … right + 1, and ``middle`` was asked."""

    left: int
    right: int
    middle: int  # segments of the rollout that the prefix has
    node: int  # that has the estimate of this prefix
    k: int  # 0: the error is in the first ``middle`` segments
    n: int


@dataclasses.dataclass(frozen=True)
class Search:
    """One search of a tree. ``options``: best first; the first one was chosen."""

    options: tuple[Option, ...]
    rollout: Rollout
    probes: tuple[Probe, ...]
    first_wrong: int  # the first segment of the rollout, counted from 1, from which on nothing was right

    @property
    def chosen(self) -> Option:
        return self.options[0]


def replay(tree: Tree, /, **constants: Any) -> list[Search]:
    """The searches of a tree in their order.

    constants: those that the tree was grown with, where they are not the defaults: c_puct, alpha, beta, length_scale.
    Raises UserError for a tree that these rules do not explain: it was grown with others, or in mode paper.
    """
    state = _State(tree, Constants.of(schema.given(settings.Search, constants)))
    return list(state.searches())


class _State:
    """What was known of a tree at some time."""

    def __init__(self, tree: Tree, constants: Constants) -> None:
        self._tree, self._constants = tree, constants
        self._node_of = {tree.prefix(i): i for i in range(len(tree.nodes))}
        self._visits = [0] * len(tree.nodes)
        self._known: set[int] = set()
        self._waiting: list[tuple[int, int]] = []  # node and rollout
        self._meet(0)

    def searches(self) -> Iterator[Search]:
        for number, (node, rollout) in enumerate(self._tree.searches, 1):
            options = self._options()
            chosen = next((option for option in options if (option.node, option.rollout) == (node, rollout)), None)
            if chosen is None or _priority(chosen) < _priority(options[0]) - _ROUNDING:
                raise UserError(
                    f"problem {self._tree.problem.id}, search {number}: rollout {rollout} of node {node} was not the"
                    " best by these settings; give replay those that the tree was grown with (mode default only)"
                )
            options.remove(chosen)
            self._waiting.remove((node, rollout))
            found = self._tree.nodes[node].rollouts[rollout]
            probes, first_wrong = self._locate(node, found.segments)
            self._visits[node] += 1
            yield Search((chosen, *options), found, probes, first_wrong)

    def _meet(self, node: int) -> None:
        """A node got its estimate: its distinct wrong rollouts of several segments wait, if some of it is right."""
        self._known.add(node)
        found = self._tree.nodes[node]
        wrong: dict[tuple[str, ...], int] = {}
        for i, rollout in enumerate(found.rollouts):
            if not rollout.correct and len(rollout.segments) > 1:
                wrong.setdefault(rollout.segments, i)
        if 0 < found.k < found.n:
            self._waiting += [(node, i) for i in wrong.values()]

    def _options(self) -> list[Option]:
        """The rollouts that wait, in the order of ``tree.best``."""
        total, c, options = np.float32(sum(self._visits)), self._constants, []
        for node, rollout in self._waiting:
            found, visits = self._tree.nodes[node], self._visits[node]
            length = found.rollouts[rollout].n_tokens
            q = quality(np.float32(found.k / found.n), np.float32(length), c)
            u = exploration(total, np.float32(visits), c)
            options.append(Option(node, rollout, found.k, found.n, visits, length, float(q), float(u)))
        return sorted(options, key=lambda x: (-_priority(x), x.visits, x.node, x.rollout))

    def _locate(self, node: int, segments: tuple[str, ...]) -> tuple[tuple[Probe, ...], int]:
        """The binary search for the shortest prefix from which no rollout was right."""
        base, left, right = self._tree.prefix(node), 1, len(segments) - 1
        probes = []
        while left <= right:
            middle = (left + right) // 2
            at = self._node_of.get(base + segments[:middle])
            if at is None:
                raise UserError(
                    f"problem {self._tree.problem.id}: a search needs the prefix of {middle} segments below node"
                    f" {node}, which the tree does not have; replay is for trees of mode default"
                )
            if at not in self._known:
                self._meet(at)
            k, n = self._tree.nodes[at].k, self._tree.nodes[at].n
            probes.append(Probe(left, right, middle, at, k, n))
            if k:
                left = middle + 1
            else:
                right = middle - 1
        return tuple(probes), left


def _priority(option: Option) -> float:
    return option.q + option.u
