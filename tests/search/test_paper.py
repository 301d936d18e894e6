"""The original's search and labels, replayed from its own logs."""

import collections
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_samplers import FakeSampler
from omegaprm_reference import exploration, quality

from mmprm_jax.records import Problem, Request, Rollout
from mmprm_jax.rollout.rollouts import request_key
from mmprm_jax.search import omegaprm, paper
from mmprm_jax.search import tree as arrays
from mmprm_jax.search.flight import Coroutines
from mmprm_jax.search.labels import LabelSettings


class Logs:
    """Answers each problem's requests with its logged rollouts, in the order in which the original asked for them."""

    def __init__(self, trees):
        self.calls = {name: collections.deque(tree["calls"]) for name, tree in trees.items()}
        self.answers = {name: tree["settings"]["correct_answer"] for name, tree in trees.items()}
        self.repeats = collections.Counter()

    def __call__(self, request):
        name = request.problem.id
        call = self.calls[name].popleft()
        assert (list(request.prefix), request.n) == (call["prefix_steps"], call["n"])
        assert request.repeat == self.repeats[name, request.prefix]
        self.repeats[name, request.prefix] += 1
        return tuple(
            Rollout(tuple(steps), (steps[-1] if steps else "") == self.answers[name], 0) for steps in call["rollouts"]
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
    logs, problems = Logs(logged), []
    for name, tree in logged.items():
        s = tree["settings"]
        problems.append(Problem(name, s["question"], s["correct_answer"], (s["image_path"],)))

    def search(problem, _):
        return paper.search(problem, settings_of(logged[problem.id]))

    sampler = FakeSampler(logs)
    forest = Coroutines(search, omegaprm.Settings(), len(problems))
    found = dict(omegaprm.grow(enumerate(problems), forest, sampler))
    assert sampler.waits[0] == len(logged)  # one request of every tree at once
    assert not any(logs.calls.values())  # nothing is left that the original asked for
    return {name: found[i] for i, name in enumerate(logged)}


def test_every_tree_is_the_original_s(logged, trees):
    assert len(trees) >= 1
    for name, tree in trees.items():
        assert json.loads(json.dumps(paper.original_tree(tree))) == logged[name]["tree"], name


def test_every_selection_is_logged(logged, trees):
    for name, tree in trees.items():
        visits, selections = collections.Counter(), logged[name]["selections"]
        assert len(tree.searches) == len(selections)
        for (node, rollout), want in zip(tree.searches, selections, strict=True):
            steps = tree.nodes[node].rollouts[rollout].segments
            assert list(steps) == want["rollout"] and visits[node] == want["visit_count_before"]
            assert [step.strip() for step in tree.prefix(node)] == [step.strip() for step in want["prefix_steps"]]
            visits[node] += 1


def candidates_at(tree, selections, shape):
    """A row of array trees for each selection: the wrong rollouts then live, lengths in words, visits so far."""
    sampled = [i for i, node in enumerate(tree.nodes) if node.n]
    n = tree.nodes[0].n
    rows = {name: np.zeros(shape[:2], np.int32) for name in ("k", "visits")}
    rows |= {name: np.zeros((*shape, n), np.int32) for name in ("length", "waiting")}
    for row, want in enumerate(selections):
        taken = tree.searches[:row]
        for i in sampled[: want["calls_before"]]:
            node, seen = tree.nodes[i], set()
            rows["k"][row, i] = node.k
            rows["visits"][row, i] = sum(node == i for node, _ in taken)
            for j, rollout in enumerate(node.rollouts):
                rows["length"][row, i, j] = len("\n".join(rollout.segments).split())
                live = node.k > 0 and not rollout.correct and rollout.segments not in seen
                rows["waiting"][row, i, j] = live and (i, j) not in taken
                seen |= set() if rollout.correct else {rollout.segments}
        assert rows["waiting"][row].sum() == want["live_candidates"]
    return rows


def test_array_trees_select_as_the_original(logged, trees):
    """The array ``select`` on every logged selection: the same priority, and one of the equally good candidates."""
    rows_of, nodes_of = (
        max(size) for size in zip(*((len(t.searches), len(t.nodes)) for t in trees.values()), strict=True)
    )
    best, select, number, ties = jax.jit(arrays.best), jax.jit(arrays.select), 0, 0
    for name, tree in trees.items():
        selections, n = logged[name]["selections"], tree.nodes[0].n
        rows = candidates_at(tree, selections, (rows_of, nodes_of))
        blank = arrays.restart(arrays.empty(rows_of, nodes_of, n, 1), np.ones(rows_of, bool))
        batch = dataclasses.replace(blank, **{k: jnp.asarray(v, getattr(blank, k).dtype) for k, v in rows.items()})
        s = dataclasses.replace(settings_of(logged[name]), max_searches=1, rollout_budget=1)
        c = arrays.Constants.of(s)
        priority = jax.device_get(best(batch, c)[2])
        after = jax.device_get(select(batch, c, np.arange(rows_of) < len(selections)))
        for row, want in enumerate(selections):
            number += 1
            assert priority[row] == pytest.approx(want["priority"], abs=1e-6)
            chosen, total = tuple(after.log[row, 0]), rows["visits"][row].sum()
            equal = {
                (i, j)
                for i, j in np.argwhere(rows["waiting"][row])
                if quality(rows["k"][row, i] / n, rows["length"][row, i, j], s)
                + exploration(total, rows["visits"][row, i], s)
                == want["priority"]
            }
            assert chosen in equal and tree.searches[row] in equal and len(equal) == want["n_equal_priority"]
            assert rows["visits"][row, chosen[0]] == min(rows["visits"][row, i] for i, _ in equal)
            ties += len(equal) > 1
        assert (after.status[len(selections) :] == arrays.GROWING).all()
    assert number == sum(len(tree["selections"]) for tree in logged.values()) and (ties > 0 or len(trees) < 20)


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
    keys = [request_key(0, "annotate", Request(problem, ("s",), 4, repeat)).tolist() for repeat in (0, 1, 2)]
    assert len({tuple(key) for key in keys}) == 3


def test_wrong_number_of_rollouts():
    search = paper.search(Problem("p", "q", "a"), omegaprm.Settings(num_rollouts=4))
    next(search)
    with pytest.raises(ValueError, match="problem p: 4 rollouts were requested, 0 came"):
        search.send([()])
