"""Benchmarks' problems on a run, by official rules. A whole evaluation: test_pipeline."""

import json
from pathlib import Path

import pytest
from etils import epath

from mmprm_jax import config as configs
from mmprm_jax import io, records, stages
from mmprm_jax.data import digits
from mmprm_jax.records import Candidate, Problem, UserError
from mmprm_jax.schema import from_config
from mmprm_jax.stages import benchmark

ROOT = Path(__file__).parents[2]
CHOICES = {"mode": "mathvista", "options": ["12", "15"], "question_type": "multi_choice", "answer_type": "text"}
FLOAT = {"mode": "mathvista", "precision": 1, "question_type": "free_form", "answer_type": "float", "category": "c"}
PROBLEMS = [Problem("1", "q", "15", source="mathvista"), Problem("2", "q", "0.3", source="mathvista")]


@pytest.fixture
def base(tmp_path):
    """A run of the smoke configuration, of which only the data are there, and an evaluation that says so."""
    few = dict(train=2, dev=1, test=1, demonstrations=12, transcriptions=4, text_only=4)
    config = configs.load(f"{ROOT / 'configs' / 'digits.py'}:smoke", [f"--config.data.{k}={n}" for k, n in few.items()])
    run = stages.Run(config, epath.Path(tmp_path / "run"))
    digits.generate(run.data, from_config(digits.Settings, config.data, seed=0))
    for name in ("dev_candidates.jsonl", "dev_scored.jsonl"):
        records.write(run.folder("evaluate") / name, [])
    io.write_json(run.folder("evaluate") / "done.json", {})
    return run


@pytest.fixture
def file(tmp_path):
    path = epath.Path(tmp_path / "mathvista" / "testmini.jsonl")
    records.write(path, PROBLEMS)
    return path


def prepared(path, *rows):
    folder = path.parent / "prepare" / path.stem
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"id": p.id, "prompt": "q", **row}) for p, row in zip(PROBLEMS, rows, strict=False)]
    (folder / "benchmark.jsonl").write_text("\n".join(lines) + "\n")


def candidate(problem, answer, correct=False):
    segments = ("<step>s</step>",) + ((f"<answer>{answer}</answer>",) if answer is not None else ())
    return Candidate(problem, segments, answer, correct, 0.0, 3)


def test_official_rules_decide(base, file):
    prepared(file, CHOICES, FLOAT)
    rules, run = benchmark.load_rules(file, PROBLEMS, ""), benchmark.benchmark_run(base, file)
    for problem, answer, right in [
        ("1", "B", True), ("1", "(B) 15", True), ("1", "A", False), ("2", "0.26", True), ("2", "0.36", False),
        ("2", None, False),
    ]:  # fmt: skip
        assert rules.judge(candidate(problem, answer, not right)).correct == right, answer
    assert sum(rules.verdicts.values()) == 6 and rules.verdicts["equal"] == 3
    assert [rules.category(p) for p in PROBLEMS] == ["mathvista", "c"]
    assert len(run.problems("dev")) == 1 and run.record_files() == [file]
    assert run.folder("evaluate") == base.workdir / "benchmarks" / "mathvista-testmini"
    assert run.folder("train_prm") == base.folder("train_prm") and base.config.evaluate.calibration_problems


def test_without_scoring_rows_the_verifier_decides(base, file):
    for scoring in ("", benchmark.VERIFIER):
        rules = benchmark.load_rules(file, PROBLEMS, scoring)
        for right in (False, True):
            assert rules.judge(candidate("1", "B", right)).correct == right
        assert not rules.verdicts
        prepared(file, CHOICES, FLOAT)  # and not if it is asked for


def test_what_only_a_judge_could_tell_counts_as_wrong(base, file):
    rules = benchmark.load_rules(file, PROBLEMS, "mm_k12")
    assert not rules.judge(candidate("1", "15 (students)", True)).correct and rules.verdicts == {"unknown": 1}


def test_scoring_rows_may_hold_any_text(base, file):
    """U+2028 and U+0085 end a line of text for Python, but not a row of JSON."""
    prepared(file, CHOICES, FLOAT)
    path = file.parent / "prepare" / "testmini" / "benchmark.jsonl"
    path.write_text(path.read_text().replace('"q"', '"a\u2028b\x85c"'))
    assert benchmark.scoring_rows(file)["2"]["prompt"] == "a\u2028b\x85c"


def test_one_mode_for_all(base, file):
    rules = benchmark.load_rules(file, PROBLEMS, "olympiadbench")
    assert rules.judge(candidate("2", "\\frac{3}{10}")).correct and not rules.judge(candidate("2", "0.4")).correct


def test_what_is_wrong_is_said(base, file):
    with pytest.raises(UserError, match="--scoring: 'best' is not one of mathvista"):
        benchmark.load_rules(file, PROBLEMS, "best")
    prepared(file, CHOICES)
    with pytest.raises(UserError, match="no scoring row for problem 2"):
        benchmark.load_rules(file, PROBLEMS, "")
    prepared(file, CHOICES, {"mode": "mathvisor"})
    with pytest.raises(UserError, match="no official scoring 'mathvisor'"):
        benchmark.load_rules(file, PROBLEMS, "")
    (file.parent / "prepare" / "testmini" / "benchmark.jsonl").write_text("{")
    with pytest.raises(UserError, match="damaged; run mmprm prepare again"):
        benchmark.load_rules(file, PROBLEMS, "")
    (base.folder("evaluate") / "done.json").unlink()
    with pytest.raises(UserError, match="its evaluation has not finished"):
        benchmark.run(base, file, benchmark.VERIFIER)


def begin(base, file, scoring):
    rules = benchmark.load_rules(file, records.read_problems(file), scoring)
    benchmark.begin(base, file, rules.modes, benchmark.benchmark_run(base, file).folder("evaluate"))


def test_a_folder_of_other_problems_or_rules(base, file):
    prepared(file, CHOICES, FLOAT)
    for _ in range(2):
        begin(base, file, "")
    with pytest.raises(UserError, match="of other problems, or by other rules"):
        begin(base, file, benchmark.VERIFIER)
    records.write(file, PROBLEMS[:1])
    with pytest.raises(UserError, match="of other problems, or by other rules"):
        begin(base, file, "")
