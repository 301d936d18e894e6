"""Verdicts on whole responses as models write them: what is the answer, and what only looks like it."""

# ruff: noqa: E501 (a pair in a line)

import random

from test_pairs import GOLDS, SAME, plain

from mmprm_jax.answers.equivalence import compare, make_settings

EQUAL = [
    # blocks of display mathematics, headings, several lines
    ("3", "### Final Answer\n\n$$\n3\n$$"),
    ("3", "The answer is\n\n$$\n3\n$$"),
    ("3", "**Final Answer**\n\n\\[\n3\n\\]\n"),
    ("x>2", "Final Answer:\n\n\\[ x > 2 \\]"),
    ("8\n4", "## Answer\n$$8$$\n$$4$$"),
    ("3", "The final answer is:\n$$\\begin{aligned} 3 \\end{aligned}$$"),
    ("3", "Final Answer\n\n3"),
    ("5", "We add them.\n\n**5**"),
    ("x=5", "It follows.\nTherefore, x = 5."),
    ("No", "So they are not the same.\n\n**No**"),
    ("8\n4", "We look at both of the figures.\n\n8\n4"),
    ("rectangle\nsquare", "The answer is rectangle\nsquare."),
    # Chinese phrases and options
    ("A", "【答案】A"),
    ("A", "【答案】 A\n【解析】因为…"),
    ("\\frac12", "答案为：$\\frac12$。其中…"),
    ("D", "故本题选D。"),
    ("D", "正确选项为D"),
    ("D", "因此，正确选项是D。"),
    ("B", "所以选项B正确。"),
    ("AC", "选项A、C正确"),
    ("B", "因此B选项正确"),
    ("C", "综上所述，选C。"),
    ("C", "所以应选：C"),
    ("C", "故选：C．"),
    ("12", "【参考答案】12"),
    ("B", "So option B is correct."),
    ("B", "Hence option (B) is the correct one."),
    ("5", "答案是5。因为2+3=5。"),
    ("D", "本题应选D"),
    ("B", "综上，故选：B"),
    ("D", "因此，面积为5，选项为（D）。"),
    ("B", "The answer is (B) B.\n\nWe check it.\n\nAnswer"),
    ("7", "结果是7。"),
    ("A", "A选项是正确的，其余都错"),
    # units without a space
    ("160", "160m"),
    ("30", "30s"),
    ("160 m", "160m"),
    ("2.5", "2.5g"),
    ("45", "45s"),
    ("12", "12L"),
    ("100", "100N"),
    # units in braces or of small things
    ("5", "5\\text{ Å}"),
    ("5 Å", "5\\text{ Å}"),
    ("0.5 nm", "5 Å"),
    ("45", "45{degrees}"),
    ("45°", "45{degrees}"),
    ("12", "12{squareinches}"),
    ("12 square inches", "12{squareinches}"),
    ("7", "7{cubic feet}"),
    # mark-up and special tokens of a server
    ("3", "<|begin_of_box|>3<|end_of_box|>"),
    ("3", "so <|begin_of_box|>\\boxed{3}<|end_of_box|><|im_end|>"),
    ("3", "The answer is 3<|im_end|>"),
    ("3", "\\boxed{3}</s>"),
    ("x=2", "<think>hm</think><|begin_of_box|>x = 2<|end_of_box|>"),
    # a last sentence
    ("10", "Let a be one age.\nWe subtract.\nThe age gap between these two people is 10 years."),
    ("12", "We add 5 and 7.\nThe sum is 12."),
    ("12 cm", "First we look at the figure. Then we measure.\nSo the side is 12 cm long."),
    ("40°", "Because of this ...\nThe measure of the angle is $40^\\circ$."),
    ("55", "We use the formula.\nHence the sum of the first ten terms is 55."),
    ("B", "A is too small.\nSo option B is correct."),
    # macros that swallow a letter
    ("x_1=1, x_2=3", "x_1=1,\\quadx_2=3"),
    ("2\\pi r", "2\\pir"),
    ("3\\alpha x", "3\\alphax"),
    ("x\\le y", "x\\leqy"),
    ("a\\cdot b", "a\\cdotb"),
    # sums of tuples and matrices
    (
        "\\begin{pmatrix}1+3t\\\\2+4t\\end{pmatrix}",
        "\\begin{pmatrix}1\\\\2\\end{pmatrix}+t\\begin{pmatrix}3\\\\4\\end{pmatrix}",
    ),
    (
        "\\begin{pmatrix}1\\\\2\\end{pmatrix}+t\\begin{pmatrix}3\\\\4\\end{pmatrix}",
        "\\begin{pmatrix}1+3t\\\\2+4t\\end{pmatrix}",
    ),
    ("(1,2)+s(3,4)", "s(3,4)+(1,2)"),
    (
        "\\begin{pmatrix}a&b\\\\c&d\\end{pmatrix}-\\begin{pmatrix}1&0\\\\0&1\\end{pmatrix}",
        "\\begin{pmatrix}a-1&b\\\\c&d-1\\end{pmatrix}",
    ),
    ("(x,y)=(1,2)+t(3,4)", "(x,y)=(1+3t,2+4t)"),
    ("\\frac12\\begin{pmatrix}2a\\\\4\\end{pmatrix}", "(a,2)"),
    # absolute values between two bounds
    ("1<|x|<3", "-3<x<-1 \\text{ or } 1<x<3"),
    ("1\\le|x-2|<3", "(-1,1]\\cup[3,5)"),
    ("|x-2|<3", "-1<x<5"),
    ("|2x+1|\\ge 3", "x\\le -2 \\text{ or } x\\ge 1"),
    ("3>|x|>1", "1<|x|<3"),
    ("|a|<|b|<|c|", "|c|>|b|>|a|"),
    ("2<|x+1|", "(-\\infty,-3)\\cup(1,\\infty)"),
    ("0.5\\le|2x|<1", "(-0.5,-0.25]\\cup[0.25,0.5)"),
]

# Near misses: a wrong "equal" is the worst fault.
UNEQUAL = [
    # blocks of display mathematics, headings, several lines
    ("3", "### Final Answer\n\n$$\n4\n$$"),
    ("8", "## Answer\n$$8$$\n$$4$$"),
    ("4", "## Answer\n$$8$$\n$$4$$"),
    ("3", "The answer is not\n\n$$\n3\n$$"),
    ("3", "The answer is\n\n$$\n3x\n$$"),
    ("8", "Final answer:\n8\n4"),
    ("5", "We add them.\n\n**Step 5**"),
    ("4", "We see that x is at least\n\n4"),
    ("4", "We see that the total is not:\n\n**4**"),
    ("4", "This shows that x is less than\n\n$$\n4\n$$"),
    ("3", "The values of it are:\n1\n2\n3"),
    ("3", "The answer is 3\n5"),
    ("4", "It is 8 and 4:\n\n8\n4"),
    ("10", "We look at both of them here.\n(2) 5"),
    ("5", "We have x = 5 or so.\nBut that is too small."),
    # Chinese phrases and options
    ("B", "所以选项B不正确"),
    ("B", "选项B错误"),
    ("B", "故不选B"),
    ("B", "不应选B"),
    ("B", "若选B，则不成立"),
    ("B", "选项A正确，选项B正确"),
    ("A", "【答案】B"),
    ("B", "option B is not correct"),
    ("B", "B选项不正确"),
    ("AC", "选项A正确"),
    ("B", "选B的人有5个"),
    ("B", "答案不是B"),
    ("B", "The answer is not B"),
    ("\\frac12", "答案为：$\\frac13$。其中$\\frac12$…"),
    ("D", "如果选D则错"),
    ("A", "我们选择A点作为原点"),
    ("C", "选项A正确，选项B正确，选项D正确，选项C错误"),
    ("B", "so option B is incorrect"),
    # units without a space
    ("2", "2m"),
    ("160", "160x"),
    ("160", "160m^2 x"),
    ("160 m", "160s"),
    ("30", "30t"),
    ("5", "5a"),
    ("16", "160m"),
    # units in braces or of small things
    ("5 Å", "5 nm"),
    ("5", "50\\text{ Å}"),
    ("45", "45{degrees}x"),
    ("12 square inches", "12{cubicinches}"),
    ("12", "12{abc}"),
    # mark-up and special tokens of a server
    ("4", "<|begin_of_box|>3<|end_of_box|>"),
    ("4", "The answer is 3<|im_end|>4"),
    ("3", "<|begin_of_box|>3x<|end_of_box|>"),
    # a last sentence
    ("10", "The age gap between these two people is not 10 years."),
    ("10", "Let a be one age.\nWe subtract.\nThe age gap might be 10 years."),
    ("5", "We add 5 and 7.\nThe sum is 12."),
    ("10", "Let a be one age.\nIf the gap is 10 years, we get 20."),
    ("10", "We look at the ages.\nThe gap is 10 or 12 years."),
    ("5", "We see it in the figure.\nThe height is 5 and the width is 7."),
    ("5", "5 is what one may guess.\nThe sum is not 5."),
    ("6", "The area is 12.\nHowever, we need half of it."),
    ("3", "The answer is between 3 and 4."),
    # macros that swallow a letter
    ("x_1=1, x_2=3", "x_1=1,\\quadx_2=4"),
    ("2\\pi r", "2\\pi s"),
    ("2\\pi r", "2\\pis"),
    ("a\\sim b", "a\\simeqb"),
    # sums of tuples and matrices
    (
        "\\begin{pmatrix}1+3t\\\\2+4t\\end{pmatrix}",
        "\\begin{pmatrix}1\\\\2\\end{pmatrix}+t\\begin{pmatrix}3\\\\5\\end{pmatrix}",
    ),
    ("(4,6)", "(1,2)+(3,4)"),
    ("2", "\\max(1,2)"),
    ("(1,2)", "f(1,2)"),
    ("(1+3t,2+4t)", "(1,2)-t(3,4)"),
    ("(1+3t,2+4t)", "(1,2)+t(3,4,5)"),
    ("(1,2)", "t(1,2)"),
    # absolute values between two bounds
    ("1<|x|<3", "1<x<3"),
    ("1<|x|<3", "1\\le|x|<3"),
    ("|x-2|<3", "-5<x<1"),
    ("1<|x-2|<3", "(-1,5)"),
    ("|a|<|b|<|c|", "|a|<|c|<|b|"),
    ("|x|<-1", "x<1"),
    ("-1<|x|<3", "1<|x|<3"),
    ("|x|>2", "x>2"),
    ("1<|x|<3", "3<|x|<1"),
]


def test_what_a_response_says():
    assert [(pair, compare(*pair)) for pair in EQUAL if not compare(*pair)] == []


def test_what_a_response_does_not_say():
    assert [(pair, compare(*pair)) for pair in UNEQUAL if compare(*pair)] == []


def test_segments_among_the_options_are_no_letters():
    settings = make_settings(["\\overline{AB}", "\\overline{CD}", "\\overline{AC}", "\\overline{BD}"])
    equal = [("B", "\\overline{CD}"), ("\\overline{CD}", "B"), ("B", "\\overline{DC}"), ("B", "CD"), ("B", "segment CD"),
             ("\\overline{AC}", "\\overline{AC}"), ("\\overline{BD}", "D")]  # fmt: skip
    assert [pair for pair in equal if not compare(*pair, settings)] == []
    unequal = [("C", "\\overline{CD}"), ("D", "\\overline{CD}"), ("\\overline{AC}", "A, C"), ("B", "\\angle CD"),
               ("A", "\\overline{AC}"), ("AB", "A and B")]  # fmt: skip
    assert [pair for pair in unequal if compare(*pair, settings)] == []
    assert compare("CD", "C, D", make_settings(["1", "2", "3", "4"]))


WORK = "We look at the figure.\nStep 1: two of the lines are given.\n\n"


def bare(gold):
    return gold.replace("$", "")


FORMS = {
    "boxed": lambda gold: f"{WORK}Therefore we get $\\boxed{{{bare(gold)}}}$.",
    "display block": lambda gold: f"{WORK}### Final Answer\n\n$$\n{bare(gold)}\n$$\n",
    "the answer is": lambda gold: f"{WORK}The answer is {gold}.",
    "answer:": lambda gold: f"{WORK}Answer: {gold}",
    "【答案】": lambda gold: f"【答案】{gold}",
    "答案为": lambda gold: f"由题意可知。\n答案为：${bare(gold)}$。",
    "tag": lambda gold: f"<step>so</step>\n<answer>{gold}</answer>",
    "bold": lambda gold: f"{WORK}**{gold}**",
    "last line": lambda gold: f"{WORK}Final answer:\n{gold}",
    "therefore": lambda gold: f"{'故选' if gold in tuple('ABCD') else 'Therefore, '}{gold}.",
}


def test_golds_are_found_in_responses():
    rows = [(name, gold, form(gold)) for name, form in FORMS.items() for gold in GOLDS]
    assert [row for row in rows if not compare(*row[1:])] == []


def test_other_golds_are_not_found_in_responses():
    rnd, found = random.Random(2), []
    numbered = [gold for gold in GOLDS if gold.startswith("1. 2. ")]  # "The answer is 1. 2. When …": its first one
    for name, form in FORMS.items():
        for gold, other in (rnd.sample(GOLDS, 2) for _ in range(1000)):
            alike = plain(gold) == plain(other) or any({plain(gold), plain(other)} <= group for group in SAME)
            if not alike and other not in numbered and compare(gold, form(other)):
                found.append((name, gold, other))
    assert found == []
