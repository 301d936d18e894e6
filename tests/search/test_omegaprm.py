"""OmegaPRM search: formulas, hand-worked trees, the binary search, limits, reuse, ties, batching, unbiased values."""

import math
import zlib

import numpy as np
import pytest
from scipy import stats

from mmprm_jax.records import Problem, Rollout
from mmprm_jax.search import omegaprm
from mmprm_jax.search.omegaprm import Request, Settings

PROBLEM = Problem("p", "question", "1")


def roll(text: str, correct: bool = False, n_tokens: int = 100) -> Rollout:
    return Rollout(tuple(text.split()), correct, -1.0, n_tokens)


RIGHT = roll("r R", correct=True)


def drive(settings, script, problem=PROBLEM):
    """Runs one search on ``script`` (prefix as a string -> rollouts); returns the tree and the prefixes asked for."""
    asked = []

    def sample(requests):
        (request,) = requests
        assert request.problem is problem and request.n == settings.num_rollouts
        asked.append(" ".join(request.prefix))
        return [tuple(script[asked[-1]])]

    return trees_of([problem], settings, sample)[0], asked


def trees_of(problems, settings, sample, in_flight=10**6):
    found = dict(omegaprm.grow([omegaprm.search(p, settings) for p in problems], sample, in_flight))
    assert sorted(found) == list(range(len(problems)))
    return [found[i] for i in range(len(problems))]


def test_quality_and_exploration_by_hand():
    settings = Settings(alpha=0.5, beta=0.9, length_scale=500, c_puct=0.125)
    assert omegaprm.quality(0.5, 100, settings) == pytest.approx(0.70710678 * 0.97914836)
    assert omegaprm.quality(0.75, 500, settings) == pytest.approx(0.84089642 * 0.9)
    assert omegaprm.quality(1.0, 0, settings) == 1.0
    assert omegaprm.exploration(0, 0, settings) == 0.0
    assert omegaprm.exploration(9, 2, settings) == pytest.approx(0.125 * 3 / 3)
    assert omegaprm.exploration(2, 0, settings) == pytest.approx(0.125 * 1.41421356)


@pytest.mark.parametrize("bad", [{"num_rollouts": 1}, {"alpha": 0}, {"beta": -1}, {"length_scale": 0}])
def test_settings_that_cannot_work(bad):
    with pytest.raises(ValueError):
        Settings(**bad)


HAND = {
    "": [roll("a b c X"), RIGHT, roll("t Y", n_tokens=300), RIGHT],
    "a b": [roll("c X"), roll("d X"), roll("e X"), roll("f X")],
    "a": [roll("u W", n_tokens=50), roll(""), roll("u W", n_tokens=60), RIGHT],
    "t": [RIGHT, roll("v w Z", n_tokens=500), RIGHT, RIGHT],
    "t v": [RIGHT] * 4,
    "t v w": [roll("Z")] * 4,
    "a u": [roll("W")] * 4,
}


def test_hand_worked_tree():
    """Priorities by hand, alpha .5, beta .9, L 500, c .125.

    1: root/0 .7071*.9^.2 = .692 beats root/2 .7071*.9^.6 = .664. Prefixes of "a b c": "a b" wrong, then "a" right.
    2: root/2 .664 + .125/2 = .726 beats "a"/0 .5^.75*.9^.1 + .125 = .713.
    3: "t"/1 .5^.25*.9 + .125*sqrt(2) = .934 beats "a"/0 .588 + .177. "t v" right, "t v w" wrong.
    4: "a"/0 is left alone; its copy "a"/2 and the empty "a"/1 are no candidates.
    """
    tree, asked = drive(Settings(num_rollouts=4), HAND)
    assert asked == ["", "a b", "a", "t", "t v", "t v w", "a u"]
    assert tree.searches == ((0, 0), (0, 2), (3, 1), (2, 0))
    assert [n.parent for n in tree.nodes] == [-1, 0, 0, 0, 3, 4, 2]
    assert [" ".join(n.segments) for n in tree.nodes] == ["", "a b", "a", "t", "v", "w", "u"]
    assert [(n.k, n.n) for n in tree.nodes] == [(2, 4), (0, 4), (1, 4), (3, 4), (4, 4), (0, 4), (0, 4)]
    assert [n.visits for n in tree.nodes] == [2, 0, 1, 1, 0, 0, 0]
    assert [" ".join(tree.prefix(i)) for i in range(7)] == asked
    assert [list(n.rollouts) for n in tree.nodes] == [HAND[prefix] for prefix in asked]


def test_visits_change_the_choice():
    """With a large c_puct the unvisited node wins the second choice that Q alone would give to the root."""
    assert drive(Settings(num_rollouts=4, c_puct=1.0), HAND)[0].searches == ((0, 0), (2, 0), (0, 2), (4, 1))


def test_the_shared_prefix_is_asked_once_and_keeps_its_first_parent():
    script = {
        "": [roll("a b c X"), RIGHT, roll("a b d Y"), RIGHT],
        "a b": [roll("c X")] * 4,  # first met below the root
        "a": [RIGHT, roll("b Z"), RIGHT, RIGHT],  # its own candidate runs through "a b" again
    }
    tree, asked = drive(Settings(num_rollouts=4), script)
    assert asked == ["", "a b", "a"]
    assert sorted(tree.searches) == [(0, 0), (0, 2), (2, 1)]
    assert [n.parent for n in tree.nodes] == [-1, 0, 0]
    assert [tree.prefix(i) for i in range(3)] == [(), ("a", "b"), ("a",)]


def test_a_reused_right_prefix_becomes_the_parent():
    script = {
        "": [roll("a b X"), RIGHT, roll("a c Y"), RIGHT],
        "a": [RIGHT] * 4,
        "a b": [roll("X")] * 4,
        "a c": [roll("Y")] * 4,
    }
    tree, asked = drive(Settings(num_rollouts=4), script)
    assert asked == ["", "a", "a b", "a c"]
    assert [(n.parent, n.segments) for n in tree.nodes] == [(-1, ()), (0, ("a",)), (1, ("b",)), (1, ("c",))]


@pytest.mark.parametrize("correct", [False, True])
def test_a_uniform_root_ends_the_search(correct):
    tree, asked = drive(Settings(num_rollouts=3), {"": [roll("a b X", correct=correct)] * 3})
    assert asked == [""] and len(tree.nodes) == 1 and tree.searches == ()
    assert (tree.nodes[0].k, tree.nodes[0].n) == (3 * correct, 3)


def test_empty_and_answer_only_rollouts_count_but_are_never_searched():
    tree, asked = drive(Settings(num_rollouts=4), {"": [roll(""), roll("X"), RIGHT, roll("")]})
    assert asked == [""] and tree.searches == () and (tree.nodes[0].k, tree.nodes[0].n) == (1, 4)


@pytest.mark.parametrize(
    ("root", "expected"),
    [
        ([roll("c1 X"), roll("c2 X"), RIGHT, RIGHT], [0, 1]),  # equal priority in one node: the earlier rollout
        ([roll("c1 X", n_tokens=101), roll("c2 X"), RIGHT, RIGHT], [1, 0]),  # the shorter one has a higher Q
    ],
)
def test_ties_inside_a_node(root, expected):
    tree, _ = drive(Settings(num_rollouts=4), {"": root, "c1": [RIGHT] * 4, "c2": [RIGHT] * 4})
    assert [rollout for _, rollout in tree.searches] == expected


def test_ties_between_nodes():
    """c_puct 0: only Q counts. Equal Q: the node with fewer visits, then the older node."""
    mixed = [roll("x X"), roll("y X"), RIGHT, RIGHT]
    script = {"": [roll("a X"), roll("b X"), RIGHT, RIGHT], "a": mixed, "b": mixed}
    script |= {f"{p} {q}": [RIGHT] * 4 for p in "ab" for q in "xy"}
    tree, _ = drive(Settings(num_rollouts=4, c_puct=0.0), script)
    # node 1 is "a" (no visit) after the first search; both have one visit then, and the older node, the root, wins
    names = [" ".join(tree.prefix(node)) for node, _ in tree.searches]
    assert names == ["", "a", "", "b", "a", "b"]


@pytest.mark.parametrize("length", range(2, 9))
def test_binary_search_finds_the_first_error_wherever_it_is(length):
    for error in range(1, length + 1):
        segments = [f"e{i}" if i == error else f"s{i}" for i in range(1, length + 1)]
        wrong = roll(" ".join(segments))
        script = {"": [wrong, RIGHT]}
        for j in range(1, length):
            script[" ".join(segments[:j])] = [RIGHT if j < error else roll("X")] * 2
        tree, asked = drive(Settings(num_rollouts=2), script)
        found = {len(tree.prefix(i)): node.k for i, node in enumerate(tree.nodes)}
        assert error == length or found[error] == 0
        assert error == 1 or found[error - 1] == 2
        assert length not in found
        assert len(asked) - 1 <= math.ceil(math.log2(length)) and len(set(asked)) == len(asked)
        for node in tree.nodes[1:]:
            assert node.segments and (node.parent == 0 or tree.nodes[node.parent].k > 0)


def endless(requests):
    """Distinct rollouts, half of them right, whatever is asked."""
    return [
        tuple(roll(f"{len(r.prefix)}{i} b c d X", i % 2 == 0, n_tokens=100 + i) for i in range(r.n)) for r in requests
    ]


@pytest.mark.parametrize("limit", [0, 1, 5])
def test_search_limit(limit):
    (tree,) = trees_of([PROBLEM], Settings(4, limit, 10**6), endless)
    assert len(tree.searches) == limit == sum(n.visits for n in tree.nodes)


@pytest.mark.parametrize("budget", [1, 4, 5, 40, 41])
def test_no_search_starts_beyond_the_budget(budget):
    (tree,) = trees_of([PROBLEM], Settings(4, 10**6, budget), endless)
    used = 4 * len(tree.nodes)
    assert budget <= used < budget + 4 + 4 * 3  # one search over 5 segments asks for 3 prefixes at most
    (shorter,) = trees_of([PROBLEM], Settings(4, max(0, len(tree.searches) - 1), 10**6), endless)
    assert budget <= 4 or 4 * len(shorter.nodes) < budget


def test_a_wrong_number_of_rollouts_or_answers_is_an_error():
    with pytest.raises(ValueError, match="asked for 16 rollouts, was sent 1"):
        trees_of([PROBLEM], Settings(), lambda requests: [(RIGHT,)])
    with pytest.raises(ValueError, match="sent 1 requests and answered 0"):
        trees_of([PROBLEM], Settings(), lambda requests: [])


# A world whose true values are known. Each step is good with probability GOOD[i]; after a bad step the answer is right
# with probability LUCKY, otherwise it is right for certain.
GOOD = (0.9, 0.6, 0.8, 0.9, 0.7)
LUCKY = 0.15


def true_value(prefix):
    if any(s.startswith("bad") for s in prefix):
        return LUCKY
    good = math.prod(GOOD[len(prefix) :])
    return good + (1 - good) * LUCKY


def sample_world(request: Request) -> tuple[Rollout, ...]:
    key = zlib.crc32("|".join((request.problem.id, *request.prefix)).encode())
    rng = np.random.default_rng((7, key))
    rollouts = []
    for _ in range(request.n):
        start = len(request.prefix)
        steps = tuple(
            f"{'good' if rng.random() < GOOD[i] else 'bad'}{i}{rng.integers(3)}" for i in range(start, len(GOOD))
        )
        spoilt = any(s.startswith("bad") for s in request.prefix + steps)
        correct = bool(not spoilt or rng.random() < LUCKY)
        answer = "<answer>1</answer>" if correct else f"<answer>{rng.integers(2, 9)}</answer>"
        rollouts.append(Rollout((*steps, answer), correct, -1.0, int(rng.integers(50, 500))))
    return tuple(rollouts)


PROBLEMS = [Problem(f"p{i}", "q", "1") for i in range(40)]
WORLD = Settings(num_rollouts=8, max_searches=20, rollout_budget=200)


@pytest.mark.parametrize("in_flight", [1, 7, 1000])
def test_trees_do_not_depend_on_how_many_are_in_flight(in_flight):
    sizes = []

    def sample(requests):
        sizes.append(len({r.problem.id for r in requests}))
        return [sample_world(r) for r in requests]

    together = trees_of(PROBLEMS, WORLD, sample, in_flight)
    alone = [trees_of([p], WORLD, lambda rs: [sample_world(r) for r in rs])[0] for p in PROBLEMS]
    assert together == alone and [t.problem for t in together] == PROBLEMS
    assert sizes[0] == max(sizes) == min(in_flight, len(PROBLEMS))
    assert sum(sizes) == sum(len(t.nodes) for t in together)
    if in_flight == 7:  # kept full until the problems run out
        assert set(sizes[: len(sizes) // 2]) == {7}


def test_no_problems():
    assert trees_of([], WORLD, lambda requests: pytest.fail("nothing to sample")) == []


def test_annotated_values_are_unbiased():
    """Chi-square of k against the true value, pooled by (length, spoilt); a truth off by .05 is rejected."""
    trees = trees_of(PROBLEMS, WORLD, lambda requests: [sample_world(r) for r in requests])
    pooled: dict[tuple[int, float], list[int]] = {}
    for tree in trees:
        for i, node in enumerate(tree.nodes):
            prefix = tree.prefix(i)
            cell = pooled.setdefault((len(prefix), true_value(prefix)), [0, 0])
            cell[0] += node.k
            cell[1] += node.n

    def p_value(shift):
        cells = [(k, n, v + shift) for (_, v), (k, n) in pooled.items() if 0 < v + shift < 1]
        return stats.chi2.sf(sum((k - n * v) ** 2 / (n * v * (1 - v)) for k, n, v in cells), len(cells))

    assert len(pooled) > 8 and sum(n for _, n in pooled.values()) > 2000
    assert all(k == n for (_, v), (k, n) in pooled.items() if v == 1)
    assert p_value(0.0) > 0.01
    assert p_value(0.05) < 1e-4 and p_value(-0.05) < 1e-4


def test_every_prefix_of_the_right_solutions_is_estimated():
    """Two right solutions share their first step: five distinct prefixes, none of them asked for twice."""
    answer = "<answer>1</answer>"
    first, second = ("a", "b", "c", answer), ("a", "d", "e", answer)
    wrong = ("x", answer)
    asked = []

    def sample(requests):
        asked.extend(request.prefix for request in requests)
        if requests[0].prefix == ():
            pairs = ((first, True), (wrong, False), (second, True), (first, True))
            return [tuple(rollout_of(*pair) for pair in pairs)]
        return [(rollout_of((answer,), request.prefix[0] != "x"),) * 4 for request in requests]

    def rollout_of(segments, correct):
        return Rollout(segments, correct, -1.0, 3)

    (tree,) = trees_of([PROBLEM], Settings(4, 10, 10**6, right_solutions=5), sample)
    expected = [("a",), ("a", "b"), ("a", "b", "c"), ("a", "d"), ("a", "d", "e")]
    assert asked == [(), ("x",), *expected]
    assert [tree.prefix(i) for i in range(2, 7)] == expected
    assert len(tree.searches) == 1
    assert [tree.prefix(node.parent) for node in tree.nodes[2:]] == [(), ("a",), ("a", "b"), ("a",), ("a", "d")]
    (one,) = trees_of([PROBLEM], Settings(4, 10, 10**6, right_solutions=1), sample)
    assert [one.prefix(i) for i in range(2, len(one.nodes))] == expected[:3]
