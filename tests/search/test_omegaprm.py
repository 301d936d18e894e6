"""OmegaPRM search: hand-worked trees, the binary search, limits, reuse, ties, the loop, unbiased values."""

import dataclasses
import math
import zlib

import jax
import numpy as np
import pytest
from fake_samplers import FakeSampler
from omegaprm_reference import search as reference
from scipy import stats

from mmprm_jax.records import Failure, Problem, Request, Rollout, UserError
from mmprm_jax.search import omegaprm
from mmprm_jax.search import tree as arrays
from mmprm_jax.search.omegaprm import Forest, Settings, grow

PROBLEM = Problem("p", "question", "1")
ORDERS = ("all", "one", "newest", "shuffled", "some")


def roll(text: str, correct: bool = False, n_tokens: int = 100) -> Rollout:
    return Rollout(tuple(text.split()), correct, n_tokens)


RIGHT = roll("r R", correct=True)


def drive(settings, script, problem=PROBLEM):
    """Runs one search on ``script`` (prefix as a string -> rollouts); returns the tree and the prefixes asked for."""
    sampler = FakeSampler(lambda request: tuple(script[" ".join(request.prefix)]))
    (found,) = trees_of([problem], settings, sampler)
    assert all(r.problem is problem and r.n == settings.num_rollouts and r.repeat == 0 for r in sampler.requested)
    return found, [" ".join(request.prefix) for request in sampler.requested]


def trees_of(problems, settings, sampler, capacity=1):
    found = dict(grow(enumerate(problems), Forest(settings, capacity), sampler))
    assert sorted(found) == list(range(len(problems)))
    assert sorted(sampler.released) == sorted(p.id for p in problems)
    return [found[i] for i in range(len(problems))]


@pytest.mark.parametrize(
    "bad", [{"num_rollouts": 1}, {"alpha": 0}, {"beta": -1}, {"length_scale": 0}, {"flat_solutions": 0}]
)
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
    tree, prefixes = drive(Settings(num_rollouts=4), HAND)
    assert prefixes == ["", "a b", "a", "t", "t v", "t v w", "a u"]
    assert tree.searches == ((0, 0), (0, 2), (3, 1), (2, 0))
    assert [n.parent for n in tree.nodes] == [-1, 0, 0, 0, 3, 4, 2]
    assert [" ".join(n.segments) for n in tree.nodes] == ["", "a b", "a", "t", "v", "w", "u"]
    assert [(n.k, n.n) for n in tree.nodes] == [(2, 4), (0, 4), (1, 4), (3, 4), (4, 4), (0, 4), (0, 4)]
    assert [n.visits for n in tree.nodes] == [2, 0, 1, 1, 0, 0, 0]
    assert [" ".join(tree.prefix(i)) for i in range(7)] == prefixes
    assert [list(n.rollouts) for n in tree.nodes] == [HAND[prefix] for prefix in prefixes]


def test_visits_change_the_choice():
    """With a large c_puct the unvisited node wins the second choice that Q alone would give to the root."""
    assert drive(Settings(num_rollouts=4, c_puct=1.0), HAND)[0].searches == ((0, 0), (2, 0), (0, 2), (4, 1))


def test_the_shared_prefix_is_asked_once_and_keeps_its_first_parent():
    script = {
        "": [roll("a b c X"), RIGHT, roll("a b d Y"), RIGHT],
        "a b": [roll("c X")] * 4,  # first met below the root
        "a": [RIGHT, roll("b Z"), RIGHT, RIGHT],  # its own candidate runs through "a b" again
    }
    tree, prefixes = drive(Settings(num_rollouts=4), script)
    assert prefixes == ["", "a b", "a"]
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
    tree, prefixes = drive(Settings(num_rollouts=4), script)
    assert prefixes == ["", "a", "a b", "a c"]
    assert [(n.parent, n.segments) for n in tree.nodes] == [(-1, ()), (0, ("a",)), (1, ("b",)), (1, ("c",))]


@pytest.mark.parametrize("correct", [False, True])
def test_a_uniform_root_ends_the_search(correct):
    tree, prefixes = drive(Settings(num_rollouts=3), {"": [roll("a b X", correct=correct)] * 3})
    assert prefixes == [""] and len(tree.nodes) == 1 and tree.searches == ()
    assert (tree.nodes[0].k, tree.nodes[0].n) == (3 * correct, 3)


def test_empty_and_answer_only_rollouts_count_but_are_never_searched():
    tree, prefixes = drive(Settings(num_rollouts=4), {"": [roll(""), roll("X"), RIGHT, roll("")]})
    assert prefixes == [""] and tree.searches == () and (tree.nodes[0].k, tree.nodes[0].n) == (1, 4)


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
        tree, prefixes = drive(Settings(num_rollouts=2), script)
        found = {len(tree.prefix(i)): node.k for i, node in enumerate(tree.nodes)}
        assert error == length or found[error] == 0
        assert error == 1 or found[error - 1] == 2
        assert length not in found
        assert len(prefixes) - 1 <= math.ceil(math.log2(length)) and len(set(prefixes)) == len(prefixes)
        for node in tree.nodes[1:]:
            assert node.segments and (node.parent == 0 or tree.nodes[node.parent].k > 0)


def endless(r):
    """Distinct rollouts, half of them right, whatever is asked."""
    return tuple(roll(f"{len(r.prefix)}{i} b c d X", i % 2 == 0, n_tokens=100 + i) for i in range(r.n))


@pytest.mark.parametrize("limit", [0, 1, 5])
def test_search_limit(limit):
    (tree,) = trees_of([PROBLEM], Settings(4, limit, 10**6), FakeSampler(endless))
    assert len(tree.searches) == limit == sum(n.visits for n in tree.nodes)


@pytest.mark.parametrize("budget", [1, 4, 5, 40, 41])
def test_no_search_starts_beyond_the_budget(budget):
    (tree,) = trees_of([PROBLEM], Settings(4, 10**6, budget), FakeSampler(endless))
    used = 4 * len(tree.nodes)
    assert budget <= used < budget + 4 + 4 * 3  # one search over 5 segments asks for 3 prefixes at most
    (shorter,) = trees_of([PROBLEM], Settings(4, max(0, len(tree.searches) - 1), 10**6), FakeSampler(endless))
    assert budget <= 4 or 4 * len(shorter.nodes) < budget


def test_answers_that_do_not_fit():
    with pytest.raises(ValueError, match="problem p: 16 rollouts were requested, 1 came"):
        trees_of([PROBLEM], Settings(), FakeSampler(lambda request: (RIGHT,)))
    forest = Forest(Settings(num_rollouts=2), 1)
    forest.start(7, PROBLEM)
    ((index, request),) = forest.requests()
    assert (index, request) == (7, Request(PROBLEM, (), 2)) and forest.requests() == []
    for wrong in ((8, request), (7, dataclasses.replace(request, prefix=("a",)))):
        with pytest.raises(ValueError, match="problem p: an answer to no open request"):
            forest.answer(*wrong, (RIGHT,) * 2)
    forest.answer(7, request, (RIGHT,) * 2)
    with pytest.raises(ValueError, match="problem p: an answer to no open request"):
        forest.answer(7, request, (RIGHT,) * 2)


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
        rollouts.append(Rollout((*steps, answer), correct, int(rng.integers(50, 500))))
    return tuple(rollouts)


PROBLEMS = [Problem(f"p{i}", "q", "1") for i in range(40)]
WORLD = Settings(num_rollouts=8, max_searches=20, rollout_budget=200)


@pytest.fixture(scope="module")
def alone():
    """The trees of the world, each grown alone and without arrays."""
    return [reference(p, WORLD, lambda prefix, p=p: sample_world(Request(p, prefix, 8))) for p in PROBLEMS]


@pytest.mark.parametrize(("capacity", "order"), [(1, "all"), *((7, order) for order in ORDERS), (64, "some")])
def test_trees_do_not_depend_on_the_number_in_flight_nor_on_the_order_of_answers(capacity, order, alone):
    sampler = FakeSampler(sample_world, order)
    assert trees_of(PROBLEMS, WORLD, sampler, capacity) == alone
    assert len(sampler.rounds[0]) == min(capacity, len(PROBLEMS))
    assert len(sampler.requested) == len(set(sampler.requested)) == sum(len(t.nodes) for t in alone)
    if (capacity, order) == (7, "all"):  # kept full until the problems run out
        assert set(sampler.waits[: len(sampler.waits) // 2]) == {7} and max(sampler.waits) == 7


def test_no_problems():
    assert trees_of([], WORLD, FakeSampler(lambda request: pytest.fail("nothing to sample"))) == []


def test_annotated_values_are_unbiased():
    """Chi-square of k against the true value, pooled by (length, spoilt); a truth off by .05 is rejected."""
    trees = trees_of(PROBLEMS, WORLD, FakeSampler(sample_world), 64)
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

    def rollout_of(segments, correct):
        return Rollout(segments, correct, 3)

    def sample(request):
        if request.prefix == ():
            return tuple(rollout_of(*p) for p in ((first, True), (wrong, False), (second, True), (first, True)))
        return (rollout_of((answer,), request.prefix[0] != "x"),) * 4

    sampler = FakeSampler(sample, "newest")
    (tree,) = trees_of([PROBLEM], Settings(4, 10, 100, right_solutions=5), sampler)
    expected = [("a",), ("a", "b"), ("a", "b", "c"), ("a", "d"), ("a", "d", "e")]
    assert [[r.prefix for r in requests] for requests in sampler.rounds] == [[()], [("x",)], expected]  # in one go
    assert [tree.prefix(i) for i in range(2, 7)] == expected
    assert len(tree.searches) == 1
    assert [tree.prefix(node.parent) for node in tree.nodes[2:]] == [(), ("a",), ("a", "b"), ("a",), ("a", "d")]
    (one,) = trees_of([PROBLEM], Settings(4, 10, 100, right_solutions=1), FakeSampler(sample))
    assert [one.prefix(i) for i in range(2, len(one.nodes))] == expected[:3]


def jungle(request: Request) -> tuple[Rollout, ...]:
    """Few distinct segments and lengths: duplicates, ties, empty and answer-only rollouts, prefixes met again."""
    key = zlib.crc32("|".join((request.problem.id, *request.prefix)).encode())
    rng = np.random.default_rng((11, key))
    share = rng.choice([0.0, 0.3, 0.6, 0.9, 1.0], p=[0.2, 0.3, 0.3, 0.1, 0.1]) if request.prefix else 0.5
    rollouts = []
    for _ in range(request.n):
        steps = tuple(f"s{rng.integers(2)}" for _ in range(rng.choice([0, 1, 2, 3, 6, 11])))
        segments = (*steps, f"a{rng.integers(2)}") if rng.random() < 0.85 else ()
        correct = bool(segments and rng.random() < share)
        rollouts.append(Rollout(segments, correct, int(rng.choice([100, 200, 300]))))
    return tuple(rollouts)


JUNGLES = [
    Settings(num_rollouts=4, max_searches=12, rollout_budget=80),
    Settings(num_rollouts=4, max_searches=12, rollout_budget=80, right_solutions=3, c_puct=0.0),
    Settings(num_rollouts=4, max_searches=12, rollout_budget=79, c_puct=1.0, alpha=0.9, beta=0.5, length_scale=50.0),
    Settings(num_rollouts=4, max_searches=12, rollout_budget=80, alpha=1.0, beta=1.0),  # ties everywhere
    Settings(num_rollouts=7, max_searches=25, rollout_budget=280, right_solutions=1),
]


@pytest.mark.parametrize("number", [0, 1, 2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_array_trees_are_the_trees_of_the_reference(number):
    settings, problems = JUNGLES[number], [Problem(f"j{number}.{i}", "q", "1") for i in range(80)]
    wanted = [reference(p, settings, lambda x, p=p: jungle(Request(p, x, settings.num_rollouts))) for p in problems]
    assert trees_of(problems, settings, FakeSampler(jungle, "some"), 32) == wanted
    few = slice(0, 16)
    assert trees_of(problems[few], settings, FakeSampler(jungle), 1) == wanted[few]
    # The problems are varied enough to mean something.
    sizes = {len(t.nodes) for t in wanted}
    assert len(sizes) > 10 and any(not t.searches for t in wanted)
    ends = {
        "searches": any(len(t.searches) == settings.max_searches for t in wanted),
        "budget": any(len(t.nodes) * settings.num_rollouts >= settings.rollout_budget for t in wanted),
        "candidates": any(t.searches and len(t.searches) < settings.max_searches for t in wanted),
    }
    assert sum(ends.values()) >= 2
    assert any(node < len(t.nodes) and t.nodes[node].parent >= 0 for t in wanted for node, _ in t.searches)


def test_one_call_per_round_and_one_trace_for_all(monkeypatch):
    calls, traces = [], []
    select, advance = arrays.select, arrays.advance
    monkeypatch.setattr(arrays, "select", lambda *args: traces.append(1) or select(*args))
    monkeypatch.setattr(arrays, "advance", lambda *args: calls.append(1) or advance(*args))
    met_again = 0
    for settings in JUNGLES[:4]:
        settings = dataclasses.replace(settings, rollout_budget=80)
        for count in (1, 5, 13):
            problems = [Problem(f"t{i}", "q", "1") for i in range(count)]
            sampler, before = FakeSampler(jungle), len(calls)
            found = dict(grow(enumerate(problems), Forest(settings, 13), sampler))
            assert len(found) == count
            met_again += len(calls) - before - len(sampler.waits)
    assert len(traces) == 1 and met_again > 0
    sampler, before = FakeSampler(endless), len(calls)
    assert len(trees_of(PROBLEMS, JUNGLES[0], sampler, 13)) == 40
    assert len(calls) - before == len(sampler.waits)  # no prefix is met again here


def test_a_forest_ignores_the_mesh_around_it(mesh_of, alone):
    forest, sampler = Forest(WORLD, 64), FakeSampler(sample_world)
    with jax.set_mesh(mesh_of(data=2, fsdp=4)):
        assert trees_of(PROBLEMS, WORLD, FakeSampler(sample_world), 64) == alone
        growing = grow(enumerate(PROBLEMS), forest, sampler)
        first = next(growing)
    assert dict([first, *growing]) == dict(enumerate(alone))  # begun in one mesh, ended in none


def test_a_failure_costs_its_own_tree_only(alone):
    """Every tree of an odd number fails at its third request."""
    seen = {}

    def sample(request):
        i = int(request.problem.id[1:])
        seen[i] = seen.get(i, 0) + 1
        return Failure(f"no {i}") if i % 2 and seen[i] == 3 else sample_world(request)

    for order in ("all", "some"):
        seen.clear()
        sampler = FakeSampler(sample, order)
        found = trees_of(PROBLEMS, WORLD, sampler, 5)
        lost = [i for i, t in enumerate(alone) if i % 2 and len(t.nodes) >= 3]
        assert len(lost) > 10
        assert found == [Failure(f"no {i}") if i in lost else t for i, t in enumerate(alone)]


def test_late_answers_to_a_tree_that_failed_are_dropped():
    """Two of many requests made at once fail; what else was asked for comes in after the tree is gone."""

    def sample(request):
        if request.prefix == ():
            return (roll("a b c d e =1", True), roll("x =2"))
        return Failure("lost") if request.prefix[1:] in (("b",), ("b", "c")) else (RIGHT, RIGHT)

    problems = [PROBLEM, Problem("q", "question", "1")]
    for order in ORDERS:
        sampler = FakeSampler(sample, order)
        assert trees_of(problems, Settings(2, 4, 100, right_solutions=1), sampler, 1) == [Failure("lost")] * 2
        assert len(sampler.requested) == 2 * 7 and not sampler.open


def test_a_tree_that_outgrows_its_arrays_fails_alone():
    """Four nodes are enough for a search over 7 prefixes, not over 8, when the first error is the last step."""
    wrong = {"p0": 8, "p1": 9, "p2": 8}

    def sample(request):
        steps = [f"s{i}" for i in range(wrong[request.problem.id] - 1)]
        return (RIGHT, RIGHT if request.prefix else roll(" ".join([*steps, "X"])))

    problems = [Problem(name, "q", "1") for name in wrong]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(omegaprm, "MAX_SEGMENTS", 8)
        settings = Settings(num_rollouts=2, max_searches=1)
        found = trees_of(problems, settings, FakeSampler(sample), 2)
    assert [len(found[i].nodes) for i in (0, 2)] == [4, 4]
    assert isinstance(found[1], Failure)
    for word in ("problem p1", "4 nodes", "rollout_budget 1000", "max_searches 1", "8 segments"):
        assert word in found[1].reason


@pytest.mark.parametrize("settings", [Settings(2, 3, 10**6), Settings(2, 10**6, 40)])
@pytest.mark.parametrize("right", [False, True])
def test_the_longest_solutions_fit(settings, right):
    """Long distinct solutions, and searches that take as many steps as they can."""

    def sample(request):
        name = "".join(request.prefix[-1:])
        wrong = roll(" ".join(f"{name}.{i}" for i in range(omegaprm.MAX_SEGMENTS)))
        return (RIGHT, wrong) if right or not request.prefix else (roll("X"), roll("Y"))

    (found,) = trees_of([PROBLEM], settings, FakeSampler(sample))
    assert len(found.nodes) >= 10


def test_two_problems_with_one_id():
    for capacity in (1, 2):
        with pytest.raises(UserError, match="problem p"):
            trees_of([PROBLEM, PROBLEM], WORLD, FakeSampler(sample_world), capacity)


def test_a_sampler_that_falls_silent():
    sampler = FakeSampler(sample_world)
    sampler.collect = list
    with pytest.raises(RuntimeError, match="1 requests are open"):
        trees_of(PROBLEMS[:1], WORLD, sampler)


def test_capacity():
    with pytest.raises(ValueError, match="capacity"):
        Forest(WORLD, 0)
    forest = Forest(WORLD, 2)
    for i in range(2):
        forest.start(i, PROBLEMS[i])
    assert forest.room == 0
    forest.drop(1)
    assert forest.room == 1 and [i for i, _ in forest.requests()] == [0]


@pytest.mark.parametrize("mode", sorted(omegaprm.SEARCHES))
def test_every_mode_grows_trees(mode):
    settings = Settings(num_rollouts=4, max_searches=3, rollout_budget=60, flat_solutions=3)
    sampler = FakeSampler(sample_world, "some")
    found = dict(grow(enumerate(PROBLEMS[:10]), omegaprm.SEARCHES[mode](settings, 4), sampler))
    assert len(found) == 10 == len(sampler.released) and sum(len(t.nodes) for t in found.values()) > 20
    assert {len(t.nodes[0].rollouts) for t in found.values()} == {3 if mode == "flat" else 4}


def test_a_dropped_coroutine_is_let_go():
    closed = []

    def search(problem, settings):
        try:
            yield [Request(problem, (), settings.num_rollouts)]
        finally:
            closed.append(problem.id)

    flight = omegaprm.Coroutines(search, WORLD, 1)
    flight.start(0, PROBLEM)
    assert not flight.room and not closed
    flight.drop(0)
    assert flight.room == 1 and closed == ["p"] and flight.requests() == []
