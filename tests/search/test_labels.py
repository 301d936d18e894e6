"""Trees to step examples: where counts land, masks, choice of solutions, independence of order."""

import collections
import dataclasses
import json
import zlib

import numpy as np
import pytest
from fake_samplers import FakeSampler

from mmprm_jax import records
from mmprm_jax.records import Node, Problem, Rollout, StepExample, Tree
from mmprm_jax.search import labels, omegaprm
from mmprm_jax.search.labels import LabelSettings

PROBLEM = Problem("p", "question", "1", images=("i.png",))
ALL = LabelSettings(max_paths=100, balance=False)


def roll(text: str, correct: bool = False) -> Rollout:
    """'a b =1' -> segments a, b, <answer>1</answer>."""
    segments = (f"<answer>{s[1:]}</answer>" if s.startswith("=") else s for s in text.split())
    return Rollout(tuple(segments), correct, 10)


def node(parent: int, text: str, k: int, *rollouts: Rollout) -> Node:
    return Node(parent, tuple(text.split()), k, len(rollouts), 0, rollouts)


TREE = Tree(
    PROBLEM,
    (
        node(-1, "", 2, roll("a b c =2"), roll("d =1", True), roll("a b c =1", True), roll("")),
        node(0, "a", 3, roll("b c =1", True), roll("e =1", True), roll("b c f =1", True), roll("g h")),
        node(1, "b c", 1, roll("=2"), roll("=1", True), roll(""), roll("")),
        node(1, "b", 0, roll("=3"), roll("=3"), roll(""), roll("=4")),
    ),
    ((0, 0), (1, 3)),
)


def by_text(examples):
    return {" ".join(e.segments).replace("<answer>", "=").replace("</answer>", ""): e for e in examples}


def test_counts_land_on_the_right_steps():
    found = by_text(labels.step_examples(TREE, ALL, 0))
    counts = {text: list(zip(e.k, e.n, strict=True)) for text, e in found.items()}
    a, ab, abc, masked = (3, 4), (0, 4), (1, 4), (0, 0)
    assert counts == {
        "a b c =2": [a, ab, abc, (0, 1)],
        "a b c =1": [a, ab, abc, (1, 1)],
        "d =1": [masked, (1, 1)],  # a right rollout's step that was not estimated is masked, not 1.0
        "a e =1": [a, masked, (1, 1)],
        "a b c f =1": [a, ab, abc, masked, (1, 1)],
        "a g h": [a, masked, masked],  # unfinished: no outcome
        "a b =3": [a, ab, (0, 1)],
        "a b =4": [a, ab, (0, 1)],
    }
    example = found["a b c =2"]
    assert (example.problem_id, example.question, example.images) == ("p", "question", ("i.png",))


def test_solutions_are_distinct_and_ids_name_their_origin():
    examples = labels.step_examples(TREE, ALL, 0)
    assert len({e.segments for e in examples}) == len(examples) == len({e.id for e in examples})
    assert {e.id for e in examples} >= {"p/0.0", "p/1.2"}


def test_solutions_without_any_label_are_left_out():
    tree = Tree(PROBLEM, (node(-1, "", 1, roll("a b"), roll("c =1", True)),), ())
    assert [e.segments for e in labels.step_examples(tree, ALL, 0)] == [("c", "<answer>1</answer>")]


@pytest.mark.parametrize("correct", [False, True])
def test_uniform_roots_are_skipped(correct):
    tree = Tree(PROBLEM, (node(-1, "", 2 * correct, *[roll("a =1", correct)] * 2),), ())
    assert labels.step_examples(tree, ALL, 0) == []


def test_the_most_estimated_solutions_come_first():
    estimated = [sum(n > 0 for n in e.n[:-1]) for e in labels.step_examples(TREE, ALL, 0)]
    assert estimated == sorted(estimated, reverse=True) and estimated[0] == 3
    best = labels.step_examples(TREE, LabelSettings(max_paths=3, balance=False), 0)
    assert set(by_text(best)) == {"a b c =2", "a b c =1", "a b c f =1"}


def test_balance():
    for paths, each in ((2, 1), (5, 2), (6, 3), (100, 4)):
        examples = labels.step_examples(TREE, LabelSettings(paths, balance=True), 0)
        right = [e for e in examples if e.segments[-1] == "<answer>1</answer>"]
        assert (len(right), len(examples)) == (each, 2 * each)
    assert set(by_text(labels.step_examples(TREE, LabelSettings(2, balance=True), 0))) < {
        "a b c =2",
        "a b c =1",
        "a b c f =1",
    }


def test_impossible_settings():
    with pytest.raises(ValueError):
        LabelSettings(1, balance=True)
    with pytest.raises(ValueError):
        LabelSettings(max_paths=0, balance=False)
    LabelSettings(max_paths=1, balance=False)


def world(request):
    """Random solutions of random length, keyed by problem and prefix."""
    rng = np.random.default_rng(zlib.crc32("|".join((request.problem.id, *request.prefix)).encode()))
    rollouts = []
    for _ in range(request.n):
        steps = " ".join(f"s{rng.integers(3)}" for _ in range(rng.integers(1, 5)))
        correct = bool(rng.random() < 0.4)
        rollouts.append(roll(f"{steps} ={1 if correct else rng.integers(2, 9)}", correct))
    return tuple(rollouts)


@pytest.fixture(scope="module")
def trees():
    problems = [Problem(f"p{i}", f"q{i}", "1") for i in range(12)]
    forest = omegaprm.Forest(omegaprm.Settings(8, 20, 160), 10)
    return [tree for _, tree in sorted(omegaprm.grow(enumerate(problems), forest, FakeSampler(world)))]


def test_every_label_of_a_searched_tree_is_its_nodes_count(trees):
    seen = 0
    for tree in trees:
        counts = {tree.prefix(i): (n.k, n.n) for i, n in enumerate(tree.nodes)}
        for example in labels.step_examples(tree, ALL, 0):
            assert len(example.segments) == len(example.k) == len(example.n)
            for i in range(len(example.segments) - 1):
                assert (example.k[i], example.n[i]) == counts.get(example.segments[: i + 1], (0, 0))
                seen += example.n[i] > 0
            assert (example.k[-1], example.n[-1]) == (int(example.segments[-1] == "<answer>1</answer>"), 1)
    assert seen > 500


def test_independent_of_the_order_of_trees_and_keyed_by_seed_and_problem(trees):
    settings = LabelSettings(4, balance=True)
    forward = {t.problem.id: labels.step_examples(t, settings, 3) for t in trees}
    backward = {t.problem.id: labels.step_examples(t, settings, 3) for t in reversed(trees)}
    assert forward == backward
    assert forward != {t.problem.id: labels.step_examples(t, settings, 4) for t in trees}
    renamed = dataclasses.replace(trees[0], problem=dataclasses.replace(trees[0].problem, id="other"))
    every = LabelSettings(100, balance=True)
    picks = [[e.segments for e in labels.step_examples(t, every, 3)] for t in (trees[0], renamed)]
    assert picks[0] != picks[1]


def test_trees_survive_their_file(tmp_path, trees):
    path = tmp_path / "trees.jsonl"
    records.write(path, [TREE, *trees])
    back = records.read_all(path, Tree)
    assert back == [TREE, *trees]
    assert labels.step_examples(back[1], ALL, 0) == labels.step_examples(trees[0], ALL, 0)


def test_histogram():
    def example(problem, k, n):
        return StepExample("x", problem, "q", ("s",) * len(k), k, n)

    found = labels.histogram(
        [example("a", (0, 8, 1, 0), (8, 8, 10, 0)), example("a", (7, 9), (10, 10)), example("b", (), ())]
    )
    assert found == {"histogram": [1, 1, 0, 0, 0, 0, 0, 1, 0, 2], "steps": 5, "examples": 3, "problems": 2}
    assert json.loads(json.dumps(found)) == found
    assert labels.histogram([]) == {"histogram": [0] * 10, "steps": 0, "examples": 0, "problems": 0}


def test_histogram_of_the_hand_made_tree():
    examples = labels.step_examples(TREE, ALL, 0)
    values = collections.Counter(min(9, int(10 * k / n)) for e in examples for k, n in zip(e.k, e.n, strict=True) if n)
    assert labels.histogram(examples)["histogram"] == [values[b] for b in range(10)]
