"""How an answer falls into parts, and what stands before it."""

from __future__ import annotations

import re
from typing import Literal

from mmprm_jax.answers.normalise import trim
from mmprm_jax.answers.scalars import NUMBER, parse_number
from mmprm_jax.answers.split import split
from mmprm_jax.answers.values import Formula

MAX_ITEMS = 50
_LEAD = re.compile(
    r"(?:(?:so|thus|hence|therefore),? )?(?:the )?(?:final |correct )?(?:answers?|result|value)(?: is| are| =|:)+:?\s*"
    r"|answer\s*[:.]\s*|answer\s+(?=[-+\d\\(])|答案\s*[是为:]*\s*|答\s*:\s*|(?:it|this) (?:is|equals) |≈|approximately "
    r"|approx\.? |about "
    r"|the (?:point|vector|set|interval|ordered pair) (?=[(\[⦃])"
    r"|in (?=\d{4}$)|(?:点|向量|区间|集合) ?(?=[(\[⦃])|约为?|大约|解得\s*|即\s*|共|there (?:is|are) |a total of ",
    re.IGNORECASE,
)
_SPACED = re.compile(r"-?[1-9]\d{0,2}(?: \d{3})+")
_DECIMAL_COMMA = re.compile(r"-?(?:0|[1-9]\d*),\d+")


def one_number(text: str) -> Formula | None:
    """Numbers that another country writes as one: 0,5 and 10 500."""
    if _SPACED.fullmatch(text):
        return parse_number(text.replace(" ", ""))
    return parse_number(text.replace(",", ".")) if _DECIMAL_COMMA.fullmatch(text) else None


def strip_lead_in(text: str) -> str:
    """Without "the answer is" and the like before an answer."""
    for _ in range(3):
        match = _LEAD.match(text)
        if not match or match.end() == len(text):
            break
        text = trim(text[match.end() :])
    return text


def split_parts(text: str) -> tuple[list[str], Literal["parts", "maybe", "list", "or", "and", ""]]:
    """The parts of an answer and what joins them."""
    if re.fullmatch(r"\d(?:\.\d){2,}", text):
        return text.split("."), "list"  # 1.3.4: the numbers of statements
    if re.fullmatch(r"(?:\(\d{1,2}\)\s*(?:(?:,|and|和)\s*)?){2,}", text):
        return re.findall(r"\d+", text), "list"  # (1)(3)
    numbered = numbered_parts(text)
    if numbered:
        return numbered, "parts"
    rules: tuple[tuple[str, Literal["parts", "maybe", "list", "or", "and"]], ...] = (
        ("\n", "parts"), (";", "maybe"), ("→", "parts"), (" or |或", "or"), (",? and |和|且|与", "and"), (",", "list"),
    )  # fmt: skip
    for sign, kind in rules:
        if sign == "→" and not re.search(r"\)\s*→", text):
            continue
        parts = [trim(part) for part in split(text, sign)] if re.search(sign, text) else []
        if len(parts) > 1 and all(parts):
            return [re.sub("^(?:or|and) ", "", part) for part in parts], kind
    pieces = text.split(" ")
    if len(pieces) > 1 and all(NUMBER.fullmatch(piece) for piece in pieces):
        return pieces, "parts"  # 16 12.5
    return [], ""


_ROMAN = "i ii iii iv v vi".split()
_MARKS = ([str(n) for n in range(1, MAX_ITEMS)], _ROMAN, [mark.upper() for mark in _ROMAN], list("abcdef"))


def numbered_parts(text: str) -> list[str]:
    """(1) … (2) …, (i) … (ii) …, (a) … (b) …: what follows each number."""
    marks = next((marks for marks in _MARKS if text.startswith(f"({marks[0]})")), None)
    if not marks:
        return []
    parts, i = [], len(marks[0]) + 2
    for mark in marks[1:]:
        end = text.find(f"({mark})", i)
        if end < 0:
            break
        parts.append(trim(text[i:end]))
        i = end + len(f"({mark})")
    parts.append(trim(text[i:]))
    return parts if len(parts) > 1 and all(parts) else []
