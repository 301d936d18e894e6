"""OlympiadBench's official scoring (``auto_scoring_judge.py``), without evaluating anything.

Where it asks sympy whether two expressions with unknowns are equal, both are computed at fixed points here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mmprm_jax.answers import official_latex as latex
from mmprm_jax.answers.verdict import Verdict, equal, unequal, unknown

PRECISION = 1e-8  # where the row gives none
MAX_PARTS = 50
_DECORATION = "\n$,.:;^_=+`!@#%&*~，。 "
_TINY = 1e-20  # at 60 digits, equal values differ by less
_REPLACED = {
    "\\left": "", "\\right": "", "∶": ":", "，": ",", "$": "", "\\approx": "=", "\\simeq": "=", "\\sim": "=",
    "^\\prime": "'", "^{\\prime}": "'", "^\\circ": "", "^{\\circ}": "", "%": "",
}  # fmt: skip


def olympiadbench(row: Mapping[str, Any]) -> Verdict:
    """Lists without order, ± expanded, tolerance ``error`` x 1.01, hundredfold and hundredth numbers accepted too."""
    response = "" if row.get("prediction") is None else str(row["prediction"])[-100_000:]
    if not response.strip():
        return unequal("no answer")
    finals = re.findall("(?:So the final answer is |所以最终答案是)(.*)", response)
    gold, said = str(row["gold"]), finals[-1].strip() if finals else response
    try:
        expected, found = _clean(gold), _clean(said)
    except ValueError as error:
        return unequal(str(error))
    if expected == found:
        return equal("the same text")
    golds, answers = _parts(expected), _parts(found)
    if len(golds) != len(answers):
        return unequal(f"{len(answers)} answers, {len(golds)} expected")
    if len(golds) > MAX_PARTS:
        return unknown(f"more than {MAX_PARTS} answers")
    try:
        return _matched(golds, answers, _precisions(row.get("error"), len(golds)))
    except latex.TooBig as error:
        return unknown(f"not computed: {error}")


def _precisions(error: Any, count: int) -> list[float]:
    given = error if isinstance(error, list | tuple) else [] if error in (None, "") else str(error).split(",")
    try:
        found = [float(part) if str(part).strip() else PRECISION for part in given]
    except (ValueError, TypeError):
        found = []
    return (found * count if len(found) == 1 else [*found, *[PRECISION] * count])[:count]


def _matched(golds: list[str], answers: list[str], precisions: list[float]) -> Verdict:
    left = list(answers)
    for gold, precision in zip(golds, precisions, strict=True):
        hit = next((i for i, answer in enumerate(left) if _equal(gold, answer, precision)), None)
        if hit is None:
            return unequal(f"nothing equals {gold!r:.60}")
        del left[hit]
    return equal(f"{len(golds)} of {len(golds)} parts agree")


def _boxes(text: str) -> list[str]:
    """What is in each box. Raises ValueError when braces do not close."""
    found, at = [], 0
    while (start := text.find("\\boxed{", at)) >= 0:
        depth, at = 1, start + len("\\boxed{")
        begin = at
        while depth and at < len(text):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        if depth:
            raise ValueError("a box that is not closed")
        found.append(text[begin : at - 1])
    return found


def _clean(text: str) -> str:
    """The official preprocessing: boxes, else the formulas of the last line, else everything; without decoration."""
    found = _boxes(text)
    if not found:
        found = re.findall(r"\$(.*?)\$", text.strip().split("\n")[-1])
    text = ",".join(found) if found else text
    if "\\in " in text:
        text = text.split("\\in ")[1]
    for old, new in _REPLACED.items():
        text = text.replace(old, new)
    text = text.strip(_DECORATION)
    return re.sub(r"\\(?:mathrm|mathbf)\{~?([^}]*)\}", r"\1", text)


def _parts(text: str) -> list[str]:
    """The members of a list; ± makes two."""
    text = re.sub(r"[\u4e00-\u9fff]+", "", text)
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(char, 0)
        if char == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    parts.append(text[start:].strip())
    return [p.replace("\\pm", sign) for p in parts if p for sign in ("+-" if "\\pm" in p else "+")]


def _equal(gold: str, answer: str, precision: float) -> bool:
    if gold == answer:
        return True
    if _is_interval(gold) and _is_interval(answer):
        return _intervals(gold, answer, precision)
    try:
        reference, number = float(gold), float(answer)
    except ValueError:
        pass
    else:
        if any(abs(form - number) <= precision * 1.01 for form in (reference / 100, reference, reference * 100)):
            return True
    if not ("=" in gold and "=" in answer):
        return _expressions(gold, answer, precision)
    return _equations(gold, answer)


def _is_interval(text: str) -> bool:
    return text.startswith(("(", "[")) and text.endswith((")", "]"))


def _intervals(gold: str, answer: str, precision: float) -> bool:
    golds, answers = gold.split("\\cup"), answer.split("\\cup")
    return len(golds) == len(answers) and all(_interval(a, b, precision) for a, b in zip(golds, answers, strict=True))


def _interval(gold: str, answer: str, precision: float) -> bool:
    if not gold or not answer or (gold[0], gold[-1]) != (answer[0], answer[-1]):
        return False
    ends, others = gold.strip("[]()").split(","), answer.strip("[]()").split(",")
    return len(ends) == len(others) and all(_end(a, b, precision) for a, b in zip(ends, others, strict=True))


def _end(gold: str, answer: str, precision: float) -> bool:
    a, b = (re.sub(r"\s|\+(?=\\infty)", "", text) for text in (gold, answer))
    return a == b or ("infty" not in a + b and _expressions(gold, answer, precision))


def _right_side(text: str) -> str:
    return text.split("=")[1].strip() if "=" in text else text.strip()


def _expressions(gold: str, answer: str, precision: float) -> bool:
    """Numbers within the tolerance; expressions with unknowns equal everywhere, or a constant below 0.001 apart."""
    try:
        a, b = latex.parse(_right_side(gold)), latex.parse(_right_side(answer))
        names = latex.symbols(a) | latex.symbols(b)
        if not names:
            return abs(latex.value(a) - latex.value(b)) <= precision * 1.01
    except latex.NotMaths:
        return False
    if not (latex.symbols(a) and latex.symbols(b)):
        return False
    apart = [(x - y, max(1, abs(x))) for x, y in _values(a, b, names)]
    if not apart:
        return False
    first = apart[0][0]
    return abs(first) < 1e-3 and all(abs(difference - first) <= _TINY * scale for difference, scale in apart)


def _values(a: latex.Node, b: latex.Node, names: set[str]) -> list[tuple[Any, Any]]:
    """The values of two trees at the points where both have one."""
    found = []
    for at in latex.probes(names):
        try:
            found.append((latex.value(a, at), latex.value(b, at)))
        except latex.NotMaths:
            continue
    return found


def _equations(gold: str, answer: str) -> bool:
    """One equation is a whole multiple of the other: the quotient of their differences of sides is constant."""
    try:
        trees = []
        for text in (gold, answer):
            left, right = (latex.parse(side) for side in text.split("="))
            trees.append(("-", left, right))
    except ValueError:  # not two sides, or not maths
        return False
    names = latex.symbols(trees[0]) | latex.symbols(trees[1])
    pairs = [(x, y) for x, y in _values(trees[0], trees[1], names) if abs(x) > _TINY and abs(y) > _TINY]
    if not pairs:
        return False
    return any(_whole([x / y for x, y in some]) for some in (pairs, [(y, x) for x, y in pairs]))


def _whole(quotients: list[Any]) -> bool:
    first = quotients[0]
    near = int(round(float(first.real)))
    return near != 0 and all(abs(q - near) <= _TINY * max(1, abs(near)) for q in quotients)
