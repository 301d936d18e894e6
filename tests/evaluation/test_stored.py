"""Candidates from files that others make: both layouts, bad rows, `mmprm bon`."""

import json
import re

import pytest

from mmprm_jax import cli, records
from mmprm_jax.evaluation import stored
from mmprm_jax.records import Candidate, ScoredCandidate, UserError

OURS = {
    "candidate": {
        "problem_id": "p", "segments": ["a", "<answer> 7 </answer>"], "answer": "7", "correct": True, "logprob": -1.5,
        "n_tokens": 9,
    },
    "scores": [0.25, 1],
}  # fmt: skip
THEIRS = {
    "id": 3, "question": "q", "image_path": "x.png", "solutions_splits": [["a", "b"], []], "labels": [1, 0],
    "prm_scores": [[0.5, 0.75], []],
}  # fmt: skip


def write(path, rows, as_list=False):
    texts = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("[" + ",".join(texts) + "]" if as_list else "".join(text + "\n" for text in texts))
    return path


def bon(*argv):
    cli.run(["bon", *map(str, argv)])


def test_our_rows(tmp_path):
    found = stored.read(
        write(tmp_path / "c.jsonl", [OURS, OURS, {**OURS, "candidate": OURS["candidate"] | {"problem_id": "o"}}])
    )
    assert {name: len(group) for name, group in found.problems.items()} == {"p": 2, "o": 1}
    segments = ("a", "<answer> 7 </answer>")
    assert found.problems["p"][0] == ScoredCandidate(Candidate("p", segments, "7", True, -1.5, 9), (0.25, 1.0))
    assert found.without == [] and found.bad == []


def test_what_the_pipeline_writes_comes_back(tmp_path):
    scored = [ScoredCandidate(Candidate("p", ("ä\ud800",), None, False, -2.0, 1), (0.5,)) for _ in range(3)]
    records.write(tmp_path / "c.jsonl", scored)
    assert stored.read(tmp_path / "c.jsonl").problems == {"p": scored}


def test_the_least_that_is_needed(tmp_path):
    rows = [{"candidate": {"problem_id": "p", "correct": c}, "scores": s} for c, s in ((1, [0.9]), (0, [0.1, 0.2]))]
    found = stored.read(write(tmp_path / "c.jsonl", rows))
    assert set(found.without) == {"majority", "prm_weighted_majority", "policy_logprob", "unique"}
    assert [len(s.scores) for s in found.problems["p"]] == [1, 2]


@pytest.mark.parametrize("as_list", [True, False])
def test_the_rows_of_the_original(tmp_path, as_list):
    bare = {"labels": [1], "prm_scores": [[1.0]], "answers": ["x"]}
    found = stored.read(write(tmp_path / "r.json", [THEIRS, bare], as_list))
    first, second = found.problems.values()
    assert list(found.problems)[0] == "3" and len(first) == 2
    assert first[0] == ScoredCandidate(Candidate("3", ("a", "b"), None, True, 0.0, 0), (0.5, 0.75))
    assert first[1].scores == () and second[0].candidate.answer == "x"
    assert found.without == ["policy_logprob"]


def test_there_and_back(golden, tmp_path):
    original = json.loads((golden / "bon" / "results.json").read_text())
    bon(golden / "bon" / "results.json", f"--output={tmp_path / 'back.json'}")
    assert json.loads((tmp_path / "back.json").read_text()) == original
    path = write(tmp_path / "full.json", [THEIRS | {"answers": ["7", None]}], as_list=True)
    bon(path, f"--output={tmp_path / 'again.json'}")
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads(path.read_text())
    bon(path, f"--output={tmp_path / 'ours.jsonl'}")
    assert stored.read(tmp_path / "ours.jsonl").problems == stored.read(path).problems


def test_what_a_file_does_not_say_is_not_made_up_in_the_other_layout(tmp_path):
    """Without steps and log-probabilities, from the original's layout to ours and back."""
    path = write(tmp_path / "r.json", [{k: v for k, v in THEIRS.items() if k in ("id", "labels", "prm_scores")}], True)
    bon(path, f"--output={tmp_path / 'ours.jsonl'}")
    found = stored.read(tmp_path / "ours.jsonl")
    assert found.bad == [] and found.problems == stored.read(path).problems
    assert found.without == stored.read(path).without == list(stored.NEEDS)
    bon(tmp_path / "ours.jsonl", f"--output={tmp_path / 'back.json'}")
    assert json.loads((tmp_path / "back.json").read_text()) == [
        {"id": "3", "labels": [1, 0], "prm_scores": [[0.5, 0.75], []]}
    ]


def test_a_problem_without_candidates_fits_into_the_original_layout_only(tmp_path):
    path = write(tmp_path / "r.json", [THEIRS, {"id": 4, "labels": [], "prm_scores": []}], as_list=True)
    with pytest.raises(UserError, match="1 problems have no candidates, e.g. 4; only .json holds them"):
        bon(path, f"--output={tmp_path / 'ours.jsonl'}")
    bon(path, f"--output={tmp_path / 'again.json'}")
    assert stored.read(tmp_path / "again.json").problems == stored.read(path).problems


def test_a_candidate_without_a_log_probability_is_not_the_likeliest(tmp_path, capsys):
    """What stands for it, 0, would beat every true one."""
    some = changed(OURS, candidate={k: v for k, v in OURS["candidate"].items() if k != "logprob"})
    path = write(tmp_path / "c.jsonl", [OURS, some])
    assert stored.read(path).without == ["policy_logprob"]
    bon(path)
    assert "left out: policy_logprob (not every candidate has logprob)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["c.txt", "c.jsonl", "c"])
def test_an_output_that_cannot_be_meant(tmp_path, name):
    path = write(tmp_path / "c.jsonl", [OURS])
    with pytest.raises(UserError, match="replaced by the output|end the name in"):
        bon(path, f"--output={tmp_path / name}")
    assert json.loads(path.read_text()) == OURS


def changed(row, **values):
    return {**row, **values}


BAD = [
    ("{", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ("null", "expected a JSON object, found NoneType"),
    ({"scores": [1]}, "neither candidate"),
    (changed(OURS, scores=[0.25, 1.5]), r"scores\[1\] must be a number from 0 to 1, found 1.5"),
    (changed(OURS, scores=[0.25, True]), r"scores\[1\] must be"),
    (changed(OURS, scores=[0.25]), "2 segments, but 1 scores"),
    (changed(OURS, scores=None), "scores must be a list"),
    (changed(OURS, candidate=OURS["candidate"] | {"correct": "yes"}), "correct must be true or false"),
    (changed(OURS, candidate=OURS["candidate"] | {"correct": None}), "correct must be"),
    (changed(OURS, candidate=OURS["candidate"] | {"problem_id": 3.5}), "problem_id must be a text or a whole number"),
    (changed(OURS, candidate=OURS["candidate"] | {"problem_id": True}), "problem_id must be a text or a whole number"),
    (changed(OURS, candidate=OURS["candidate"] | {"answer": True}), "answer must be a text, a number or null"),
    (json.dumps(OURS).replace("-1.5", "NaN"), "logprob must be a finite number"),
    (json.dumps(OURS).replace("-1.5", "9" * 400), "logprob must be a finite number"),
    (changed(OURS, candidate=OURS["candidate"] | {"n_tokens": "many"}), "n_tokens must be a whole number"),
    (changed(OURS, candidate=[1]), "candidate must be an object"),
    (changed(THEIRS, labels=[1]), "labels must be a list as long as prm_scores, 2"),
    (changed(THEIRS, labels=[1, 2]), r"labels\[1\] must be true or false"),
    (changed(THEIRS, prm_scores=[[0.5], []]), r"solutions_splits\[0\] has 2 steps, but there are 1 scores"),
    (changed(THEIRS, prm_scores=5), "prm_scores must be a list"),
    (changed(THEIRS, solutions_splits=[["a", 1], []]), "must be a list of texts"),
    (changed(THEIRS, id="p"), "a second row of problem p"),
]


@pytest.mark.parametrize(("row", "words"), BAD)
def test_a_bad_row_is_named_and_the_others_are_read(tmp_path, row, words, capsys):
    path = write(tmp_path / "c.jsonl", [OURS, row, OURS])
    found = stored.read(path)
    assert [len(group) for group in found.problems.values()] == [2] and len(found.bad) == 1
    assert f"{path}, line 2: " in found.bad[0]
    with pytest.raises(ValueError, match=words):
        raise ValueError(found.bad[0])
    with pytest.raises(UserError, match="1 bad rows were left out"):
        bon(path)
    said = capsys.readouterr()
    assert "line 2" in said.err and "1 test problems" in said.out


def test_whole_numbers_as_ids_numbers_as_answers_and_keys_of_ones_own(tmp_path, caplog):
    own = changed(OURS, level=3, candidate=OURS["candidate"] | {"problem_id": 3, "answer": 7, "anser": 1})
    text = changed(OURS, candidate=OURS["candidate"] | {"problem_id": "3", "answer": "7"})
    found = stored.read(write(tmp_path / "c.jsonl", [own, text, own]))
    assert list(found.problems) == ["3"] and not found.bad
    assert [x.candidate.answer for x in found.problems["3"]] == ["7"] * 3
    told = [record.getMessage().partition(": ")[2] for record in caplog.records]
    assert told == [
        "the key 'anser' is none of a candidate's and is not used; did you mean 'answer'?",
        "the key 'level' is none of a row's and is not used",
    ]
    theirs = changed(THEIRS, answers=[0.5, None])
    (group,) = stored.read(write(tmp_path / "t.jsonl", [theirs])).problems.values()
    assert [x.candidate.answer for x in group] == ["0.5", None]


def test_files_without_a_good_row(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        stored.read(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="is empty"):
        stored.read(write(tmp_path / "empty.jsonl", []))
    with pytest.raises(UserError, match="line 1: neither"):
        stored.read(write(tmp_path / "bad.jsonl", [{}]))
    (tmp_path / "latin.jsonl").write_bytes(b"\xe9\n")
    with pytest.raises(UserError, match="not UTF-8"):
        stored.read(tmp_path / "latin.jsonl")
    with pytest.raises(UserError, match="not JSON"):
        stored.read(write(tmp_path / "cut.json", ["[1, "]))


def problem(name, right, scores, answers=None):
    answers = answers or ["yes" if r else "no" for r in right]
    return [
        {"candidate": {"problem_id": name, "correct": r, "answer": a, "logprob": -float(i)}, "scores": [0.5, s]}
        for i, (r, s, a) in enumerate(zip(right, scores, answers, strict=True))
    ]


def test_the_command(tmp_path, capsys):
    """Two problems: majority 0 of 2, log-probability 1 of 2, the last score 2 of 2; dev chooses the last score."""
    rows = problem("a", [1, 0, 0], [0.9, 0.2, 0.3]) + problem("b", [0, 0, 1], [0.1, 0.2, 0.8])
    dev = problem("d", [0, 1], [0.4, 0.6])
    path, held_out = write(tmp_path / "c.jsonl", rows), write(tmp_path / "d.jsonl", dev)
    categories = write(tmp_path / "p.jsonl", [{"id": "a", "topic": "sum"}, {"id": "b", "topic": "area"}])
    bon(path, f"--dev={held_out}", f"--problems={categories}", "--category=topic", f"--json={tmp_path / 'f.json'}")
    found, out = json.loads((tmp_path / "f.json").read_text()), capsys.readouterr().out
    best = found["best_of_n"]["3"]
    assert set(found["best_of_n"]) == {"1", "2", "3"}
    assert (best["majority"]["accuracy"], best["policy_logprob"]["accuracy"]) == (0, 0.5)
    assert (best["prm"]["last"]["accuracy"], best["oracle"]["accuracy"]) == (1, 1)
    assert found["prm_selected"] == "min" or best["prm"][found["prm_selected"]]["accuracy"] == 1
    assert found["against_majority"]["prm.last"]["difference"] == 1
    assert found["by_category"]["sum"]["policy_logprob"]["accuracy"] == 1
    assert found["by_category"]["area"]["policy_logprob"]["accuracy"] == 0
    assert "majority vote" in out and "left out: unique (no candidate has segments)" in out


def test_answers_vote_as_in_the_evaluation_of_a_run(tmp_path):
    """0.5 and 1/2 are one answer."""
    rows = problem("a", [1, 1, 0, 0, 0], [0.5] * 5, ["0.5", "1/2", "7", "7", "8"])
    path = write(tmp_path / "c.jsonl", [*rows, *problem("b", [1, 1, 0], [0.5] * 3, ["\\frac12", "0.5", "3"])])
    bon(path, f"--json={tmp_path / 'f.json'}")
    assert json.loads((tmp_path / "f.json").read_text())["best_of_n"]["5"]["majority"]["accuracy"] == 0.75


def test_answers_vote_by_the_grading_of_their_problem(tmp_path):
    """A letter and the text of its choice are one answer."""
    rows = problem("a", [1, 1, 0, 0, 0], [0.5] * 5, ["B", "60°", "7", "7", "8"])
    path, told = write(tmp_path / "c.jsonl", rows), {"id": "a", "source": "s"}
    for grading, accuracy in (({}, 0), ({"grading": {"options": ["30°", "60°", "7", "8"]}}, 0.5)):
        bon(path, f"--problems={write(tmp_path / 'p.jsonl', [told | grading])}", f"--json={tmp_path / 'f.json'}")
        found = json.loads((tmp_path / "f.json").read_text())["best_of_n"]["5"]["majority"]["accuracy"]
        assert found == accuracy
    with pytest.raises(UserError, match='line 1: grading: "options" is a list'):
        bon(path, f"--problems={write(tmp_path / 'p.jsonl', [told | {'grading': {'options': 3}}])}")


def test_options_that_do_not_fit(tmp_path):
    path = write(tmp_path / "c.jsonl", problem("a", [1, 0], [0.9, 0.2]))
    with pytest.raises(UserError, match="1 problems are in .* too, e.g. a"):
        bon(path, f"--dev={path}")
    with pytest.raises(UserError, match="--mode=paper knows neither --dev"):
        bon(path, "--mode=paper", f"--dev={path}")
    with pytest.raises(UserError, match="1 problems of .* are missing, e.g. a"):
        bon(path, f"--problems={write(tmp_path / 'p.jsonl', [{'id': 'b', 'source': 's'}])}")
    with pytest.raises(UserError, match="line 1: expected an object with id and topic"):
        bon(path, f"--problems={tmp_path / 'p.jsonl'}", "--category=topic")


SEARCHED = {
    "unique_id": "test/9.json", "problem": "1/4 + 1/4?", "answer": "\\frac{1}{2}", "level": 1,
    "completions": ["Add.\n\nIt is $\\boxed{0.5}$.", "Add.\n\n\\boxed{1}", "No idea.\n\nStop."],
    "scores": [[0.9, 0.8], [0.4, 0.3], [0.2, 0.1]], "agg_scores": [0.8, 0.3, 0.1], "pred": "\\boxed{0.5}",
    "completion_tokens": [9, 8, -1],
}  # fmt: skip


def test_rows_of_search_and_learn(tmp_path, capsys):
    """Right is what the verifier says of the completions' answers; steps are parted by blank lines."""
    path = write(tmp_path / "s.jsonl", [SEARCHED, SEARCHED | {"unique_id": "b", "scores": [[0.7], [0.1, 0.2], [0.3]]}])
    found = stored.read(path)
    first, other = found.problems["test/9.json"], found.problems["b"]
    assert [(s.candidate.correct, s.candidate.answer, s.scores) for s in first] == [
        (True, "0.5", (0.9, 0.8)), (False, "1", (0.4, 0.3)), (False, None, (0.2, 0.1))
    ]  # fmt: skip
    assert first[1].candidate.segments == ("Add.", "\\boxed{1}") and other[0].candidate.segments == ()
    assert found.without == ["policy_logprob"] and not found.bad and not found.unjudged
    bon(path, f"--json={tmp_path / 'f.json'}", f"--output={tmp_path / 'o.json'}")
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["best_of_n"]["3"]["prm"]["last"]["accuracy"] == 1
    assert [row["labels"] for row in json.loads((tmp_path / "o.json").read_text())] == [[1, 0, 0]] * 2
    unsure = SEARCHED | {"answer": "\\int x dx", "completions": ["\\boxed{\\frac{x^2}{2}}"] * 3}
    unsure = write(tmp_path / "u.jsonl", [unsure])
    bon(unsure)
    assert "3 of 3 answers could not be verified, and count as wrong" in capsys.readouterr().out


def test_what_score_writes_is_joined_with_what_it_read(tmp_path):
    scored = [
        {"id": 3, "scores": [[0.9, 0.8], [0.1, 0.2]], "model": "m", "template": "own"},
        {"id": "a", "scores": [[0.5], [0.4]], "model": "m", "template": "own"},
    ]
    told = [
        {"id": "a", "question": "q", "candidates": [["<answer> 7 </answer>"], ["<answer> 8 </answer>"]], "answer": 8},
        {"id": 3, "question": "q", "candidates": [["s", "t"], ["u", "v"]], "labels": [1, 0]},
        {"id": 4, "question": "never scored"},
    ]
    path, truth = write(tmp_path / "s.jsonl", scored), write(tmp_path / "p.jsonl", told)
    found = stored.read(path, truth)
    assert list(found.problems) == ["3", "a"] and not found.bad
    assert [[s.candidate.correct for s in group] for group in found.problems.values()] == [[True, False], [False, True]]
    assert [s.candidate.segments for s in found.problems["3"]] == [("s", "t"), ("u", "v")]
    assert [s.candidate.answer for s in found.problems["a"]] == ["7", "8"]
    bon(path, f"--labels={truth}", f"--dev={write(tmp_path / 'd.jsonl', problem('d', [0, 1], [0.4, 0.6]))}")
    with pytest.raises(UserError, match="the id 'a' is there twice"):
        stored.read(path, write(tmp_path / "twice.jsonl", [*told, told[0]]))


OTHERS = [
    (SEARCHED | {"answer": None}, "answer is missing"),
    ({k: v for k, v in SEARCHED.items() if k != "answer"}, "answer is missing"),
    (SEARCHED | {"answer": [1]}, "answer must be a text, a number or null"),
    (SEARCHED | {"scores": [[0.1]]}, "completions and scores must be lists of one length"),
    (SEARCHED | {"scores": [0.1, 0.2, 0.3]}, r"prm_scores\[0\] must be a list of numbers"),
    (SEARCHED | {"scores": [[0.1], [-1], [2]]}, r"prm_scores\[1\]\[0\] must be a number from 0 to 1"),
    (SEARCHED | {"completions": "text"}, "completions must be a list of texts"),
    ({"id": "c", "scores": [[0.5]]}, "the file of --labels has no row of that id"),
    ({"id": None, "scores": [[0.5]]}, "the file of --labels has no row of that id"),
    ({"id": "t", "scores": [[0.5]]}, "labels must be a list as long as prm_scores, 1"),
    ({"id": "g", "scores": [[0.5]]}, "answer is missing: the right one, by which those of candidates"),
    ({"id": "n", "scores": [[0.5]]}, "the row of --labels has no candidates"),
    ({"id": "t", "line": 2, "error": "no image"}, "it could not be scored: 'no image'"),
]


def test_bad_rows_of_others_are_named(tmp_path):
    told = [
        {"id": "t", "candidates": [["s"]], "labels": [1, 0]},
        {"id": "g", "candidates": [["s"]]},
        {"id": "n", "labels": [1]},
    ]
    truth, missed = write(tmp_path / "p.jsonl", told), []
    for row, words in OTHERS:
        path = write(tmp_path / "s.jsonl", [OURS, row])
        (bad,) = stored.read(path, truth).bad
        if not (bad.startswith(f"{path}, line 2: ") and re.search(words, bad)):
            missed.append((words, bad))
    assert not missed
    with pytest.raises(UserError, match="line 1: of `mmprm score`: name the file that it read, --labels=FILE"):
        bon(write(tmp_path / "s.jsonl", [OTHERS[7][0]]))


def test_mode_paper(golden, tmp_path, capsys):
    bon(golden / "bon" / "results.json", "--mode=paper", f"--json={tmp_path / 'f.json'}")
    assert "prm accuracy sum_logit 49 / 60, rate: 81.67%" in capsys.readouterr().out
    expected = json.loads((golden / "bon" / "expected.json").read_text())
    assert json.loads((tmp_path / "f.json").read_text())["chosen"] == expected["chosen_index"]
