"""The default search once more, one tree at a time and without arrays: what ``Forest`` is compared with."""

import itertools
import math

from mmprm_jax.records import Node, Tree


def quality(mc, length, settings):
    return settings.alpha ** (1.0 - mc) * settings.beta ** (length / settings.length_scale)


def exploration(total_visits, visits, settings):
    return settings.c_puct * math.sqrt(total_visits) / (1 + visits)


class Draft:
    """A node under construction; ``waiting``: (-Q, rollout) of the candidates not yet searched, best first."""

    def __init__(self, parent, segments, rollouts, settings):
        self.parent, self.segments, self.rollouts, self.visits = parent, segments, rollouts, 0
        self.k = sum(r.correct for r in rollouts)
        mc, wrong = self.k / len(rollouts), {}
        for i, rollout in enumerate(rollouts):
            if 0 < mc < 1 and not rollout.correct and len(rollout.segments) > 1:
                wrong.setdefault(rollout.segments, (-quality(mc, rollout.n_tokens, settings), i))
        self.waiting = sorted(wrong.values())


class Builder:
    """``sample(prefix)`` returns the rollouts of a prefix."""

    def __init__(self, problem, settings, sample):
        self.problem, self.settings, self.sample = problem, settings, sample
        self.nodes, self.prefixes, self.index, self.searches = [], [], {}, []

    def estimate(self, prefix, parent):
        if prefix not in self.index:
            skip = len(self.prefixes[parent]) if parent >= 0 else 0
            self.index[prefix] = len(self.nodes)
            self.nodes.append(Draft(parent, prefix[skip:], self.sample(prefix), self.settings))
            self.prefixes.append(prefix)
        return self.index[prefix]

    def select(self):
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

    def locate_error(self, node, rollout):
        base, segments = self.prefixes[node], self.nodes[node].rollouts[rollout].segments
        parent, left, right = node, 1, len(segments) - 1
        while left <= right:
            middle = (left + right) // 2
            child = self.estimate(base + segments[:middle], parent)
            if self.nodes[child].k == 0:
                right = middle - 1
            else:
                parent, left = child, middle + 1

    def estimate_right(self):
        solutions = dict.fromkeys(
            self.prefixes[i] + rollout.segments
            for i, node in enumerate(self.nodes)
            for rollout in node.rollouts
            if rollout.correct
        )
        for segments in list(itertools.islice(solutions, self.settings.right_solutions)):
            for length in range(1, len(segments)):
                prefix = segments[:length]
                above = max(i for i in range(length) if prefix[:i] in self.index)
                self.estimate(prefix, self.index[prefix[:above]])


def search(problem, settings, sample):
    builder = Builder(problem, settings, sample)
    builder.estimate((), -1)
    while len(builder.searches) < settings.max_searches:
        if len(builder.nodes) * settings.num_rollouts >= settings.rollout_budget:
            break
        selected = builder.select()
        if selected is None:
            break
        builder.searches.append(selected)
        builder.locate_error(*selected)
        builder.nodes[selected[0]].visits += 1
    if 0 < builder.nodes[0].k < settings.num_rollouts:
        builder.estimate_right()
    nodes = (Node(d.parent, d.segments, d.k, len(d.rollouts), d.visits, d.rollouts) for d in builder.nodes)
    return Tree(problem, tuple(nodes), tuple(builder.searches))
