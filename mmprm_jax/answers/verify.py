"""Is a final answer right? Exact for numbers, normalised text otherwise. Nothing in an answer is ever evaluated."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

_NUMBER = re.compile(r"[+-]?\d{1,40}(\.\d{1,40})?(/\d{1,40})?")

_POWERS = {ord(c): f"^{i}" for i, c in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}  # NFKC would make 22 of 2²
MAX_LENGTH = 10_000


def _normalise(text: str) -> str:
    text = unicodedata.normalize("NFKC", text.translate(_POWERS)).replace("−", "-").strip().strip("$").rstrip(".")
    return re.sub(r"\s+", " ", text).strip().casefold()


def _number(text: str) -> Fraction | None:
    compact = re.sub(r"(?<=[+/-]) | (?=/)", "", text)
    if not _NUMBER.fullmatch(compact):
        return None
    top, _, bottom = compact.partition("/")
    return None if bottom and int(bottom) == 0 else Fraction(top) / (int(bottom) if bottom else 1)


def is_correct(answer: str | None, gold: str) -> bool:
    """Whether a predicted answer equals the gold answer; None (no answer found) and endless text are wrong."""
    if answer is None or max(len(answer), len(gold)) > MAX_LENGTH:
        return False
    answer, gold = _normalise(answer), _normalise(gold)
    a, b = _number(answer), _number(gold)
    return a == b if a is not None and b is not None else answer == gold
