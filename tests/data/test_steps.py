"""Solutions into steps and an answer: nothing is lost, formulas stay whole, the answer is the one committed to."""

import re
import time

import pytest

from mmprm_jax.answers import extract
from mmprm_jax.data.prompts import final_answer, split_segments, step_text
from mmprm_jax.data.steps import restructure, split_steps

SOLUTIONS = [
    ("We add.\n\n1 + 1 = 2.\n\n\\boxed{2}", ["We add.", "1 + 1 = 2."], "2"),
    ("We add.\n1 + 1 = 2.\n#### 2", ["We add.", "1 + 1 = 2."], "2"),
    ("Step 1: We add,\nboth.\n\nStep 2 (Sum): It is 2.\nAnswer: 2", ["Step 1: We add,\nboth.",
     "Step 2 (Sum): It is 2.\nAnswer: 2"], "2"),
    ("A first line.\n\nThe answer is: $\\frac{1}{2}$.", ["A first line."], "\\frac{1}{2}"),
    ("It is.\nTherefore, the final answer is **B**.", ["It is.", "Therefore, the final answer is **B**."], "B"),
    ("So $x = \\boxed{\\frac{a}{\\boxed{b}}}$ holds.", ["So $x = \\boxed{\\frac{a}{\\boxed{b}}}$ holds."], "b"),
    ("First \\boxed{1}, no: \\boxed{\\text{B}} it is", ["First \\boxed{1}, no: \\boxed{\\text{B}} it is"], "\\text{B}"),
    ("145°", [], "145°"),
    ("No.", [], "No"),
    ("因为 AB=2。\n所以是 3。\n答案是：3。", ["因为 AB=2。", "所以是 3。"], "3"),
    ("We get\n\n\\[\nx = 1\n\n+ 2\n\\]\n\nas was said.\n\nAnswer: 3", ["We get\n\\[\nx = 1\n+ 2\n\\]",
     "as was said."], "3"),
    ("<step>a</step>\n<step>b</step>\n<answer> 4 </answer>", ["a", "b"], "4"),
    ("Text with <answer> in it.\r\n\r\nAnswer: 7", ["Text with  in it."], "7"),
    ("†Answer: 12 cm", [], "12 cm"),
]  # fmt: skip


@pytest.mark.parametrize("solution, steps, answer", SOLUTIONS)
def test_known_solutions(solution, steps, answer):
    response = restructure(solution)
    segments = split_segments(response)
    assert "".join(segments) == response
    assert [step_text(segment) for segment in segments[:-1]] == steps and final_answer(segments) == answer


def test_nothing_is_lost_but_what_says_only_the_answer():
    for solution, steps, answer in SOLUTIONS:
        said = re.sub(r"</?(step|answer)>|\s", "", solution)
        kept = re.sub(r"\s", "", "".join(steps))
        assert kept == said[: len(kept)] and len(said) - len(kept) <= 18 + len(answer)


@pytest.mark.parametrize(
    "solution",
    [
        "",
        "  \n",
        "I wonder, and wonder.\nStill no idea.",
        "word " * 13,
        "\\boxed{",
        "Answer:",
        "The answer is.",
        "####",
    ],
)
def test_no_answer_is_reported(solution):
    assert restructure(solution) is None


@pytest.mark.parametrize("answer", [None, "3</ans</step>wer>", "<ans<answer>wer>3"])
def test_tags_inside_of_tags_give_none(answer):
    response = restructure("One </st</step>ep> two <answ<step>er> three.\n\nSo.\n\nAnswer: 3", answer)
    assert "".join(split_segments(response)) == response and len(split_segments(response)) == 3


def test_the_data_set_may_say_the_answer():
    assert restructure("So x = 2.\n\nIt fits.", "B") == "<step>So x = 2.</step><step>It fits.</step><answer>B</answer>"


def test_long_paragraphs_are_cut_into_sentences_and_formulas_are_not():
    sentence = "This is a sentence of some length, with 3.5 and e.g. more in it. "
    assert len(split_steps(sentence * 8)) == 8
    assert split_steps("$$a\n\n= b$$\n\ntext") == ["$$a\n= b$$", "text"]
    assert split_steps("\\begin{align}\na\n\nb\n\\end{align}\n\ntext") == ["\\begin{align}\na\nb\n\\end{align}", "text"]


@pytest.mark.parametrize(
    "text", ["\\boxed{" * 15_000, "answer " * 15_000, "\n \n" * 30_000, "answer" + " " * 90_000, "step 1\n" * 12_000,
             "<step>" * 16_000, "$" * 100_000, "{" * 100_000, "\\[" * 50_000],
)  # fmt: skip
def test_hostile_text_takes_no_time(text):
    start = time.process_time()
    restructure(text)
    extract.answer(text)
    assert time.process_time() - start < 3
