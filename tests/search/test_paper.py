"""The original's search and labels, replayed from its own logs."""

import collections
import json
import math

import pytest

from mmprm_jax.records import Problem, Rollout
from mmprm_jax.rollout.rollouts import request_key
from mmprm_jax.search import omegaprm, paper
from mmprm_jax.search.labels import LabelSettings


class Logs:
    """The logged rollouts of many problems, each served in the order in which the original asked for them."""

    def __init__(self, trees):
        self.calls = {name: collections.deque(tree["calls"]) for name, tree in trees.items()}
        self.answers = {name: tree["settings"]["correct_answer"] for name, tree in trees.items()}
        self.repeats = collections.Counter()
        self.largest = 0

    def __call__(self, requests):
        self.largest = max(self.largest, len(requests))
        return [self.answer(request) for request in requests]

    def answer(self, request):
        name = request.problem.id
        call = self.calls[name].popleft()
        assert (list(request.prefix), request.n) == (call["prefix_steps"], call["n"])
        assert request.repeat == self.repeats[name, request.prefix]
        self.repeats[name, request.prefix] += 1
        return tuple(
            Rollout(tuple(steps), (steps[-1] if steps else "") == self.answers[name], 0.0, 0)
            for steps in call["rollouts"]
        )


@pytest.fixture(scope="module")
def logged(golden):
    return {path.stem: json.loads(path.read_text()) for path in sorted((golden / "omegaprm").glob("tree_*.json"))}


def settings_of(logged):
    s = logged["settings"]
    return omegaprm.Settings(
        num_rollouts=s["num_rollouts"], max_searches=s["max_search_count"], rollout_budget=s["rollout_budget"],
        c_puct=s["c_puct"], alpha=s["alpha"], beta=s["beta"], length_scale=s["length_scale"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def trees(logged):
    """All trees, grown as one batch."""
    logs, searches = Logs(logged), []
    for name, tree in logged.items():
        s = tree["settings"]
        problem = Problem(name, s["question"], s["correct_answer"], s["image_path"])
        searches.append(paper.search(problem, settings_of(tree)))
    found = dict(omegaprm.grow(searches, logs, len(searches)))
    assert logs.largest == len(logged)  # one request of every tree at once
    assert not any(logs.calls.values())  # nothing is left that the original asked for
    return {name: found[i] for i, name in enumerate(logged)}


def test_every_tree_is_the_original_s(logged, trees):
    assert len(trees) >= 1
    for name, tree in trees.items():
        assert json.loads(json.dumps(paper.original_tree(tree))) == logged[name]["tree"], name


def test_every_selection_and_its_priority(logged, trees):
    for name, tree in trees.items():
        s, visits = settings_of(logged[name]), collections.Counter()
        selections = logged[name]["selections"]
        assert len(tree.searches) == len(selections)
        for i, ((node, rollout), want) in enumerate(zip(tree.searches, selections, strict=True)):
            steps = tree.nodes[node].rollouts[rollout].segments
            assert list(steps) == want["rollout"] and visits[node] == want["visit_count_before"]
            assert [step.strip() for step in tree.prefix(node)] == [step.strip() for step in want["prefix_steps"]]
            words = len("\n".join(steps).split())
            q = s.alpha ** (1 - tree.nodes[node].k / tree.nodes[node].n) * s.beta ** (words / s.length_scale)
            assert q + s.c_puct * math.sqrt(i) / (1 + visits[node]) == pytest.approx(want["priority"], abs=1e-6)
            visits[node] += 1


def test_labels_of_traverse(golden, trees):
    per_tree = json.loads((golden / "traverse" / "per_tree.json").read_text())["trees"]
    assert {entry["tree"] for entry in per_tree} == {f"{name}.json" for name in trees}
    for entry in per_tree:
        wrong, right = paper.solutions(trees[entry["tree"].removesuffix(".json")])
        for found, want in ((wrong, entry.get("negatives") or []), (right, entry.get("positives") or [])):
            got = [
                {
                    "process": "<prm>\n\n".join(e.segments) + "<prm>",
                    "labels": [k / n for k, n in zip(e.k, e.n, strict=True)],
                }
                for e in found
            ]
            assert got == want, entry["tree"]


def test_balancing(golden, trees):
    per_tree = {e["tree"]: e for e in json.loads((golden / "traverse" / "per_tree.json").read_text())["trees"]}
    for name, tree in trees.items():
        wrong, right = paper.solutions(tree)
        chosen = paper.step_examples(tree, LabelSettings(balance=True), 0)
        assert chosen[: len(wrong)] == wrong and len({e.id for e in chosen}) == len(chosen)
        assert len(chosen) == (per_tree[f"{name}.json"].get("n_output") or 0)
        assert {e.id for e in chosen[len(wrong) :]} <= {e.id for e in right}
        assert paper.step_examples(tree, LabelSettings(balance=False), 0) == wrong + right
    balanced = LabelSettings(balance=True)
    assert any(paper.step_examples(t, balanced, 0) != paper.step_examples(t, balanced, 1) for t in trees.values())


def test_a_repeated_prefix_is_sampled_anew():
    problem = Problem("p", "q", "a")
    keys = [request_key(0, "annotate", omegaprm.Request(problem, ("s",), 4, repeat)).tolist() for repeat in (0, 1, 2)]
    assert len({tuple(key) for key in keys}) == 3


def test_wrong_number_of_rollouts():
    search = paper.search(Problem("p", "q", "a"), omegaprm.Settings(num_rollouts=4))
    next(search)
    with pytest.raises(ValueError, match="problem p: asked for 4 rollouts, was sent 0"):
        search.send([()])
