"""Whole answers that are a set phrase: no solution, all real numbers, a date, a number in words."""

from __future__ import annotations

import re

from mmprm_jax.answers import dates, numerals, relations, trees, units
from mmprm_jax.answers.scalars import parse_formula, parse_number
from mmprm_jax.answers.values import Formula, Interval, Nothing, Quantity, Region, Value

_NOTHING = frozenset(
    ["∅", "⦃⦄", "⦃ ⦄", "{}", "no solution", "no solutions", "no real solution", "no real solutions", "none",
     "empty set", "no answer", "there is no solution", "there are no solutions", "no such number exists",
     "does not exist", "dne", "the empty set", "no real roots", "no real root", "无解", "无实数解", "无实数根", "空集",
     "不存在", "无实根", "没有实数根"]
)  # fmt: skip
_HAS_NONE = re.compile(
    r"null set|(?:there (?:is|are) )?no (?:real |such |integer |positive ){0,3}(?:solutions?|roots?|numbers?|values?)"
    r"(?: exists?)?"
    r"|(?:the )?(?:equation|system|inequality)s? (?:has|have) no (?:real )?(?:solutions?|roots?)"
    r"|(?:原|该|此)?(?:方程|不等式)组?无(?:实数)?[解根]|没有(?:实数)?[解根]"
)
_ALL = frozenset(
    ["all real numbers", "all reals", "any real number", "all real number", "全体实数", "一切实数", "任意实数", "x∈R",
     "x ∈ R", "the set of all real numbers", "every real number", "(-∞,∞)"]
)  # fmt: skip
_HALF_LINE = re.compile(r"(?:x ?∈ ?)?R ?[_^] ?\{?([+-])\}?( ?∪ ?⦃ ?0 ?⦄)?")  # R^+


def parse_phrase(text: str) -> Value | None:
    """The value of a set phrase, or None."""
    folded = text.casefold()
    if folded in _NOTHING or _HAS_NONE.fullmatch(folded):
        return Nothing()
    if text in _ALL or folded in _ALL:
        return Region((relations.EVERYTHING,), None)
    if half := _HALF_LINE.fullmatch(text):
        zero, closed = Formula(trees.ZERO), bool(half[2])
        ends = (zero, None, closed, False) if half[1] == "+" else (None, zero, False, closed)
        return Region((Interval(*ends),), None)
    if date := dates.date(text):
        return date
    if found := numerals.number(text):
        return parse_formula(found)
    counted = numerals.leading_number(text)
    if counted is None:
        return None
    unit = units.parse_unit(counted[1])
    return Quantity(parse_number(counted[0]), unit) if unit else None
