"""OmegaPRM: a tree of step prefixes with Monte Carlo values, grown by binary search for first errors.

Source: OmegaPRM (arXiv 2406.06592, section 3) as used by MM-PRM (arXiv 2505.13427). In short: sample rollouts from the
question; take the wrong rollout that looks most informative; find its first wrong step by binary search, estimating
every prefix on the way from fresh rollouts; repeat, with the rollouts of the new prefixes as further candidates.

``search`` is a coroutine: it yields what it wants sampled and is sent the samples. It knows nothing of models, so a
driver can run many trees at once and batch their requests (``grow``) or replay a log. The tree is a pure
function of the problem, the settings and the samples.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Generator, Iterable, Iterator

from mmprm_jax.records import Node, Problem, Request, Rollout, Tree


@dataclasses.dataclass(frozen=True)
class Settings:
    """Constants of the search. Raises ValueError for values with which no search can work."""

    num_rollouts: int = 16  # per estimated prefix
    max_searches: int = 200  # binary searches per tree
    rollout_budget: int = 1000  # no search starts once this many are used; the one under way is finished
    c_puct: float = 0.125
    alpha: float = 0.5
    beta: float = 0.9
    length_scale: float = 500.0  # L, in sampled tokens
    right_solutions: int = 0  # of how many right solutions per tree every prefix is estimated, after the searches

    def __post_init__(self) -> None:
        if self.num_rollouts < 2:
            raise ValueError(f"num_rollouts is {self.num_rollouts}; a value between 0 and 1 needs at least 2 rollouts")
        if not (self.alpha > 0 and self.beta > 0 and self.length_scale > 0):
            raise ValueError("alpha, beta and length_scale must be positive")


Answers = list[tuple[Rollout, ...]]
Search = Generator[list[Request], Answers, Tree]
Sampler = Callable[[list[Request]], list[tuple[Rollout, ...]]]


def quality(mc: float, length: float, settings: Settings) -> float:
    """Q = alpha^(1 - MC) * beta^(len / L): prefers wrong rollouts of likely right prefixes, and short ones.

    OmegaPRM section 3 (state-rollout value). ``mc`` in [0, 1] is the value of the prefix, ``length`` the tokens of the
    rollout without the prefix (MM-PRM counts words, which is meaningless for Chinese).
    """
    return settings.alpha ** (1.0 - mc) * settings.beta ** (length / settings.length_scale)


def exploration(total_visits: int, visits: int, settings: Settings) -> float:
    """U = c_puct * sqrt(sum of N over all nodes) / (1 + N of this node), the PUCT bonus of OmegaPRM section 3."""
    return settings.c_puct * math.sqrt(total_visits) / (1 + visits)


@dataclasses.dataclass
class _Draft:
    """A node under construction."""

    parent: int
    segments: tuple[str, ...]
    k: int
    rollouts: tuple[Rollout, ...]
    waiting: list[tuple[float, int]]  # (-Q, rollout) of the candidates not yet searched, best first
    visits: int = 0


def _candidates(rollouts: tuple[Rollout, ...], mc: float, settings: Settings) -> list[tuple[float, int]]:
    """(-Q, rollout) of the distinct wrong rollouts with at least one proper prefix, best first."""
    if not 0.0 < mc < 1.0:
        return []
    seen: set[tuple[str, ...]] = set()
    found = []
    for i, rollout in enumerate(rollouts):
        if not rollout.correct and len(rollout.segments) > 1 and rollout.segments not in seen:
            seen.add(rollout.segments)
            found.append((-quality(mc, rollout.n_tokens, settings), i))
    return sorted(found)


class _Builder:
    """The growing tree of one problem."""

    def __init__(self, problem: Problem, settings: Settings) -> None:
        self.problem = problem
        self.settings = settings
        self.nodes: list[_Draft] = []
        self.prefixes: list[tuple[str, ...]] = []
        self.index: dict[tuple[str, ...], int] = {}  # prefix -> node
        self.searches: list[tuple[int, int]] = []

    def estimate(self, prefix: tuple[str, ...], parent: int) -> Generator[list[Request], Answers, int]:
        """Returns the node of ``prefix``; samples its rollouts if there is none yet."""
        if prefix not in self.index:
            (rollouts,) = yield [Request(self.problem, prefix, self.settings.num_rollouts)]
            self.add(prefix, parent, rollouts)
        return self.index[prefix]

    def add(self, prefix: tuple[str, ...], parent: int, rollouts: tuple[Rollout, ...]) -> None:
        """Adds the node of a prefix that was sampled."""
        n = self.settings.num_rollouts
        if len(rollouts) != n:
            raise ValueError(f"problem {self.problem.id}: asked for {n} rollouts, was sent {len(rollouts)}")
        rollouts = tuple(rollouts)
        k = sum(r.correct for r in rollouts)
        skip = len(self.prefixes[parent]) if parent >= 0 else 0
        waiting = _candidates(rollouts, k / n, self.settings)
        self.index[prefix] = len(self.nodes)
        self.nodes.append(_Draft(parent, prefix[skip:], k, rollouts, waiting))
        self.prefixes.append(prefix)

    def select(self) -> tuple[int, int] | None:
        """Removes and returns the (node, rollout) with the highest Q + U; None if no candidate is left.

        Ties: fewer visits, then the older node, then (inside a node) the earlier rollout.
        """
        total = sum(node.visits for node in self.nodes)
        live = [
            (node.waiting[0][0] - exploration(total, node.visits, self.settings), node.visits, i)
            for i, node in enumerate(self.nodes)
            if node.waiting
        ]
        if not live:
            return None
        chosen = min(live)[2]
        return chosen, self.nodes[chosen].waiting.pop(0)[1]

    def locate_error(self, node: int, rollout: int) -> Generator[list[Request], Answers, None]:
        """Binary search for the shortest prefix with MC = 0 among the proper prefixes of a wrong rollout.

        The whole solution is known to be wrong, so it is never sampled; if every proper prefix has MC > 0, the last
        segment is the error.
        """
        base, segments = self.prefixes[node], self.nodes[node].rollouts[rollout].segments
        parent, left, right = node, 1, len(segments) - 1
        while left <= right:
            middle = (left + right) // 2
            child = yield from self.estimate(base + segments[:middle], parent)
            if self.nodes[child].k == 0:
                right = middle - 1
            else:
                parent, left = child, middle + 1

    def estimate_right(self, count: int) -> Generator[list[Request], Answers, None]:
        """Estimates, in one go, every proper prefix of the first ``count`` distinct right solutions.

        The searches estimate prefixes of wrong solutions only, so late right steps would have no label at all.
        """
        solutions = dict.fromkeys(
            self.prefixes[i] + rollout.segments
            for i, node in enumerate(self.nodes)
            for rollout in node.rollouts
            if rollout.correct
        )
        wanted = dict.fromkeys(
            segments[:length]
            for segments in itertools.islice(solutions, count)
            for length in range(1, len(segments))
            if segments[:length] not in self.index
        )
        if wanted:
            answers = yield [Request(self.problem, prefix, self.settings.num_rollouts) for prefix in wanted]
            for prefix, rollouts in zip(wanted, answers, strict=True):
                length = max(i for i in range(len(prefix)) if prefix[:i] in self.index)
                self.add(prefix, self.index[prefix[:length]], rollouts)

    def tree(self) -> Tree:
        nodes = tuple(Node(d.parent, d.segments, d.k, len(d.rollouts), d.visits, d.rollouts) for d in self.nodes)
        return Tree(self.problem, nodes, tuple(self.searches))


def search(problem: Problem, settings: Settings) -> Search:
    """Grows the tree of one problem: yields lists of Requests, is sent the n rollouts of each, returns the Tree.

    A prefix is asked for once per tree; whoever meets it again reuses its estimate, so a node's parent is the node
    under which it was first met. Every estimated prefix is a node, also those with MC = 0. Candidates are the distinct
    wrong rollouts of nodes with 0 < MC < 1 that have a proper prefix; unparsable (empty) rollouts only count in n. A
    root that is all right or all wrong has none and ends the search. The selected node's visit count grows by one per
    search (OmegaPRM section 3). At last ``right_solutions`` solutions are estimated prefix by prefix. Raises ValueError
    when sent another number of rollouts than asked for.
    """
    builder = _Builder(problem, settings)
    yield from builder.estimate((), -1)
    while len(builder.searches) < settings.max_searches:
        if len(builder.nodes) * settings.num_rollouts >= settings.rollout_budget:
            break
        selected = builder.select()
        if selected is None:
            break
        builder.searches.append(selected)
        yield from builder.locate_error(*selected)
        builder.nodes[selected[0]].visits += 1
    if 0 < builder.nodes[0].k < settings.num_rollouts:
        yield from builder.estimate_right(settings.right_solutions)
    return builder.tree()


def grow(searches: Iterable[Search], sample: Sampler, in_flight: int) -> Iterator[tuple[int, Tree]]:
    """Runs the searches of many problems, ``in_flight`` at a time; yields (index, tree) as they finish.

    Each round calls ``sample`` once with the Requests of every tree in flight; it answers in the same order. A finished
    tree makes room for the next one. Trees do not depend on each other, nor on ``in_flight``, as long as what
    ``sample`` returns for a request does not depend on its companions.
    Raises ValueError when an answer does not fit its request.
    """
    starting = iter(enumerate(searches))
    running: dict[int, Search] = {}
    waiting: dict[int, list[Request]] = {}
    while True:
        for i, found in itertools.islice(starting, in_flight - len(waiting)):
            running[i] = found
            waiting[i] = next(found)
        if not waiting:
            return
        requests = [request for asked in waiting.values() for request in asked]
        answers = sample(requests)
        if len(answers) != len(requests):
            raise ValueError(f"the sampler was sent {len(requests)} requests and answered {len(answers)}")
        answer = iter(answers)
        for i, asked in list(waiting.items()):
            try:
                waiting[i] = running[i].send(list(itertools.islice(answer, len(asked))))
            except StopIteration as finished:
                del waiting[i], running[i]
                yield i, finished.value
