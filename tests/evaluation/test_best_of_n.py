"""Best-of-N against hand counts, closed forms and a policy and PRM of known accuracy."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from mmprm_jax.evaluation import best_of_n as bon
from mmprm_jax.evaluation import statistics
from mmprm_jax.evaluation.aggregate import AGGREGATORS
from mmprm_jax.records import Candidate, Grading, ScoredCandidate


def scored(answer, correct, text="", logprob=0.0, scores=(0.5,)):
    segments = (text,) if text is not None else ()
    return ScoredCandidate(Candidate("p", segments, answer, correct, logprob, 1), tuple(scores))


def accuracy(candidates, n=16):
    """Per-problem accuracies of a single problem, as floats."""
    result = bon.per_problem([candidates], n)
    return {
        key: {k: float(v[0]) for k, v in value.items()} if isinstance(value, dict) else float(value[0])
        for key, value in result.items()
    }


def test_hand_counted_problem():
    # texts A A B C D; answers 7 7 8 8 -; the right answer is 7
    candidates = [
        scored("7", True, "A", -3.0, (0.9, 0.6)),
        scored("7", True, "A", -3.0, (0.9, 0.6)),
        scored("8", False, "B", -2.0, (0.5, 0.8)),
        scored("8", False, "C", -4.0, (0.4, 0.7)),
        scored(None, False, "D", -5.0, (0.1, 0.1)),
    ]
    a = accuracy(candidates)
    assert a["random"] == pytest.approx(2 / 5)
    assert a["unique"] == pytest.approx(1 / 4)
    assert a["majority"] == pytest.approx(1 / 2)  # two votes each
    assert a["policy_logprob"] == 0
    assert a["oracle"] == 1
    assert a["prm"]["min"] == 1 and a["prm"]["max"] == 1 and a["prm"]["last"] == 0
    # weights, 7 against 8: min 1.2 : 0.9; last 1.2 : 1.5
    assert a["prm_weighted_majority"]["min"] == 1 and a["prm_weighted_majority"]["last"] == 0


def choose(values, right, chosen):
    """The share of right ones among the chosen candidates of the largest value."""
    best = max(values[i] for i in chosen)
    tied = [right[i] for i in chosen if values[i] >= best - 1e-12]
    return sum(tied) / len(tied)


def vote(answers, weights, right, chosen):
    totals, share = {}, {}
    for i in chosen:
        if answers[i] is not None:
            totals[answers[i]] = totals.get(answers[i], 0) + weights[i]
            share[answers[i]] = right[i]
    tied = [share[a] for a, t in totals.items() if t >= max(totals.values()) - 1e-12]
    return sum(tied) / len(tied) if tied else 0


@pytest.mark.parametrize(("n", "size"), [(1, 1), (6, 1), (6, 3), (9, 4), (6, 6), (4, 9)])
def test_all_subsets_are_counted(n, size):
    """Against a plain enumeration of the subsets, one selector after the other; many ties."""
    rng = np.random.default_rng(n + size)
    answers = [None if a == 3 else str(a) for a in rng.integers(0, 4, n)]
    right = [a == "0" for a in answers]
    texts, logprobs = [str(i) for i in rng.integers(0, 3, n)], rng.integers(-3, 0, n).astype(float)
    texts = [f"{t} {a}" for t, a in zip(texts, answers, strict=True)]
    scores = rng.integers(1, 4, (n, 2)) / 4
    a = accuracy([scored(*x) for x in zip(answers, right, texts, logprobs, scores, strict=True)], size)
    subsets = list(itertools.combinations(range(n), min(size, n)))

    def mean(function):
        return pytest.approx(np.mean([function(chosen) for chosen in subsets]), abs=1e-12)

    assert a["random"] == mean(lambda c: sum(right[i] for i in c) / len(c))
    assert a["oracle"] == mean(lambda c: any(right[i] for i in c))
    assert a["oracle"] == pytest.approx(statistics.pass_at_k(n, sum(right), min(size, n)))
    assert a["unique"] == mean(lambda c: np.mean([t.endswith(" 0") for t in {texts[i] for i in c}]))
    assert a["policy_logprob"] == mean(lambda c: choose(logprobs, right, c))
    assert a["majority"] == mean(lambda c: vote(answers, np.ones(n), right, c))
    for name in ("min", "mean", "last", "max"):
        values = {"min": scores.min(1), "mean": scores.mean(1), "last": scores[:, -1], "max": scores.max(1)}[name]
        assert a["prm"][name] == mean(lambda c, v=values: choose(v, right, c)), name
        assert a["prm_weighted_majority"][name] == mean(lambda c, v=values: vote(answers, v, right, c)), name


def test_a_sample_of_the_subsets_is_close_to_all_of_them():
    """C(14, 7) = 3432 subsets, of which votes see 256."""
    answers = ["1"] * 5 + ["2"] * 4 + ["3"] * 3 + [None] * 2
    got = accuracy([scored(x, x == "1", str(i)) for i, x in enumerate(answers)], 7)["majority"]
    all_of_them = [
        vote(answers, np.ones(14), [x == "1" for x in answers], c) for c in itertools.combinations(range(14), 7)
    ]
    assert got == pytest.approx(np.mean(all_of_them), abs=4 * np.std(all_of_them) / 16)


def test_one_candidate_is_a_random_one():
    rng = np.random.default_rng(5)
    group = [scored(str(i % 3), i % 3 == 0, str(i), -float(i), (rng.random(),)) for i in range(7)]
    a = accuracy(group, 1)
    assert {round(x, 12) for x in (a["majority"], a["oracle"], a["policy_logprob"], *a["prm"].values())} == {
        round(3 / 7, 12)
    }


def test_answers_of_one_class_vote_together():
    group = [scored("1/2", True), scored("0.5", True), scored("7", False), scored("7", False), scored("7", False)]
    group.append(scored("50%", True))
    group.append(scored(r"\frac12", True))
    halves = {"1/2", "0.5", "50%", r"\frac12"}
    assert accuracy(group)["majority"] == 0
    assert bon.per_problem([group], 7, key=lambda c: c.answer in halves)["majority"] == [1.0]


@pytest.mark.parametrize(("a", "b", "same"), [(" 12  m", "12 M", True), ("2²", "22", False), ("é", "e\u0301", True)])
def test_the_plain_form_of_answers(a, b, same):
    assert (bon.plain(a) == bon.plain(b)) == same


def test_selectors_that_lack_their_data_are_left_out():
    found = bon.best_of_n([[scored("1", True)]], without=["majority", "policy_logprob"], greedy=[True])
    assert not {"majority", "policy_logprob"} & set(found["1"]) and found["1"]["greedy"]["accuracy"] == 1


def test_groups_by_hand():
    each = bon.per_problem([[scored("1", True)], [scored("1", False)], [scored("1", True)]], 1)
    found = bon.by_group(each, ["level 10", "level 9", "level 10"])
    assert list(found) == ["level 9", "level 10"]
    assert found["level 10"]["n_problems"] == 2 and found["level 10"]["prm.min"]["accuracy"] == 1
    assert found["level 9"]["random"]["accuracy"] == 0


@pytest.mark.parametrize(
    ("steps", "name"),
    [([], "0-1 steps"), ([1], "0-1 steps"), ([2, 2], "2 steps"), ([2, 3], "3-4 steps"), ([4], "3-4 steps"),
     ([5], "5-8 steps"), ([8, 8], "5-8 steps"), ([8, 9], "9-16 steps"), ([33], "33-64 steps")],
)  # fmt: skip
def test_bins_of_length(steps, name):
    assert bon.length_group([scored("1", True, scores=(0.5,) * s) for s in steps]) == name


def test_sums_in_another_order_are_tied():
    """0.1 + 0.2 + 0.3 is not 0.3 + 0.2 + 0.1 to the last bit."""
    a = accuracy([scored("7", True, scores=(0.1, 0.2, 0.3)), scored("8", False, scores=(0.3, 0.2, 0.1))])
    assert a["prm"]["mean"] == a["prm"]["mean_odds"] == a["prm"]["product"] == 0.5
    assert a["prm_weighted_majority"]["mean"] == 0.5


def test_an_answer_that_is_not_in_the_subset_gets_no_vote():
    """Not even where those that are there weigh nothing."""
    pair = [scored("7", True, scores=(0.0,)), scored("8", False, scores=(0.0,))]
    assert accuracy(pair, n=1)["prm_weighted_majority"]["min"] == 0.5


def test_an_answer_counts_as_its_candidates_of_the_subset_do():
    """The first two give the same answer, of which only one was found right: 0.5, 1 and 0 of the pairs."""
    judged = [scored("7", True, "A", scores=(0.9,)), scored("7", False, "B", scores=(0.1,)), scored("8", False, "C")]
    assert accuracy(judged, n=2)["prm_weighted_majority"]["last"] == pytest.approx((0.5 + 1 + 0) / 3)


def test_sampled_subsets_have_their_size():
    found = bon._subsets(20, 10)
    assert found.shape == (bon.SUBSETS, 20) and set(found.ravel()) == {0.0, 1.0} and np.all(found.sum(1) == 10)


def test_groups_of_any_name():
    """Digits that are no numbers stand in names too."""
    names = ["level 10", "level 9", "²", "①", ""]
    assert list(bon.by_group({"x": np.ones(5)}, names)) == ["", "level 9", "level 10", "²", "①"]


def test_ties_of_three_candidates_count_with_their_expectation():
    a = accuracy(
        [scored("1", True, "A"), scored("2", False, "B"), scored("2", False, "C"), scored("3", False, "D", -1)]
    )
    assert a["policy_logprob"] == pytest.approx(1 / 3)
    assert a["prm"]["mean"] == pytest.approx(1 / 4)


def test_tied_answers_count_once_whatever_their_size():
    """2 x 0.3 = 3 x 0.2: two tied answers, so 1/2, although 2 of 5 candidates are right."""
    right = [scored("1", True, scores=(0.3,))] * 2
    wrong = [scored("2", False, scores=(0.2,))] * 3
    a = accuracy(right + wrong)
    assert a["majority"] == 0
    for name in AGGREGATORS:
        assert a["prm_weighted_majority"][name] == pytest.approx(1 / 2)


def test_votes_need_an_answer():
    silent = [scored(None, False), scored(None, False)]
    assert accuracy(silent)["majority"] == 0
    assert accuracy(silent)["prm_weighted_majority"]["mean"] == 0
    assert accuracy([*silent, scored("1", True)])["majority"] == 1


def test_an_empty_candidate_loses_under_every_aggregator():
    a = accuracy([scored("1", True, None, scores=()), scored("2", False, "A", scores=(0.0,))])
    assert set(a["prm"].values()) == {0.0}
    assert set(a["prm_weighted_majority"].values()) <= {0.0, 0.5}  # a weight of exactly 0 ties with no steps


def test_only_empty_candidates_are_a_tie():
    a = accuracy([scored(None, False, None, scores=()), scored(None, False, None, scores=())])
    assert set(a["prm"].values()) == {0.0}


@pytest.mark.parametrize("name", AGGREGATORS)
def test_scores_of_zero_and_one(name):
    a = accuracy([scored("1", False, "A", scores=(0.0, 0.0)), scored("2", True, "B", scores=(1.0, 1.0))])
    assert a["prm"][name] == 1 and a["prm_weighted_majority"][name] == 1


def test_no_candidates_and_too_few():
    problems = [[], [scored("1", True)], [scored("1", True), scored("2", False)]]
    result = bon.per_problem(problems, 2)
    for key in ("random", "unique", "majority", "policy_logprob"):
        np.testing.assert_allclose(result[key], [0, 1, 0.5], atol=1e-12)
    np.testing.assert_array_equal(result["oracle"], [0, 1, 1])
    np.testing.assert_allclose(result["prm"]["min"], [0, 1, 0.5])


def test_order_of_the_candidates_does_not_matter():
    rng = np.random.default_rng(0)
    candidates = [
        scored(str(a), bool(a == 1), str(i % 5), -float(rng.integers(3)), rng.integers(0, 3, 4) / 2)
        for i, a in enumerate(rng.integers(0, 3, 12))
    ]
    want = accuracy(candidates)
    for _ in range(5):
        got = accuracy([candidates[i] for i in rng.permutation(12)])
        for key, value in want.items():
            assert got[key] == pytest.approx(value, abs=1e-12)


def test_simulation_of_known_accuracy():
    """Policy right with p = 0.4, perfect PRM, blind log-probs, wrong answers all different."""
    rng, p, count = np.random.default_rng(1), 0.4, 1000
    problems = []
    for _ in range(count):
        right = rng.random(8) < p
        problems.append(
            [
                scored("y" if r else f"n{j}", bool(r), str(j), float(rng.normal()), (0.5, 0.9 if r else 0.1))
                for j, r in enumerate(right)
            ]
        )
    result = bon.best_of_n(problems)
    assert list(result) == ["1", "2", "4", "8"]
    for n in (1, 2, 4, 8):
        row = result[str(n)]
        any_right = 1 - (1 - p) ** n
        one_right = n * p * (1 - p) ** (n - 1)
        # two right answers outvote singletons; a single right one ties with n - 1 others
        majority = any_right - one_right * (1 - 1 / n)
        for got, want in [
            (row["random"], p), (row["unique"], p), (row["policy_logprob"], p), (row["prm"]["last"], any_right),
            (row["prm"]["min"], any_right), (row["oracle"], any_right), (row["majority"], majority),
        ]:  # fmt: skip
            assert abs(got["accuracy"] - want) < 4.5 * max(got["stderr"], 1e-3)
            assert got["ci95"][0] <= got["accuracy"] <= got["ci95"][1]
        simple = math.sqrt(any_right * (1 - any_right) / count)  # the standard error from the first N alone
        assert row["oracle"]["stderr"] < (1.1 if n == 8 else 0.75) * simple


def test_sizes_stop_at_the_number_of_candidates():
    assert bon.sizes([[scored("1", True)] * 16, []]) == [1, 2, 4, 8, 16]
    assert bon.sizes([[scored("1", True)] * 6]) == [1, 2, 4, 6]
    assert bon.sizes([[]]) == [1]


def test_one_problem_has_no_standard_error():
    assert math.isnan(bon.best_of_n([[scored("1", True)]])["1"]["random"]["stderr"])


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        bon.per_problem([[scored("1", True)]], 0)
    with pytest.raises(ValueError, match="no problems"):
        bon.best_of_n([])
    with pytest.raises(ValueError, match="one truth per score"):
        bon.step_auc([0.1, 0.2], [True])


def test_select_aggregator():
    only_last = [[scored("1", False, "A", scores=(0.9, 0.3)), scored("2", True, "B", scores=(0.1, 0.4))]]
    assert bon.select_aggregator(only_last) == "last"
    assert bon.select_aggregator([[scored("1", True)]]) == "min"  # all tied: the first


@pytest.mark.parametrize(
    ("scores", "truths", "expected"),
    [
        ([0.1, 0.4, 0.35, 0.8], [False, False, True, True], 0.75),
        ([0.1, 0.2, 0.8, 0.9], [False, False, True, True], 1.0),
        ([0.9, 0.1], [False, True], 0.0),
        ([0.5, 0.5, 0.5], [True, False, True], 0.5),
        ([0.5, 0.5, 0.9], [False, True, True], 0.75),  # one tie, one win
    ],
)
def test_step_auc_by_hand(scores, truths, expected):
    assert bon.step_auc(scores, truths) == expected


def test_step_auc_counts_pairs():
    rng = np.random.default_rng(2)
    scores, truths = rng.integers(0, 10, 60) / 10, rng.random(60) < 0.4
    pairs = [(s > t) + 0.5 * (s == t) for s in scores[truths] for t in scores[~truths]]
    assert bon.step_auc(scores, truths) == pytest.approx(np.mean(pairs), rel=1e-12)


def test_step_auc_of_one_class_is_nan():
    assert math.isnan(bon.step_auc([0.1], [True])) and math.isnan(bon.step_auc([], []))


def test_answers_that_say_the_same_vote_together():
    """Within a problem; what is one answer is so by the rules in both directions."""
    one = [scored(a, a in ("0.5", "\\frac{1}{2}", "1/2"), text=a) for a in ("\\frac{1}{2}", "7", "0.5", "1/2", "7")]
    key = bon.equivalent([one, [scored(None, False)], []])
    half, fraction, formula, seven = (key(scored(a, True).candidate) for a in ("0.5", "1/2", "\\frac{1}{2}", "7"))
    assert half == fraction == formula != seven
    assert key(scored("Never seen", True).candidate) == key(scored("never  seen ", True).candidate)
    assert bon.per_problem([one], 5)["majority"].tolist() == [0.0]
    assert bon.per_problem([one], 5, key)["majority"].tolist() == [1.0]
    rounded = bon.equivalent([[scored("3.1", True), scored("3.14", False), scored("22/7", False)]])
    assert len({rounded(scored(a, True).candidate) for a in ("3.1", "3.14", "22/7")}) == 3


def test_choices_vote_by_letter_and_by_text():
    """In the problem that has them; b is no letter there, and other problems have other choices."""

    def one(name, *answers):
        found = [scored(a, False, text=a) for a in answers]
        return [dataclasses.replace(s, candidate=dataclasses.replace(s.candidate, problem_id=name)) for s in found]

    answers = ("B", "4 cm", "(B) 4 cm", "A", "3 cm", "5 cm")
    problems = [one("p", *answers), one("q", *answers), one("r", *answers)]
    gradings = {"p": Grading.of(["3 cm", "4 cm"]), "q": Grading.of(["4 cm", "3 cm"]), "r": Grading()}
    key = bon.equivalent(problems, gradings)
    p, q, r = ([key(s.candidate) for s in group] for group in problems)
    assert p[0] == p[1] == p[2] and p[3] == p[4] and len(set(p)) == 3
    assert q[0] == q[4] and q[3] == q[1] and len(set(q[:2])) == 2
    assert len({r[0], r[1], r[3], r[4], r[5]}) == 5
    plain = bon.equivalent(problems)
    assert [plain(s.candidate) for s in problems[2]] == r  # as without any
