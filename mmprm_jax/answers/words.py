"""Answers in words: one spelling for those that say the same."""

from __future__ import annotations

import re


def letters(a: str, b: str) -> bool:
    """Whether two texts differ in case alone, where that means nothing: AB is no ab."""
    same = a.casefold() == b.casefold()
    return same and (a.isupper() == b.isupper() or len(a) > 3 or a.casefold() in ("no", "yes"))


def turned(text: str) -> list[str]:
    """AB ∥ CD is CD ∥ AB, and BA ∥ CD."""
    sides = re.split("[∥⊥≅~]", text)
    if len(sides) != 2:
        return [text]
    segments = ["".join(sorted(side)) if len(side.strip()) == 2 else side.strip() for side in sides]
    return [re.sub("[^∥⊥≅~]", "", text), *sorted(segments)]


_SYNONYMS = {"是": "yes", "否": "no", "对": "true", "错": "false", "正确": "true", "错误": "false", "correct": "true",
             "incorrect": "false", "wrong": "false", "right": "true", "√": "true", "不是": "no"}  # fmt: skip


def plain(text: str) -> str:
    """Without case, articles, hyphens and punctuation between words."""
    text = re.sub(r"^(?:a|an|the)\s+", "", re.sub(r"[\s\"]+|(?<=[a-z])-(?=[a-z])", " ", text.casefold()).strip())
    text = re.sub(r"\s*([^\w\s])\s*", r"\1", text)
    if re.fullmatch(r"[a-z ,]+", text):
        text = " ".join(text.replace(",", " ").split())
    return _SYNONYMS.get(text, text)
