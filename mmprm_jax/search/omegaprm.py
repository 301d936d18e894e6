"""OmegaPRM: trees of step prefixes with Monte Carlo values, grown by binary search for first errors.

Source: OmegaPRM (arXiv 2406.06592, section 3) as used by MM-PRM (arXiv 2505.13427). In short: sample rollouts from the
question; take the wrong rollout that looks most informative; find its first wrong step by binary search, estimating
every prefix on the way from fresh rollouts; repeat, with the rollouts of the new prefixes as further candidates.

The numbers of all trees in flight are arrays (``tree.py``); ``Forest`` holds the text. ``grow`` keeps a forest full and
a sampler busy. A tree is a pure function of its problem, the settings and the samples: neither the number in flight nor
the order of the answers matters.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
from jax.sharding import AxisType

from mmprm_jax.records import Failure, Node, Problem, Request, Rollout, Sampler, Tree, UserError
from mmprm_jax.search import flat, paper, tree
from mmprm_jax.search.flight import Answered, Coroutines, Flight
from mmprm_jax.search.settings import Settings, Steps

MAX_SEGMENTS = 1024  # a tree has room for solutions of this length, whatever its searches


@dataclasses.dataclass
class _TreeText:
    """What the arrays of one tree only number."""

    problem: Problem
    row: int  # of the arrays
    prefixes: list[Steps] = dataclasses.field(default_factory=list)  # by node
    rollouts: list[tuple[Rollout, ...]] = dataclasses.field(default_factory=list)  # by node
    nodes: dict[Steps, int] = dataclasses.field(default_factory=dict)  # prefix -> node
    # Taken over from the arrays when the searches are over:
    parents: list[int] = dataclasses.field(default_factory=list)
    visits: list[int] = dataclasses.field(default_factory=list)
    searches: tuple[tuple[int, int], ...] = ()

    def add(self, prefix: Steps, rollouts: tuple[Rollout, ...]) -> None:
        self.nodes[prefix] = len(self.prefixes)
        self.prefixes.append(prefix)
        self.rollouts.append(rollouts)

    def k(self, node: int) -> int:
        return sum(r.correct for r in self.rollouts[node])

    def missing(self, count: int) -> list[Steps]:
        """The prefixes of the first ``count`` distinct right solutions that are no nodes yet."""
        pairs = zip(self.prefixes, self.rollouts, strict=True)
        solutions = dict.fromkeys(p + r.segments for p, rollouts in pairs for r in rollouts if r.correct)
        first = itertools.islice(solutions, count)
        prefixes = dict.fromkeys(solution[:j] for solution in first for j in range(1, len(solution)))
        return [prefix for prefix in prefixes if prefix not in self.nodes]

    def attach(self, prefix: Steps, rollouts: tuple[Rollout, ...]) -> None:
        """Adds a node after the searches, below its longest prefix."""
        length = max(j for j in range(len(prefix)) if prefix[:j] in self.nodes)
        self.parents.append(self.nodes[prefix[:length]])
        self.visits.append(0)
        self.add(prefix, rollouts)

    def tree(self) -> Tree:
        nodes = []
        for i, (prefix, parent) in enumerate(zip(self.prefixes, self.parents, strict=True)):
            segments = prefix[len(self.prefixes[parent]) :] if parent >= 0 else ()
            nodes.append(Node(parent, segments, self.k(i), len(self.rollouts[i]), self.visits[i], self.rollouts[i]))
        return Tree(self.problem, tuple(nodes), self.searches)


class Forest(Flight):
    """The text around one batch of array trees, a row for each tree in flight.

    A prefix is asked for once per tree; whoever meets it again reuses its estimate, so a node's parent is the node
    under which it was first met. Every estimated prefix is a node, also those with MC = 0. Candidates are the distinct
    wrong rollouts of nodes with 0 < MC < 1 that have a proper prefix; unparsable (empty) rollouts only count in n. A
    root that is all right or all wrong has none and ends the tree: the seed filter of the papers. At last every prefix
    of the first ``right_solutions`` distinct right solutions is estimated, in one go: the searches estimate prefixes of
    wrong solutions only, so late right steps would have no label at all.
    """

    def __init__(self, settings: Settings, capacity: int) -> None:
        super().__init__(capacity)
        self._settings, self._constants = settings, tree.Constants.of(settings)
        n, searches, depth = settings.num_rollouts, max(0, settings.max_searches), (MAX_SEGMENTS - 1).bit_length()
        # The last search starts below the budget and is finished; a binary search adds at most `depth` nodes.
        self._size = min(max(0, settings.rollout_budget - 1) // n + depth, 1 + searches * depth)
        # One local device, whatever mesh is set outside and whatever other processes do.
        self._mesh = jax.make_mesh((1,), ("trees",), (AxisType.Explicit,), devices=jax.local_devices()[:1])
        with jax.set_mesh(self._mesh):
            self._trees = tree.empty(capacity, self._size, n, min(searches, self._size * n))
        self._texts: dict[int, _TreeText] = {}
        self._rows = list(range(capacity))  # the free ones

    def start(self, index: int, problem: Problem) -> None:
        self._texts[index] = _TreeText(problem, self._rows.pop())
        self._request(index, [Request(problem, (), self._settings.num_rollouts)])

    def drop(self, index: int) -> None:
        super().drop(index)
        self._rows.append(self._texts.pop(index).row)

    def _finish(self, index: int, result: Tree | Failure) -> None:
        self._rows.append(self._texts.pop(index).row)
        self._finished.append((index, result))

    def _advance(self, ready: dict[int, Answered]) -> None:
        """Moves trees on until each wants a prefix that it has not met, or has ended: a call for all, mostly one."""
        event, moving = self._empty_event(), []
        for index, answered in ready.items():
            text = self._texts[index]
            for request, rollouts in answered.items():
                if text.parents:
                    text.attach(request.prefix, rollouts)
                else:
                    text.add(request.prefix, rollouts)
                    self._add_to_event(event, text)
            if text.parents:
                self._finish(index, text.tree())
            else:
                moving.append(index)
        while moving:
            with jax.set_mesh(self._mesh):
                self._trees, report = tree.advance(self._trees, self._constants, event)
            report = jax.device_get(report)
            event, met = self._empty_event(), {index: self._apply_report(index, report) for index in moving}
            moving = [index for index, node in met.items() if node is not None]
            for index in moving:
                row = self._texts[index].row
                event.which[row], event.node[row] = True, met[index]

    def _empty_event(self) -> tree.Event[np.ndarray]:
        """An event that changes no tree, on the host."""
        b, bn = self.capacity, (self.capacity, self._settings.num_rollouts)
        which, fresh, candidates = (np.zeros(shape, bool) for shape in (b, b, bn))
        node, k, length, segments = (np.zeros(shape, np.int32) for shape in (b, b, bn, bn))
        return tree.Event(which, fresh, node, k, length, segments, candidates)

    def _add_to_event(self, event: tree.Event[np.ndarray], text: _TreeText) -> None:
        """Puts the newest node of a tree into the event."""
        row, node = text.row, len(text.prefixes) - 1
        rollouts = text.rollouts[node]
        event.which[row], event.fresh[row], event.node[row], event.k[row] = True, node == 0, -1, text.k(node)
        event.length[row] = [r.n_tokens for r in rollouts]
        event.segments[row] = [len(r.segments) for r in rollouts]
        wrong: dict[Steps, int] = {}
        for i, rollout in enumerate(rollouts):
            if not rollout.correct and len(rollout.segments) > 1:
                wrong.setdefault(rollout.segments, i)
        event.candidates[row, list(wrong.values())] = True

    def _apply_report(self, index: int, report: tree.Report) -> int | None:
        """Does what the arrays say of a tree. Returns the node it wants if that is an old one."""
        text, s = self._texts[index], self._settings
        row = text.row
        if report.status[row] == tree.FULL:
            reason = f"problem {text.problem.id}: its tree outgrew {self._size} nodes, which are enough for "
            reason += f"rollout_budget {s.rollout_budget}, num_rollouts {s.num_rollouts}, max_searches {s.max_searches}"
            self._finish(index, Failure(f"{reason} and solutions of up to {MAX_SEGMENTS} segments"))
        elif report.status[row] == tree.FINISHED:
            size = len(text.prefixes)
            text.parents, text.visits = (x[row, :size].tolist() for x in (report.parent, report.visits))
            text.searches = tuple((int(i), int(j)) for i, j in report.log[row, : report.searches[row]])
            missing = text.missing(s.right_solutions) if 0 < text.k(0) < s.num_rollouts else []
            if missing:
                self._request(index, [Request(text.problem, prefix, s.num_rollouts) for prefix in missing])
            else:
                self._finish(index, text.tree())
        else:
            node = report.node[row]
            rollout = text.rollouts[node][report.rollout[row]]
            prefix = text.prefixes[node] + rollout.segments[: report.middle[row]]
            if prefix in text.nodes:
                return text.nodes[prefix]
            self._request(index, [Request(text.problem, prefix, s.num_rollouts)])
        return None


# How the trees of a run are grown. "paper": as the original MM-PRM does, quirks included. "flat": as VisualPRM does.
SEARCHES: dict[str, Callable[[Settings, int], Flight]] = {
    "default": Forest,
    "paper": lambda settings, capacity: Coroutines(paper.search, settings, capacity),
    "flat": lambda settings, capacity: Coroutines(flat.search, settings, capacity),
}


def grow(
    problems: Iterable[tuple[int, Problem]], forest: Flight, sampler: Sampler
) -> Iterator[tuple[int, Tree | Failure]]:
    """Grows the trees of (index, problem) pairs; yields (index, tree) as they finish, or (index, failure).

    Keeps the forest full and asks the sampler for more as soon as it is known what; a request that fails costs its own
    tree only. Raises UserError if two problems have the same id, ValueError if an answer does not fit its request.
    """
    starting, ids = iter(problems), set()
    open_requests: dict[Request, int] = {}  # to which tree a request belongs
    growing: dict[int, Problem] = {}
    while True:
        for index, problem in itertools.islice(starting, forest.room):
            if problem.id in ids:
                raise UserError(f"problem {problem.id}: there are two problems with this id")
            ids.add(problem.id)
            growing[index] = problem
            forest.start(index, problem)
        requests = forest.requests()
        open_requests.update((request, index) for index, request in requests)
        if requests:
            sampler.submit([request for _, request in requests])
        ended = forest.finished()
        for index, result in ended:
            sampler.release(growing.pop(index).id)
            yield index, result
        if ended:
            continue  # there is room now
        if not open_requests:
            return
        answers = sampler.collect()
        if not answers:
            raise RuntimeError(f"the sampler has no answers while {len(open_requests)} requests are open")
        for request, answer in answers:
            index = open_requests.pop(request)
            if index in growing:
                if isinstance(answer, Failure):
                    forest.drop(index)
                    del growing[index]
                    yield index, answer
                else:
                    forest.answer(index, request, answer)
            if index not in growing and index not in open_requests.values():  # the last of a tree that failed
                sampler.release(request.problem.id)
