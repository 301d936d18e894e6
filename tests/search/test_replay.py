"""Finished trees explained: a hand-worked one, random ones against what the arrays chose, those of other rules."""

import dataclasses

import numpy as np
import pytest
from fake_samplers import FakeSampler
from omegaprm_reference import exploration, quality
from test_omegaprm import HAND, PROBLEM, drive

from mmprm_jax import replay
from mmprm_jax.records import Problem, Rollout, UserError
from mmprm_jax.search.omegaprm import SEARCHES, grow
from mmprm_jax.search.settings import Settings


def test_the_hand_worked_tree():
    """The numbers of ``test_hand_worked_tree``, and its binary searches."""
    searches = replay(drive(Settings(num_rollouts=4), HAND)[0])
    assert [(s.chosen.node, s.chosen.rollout) for s in searches] == [(0, 0), (0, 2), (3, 1), (2, 0)]
    numbers = [s.chosen.q + s.chosen.u for s in searches[:3]]
    assert numbers == pytest.approx([0.6924, 0.6638 + 0.0625, 0.7568 + 0.1768], abs=1e-3)
    second = searches[1].options[1]
    assert (second.node, second.rollout, second.visits) == (2, 0, 0)
    assert (second.q, second.u) == pytest.approx((0.5883, 0.125), abs=1e-3)
    assert [(p.left, p.right, p.middle, p.node, p.k) for p in searches[0].probes] == [(1, 3, 2, 1, 0), (1, 1, 1, 2, 1)]
    assert [s.first_wrong for s in searches] == [2, 2, 2, 1]
    assert [s.rollout.segments[0] for s in searches] == ["a", "t", "v", "u"]


def random_trees(seed, mode="default", count=12, **constants):
    """Trees of a policy that slips at random, behind each prefix the same way."""
    settings = Settings(**{"num_rollouts": 5, "max_searches": 9, "right_solutions": 2, **constants})

    def answer(request):
        rng = np.random.default_rng([seed, *"".join((request.problem.id, "/", *request.prefix)).encode()])
        rollouts = []
        for _ in range(request.n):
            steps = [f"{i}{rng.integers(3)}" for i in range(len(request.prefix), rng.integers(3, 7))]
            right = rng.random() < 0.5
            rollouts.append(Rollout((*steps, "right" if right else "wrong"), bool(right), int(rng.integers(1, 900))))
        return tuple(rollouts)

    problems = [Problem(f"{seed}-{i}", "", "") for i in range(count)]
    found = dict(grow(enumerate(problems), SEARCHES[mode](settings, 4), FakeSampler(answer, "shuffled")))
    return settings, [found[i] for i in range(count)]


@pytest.mark.parametrize("constants", [{}, {"c_puct": 1.5}, {"alpha": 0.2, "beta": 0.5, "length_scale": 90.0}])
def test_random_trees_are_explained_by_their_own_rules(constants):
    settings, trees = random_trees(1, **constants)
    chosen = 0
    for tree in trees:
        visits = [0] * len(tree.nodes)
        for (node, rollout), search in zip(tree.searches, replay(tree, **constants), strict=True):
            assert (search.chosen.node, search.chosen.rollout) == (node, rollout)
            assert search.rollout is tree.nodes[node].rollouts[rollout]
            for x in search.options:
                own = tree.nodes[x.node].rollouts[x.rollout]
                assert not own.correct and own.n_tokens == x.length and x.visits == visits[x.node]
                assert x.q == pytest.approx(quality(x.k / x.n, x.length, settings), abs=1e-5)
                assert x.u == pytest.approx(exploration(sum(visits), x.visits, settings), abs=1e-5)
            assert len({(x.node, x.rollout) for x in search.options}) == len(search.options)
            base = tree.prefix(node)
            for probe in search.probes:
                assert tree.prefix(probe.node) == base + search.rollout.segments[: probe.middle]
            known = {probe.middle: probe.k for probe in search.probes}
            assert known.get(search.first_wrong, 0) == 0 and known.get(search.first_wrong - 1, 1) > 0
            visits[node] += 1
            chosen += 1
        assert visits == [node.visits for node in tree.nodes]
    assert chosen > 30


def test_a_tree_of_other_rules_is_not_explained():
    _, trees = random_trees(2)
    with pytest.raises(UserError, match="was not the best by these settings; give replay those"):
        [replay(tree, c_puct=30.0) for tree in trees]
    searched = next(tree for tree in trees if tree.searches)
    with pytest.raises(UserError, match="was not the best"):
        replay(dataclasses.replace(searched, searches=(searched.searches[0],) * 2))  # selected again
    with pytest.raises(UserError, match="which the tree does not have"):
        replay(dataclasses.replace(searched, nodes=searched.nodes[:1]))
    with pytest.raises(UserError, match="c_pukt"):
        replay(searched, c_pukt=1.0)
    with pytest.raises(UserError):
        [replay(tree) for tree in random_trees(2, "paper")[1]]


def test_trees_without_searches():
    assert replay(drive(Settings(num_rollouts=4, max_searches=0), HAND)[0]) == []
    assert [s for tree in random_trees(3, "flat")[1] for s in replay(tree)] == []
    assert PROBLEM.id == "p"
