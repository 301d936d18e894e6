"""Mode paper is equal to the original's results; the default mode does not have its defects."""

import json

import pytest

from mmprm_jax.evaluation import best_of_n, paper, stored
from mmprm_jax.evaluation.aggregate import AGGREGATORS
from mmprm_jax.records import Candidate, ScoredCandidate, UserError


@pytest.fixture(scope="module")
def found(golden):
    return stored.read(golden / "bon" / "results.json")


@pytest.fixture(scope="module")
def expected(golden):
    return json.loads((golden / "bon" / "expected.json").read_text())


@pytest.mark.parametrize("name", paper.AGGREGATORS)
def test_every_number_and_every_choice_of_the_original(found, expected, name):
    values = [[paper.aggregate(name, s.scores) for s in group] for group in found.problems.values()]
    assert [paper.choose(v) for v in values] == expected["chosen_index"][name]
    assert [max(v) for v in values] == pytest.approx(expected["best_score"][name], rel=1e-12, abs=1e-12)


def test_the_accuracies_of_the_original(found, expected):
    got = paper.evaluate(found.problems)
    assert got["chosen"] == expected["chosen_index"]
    for name, want in expected["deterministic"].items():
        assert got["accuracies"][name]["correct"] == want["correct"]
        assert got["accuracies"][name]["accuracy"] == want["accuracy"]
    for name, want in expected["closed_form_expected_correct"].items():
        assert got["accuracies"][name]["correct"] == pytest.approx(want, rel=1e-12)
    assert got["accuracies"]["pass@16"]["correct"] == expected["original_output_random_seed_0"]["pass@16"]["correct"]


ZERO = [([0.0, 0.9], [0.2, 0.3], []), ([0.9, 0.0], [0.0])]  # the golden results_with_zero_scores


@pytest.mark.parametrize("name", paper.AGGREGATORS)
def test_scores_of_zero_as_in_the_original(expected, name):
    want = expected["zero_scores"]["per_aggregator"][name]
    if isinstance(want, str):
        assert want == "ValueError: math domain error"
        with pytest.raises(ValueError, match="math domain error"):
            [paper.aggregate(name, s) for group in ZERO for s in group]
        return
    for group, row in zip(ZERO, want, strict=True):
        values = [paper.aggregate(name, s) for s in group]
        assert values == pytest.approx(row["scores"])
        assert paper.choose(values) == row["chosen"]


def group(*scores):
    return [ScoredCandidate(Candidate("p", ("x",) * len(s), None, i == 0, 0.0, 1), s) for i, s in enumerate(scores)]


def test_it_stops_where_the_original_stops():
    with pytest.raises(UserError, match="problem p: a step score is 0; sum_logit stops"):
        paper.evaluate({"p": group((0.0,), (0.5,))})
    with pytest.raises(UserError, match="problem p: no candidates"):
        paper.evaluate({"p": []})


def test_the_default_has_none_of_it():
    """The first candidate is right: an empty one never beats it, 0 and 1 are numbers like others, ties share."""
    for name in AGGREGATORS:
        assert best_of_n.per_problem([group((0.4, 0.3), ())], 2)["prm"][name] == [1.0]
        assert best_of_n.per_problem([group((1.0, 1.0), (0.0, 0.0), (0.6, 0.7))], 3)["prm"][name] == [1.0]
        assert best_of_n.per_problem([group((0.5,), (0.5,))], 2)["prm"][name] == [0.5]
    # the original prefers the candidate without steps, and 9,999 for a single 1
    assert paper.choose([paper.aggregate("sum_logprob", s) for s in ((0.4, 0.3), ())]) == 1
    assert paper.choose([paper.aggregate("sum_logit", s) for s in ((0.99,) * 3, (1.0, 0.01, 0.01))]) == 1


def test_where_nothing_is_tied_the_default_agrees(found, expected):
    """On the golden problems, candidate by candidate; a right choice of a tie counts with its share."""
    names = {"mean": "average", "sum_log_odds": "sum_logit", "mean_odds": "mean_odd"}
    got = best_of_n.per_problem(list(found.problems.values()), 16)
    for name, values in got["prm"].items():
        chosen = expected["chosen_index"][names.get(name, name)]
        right = [g[i].candidate.correct for g, i in zip(found.problems.values(), chosen, strict=True)]
        clear = (values == 0) | (values == 1)
        assert clear.sum() >= 45
        assert list(values[clear]) == [float(r) for r, c in zip(right, clear, strict=True) if c], name
    closed = expected["closed_form_expected_correct"]
    assert got["random"].sum() == pytest.approx(closed["random"], rel=1e-12)
    for k in (2, 4, 8, 16):
        oracle = best_of_n.per_problem(list(found.problems.values()), k)["oracle"]
        assert oracle.sum() == pytest.approx(closed[f"pass@{k}"], rel=1e-12)
