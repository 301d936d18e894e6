"""Is a final answer right? Exact for numbers, normalised text otherwise. Nothing in an answer is ever evaluated."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

_NUMBER = re.compile(r"[+-]?\d{1,40}(\.\d{1,40})?(/\d{1,40})?")


def _normalise(text: str) -> str:
    text = unicodedata.normalize("NFKC", text[:1000]).replace("−", "-").strip().strip("$").rstrip(".")
    return re.sub(r"\s+", " ", text).strip().casefold()


def _number(text: str) -> Fraction | None:
    compact = text.replace(" ", "")
    if not _NUMBER.fullmatch(compact):
        return None
    top, _, bottom = compact.partition("/")
    return None if bottom and int(bottom) == 0 else Fraction(top) / (int(bottom) if bottom else 1)


def is_correct(answer: str | None, gold: str) -> bool:
    """Whether a predicted answer equals the gold answer; None (no answer found) is wrong."""
    if answer is None:
        return False
    answer, gold = _normalise(answer), _normalise(gold)
    a, b = _number(answer), _number(gold)
    return a == b if a is not None and b is not None else answer == gold
