"""Search guided by a PRM: on a made-up language whose best solutions are known. A real run: test_pipeline."""

import dataclasses
import itertools
import random

import numpy as np
import pytest

from mmprm_jax.evaluation import guided
from mmprm_jax.records import Candidate, Problem, Rollout, ScoredCandidate, UserError

PROBLEMS = [Problem(f"p{i}", "q", "right") for i in range(5)]
DEPTH = 4  # steps before the answer
LETTERS = "abc"


class Language:
    """A step is a letter, drawn by a hash of what it is for; the answer is right if all of a solution's are "a"."""

    def __init__(self, purpose, letters=LETTERS):
        self.purpose, self.letters, self.requested = purpose, letters, []

    def solve(self, requests):
        assert len(set(requests)) == len(requests)
        self.requested += requests
        return [[self._one(request, i) for i in range(request.n)] for request in requests]

    def _one(self, request, i):
        assert not request.prefix or "<answer>" not in request.prefix[-1]
        if len(request.prefix) == DEPTH:
            right = set(request.prefix) == {"a"}
            return Rollout((f"<answer>{'right' if right else 'wrong'}</answer>",), right, 2), 0.0
        rng = random.Random(f"{self.purpose} {request.problem.id} {request.prefix} {request.repeat} {i}")
        if rng.random() < 0.05:
            return Rollout((), False, 7), 0.0  # cut off inside of its step
        return Rollout((rng.choice(self.letters),), False, 3), 0.0


def share_of_a(found):
    """A perfect PRM: the share of right steps."""
    return [[sum(s[0] in "a<" for s in segments) / len(segments) for segments in group] for _, group in found]


def nothing(found):
    return [[0.5] * len(group) for _, group in found]


def run(name="beam", value=share_of_a, beams=24, width=12, ahead=1, problems=PROBLEMS, depth=16):
    steps, greedy = Language("steps"), Language("ahead", "a")
    method = guided.METHODS[name](beams, width, ahead)
    return guided.search(problems, method, steps, greedy, value, depth), steps, greedy


@pytest.mark.parametrize("name", guided.METHODS)
def test_a_good_judge_finds_what_chance_does_not(name):
    found, _, _ = run(name)
    assert [x.problem_id for x in found] == [p.id for p in PROBLEMS]
    assert np.mean([x.correct for x in found]) >= 0.8  # by chance 1 of 81
    for x in found:
        assert x.score == pytest.approx(share_of_a([(None, [x.segments])])[0][0])
        assert x.correct == (x.segments == ("a",) * DEPTH + ("<answer>right</answer>",))
    blind, _, _ = run(name, nothing)
    assert not any(x.correct for x in blind)


@pytest.mark.parametrize("name", guided.METHODS)
def test_problems_do_not_depend_on_each_other(name):
    together = run(name)[0]
    for problem, want in zip(PROBLEMS, together, strict=True):
        assert run(name, problems=[problem])[0] == [want]
    assert run(name, problems=PROBLEMS[::-1])[0] == together[::-1]


@pytest.mark.parametrize("name", guided.METHODS)
def test_every_sampled_token_counts_and_the_budget_is_kept(name):
    found, steps, greedy = run(name)
    for x in found:
        own = [r for r in steps.requested + greedy.requested if r.problem.id == x.problem_id]
        both = [(steps, r) for r in steps.requested] + [(greedy, r) for r in greedy.requested]
        mine = [(who, r) for who, r in both if r.problem.id == x.problem_id]
        assert len(mine) == len(own)
        assert x.n_tokens == sum(who._one(r, i)[0].n_tokens for who, r in mine for i in range(r.n))
        own_requests = (r for r in steps.requested if r.problem.id == x.problem_id)
        rounds = itertools.groupby(own_requests, lambda r: len(r.prefix))
        assert all(sum(r.n for r in part) <= 24 for _, part in rounds)
    assert bool(greedy.requested) == (name == "lookahead")


def test_the_best_of_all_go_on_in_a_beam_and_one_of_each_search_in_dvts():
    _, steps, _ = run("beam", beams=6, width=2, problems=PROBLEMS[:1])
    first = [r for r in steps.requested if r.prefix == ()]
    second = [r.prefix for r in steps.requested if len(r.prefix) == 1]
    drawn = dict.fromkeys(s for r in first for i in range(r.n) for s in [steps._one(r, i)[0].segments] if s)
    best = sorted(drawn, key=lambda s: -(s[0] == "a"))[:3]
    assert [r.n for r in first] == [6] and sorted(second) == sorted(best)
    _, steps, _ = run("dvts", beams=6, width=2, problems=PROBLEMS[:1])
    first = [r for r in steps.requested if r.prefix == ()]
    assert [(r.n, r.repeat) for r in first] == [(2, 0), (2, 1), (2, 2)]
    for r in first:
        drawn = [s for i in range(2) for s in [steps._one(r, i)[0].segments] if s]
        after = [x.prefix for x in steps.requested if len(x.prefix) == 1 and x.repeat == r.repeat]
        assert after == sorted(dict.fromkeys(drawn), key=lambda s: -(s[0] == "a"))[:1]


class Scripted:
    """Continues a prefix with the next ones of its list."""

    def __init__(self, script):
        self.script, self.requested = script, []

    def solve(self, requests):
        self.requested += [r.prefix for r in requests]
        return [
            [(Rollout((s,), s == "<answer>right</answer>", 1), 0.0) for s in self.script[r.prefix][: r.n]]
            for r in requests
        ]  # fmt: skip


def test_the_look_ahead_decides():
    """Only what greedily follows "b" is good; it is thrown away, and another step is sampled."""
    steps = Scripted({(): ["a", "b"], ("b",): ["<answer>right</answer>"] * 2, ("a",): ["<answer>wrong</answer>"] * 2})
    greedy = Scripted({("a",): ["bad"], ("b",): ["good"]})

    def value(found):
        return [[float(s[-1] in ("good", "<answer>right</answer>")) for s in group] for _, group in found]

    (found,) = guided.search(PROBLEMS[:1], guided.Method(2, 2, ahead=1), steps, greedy, value, 4)
    assert found.segments == ("b", "<answer>right</answer>") and found.correct and steps.requested == [(), ("b",)]
    assert greedy.requested == [("a",), ("b",)] and found.n_tokens == 2 + 2 + 2


def test_a_finished_solution_keeps_its_place():
    steps = Scripted({(): ["<answer>right</answer>", "a"], ("a",): ["<answer>wrong</answer>"]})
    scores = {"<answer>right</answer>": 0.9, "a": 0.8, "<answer>wrong</answer>": 0.7}

    def value(found):
        return [[scores[s[-1]] for s in group] for _, group in found]

    (found,) = guided.search(PROBLEMS[:1], guided.Method(2, 1), steps, Scripted({}), value, 4)
    assert found.segments == ("<answer>right</answer>",) and found.score == 0.9 and steps.requested == [(), ("a",)]


def test_no_finished_solution_is_a_wrong_one():
    found, _, _ = run(depth=DEPTH)
    assert all(x == dataclasses.replace(x, segments=(), correct=False, score=None) and x.n_tokens for x in found)


def test_sizes_that_do_not_go_together():
    with pytest.raises(UserError, match="width 3 must divide the 16 beams"):
        guided.METHODS["beam"](16, 3, 1)


def test_compared_at_equal_tokens():
    """Two problems: the first candidate of four is the right one, and scored highest."""

    def candidate(i, j):
        return ScoredCandidate(Candidate(f"p{i}", (f"s{j}",), "x", j == 0, 0.0, 10), (1 - j / 4,))

    scored = [[candidate(i, j) for j in range(4)] for i in range(2)]
    found = [guided.Guided("p0", ("s",), True, 1.0, 15), guided.Guided("p1", (), False, None, 24)]
    figures = guided.compare(found, scored, "last")
    # 19.5 tokens for each: two candidates of ten; the right one is among two of four half of the time
    assert figures["tokens"] == 19.5 and figures["best_of_n"]["n"] == 2 and figures["enough"]
    assert figures["best_of_n"]["accuracy"] == pytest.approx(0.5) and figures["accuracy"] == 0.5
    assert figures["unfinished"] == 0.5
    dear = guided.compare([dataclasses.replace(x, n_tokens=41) for x in found], scored, "last")
    assert dear["best_of_n"]["n"] == 4 and not dear["enough"] and dear["best_of_n"]["accuracy"] == 1
    assert "N = 2: 50.0" in guided.format_table({"beam": figures}) and "all there are" in guided.format_table(
        {"b": dear}
    )
