"""The array trees: priorities, ties, single steps, room, many rows, meshes, compilation."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omegaprm_reference import exploration, quality

from mmprm_jax.search import tree
from mmprm_jax.search.settings import Settings

SETTINGS = Settings(num_rollouts=4)
CONSTANTS = tree.Constants.of(SETTINGS)
best, select, record, restart = map(jax.jit, (tree.best, tree.select, tree.record, tree.restart))


def random_trees(seed, trees, nodes, rollouts):
    """Rows between two searches, with candidates in the nodes in use only."""
    rng = np.random.default_rng(seed)
    size = rng.integers(1, nodes + 1, trees)
    used = np.arange(nodes) < size[:, None]
    ints = lambda low, high, *shape: rng.integers(low, high, shape, np.int32)  # noqa: E731
    return dataclasses.replace(
        restart(tree.empty(trees, nodes, rollouts, 8), np.ones(trees, bool)),
        size=jnp.array(size, jnp.int32),
        k=ints(1, rollouts, trees, nodes),
        visits=jnp.where(used, ints(0, 4, trees, nodes), 0),
        waiting=jnp.array(used[..., None] & (rng.random((trees, nodes, rollouts)) < 0.5)),
        length=ints(0, 2000, trees, nodes, rollouts),
        segments=ints(2, 9, trees, nodes, rollouts),
    )


def only(trees, **values):
    """The trees with some fields set."""
    return dataclasses.replace(trees, **{k: jnp.array(v, getattr(trees, k).dtype) for k, v in values.items()})


def event_of(b, n, **values):
    """An event that adds to every row a node of which nothing is right."""
    zeros = np.zeros((b, n), np.int32)
    blank = tree.Event(
        np.ones(b, bool), np.zeros(b, bool), np.full(b, -1, np.int32), zeros[:, 0], zeros, zeros, zeros > 0
    )
    return blank._replace(**{k: np.asarray(v, getattr(blank, k).dtype) for k, v in values.items()})


def test_quality_and_exploration_by_hand():
    c = tree.Constants.of(Settings(alpha=0.5, beta=0.9, length_scale=500, c_puct=0.125))
    f = jnp.float32
    assert tree.quality(f(0.5), f(100), c) == pytest.approx(0.70710678 * 0.97914836)
    assert tree.quality(f(0.75), f(500), c) == pytest.approx(0.84089642 * 0.9)
    assert tree.quality(f(1.0), f(0), c) == 1.0
    assert tree.exploration(f(0), f(0), c) == 0.0
    assert tree.exploration(f(9), f(2), c) == pytest.approx(0.125 * 3 / 3)
    assert tree.exploration(f(2), f(0), c) == pytest.approx(0.125 * 1.41421356)


def test_the_best_candidate_against_float64():
    settings = Settings(num_rollouts=6, c_puct=0.3, alpha=0.4, beta=0.8, length_scale=300.0)
    trees = random_trees(0, 50, 12, 6)
    node, rollout, priority = jax.device_get(best(trees, tree.Constants.of(settings)))
    host = jax.device_get(trees)
    assert host.waiting.any((1, 2)).sum() > 40
    for b in range(50):
        scores = {
            (i, j): quality(host.k[b, i] / 6, host.length[b, i, j], settings)
            + exploration(host.visits[b].sum(), host.visits[b, i], settings)
            for i, j in np.argwhere(host.waiting[b])
        }
        if scores:
            assert priority[b] == pytest.approx(max(scores.values()), abs=1e-6)
            assert scores[node[b], rollout[b]] == pytest.approx(max(scores.values()), abs=1e-6)
        else:
            assert priority[b] == -np.inf


@pytest.mark.parametrize("shape", [(1, 3, 2), (5, 7, 4), (3, 13, 5), (32, 17, 16)])
def test_equal_numbers_have_equal_priorities_wherever_they_are(shape):
    rng = np.random.default_rng(0)
    mc, length = (rng.integers(1, high, shape).astype(np.float32) for high in (4, 6))
    q = np.asarray(jax.jit(tree.quality)(mc / 4, length * 100, CONSTANTS))
    for k in range(1, 4):
        for words in range(1, 6):
            assert len(set(q[(mc == k) & (length == words)].tolist())) <= 1


def test_ties():
    """Rows: all equal; fewer visits; the older of the least visited; the shorter rollout; nothing waits."""
    trees = restart(tree.empty(5, 3, 2, 4), np.ones(5, bool))
    waiting, length, visits = np.ones((5, 3, 2), bool), np.full((5, 3, 2), 100), np.zeros((5, 3))
    visits[1], visits[2] = (1, 1, 0), (1, 0, 0)
    length[3] = ((100, 100), (100, 99), (100, 99))
    waiting[4] = False
    trees = only(trees, size=[3] * 5, k=np.ones((5, 3)), waiting=waiting, length=length, visits=visits)
    c = tree.Constants.of(Settings(num_rollouts=2, c_puct=0.0))
    node, rollout, priority = best(trees, c)
    assert list(zip(node[:4].tolist(), rollout[:4].tolist(), strict=True)) == [(0, 0), (2, 0), (1, 0), (1, 1)]
    assert np.isfinite(priority).tolist() == [True] * 4 + [False]


def test_select_begins_a_search_and_honours_the_limits():
    trees = random_trees(1, 6, 5, 4)
    full = only(trees, size=[5] * 6, waiting=np.ones((6, 5, 4)), visits=np.zeros((6, 5)))
    which = np.array([True] * 5 + [False])
    full = only(full, searches=[0, 7, 0, 0, 0, 0], waiting=full.waiting.at[2].set(False))
    full = only(full, left=[1, 1, 1, 2, 1, 1], right=[0, 0, 0, 3, 0, 0])
    c = CONSTANTS._replace(max_searches=np.int32(7), rollout_budget=np.int32(21))  # 5 nodes of 4 rollouts: 20
    node, rollout, _ = best(full, c)
    after = select(full, c, which)
    assert after.status.tolist() == [tree.GROWING, tree.FINISHED, tree.FINISHED] + [tree.GROWING] * 3
    begun = [0, 4]
    for b in range(6):
        gone = np.argwhere(np.asarray(full.waiting[b] & ~after.waiting[b])).tolist()
        assert gone == ([[node[b], rollout[b]]] if b in begun else [])
        assert after.searches[b] == full.searches[b] + int(b in begun)
        if b in begun:
            assert after.log[b, 0].tolist() == [node[b], rollout[b]]
            assert (after.node[b], after.rollout[b], after.above[b], after.left[b]) == (node[b], rollout[b], node[b], 1)
            assert after.right[b] == full.segments[b, node[b], rollout[b]] - 1
    used_up = select(full, c._replace(rollout_budget=np.int32(20)), which)
    assert used_up.status.tolist() == [1, 1, 1, 0, 1, 0] and used_up.waiting.tolist() == full.waiting.tolist()


def test_one_search_step_by_step():
    """Of five proper prefixes the second is the first wrong one: 3 wrong, 1 right, 2 wrong."""
    trees = tree.empty(1, 6, 2, 3)
    root = dict(fresh=[True], k=[1], length=[[9, 9]], segments=[[6, 2]], candidates=[[True, False]])
    trees, report = tree.advance(trees, CONSTANTS, event_of(1, 2, **root))
    steps = []
    for k in (0, 2, 0):
        steps.append(report.middle.item())
        trees, report = tree.advance(trees, CONSTANTS, event_of(1, 2, k=[k], candidates=[[True, True]]))
    assert steps == [3, 1, 2] and report.status.tolist() == [tree.FINISHED]
    assert report.parent[0, :4].tolist() == [-1, 0, 0, 2] and report.visits[0].tolist() == [1, 0, 0, 0, 0, 0]
    assert trees.k[0, :4].tolist() == [1, 0, 2, 0] and trees.size.tolist() == [4]
    assert report.log[0, : report.searches[0]].tolist() == [[0, 0]]
    assert not trees.waiting.any()  # neither all right nor all wrong nodes have candidates


def test_a_node_that_is_met_again_takes_the_step_and_adds_nothing():
    trees = only(random_trees(2, 1, 5, 4), size=[3], k=[[2, 0, 4, 0, 0]], node=[0], left=[1], right=[3], above=[0])
    right, wrong = (record(trees, event_of(1, 4, node=[node], k=[3])) for node in (2, 1))
    assert (right.left.item(), right.right.item(), right.above.item()) == (3, 3, 2)
    assert (wrong.left.item(), wrong.right.item(), wrong.above.item()) == (1, 1, 0)
    for after in (right, wrong):
        assert after.size.tolist() == [3]
        assert all((getattr(after, f) == getattr(trees, f)).all() for f in ("k", "parent", "waiting", "visits", "log"))


def test_a_full_row_says_so_and_spares_the_others():
    trees = only(random_trees(3, 3, 2, 2), size=[2, 1, 2], node=[0] * 3, left=[1] * 3, right=[3] * 3)
    after = record(trees, event_of(3, 2, which=[True, True, False], k=[1] * 3, candidates=[[True, True]] * 3))
    assert after.status.tolist() == [tree.FULL, tree.GROWING, tree.GROWING]
    assert after.size.tolist() == [2, 2, 2] and after.waiting[1, 1].all()
    for name in ("k", "waiting", "parent", "visits", "left", "right"):
        assert (getattr(after, name)[::2] == getattr(trees, name)[::2]).all()
    assert select(after, CONSTANTS, np.ones(3, bool)).status.tolist() == after.status.tolist()
    assert restart(after, np.ones(3, bool)).status.tolist() == [tree.GROWING] * 3


def random_rounds(rounds=25, b=8):
    """Events and the reports on them; rows begin, rest and start over at random, with 8 constants."""
    rng, trees, reports = np.random.default_rng(4), tree.empty(b, 12, 4, 48), []
    for i in range(rounds):
        c = CONSTANTS._replace(c_puct=np.float32(0.1 * (i % 8)), rollout_budget=np.int32(40))
        event = event_of(
            b, 4, which=rng.random(b) < 0.7, fresh=np.full(b, i == 0) | (rng.random(b) < 0.1),
            k=rng.integers(0, 5, b), length=rng.integers(0, 900, (b, 4)), segments=rng.integers(2, 9, (b, 4)),
            candidates=rng.random((b, 4)) < 0.6,
        )  # fmt: skip
        before = jax.device_get(trees)
        event = event._replace(which=event.which | (i == 0), fresh=event.fresh & (event.which | (i == 0)))
        trees, report = tree.advance(trees, c, event)
        reports.append(jax.device_get(report))
        for field in dataclasses.fields(trees):
            old, new = (np.asarray(getattr(x, field.name))[~event.which] for x in (before, trees))
            assert (old == new).all(), field.name  # rows without news are left alone
    return reports


def test_nothing_but_a_shape_compiles_anew(monkeypatch):
    traces = []
    original = tree.select
    monkeypatch.setattr(tree, "select", lambda *args: traces.append(1) or original(*args))
    tree.advance.clear_cache()
    reports = random_rounds()
    assert len(traces) == 1
    assert {int(s) for report in reports for s in report.status} == {tree.GROWING, tree.FINISHED, tree.FULL}
    assert max(report.searches.max() for report in reports) > 3


def test_a_mesh_of_eight_devices_changes_nothing(mesh_of):
    alone = random_rounds()
    with jax.set_mesh(mesh_of(data=2, fsdp=4)):
        together = random_rounds()
    for one, other in zip(alone, together, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_constants_beyond_int32_are_no_limits():
    c = tree.Constants.of(Settings(max_searches=10**12, rollout_budget=10**12))
    assert c.max_searches == c.rollout_budget == 2**31 - 1 and math.isclose(c.alpha, 0.5)
