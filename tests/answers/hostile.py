"""Texts that nobody means as answers: made from a seed, for the tests of what must not happen."""

# ruff: noqa: E501 (lists of texts)

import json
import random
from pathlib import Path

MILLION = 2**20
PIECES = [
    *"0123456789xyzabnkABCDEFRiπe+-*/^_!=<>≤≥≠±∪∩∈∞°%:,;.()[]{}⦃⦄|√∠△∅→'\"$&~#@\\ \n\t",
    *[f"\\{name}" for name in "frac sqrt left right text boxed overline sum int lim log sin cdot pm begin end dot".split()],
    "\\begin{pmatrix}", "\\end{pmatrix}", "\\begin{cases}", "\\\\", "\\{", "\\}", "\\(", "\\)", "\\[", "\\]", "$$", "^{", "_{",
    "<answer>", "</answer>", "\\boxed{", "**", "or", "and", " or ", "或", "无解", "厘米", "平方", "。", "，", "①", "½", "²", "⁻", "ﷺ",
    "999999999", "1e999", "10^", "9^{9^", "!", "!!", "1/0", "0/0", "cm", "km/h", "°C", "NaN", "inf", "\x00", "\ud800", "\uffff", "\u202e",
    "__import__('os').system('touch PWNED')", "eval(", "lambda:", "exec('1')", "(1).__class__", "{{", "}}", "%s", "../", "3:30", "A.", "(B)",
]  # fmt: skip
MONSTERS = [
    "9^{9^{9^9}}", "9^9^9^9^9", "10^{10^{10^{10}}}", "(((2^9999)^9999)^9999)", "9999999!", "(9999!)!", "5!!!!!!!!", "1000000!/999999!",
    "\\binom{1000000}{500000}", "\\sqrt[99999]{9^{99999}}", "2^{-99999999999}", "\\sin(10^{10^{10}})", "e^{e^{e^{e^e}}}", "0^{-1}",
    "(x+y+z+a+b+c)^{99}", "((x+1)^{50}+1)^{50}", "\\frac{1}{x-x}", "\\log_0 0", "\\log_1 5", "1/(1-1)", "i^{i^{i^i}}", "\\tan 90^\\circ",
    "__import__('os').system('touch PWNED')", "{}{}{}", "\\frac\\frac\\frac", "\\sqrt", "^", "_", "\\", "\\\\", "$", "=", "=====", "<" * 50,
    "1" * 999, "1" * 9999, "0." + "3" * 5000, "-" * 500, "+-" * 400, "(" * 39 + "1" + ")" * 39, "(" * 5000, "[" * 2000 + "]" * 2000,
    "\\frac{" * 400, "\\sqrt{" * 30 + "2" + "}" * 30, "x^" * 300 + "x", "1+" * 900 + "1", "1," * 4000, "1;" * 200 + "1", "A or " * 500,
    "\n" * 9000 + "1", "\\boxed{" * 1000, "<answer>" * 1000, "（" * 3000, "±" * 50 + "1", "±1" * 12, "\\pm" * 200 + "1", "°" * 500,
    "∪".join(["(1,2)"] * 500), "1<" * 300 + "2", "x=" * 300 + "1", "1:" * 400 + "1", "|" * 501, "√" * 900 + "2", "\\text{" * 800,
    "∞-∞", "∞^∞", "-∞!", "{x|" * 200, "\\begin{pmatrix}" * 100, "①" * 3000, "ﷺ" * 9000, "(1) " * 200, "(1)" + "a(2)" * 99, "1 " * 3000, "A " * 3000, "A\n" * 99 + "!", "(A) " * 99 + "!",
    "Therefore " * 1000 + "is 5", "the answer is " * 600, "\\overline{" * 200, "1.\\overline{" + "3" * 400 + "}", "5 cm" * 100, "5 m" + "/s" * 100,
    "\\sin" * 200 + "x", "sin cos tan " * 60, "x_" * 300, "x'" * 300 + "'" * 300, "\\left" * 500, "∠" * 100 + "ABC", "→" * 500, "0" * 900,
    "=" * 9900 + "(x>0)", "(" * 38 + "a" + "^3)" * 38 + "=0", "1,&" * 3300 + "\n2,&x>0", ",," * 4900 + "i.e. 5", "for all " * 1200 + "x",
    "\\{x\\in Z| 0<x<10^{10}\\}", "∩".join(["(1,2)"] * 1500), "∪".join(["{1}"] * 2000), "is " * 50 + "is 3", "at least " * 1000, "Yes, " + "not " * 2000,
    "point A" + ",A" * 4000, "a<b, " * 1900, "triangle ABC≅" * 700, "C_n^k" * 1900, "minus " * 1500 + "two", "(i)" * 3000 + "(ii)", "(-x)^{1/3}" * 300,
]  # fmt: skip
ENDLESS = ["{" * MILLION, "}" * MILLION, "{}" * (MILLION // 2), "(" * MILLION, "\\boxed{" * (MILLION // 7), "\\boxed{1}" * (MILLION // 9),
           "<answer>" * (MILLION // 8), "<answer>1</answer>" * 60_000, "9" * MILLION, "9^" * (MILLION // 2), "\x00" * MILLION, "\ud800" * 100_000,
           "the answer is " * 70_000, "therefore " * 100_000, "answer:\n" * 130_000, "$" * MILLION, " " * MILLION, "ﷺ" * 300_000,
           "\\" * MILLION, "\\frac{1}{" * 100_000, "1\n" * (MILLION // 2), "答案是" * 300_000, "\\boxed{" + "{" * MILLION, "故" * MILLION, "\n" * MILLION, "* " * (MILLION // 2), "answer" + " " * MILLION, "final answer is" + "\n" * MILLION,
           "\\boxed" + " " * MILLION]  # fmt: skip


def texts(count: int, seed: int = 0) -> list[str]:
    """That many texts: random pieces, real answers with a few pieces changed, and monsters inside and beside them."""
    rnd = random.Random(seed)
    pairs = (Path(__file__).parent / "more_pairs.jsonl").read_text(encoding="utf-8").splitlines()
    real = [json.loads(line)[key] for line in pairs for key in ("gold", "prediction")]
    found = MONSTERS[:count]
    while len(found) < count:
        kind = rnd.random()
        if kind < 0.4:
            text = "".join(rnd.choices(PIECES, k=rnd.choice([3, 8, 20, 60])))
        elif kind < 0.8:
            text = rnd.choice(real)
            for _ in range(rnd.randint(1, 4)):
                at = rnd.randint(0, len(text))
                text = text[:at] + rnd.choice(PIECES) + text[at + rnd.randint(0, 2) :]
        elif kind < 0.9:
            text = rnd.choice(["{}", "({})", "\\frac{{1}}{{{}}}", "x={}", "\\sqrt{{{}}}", "{}+1", "({},2)"]).format(
                rnd.choice(MONSTERS)
            )
        else:
            text = rnd.choice(PIECES) * rnd.choice([10, 300, 3000])
        found.append(text)
    return found
