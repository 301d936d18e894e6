"""Benchmark rows: the question, the official prompt and what the official scoring needs, from real rows and by hand."""

import json
import math
from pathlib import Path

import pytest

from mmprm_jax.answers.official import MODES
from mmprm_jax.answers.workers import Verifier
from mmprm_jax.data import benchmarks, sources
from mmprm_jax.data.prompts import match_image_tags
from mmprm_jax.data.sources_base import Refused, shown
from mmprm_jax.records import Grading, UserError

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
    assert item.record.question == row["question"] and item.record.grading == Grading.of(["30°", "40°"], kind="choice")
    long = "q\n" * 40_000 + "\n" * 9_000 + " (A) 1\n\n\tB.\n2"
    spread = benchmarks.mathverse(row | {"question_for_eval": long, "question": long}, "")
    assert spread.benchmark["options"] == ("1", "2")
    with pytest.raises(UserError, match="shows the choices '30°; 40°', the row has"):
        benchmarks.mathverse(row | {"question_for_eval": long}, "")
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
        ("olympiadbench", {"question": "q", "final_answer": ["1"], "images": 5}, "the image is int, not a path"),
        ("olympiadbench", {"question": "Prove it.", "final_answer": None}, "a problem to prove"),
        ("visualprocessbench", {"question": "q", "response": {"steps": ["a"], "process_correctness": [2]}}, "1, 0 or"),
        ("visualprocessbench", {"question": "q", "response": None}, "no object response"),
        ("processbench", {"problem": "q", "steps": [], "label": -1}, "0 steps"),
    ],
)  # fmt: skip
def test_bad_rows_are_refused(parse, row, reason):
    with pytest.raises(UserError, match=reason):
        getattr(benchmarks, parse)(row, "test")


def graded(name):
    """The problem of each real row, and the row."""
    split = {"mathvista": "testmini", "mathvision": "test"}[name]
    return [(item.record, row) for item, row in zip(sources.read(name, str(GOLDEN), split), real(name), strict=True)]


@pytest.mark.parametrize("name", ["mathvista", "mathvision"])
def test_what_a_row_says_of_its_answer_is_in_the_grading(name):
    for problem, row in graded(name):
        options = row.get("choices") or row.get("options") or []
        assert [text for _, text in problem.grading.options] == options
        assert problem.grading.unit == (row.get("unit") or "") and problem.grading.precision == row.get("precision")
        assert (problem.grading.kind == "choice") == bool(options)
        assert problem.question.count("\nChoices:") == (bool(options) and options != list("ABCDEFGH")[: len(options)])


def test_a_letter_and_the_text_of_a_choice_are_one_answer():
    """MathVista's gold is a choice's text, MathVision's its letter; rollouts answer in both ways."""
    asked, other = [], []
    for problem, _ in graded("mathvista") + graded("mathvision"):
        texts = dict(problem.grading.options)
        if not texts or problem.answer.startswith("("):  # a choice that is called "(b)"
            continue
        right = next(letter for letter, text in texts.items() if problem.answer in (letter, text))
        wrong = next(letter for letter in texts if letter != right)
        asked += [(f"\\boxed{{{right}}}", problem.answer, problem.grading)]
        asked += [(f"({right}) {texts[right]}", problem.answer, problem.grading)]
        asked += [(texts[right], problem.answer, problem.grading)]
        other += [(wrong, problem.answer, problem.grading)]
    with Verifier(0) as verify:
        assert sum(verify(asked)) > 0.97 * len(asked) > 300  # others: "(C) (C)", "(D) E"
        assert not any(verify(other))
        assert sum(verify([(answer, gold) for answer, gold, _ in asked])) < 0.7 * len(asked)  # without the options


@pytest.mark.parametrize(
    "question, options, wanted",
    [
        ("Which?", ["3", "4"], "Which?\nChoices:\n(A) 3\n(B) 4"),
        ("Which?\nChoices:\n(A) 3\n(B) 4", ["3", "4"], None),
        ("Which?\nA. 3\nB. 4.", ["3", "4"], None),
        ("Which? A、3  B、4  C、5", ["3", "4", "5"], None),
        ("Which?（A）3（B）4（C）5", ["3", "4", "5"], None),
        ("Which of A. and B. is it?", ["3", "4"], "Which of A. and B. is it?\nChoices:\n(A) 3\n(B) 4"),
        ("Lines:\nA: y = x\nB: y = 2x\nWhich one?\n(A) the first\n(B) the other", ["the first", "the other"], None),
        ("Which?", ["A", "B"], "Which?"),  # the image shows them
        ("Which?\n(A) 3\n(B) 4", ["A", "B"], None),
    ],
)
def test_the_prompt_shows_the_choices_once(question, options, wanted):
    row = {"id": "1", "question": question, "options": options, "answer": "B", "image": "a.png"}
    problem = benchmarks.mathvision(row, "test").record
    assert problem.question == (wanted or question)
    texts = [text for _, text in problem.grading.options]
    assert [text.rstrip(".") for text in texts] == (["3", "4"] if "(A) 3" in question else options)


@pytest.mark.parametrize(
    "shows", ["(A) 3\n(B) 5", "(A) 4\n(B) 3", "A. 3\nB. 4\nC. 5", "A. 3 B. 4 C. 5", "(A) 3\n(B) 45", "(A) 3\n(B) 4.5"]
)
@pytest.mark.parametrize("name", ["mathvista", "mathvision", "mathverse", "mm_k12"])
def test_a_prompt_and_choices_that_disagree_are_refused(shows, name):
    row = {"id": "1", "question": f"Which?\n{shows}", "options": ["3", "4"], "choices": ["3", "4"], "answer": "B",
           "question_type": "multi-choice", "answer_type": "text", "problem_version": "v", "image": "a.png",
           "question_for_eval": "Which?\nA. 3\nB. 4"}  # fmt: skip
    with pytest.raises(UserError, match="the question shows the choices"):
        sources.find(name).parse(row, "test")


@pytest.mark.parametrize(
    "question, answer, options",
    [
        ("Which?\nA. 3\nB. 4\nC. 5\nD. 6", "B", ["3", "4", "5", "6"]),
        ("Which? ( )\nA. $3$    B. $4$\nC. $5$    D. $6$", "D", ["$3$", "$4$", "$5$", "$6$"]),
        ("Which? (A) 3 (B) 4 (C) 5", "C", ["3", "4", "5"]),
        ("Which? (A) 3 (B) 4 (C) 5", "4", []),  # may be a value that stands there
        ("Which? (A) 3 (B) 4 (C) 5", "D", []),
        ("Points A. and B. are given, C. is not.", "AB", []),
    ],
)
def test_choices_that_a_training_question_shows(question, answer, options):
    problem = sources.find("mmk12").parse({"id": "1", "question": question, "answer": answer}, "train").record
    assert problem.question == question and problem.grading == Grading.of(options, kind="choice" if options else None)
    assert list(shown(question)) == options or not options


@pytest.mark.parametrize(
    "options",
    [["3", "4"], {"A": "3", "B": "4", "C": None}, ["A. 3", "B. 4"], ["(A) 3", "(B) 4"], {"A": "A、3", "B": "B、4"}],
)
def test_choices_of_a_row_in_the_forms_they_have(options):
    problem = (
        sources.find("mmk12").parse({"id": "1", "question": "Which?", "answer": "B", "options": options}, "").record
    )
    assert problem.question == "Which?\nChoices:\n(A) 3\n(B) 4"
    assert problem.grading == Grading.of(["3", "4"], kind="choice")


@pytest.mark.parametrize("options", [{"A": "3", "C": "4"}, {"1": "3", "2": "4"}, "3, 4", [["3"], ["4"]]])
def test_choices_that_are_none(options):
    with pytest.raises(UserError, match="options"):
        sources.find("mmk12").parse({"id": "1", "question": "Which?", "answer": "B", "options": options}, "")


def test_choices_of_several_lines_and_words_behind_the_last():
    asked = "Which?\nChoices:\nA: one\nand a half\nB: two\nAnswer with the letter."
    row = {"sample_index": "7", "problem_index": "2", "problem_version": "v", "question_type": "multi-choice",
           "question": asked, "question_for_eval": asked, "answer": "B"}  # fmt: skip
    assert benchmarks.mathverse(row, "").record.question == asked
    row = {"id": "1", "question": "Which? A. 3 B. 4 C. 5. Choose one.", "options": ["3", "4", "5"], "answer": "B"}
    assert sources.find("mmk12").parse(row, "").record.question == row["question"]


@pytest.mark.parametrize(
    "row",
    [
        {"problem": "<image>Which <image>?", "images": [b"1", b"2"]},
        {"prompt": [{"role": "user", "content": "<image>Which <image>?"}], "images": [b"1", b"2"]},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [
            {"type": "image", "image": b"1"}, {"type": "text", "text": "Which "}, {"type": "image", "image": b"2"},
            {"type": "text", "text": "?"}]}]},
        {"conversations": [{"from": "human", "value": "<image>Which <image 2>?".replace("<image>", "<image 1>")}],
         "image": b"1", "images": [b"1", b"2"]},
    ],
)  # fmt: skip
def test_problems_as_chats(row):
    item = sources.find("mm_k12").parse(row | {"answer": "1"}, "train")
    assert item.record.question == "<image>Which <image>?" and item.pictures == (b"1", b"2")


def test_a_chat_with_its_answer_is_no_problem():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(UserError, match="2 turns; one question is expected"):
        sources.find("mm_k12").parse({"messages": turns, "answer": "1"}, "train")


def test_a_training_row_with_choices_unit_and_precision_of_its_own():
    row = {
        "id": "1",
        "question": "How far?",
        "answer": "1.5",
        "options": ["1.5", "2.5"],
        "unit": "km",
        "precision": 1.0,
    }
    problem = sources.find("mm_k12").parse(row, "train").record
    assert problem.grading == Grading.of(["1.5", "2.5"], "km", 1, "choice") and problem.question.endswith("(B) 2.5")
    with pytest.raises(UserError, match="no number of decimals"):
        sources.find("mm_k12").parse(row | {"precision": 1.5}, "train")


@pytest.mark.parametrize(
    "text, images, wanted",
    [
        ("Compare <image1> and <image2>.", 2, "Compare <image> and <image>."),
        ("Compare <image_0> and <image_1>.", 2, "Compare <image> and <image>."),
        ("See <image1>, <image2>; <image1> again.", 2, "See <image>, <image>; (image 1) again."),
        ("<image2> before <image1>", 2, "(image 2) before (image 1)"),  # in front they stand in their order
        ("Only <image2>.", 2, "Only (image 2)."),
        ("<image1> of <image2>", 1, "(image 1) of (image 2)"),  # parts of one picture, as MathVision has them
        ("<image3>", 1, "<image>"),
        ("<image>, <image>, <image>", 3, "<image>, <image>, <image>"),
        ("None", 3, "None"),
        ("<image 1> and <Image 2>", 2, "<image> and <image>"),
        ("<|image|>: <|image|>", 2, "<image>: <image>"),
        ("<|image_1|>\n<|image_2|>\nWhich?", 2, "<image>\n<image>\nWhich?"),
        ("![](a.png) or ![figure 2](images/b.png)?", 2, "<image> or <image>?"),
        ("<ImageHere>Which <image_placeholder>", 2, "<image>Which <image>"),
        ("<|vision_start|><|image_pad|><|vision_end|>Which?", 1, "<image>Which?"),
        ("See ![](https://example.org/a.png)", 0, "See ![](https://example.org/a.png)"),
        ("5! [x](y) and <imagine>", 1, "5! [x](y) and <imagine>"),
    ],
)
def test_image_tags(text, images, wanted):
    assert match_image_tags(text, images) == wanted


@pytest.mark.parametrize(
    "text, images, reason",
    [
        ("<image1> <image3>", 2, "image 3"),
        ("<image> <image>", 3, "2 <image>"),
        ("<|image|>", 0, "1 <image>"),
        ("![](a) <image>", 1, "2 <image>"),
    ],
)
def test_image_tags_that_do_not_fit(text, images, reason):
    with pytest.raises(UserError, match=reason):
        match_image_tags(text, images)
