"""Splitting text outside of its brackets."""

from __future__ import annotations

import functools
import re

_OPEN, _CLOSE = "([{⦃", ")]}⦄"


@functools.lru_cache(maxsize=64)
def _scanner(sign: str) -> re.Pattern[str]:
    return re.compile(rf"(?P<bracket>[(\[{{⦃)\]}}⦄])|(?P<sign>{sign})")


def split(text: str, sign: str) -> list[str]:
    """The stripped pieces between matches of the pattern ``sign`` that are in no brackets."""
    return split_with_signs(text, sign)[0]


def split_with_signs(text: str, sign: str) -> tuple[list[str], list[str]]:
    """The pieces of ``split``, and the matches between them."""
    pieces: list[str] = []
    signs: list[str] = []
    start = depth = 0
    for match in _scanner(sign).finditer(text):
        if match["bracket"]:
            depth = depth + 1 if match[0] in _OPEN else max(0, depth - 1)
        elif depth == 0:
            pieces.append(text[start : match.start()].strip())
            signs.append(match[0])
            start = match.end()
    pieces.append(text[start:].strip())
    return pieces, signs


def is_bracketed(text: str) -> bool:
    """Whether the bracket that opens a text is closed at its end, by whatever kind of bracket."""
    if len(text) < 2 or text[0] not in _OPEN or text[-1] not in _CLOSE:
        return False
    depth = 0
    for i, character in enumerate(text):
        depth += (character in _OPEN) - (character in _CLOSE)
        if depth == 0:
            return i == len(text) - 1
    return False
