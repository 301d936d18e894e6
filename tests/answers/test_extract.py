"""The final answer of a free-form response, and what only the worker processes find out."""

import pytest

from mmprm_jax.answers.extract import answer, committed, concluded
from mmprm_jax.answers.heavy import decide


@pytest.mark.parametrize(
    "response, text, how",
    [
        ("<step>1+1=2</step><answer>2</answer>", "2", "tag"),
        ("<answer>1</answer> no, <answer> 2 </answer>", "2", "tag"),
        ("<ANSWER>x=\\boxed{2}</ANSWER>", "2", "box"),
        ("so $\\boxed{\\frac{1}{\\sqrt{2}}}$.", "\\frac{1}{\\sqrt{2}}", "box"),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}", "box"),
        ("\\boxed 7.", "7", "box"),
        ("\\fbox{A}", "A", "box"),
        ("I think.\nAnswer: The final answer is 12.\nDone", "12", "phrase"),
        ("Therefore, the answer is $3.5$. I checked it.", "$3.5$", "phrase"),
        ("The answer is 3. No: the correct answer is 4.", "4", "phrase"),
        ("**Final Answer:** 5 cm", "5 cm", "phrase"),
        ("### Answer\n\n42", "42", "phrase"),
        ("因此，答案是 12。", "12", "phrase"),
        ("最终答案：$x>2$", "$x>2$", "phrase"),
        ("综上，故选 B。", "B", "phrase"),
    ],
)
def test_the_last_committed_answer(response, text, how):
    found = committed(response)
    assert (found.text, found.how) == (text, how)


@pytest.mark.parametrize(
    "response, text",
    [
        ("Therefore, the answer is $3.5$. I checked it.", "3.5"),
        ("So x is found. Answer: **12 cm**.", "12 cm"),
        ("We add.\n#### 2", "2"),
        ("our answer should be B.", "B"),
        ("#### Check\nIt is 3.\n#### End\nAll of it is\nright.", None),
        ("145°.", "145°"),
        ("and so on...", "and so on..."),
        ("word " * 13, None),
        ("Add them.\nThe sum is 18.", None),
        ("\\boxed{5", None),
        ("<answer> </answer>", None),
        ("<answer>It is:\n3</answer>", "It is:\n3"),
    ],
)
def test_an_answer_without_its_typesetting(response, text):
    assert answer(response) == text


def test_different_boxes_are_told():
    assert committed("\\boxed{1} \\boxed{2} \\boxed{1} \\boxed{3}").earlier == ("1", "2")
    assert committed("\\boxed{3} and so \\boxed{3}").earlier == ()


def test_nothing_is_committed():
    assert committed("") is None and answer("") is None and answer(" \n ") is None
    assert concluded("we add them") is None
    assert concluded("Hence, the value is -1") == "-1"


@pytest.mark.parametrize(
    "gold, prediction",
    [
        ("0", "\\sin\\pi"),
        ("(-1)^n", "\\cos(n\\pi)"),
        ("55", "\\sum_{k=1}^{10} k"),
        ("\\lim_{x\\to 0}\\frac{\\sin x}{x}", "1"),
        ("\\frac{1}{3}", "\\int_0^1 x^2 dx"),
        ("3", "\\lfloor 3.7 \\rfloor"),
    ],
)
def test_equal_by_sympy_or_math_verify(gold, prediction):
    assert decide(gold, prediction)


@pytest.mark.parametrize(
    "gold, prediction",
    [
        ("0", "\\cos\\pi"),
        ("55", "\\sum_{k=1}^{9} k"),
        ("4", "\\lfloor 3.7 \\rfloor"),
        ("5\\text{ cm}", "5\\text{ m}"),  # what follows are false positives of Math-Verify 0.9
        ("x=3", "y=3"),
        ("\\frac{1}{2004!}", "\\frac{1}{2006!}"),
        ("4", "4\\sqrt(2)"),
        ("3x-1y+13=0", "3x+4y+14=0"),
        ("3 cm", "3 cm^2"),
    ],
)
def test_not_equal_by_sympy_or_math_verify(gold, prediction):
    assert not decide(gold, prediction)
