"""Mode ``flat``: every step of some solutions is estimated; the labels are complete."""

import pytest
from fake_samplers import FakeSampler

from mmprm_jax.records import Problem, Rollout
from mmprm_jax.search import labels
from mmprm_jax.search.omegaprm import SEARCHES, Settings, grow

PROBLEM = Problem("p", "question", "1")
SETTINGS = Settings(num_rollouts=3, flat_solutions=5)


def roll(text: str) -> Rollout:
    segments = tuple(f"<answer>{s[1:]}</answer>" if s.startswith("=") else s for s in text.split())
    return Rollout(segments, "=1" in text, 10)


SOLUTIONS = tuple(map(roll, ("a b c =1", "a d =2", "", "a b c =1", "=2")))
SCRIPT = {
    "": SOLUTIONS,
    "a": (roll("b =1"), roll("x =1"), roll("=2")),
    "a b": (roll("=1"), roll("c =1"), roll("")),
    "a b c": (roll("=1"),) * 3,
    "a d": (roll("=2"),) * 3,
}


def grown(script, settings=SETTINGS):
    sampler = FakeSampler(lambda request: script[" ".join(request.prefix)], "newest")
    ((index, tree),) = grow([(4, PROBLEM)], SEARCHES["flat"](settings, 1), sampler)
    assert index == 4 and sampler.released == ["p"]
    return tree, [[(" ".join(r.prefix), r.n) for r in requests] for requests in sampler.rounds]


def test_every_proper_prefix_of_every_solution_once():
    tree, rounds = grown(SCRIPT)
    assert rounds == [[("", 5)], [("a", 3), ("a b", 3), ("a b c", 3), ("a d", 3)]]
    assert [" ".join(tree.prefix(i)) for i in range(5)] == list(SCRIPT)
    assert [n.parent for n in tree.nodes] == [-1, 0, 1, 2, 1]
    assert [(n.k, n.n, n.visits) for n in tree.nodes] == [(2, 5, 0), (2, 3, 0), (2, 3, 0), (3, 3, 0), (0, 3, 0)]
    assert [n.rollouts for n in tree.nodes] == list(SCRIPT.values()) and tree.searches == ()


def test_every_step_of_each_solution_has_a_label():
    tree, _ = grown(SCRIPT)
    found = {e.segments: e for e in labels.step_examples(tree, labels.LabelSettings(100, balance=False), 0)}
    counts = {" ".join(s.segments): found[s.segments] for s in SOLUTIONS if s.segments}
    assert {text: list(zip(e.k, e.n, strict=True)) for text, e in counts.items()} == {
        "a b c <answer>1</answer>": [(2, 3), (2, 3), (3, 3), (1, 1)],
        "a d <answer>2</answer>": [(2, 3), (0, 3), (0, 1)],
        "<answer>2</answer>": [(0, 1)],
    }


@pytest.mark.parametrize("text", ["=1", "=2", ""])
def test_solutions_without_a_step(text):
    tree, rounds = grown({"": (roll(text),) * 5})
    assert len(tree.nodes) == len(rounds) == 1 and tree.nodes[0].k == 5 * (text == "=1")
