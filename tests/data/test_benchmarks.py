"""Benchmark rows: the question, the official prompt and what the official scoring needs, from real rows and by hand."""

import json
import math
from pathlib import Path

import pytest

from mmprm_jax.answers.official import MODES
from mmprm_jax.data import benchmarks, sources
from mmprm_jax.data.sources_base import Refused
from mmprm_jax.records import UserError

GOLDEN = Path(__file__).parent.parent / "golden" / "benchmarks"


def real(name):
    path = next(GOLDEN.glob(f"{name}*.jsonl"))
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name, split, key", [("mathvista", "testmini", "pid"), ("mathvision", "test", "id")])
def test_real_rows(name, split, key):
    items, rows = list(sources.read(name, str(GOLDEN), split)), real(name)
    assert not any(isinstance(item, Refused) for item in items)
    for item, row in zip(items, rows, strict=True):
        assert (item.record.id, item.record.answer, item.pictures) == (row[key], row["answer"], (row["image"],))
        assert item.record.question.count("<image>") <= 1 and "<image1>" not in item.record.question
        scoring = item.benchmark
        assert scoring["mode"] == name and scoring["gold"] == row["answer"]
        options = row.get("choices") or row.get("options") or []
        assert list(scoring.get("options", ())) == options
        assert MODES[name]({**scoring, "prediction": row["answer"]}).kind == (
            "unequal" if options[:1] == ["(c)"] else "equal"  # MathVista takes "(b)" for a letter
        )
        for letter, option in zip("ABCDE", options, strict=False):
            assert len(option) == 1 or f"({letter}) {option}" in item.record.question
        assert not json.dumps(scoring).count("NaN")


def test_mathvista_prompts_are_built_as_the_given_ones():
    """The rows' own queries begin with the official one (theirs goes on with another project's format)."""
    for row in real("mathvista"):
        bare = {key: value for key, value in row.items() if key != "query"}
        built = benchmarks.mathvista(bare, "testmini").benchmark["prompt"]
        assert row["query"].startswith(built)
        assert benchmarks.mathvista(row, "testmini").benchmark["prompt"] == row["query"]


def test_mathvision_prompt():
    row = {"id": "1", "question": "Which?\n<image1>", "options": ["x", "y"], "answer": "B", "image": "a.png"}
    item = benchmarks.mathvision(row, "test")
    assert item.benchmark["prompt"].endswith('in the "\\boxed{}".\nWhich?\n<image1>\n(A) x\n(B) y\n')
    assert item.record.question == "Which?\n<image>\nChoices:\n(A) x\n(B) y"
    letters = row | {"options": list("ABCDE")}
    assert benchmarks.mathvision(letters, "test").record.question == "Which?\n<image>"
    assert benchmarks.mathvision(letters, "test").benchmark["prompt"].endswith("Which?\n<image1>\n")
    with pytest.raises(UserError, match="none of the letters"):
        benchmarks.mathvision(row | {"answer": "y"}, "test")


@pytest.mark.parametrize(
    "change, parts",
    [
        ({}, ["should be a numerical value. Please", 'answer is \\boxed{answer}." and give', "explicitly."]),
        ({"unit": "cm"}, ["\\boxed{answer}(unit).", "explicitly, note that the unit of the answer should not be"]),
        ({"is_multiple_answer": True}, ["has multiple answers, each of them should be a numerical value. ",
                                        "\\boxed{multiple answers connected with commas}"]),
        ({"is_multiple_answer": True, "answer_type": "Numerical,Interval"},
         ["with the answers in order being a numerical value, an interval. "]),
        ({"answer_type": "Tuple"}, ["competition. Please calculate"]),
    ],
)  # fmt: skip
def test_olympiadbench_prompt(change, parts):
    row = {"id": 1, "question": "Find x in <image_1>.", "final_answer": ["3"], "answer_type": "Numerical", "unit": None,
           "is_multiple_answer": False, "error": "1e-3", "image_1": {"bytes": b"x", "path": None}}  # fmt: skip
    item = benchmarks.olympiadbench(row | change, "test")
    assert all(part in item.benchmark["prompt"] for part in parts)
    assert item.benchmark["prompt"].endswith("\nFind x in <image_1>.")
    assert item.record.question == "Find x in <image>." and item.pictures == (b"x",)
    assert item.benchmark["error"] == "1e-3" and item.record.id == "1"


def test_mathverse_rows():
    row = {
        "sample_index": "7", "problem_index": "2", "problem_version": "Text Dominant", "question_type": "multi-choice",
        "question": "As shown, find A.\nChoices:\nA:30°\nB:40°", "image": {"bytes": b"x", "path": None}, "answer": "B",
        "query_cot": "Please first conduct reasoning …", "query_wo": "Please directly answer …",
        "question_for_eval": "As shown, find A.\nChoices:\nA:30°\nB:40°",
    }  # fmt: skip
    item = benchmarks.mathverse(row, "testmini")
    assert item.benchmark["options"] == ("30°", "40°") and item.benchmark["category"] == "Text Dominant"
    assert item.benchmark["prompt"].startswith("Please first") and item.record.answer == "B"
    spread = benchmarks.mathverse(row | {"question_for_eval": "q\n" * 40_000 + "\n" * 9_000 + " (A) 1\n\n\tB.\n2"}, "")
    assert spread.benchmark["options"] == ("1", "2")
    vision = benchmarks.mathverse(row | {"problem_version": "Vision Only", "question": ""}, "testmini")
    assert "in the image" in vision.record.question and vision.benchmark["options"] == ("30°", "40°")


@pytest.mark.parametrize(
    "parse, row, reason",
    [
        ("mathvista", {"question": "q", "answer": "5", "choices": ["1", "2"], "question_type": "multi_choice",
                       "answer_type": "text"}, "none of the choices"),
        ("mathvista", {"question": "q", "answer": "5", "answer_type": "float", "precision": "2", "image": "a",
                       "question_type": "free_form"}, "precision"),
        ("mathvista", {"question": "q", "answer": "5", "answer_type": "float", "precision": math.nan,
                       "question_type": "free_form"}, "precision is nan"),
        ("mathvista", {"question": "q", "answer": "5", "answer_type": "integer", "unit": math.nan,
                       "question_type": "free_form"}, "unit is nan"),
        ("mathvision", {"question": "q", "answer": math.inf}, "answer is inf"),
        ("mathvision", {"question": "q", "answer": "5", "level": b"1"}, "level is bytes"),
        ("mathverse", {"problem_version": "v", "question_type": "t", "answer": "A", "question_for_eval": "q" * 200_000},
         "question_for_eval has 200000 characters"),
        ("olympiadbench", {"question": "q", "final_answer": ["1"], "images": 5}, "images is int, not a list"),
        ("olympiadbench", {"question": "Prove it.", "final_answer": None}, "a problem to prove"),
        ("visualprocessbench", {"question": "q", "response": {"steps": ["a"], "process_correctness": [2]}}, "1, 0 or"),
        ("visualprocessbench", {"question": "q", "response": None}, "no object response"),
        ("processbench", {"problem": "q", "steps": [], "label": -1}, "0 steps"),
    ],
)  # fmt: skip
def test_bad_rows_are_refused(parse, row, reason):
    with pytest.raises(UserError, match=reason):
        getattr(benchmarks, parse)(row, "test")
