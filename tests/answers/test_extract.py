"""The final answer of a free-form response, and functions that only numbers decide."""

from mmprm_jax.answers.equivalence import compare
from mmprm_jax.answers.extract import answer, conclusion, marked_answer

COMMITTED = [
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
]  # fmt: skip


def test_the_last_committed_answer():
    found = [(response, marked_answer(response)) for response, *_ in COMMITTED]
    assert [(response, answer.text, answer.how) for response, answer in found] == COMMITTED


BARE = [
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
]  # fmt: skip


def test_an_answer_without_its_typesetting():
    assert [(response, answer(response)) for response, _ in BARE] == BARE


def test_different_boxes_are_reported():
    assert marked_answer("\\boxed{1} \\boxed{2} \\boxed{1} \\boxed{3}").earlier == ("1", "2")
    assert marked_answer("\\boxed{3} and so \\boxed{3}").earlier == ()


def test_nothing_is_committed():
    assert marked_answer("") is None and answer("") is None and answer(" \n ") is None
    assert conclusion("we add them") is None
    assert conclusion("Hence, the value is -1") == "-1"


def test_functions_sums_and_roundings():
    same = [
        ("0", "\\sin\\pi"),
        ("(-1)^n", "\\cos(n\\pi)"),
        ("0", "\\sqrt{6}-\\sqrt{2}\\sqrt{3}"),
        ("55", "\\sum_{k=1}^{10} k"),
        ("0", "\\sum_{i=-2}^{2} i^3"),
        ("24", "\\prod_{i=1}^4 i"),
        ("xy=9", "y=\\frac{9}{x}"),
        ("x+\\frac{1}{x}=2", "x^2+1=2x"),
        ("x+x^2+x^3", "\\sum_{k=1}^{3} x^k"),
        ("3", "\\lfloor 3.7 \\rfloor"),
        ("-4", "\\lfloor -3.7 \\rfloor"),
        ("2", "\\lceil\\sqrt{3}\\rceil"),
        ("2", "\\lfloor \\log_{10} 100 \\rfloor"),
    ]
    assert [pair for pair in same if not compare(*pair)] == []
    different = [
        ("0", "\\cos\\pi"),
        ("0", "e^{-1000}"),
        ("(-1)^n", "\\cos(2n\\pi)"),
        ("55", "\\sum_{k=1}^{9} k"),
        ("4", "\\lfloor 3.7 \\rfloor"),
        ("\\lfloor x \\rfloor", "\\lfloor x+0.01 \\rfloor"),
        ("\\sum_{k=1}^{3} a_k", "6a"),
        ("\\sum_{k=1}^{9} a_{k+1}", "45a"),
        ("5\\text{ cm}", "5\\text{ m}"),  # what follows are false positives of well-known graders
        ("x=3", "y=3"),
        ("x=0", "y=0"),
        ("x^2=x", "x=1"),
        ("\\sqrt{2}=1.41", "\\sqrt{3}=1.73"),
        ("x+\\frac{1}{x}=1", "x^2+1=2x"),
        ("\\frac{1}{2004!}", "\\frac{1}{2006!}"),
        ("10^{100}x", "10^{100}x+1"),
        ("4", "4\\sqrt(2)"),
        ("3x-1y+13=0", "3x+4y+14=0"),
        ("3 cm", "3 cm^2"),
    ]
    assert [pair for pair in different if compare(*pair)] == []
    for undecided in ("\\lim_{x\\to 0}\\frac{\\sin x}{x}", "\\int_0^1 2x dx"):  # no rule here
        assert compare("1", undecided).kind == "unknown"
