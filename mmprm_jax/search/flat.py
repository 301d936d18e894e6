"""Mode ``flat``: Monte Carlo values of every step of some solutions, without a search.

VisualPRM (arXiv 2503.10291) and others label so: m solutions are sampled from the question, then n rollouts from each
of their prefixes.
"""

from __future__ import annotations

from mmprm_jax.records import Node, Problem, Request, Tree
from mmprm_jax.search.settings import Search, Settings


def search(problem: Problem, settings: Settings) -> Search:
    """Estimates every proper prefix of ``flat_solutions`` solutions, right and wrong ones, each distinct prefix once.

    A coroutine: yields lists of Requests, is sent the rollouts of each, returns the Tree. The rollouts of its root are
    the solutions; a node's parent is its prefix without the last segment.
    """
    (solutions,) = yield [Request(problem, (), settings.flat_solutions)]
    distinct = dict.fromkeys(solution.segments for solution in solutions)
    prefixes = list(dict.fromkeys(s[:length] for s in distinct for length in range(1, len(s))))
    answers = (yield [Request(problem, prefix, settings.num_rollouts) for prefix in prefixes]) if prefixes else []
    index = {prefix: i for i, prefix in enumerate([(), *prefixes])}
    nodes = []
    for prefix, rollouts in zip(index, [solutions, *answers], strict=True):
        k = sum(r.correct for r in rollouts)
        parent = index[prefix[:-1]] if prefix else -1
        nodes.append(Node(parent, prefix[-1:], k, len(rollouts), 0, rollouts))
    return Tree(problem, tuple(nodes), ())
