"""Numbers in words, English and Chinese, as digits."""

from __future__ import annotations

import re

_UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
_UNITS += "seventeen eighteen nineteen".split()
_TENS = dict(zip("twenty thirty forty fifty sixty seventy eighty ninety".split(), range(20, 100, 10), strict=True))
_ENGLISH = {word: i for i, word in enumerate(_UNITS)} | _TENS
_ENGLISH |= {
    f"{ten}{sign}{one}": n + i for ten, n in _TENS.items() for i, one in enumerate(_UNITS[1:10], 1) for sign in "- "
}
_DIGITS = {c: i for i, c in enumerate("零一二三四五六七八九")} | {"两": 2, "〇": 0}
_PLACES = {"十": 10, "百": 100, "千": 1000}
_CHINESE = "[零〇一二两三四五六七八九十百千]{1,7}"
_LEADING = re.compile(rf"({_CHINESE})(?=[^\s零〇一二两三四五六七八九十百千])(.{{1,8}})")
_WORDS = re.compile(r"([A-Za-z]{3,9}(?:[ -](?:one|two|three|four|five|six|seven|eight|nine))?) ([a-z/ ]{1,24})")
_PARTS = re.compile(rf"({_CHINESE})分之({_CHINESE})")


_ORDINALS = "half third quarter fifth sixth seventh eighth ninth tenth".split()
_BELOW = {word: i for i, word in enumerate(_ORDINALS, 2)} | {"fourth": 4, "halve": 2}
_FRACTION = re.compile(rf"(?:(an?|[a-z]+)[ -])?({'|'.join(_BELOW)})(s?)")


def number(text: str) -> str | None:
    """twenty-five, 二十五, 五分之三, two thirds as 25, 25, (3/5), (2/3); None: no number in words."""
    if (english := _ENGLISH.get(text.casefold())) is not None:
        return str(english)
    if (below := re.match("(?:minus|negative) ", text)) and (found := number(text[below.end() :])):
        return f"-{found}"
    if (part := _FRACTION.fullmatch(text.casefold())) and (part[1] or part[2] == "half"):
        top = 1 if part[1] in (None, "a", "an") else _ENGLISH.get(part[1])
        return f"({top}/{_BELOW[part[2]]})" if top and (top > 1) == bool(part[3]) else None
    if re.fullmatch(_CHINESE, text):
        written = _chinese(text)
        return None if written is None else str(written)
    if parts := _PARTS.fullmatch(text):
        bottom, top = 100 if parts[1] == "百" else _chinese(parts[1]), _chinese(parts[2])
        return f"({top}/{bottom})" if top is not None and bottom else None
    return None


def leading_number(text: str) -> tuple[str, str] | None:
    """三十厘米 and thirty cm as (30, 厘米), (30, cm); None: it does not begin with a number in words."""
    if english := _WORDS.fullmatch(text):
        count = _ENGLISH.get(english[1].casefold())
        return None if count is None else (str(count), english[2])
    match = _LEADING.fullmatch(text)
    if match is None:
        return None
    found = _chinese(match[1])
    return None if found is None else (str(found), match[2])


def _chinese(text: str) -> int | None:
    """Up to 9999; None: not how a number is written."""
    total, digit, last = 0, None, 10_000
    for character in text:
        if character in _PLACES:
            place = _PLACES[character]
            if place >= last or digit == 0 or digit is None and (place != 10 or total):
                return None
            total, digit, last = total + (1 if digit is None else digit) * place, None, place
        elif digit:
            return None
        else:
            digit = _DIGITS[character]
    return total + (digit or 0)
