"""Answers in words: one spelling for those that say the same."""

from __future__ import annotations

import re

_NOT_NAMES = frozenset("no yes sas asa aas sss".split())  # that are as good in capital letters


def equal_but_for_case(a: str, b: str) -> bool:
    """Whether two texts differ in case alone, where that means nothing: AB is no ab."""
    same = a.casefold() == b.casefold()
    return same and (a.isupper() == b.isupper() or len(a) > 3 or a.casefold() in _NOT_NAMES)


_FIGURES = re.compile(r"(?:△|triangle |rt△)([a-z]'*)([a-z]'*)([a-z]'*)")


def symmetric_forms(text: str) -> list[str]:
    """AB ∥ CD is CD ∥ AB, and BA ∥ CD; △ABC ≅ △DEF is △BCA ≅ △EFD: what corresponds stays together."""
    sides = re.split("[∥⊥≅~]", text)
    figures = [_FIGURES.fullmatch(side.strip()) for side in sides]
    corners = [list(figure.groups()) for figure in figures if figure]
    if len(corners) == len(sides) <= 2:
        swapped = [sorted(zip(*order, strict=True)) for order in (corners, corners[::-1])]
        return [re.sub("[^∥⊥≅~]", "", text), *map(str, min(swapped))]
    if len(sides) != 2:
        return [text]
    segments = ["".join(sorted(side)) if len(side.strip()) == 2 else side.strip() for side in sides]
    return [re.sub("[^∥⊥≅~]", "", text), *sorted(segments)]


_SYNONYMS = {"是": "yes", "否": "no", "对": "true", "错": "false", "正确": "true", "错误": "false", "correct": "true",
             "incorrect": "false", "wrong": "false", "right": "true", "√": "true", "不是": "no", "not true": "false",
             "not false": "true", "not correct": "false", "大于": ">", "小于": "<", "等于": "=",
             "greater than": ">", "less than": "<", "equal to": "=", "equal": "="}  # fmt: skip


def plain(text: str) -> str:
    """Without case, articles, hyphens and punctuation between words."""
    text = re.sub(r"^(?:a|an|the)\s+", "", re.sub(r"[\s\"]+|(?<=[a-z])-(?=[a-z])", " ", text.casefold()).strip())
    text = re.sub(r"\s*([^\w\s])\s*", r"\1", text)
    if re.fullmatch(r"[a-z ,]+", text):
        text = " ".join(text.replace(",", " ").split())
    text = re.sub(r"^(?:(?:the |this )?(?:statement|claim|proposition|conclusion)|it|that) is (?=\w)", "", text)
    return _SYNONYMS.get(text, text)


_PLACED = re.compile(r"(?:on|at|in) (?=\w)")


def equal_but_for_preposition(a: str, b: str) -> bool:
    """Whether two plain texts differ in a preposition that only one of them begins with: on Tuesday."""
    return bool(_PLACED.match(a)) != bool(_PLACED.match(b)) and _PLACED.sub("", a, 1) == _PLACED.sub("", b, 1)


_SENTENCE = re.compile(r"[a-z△∠ ]{1,60}")


def states_answer(gold: str, prediction: str) -> bool:
    """Whether a plain prediction is a sentence that says of something that it is the gold answer, a word or more."""
    if not re.fullmatch("[a-z][a-z ]{2,}", gold) or len(gold.split()) > 3:
        return False
    subject, is_, rest = prediction.partition(" is ")
    rest = re.sub(r"^(?:an?|the) ", "", rest)
    return bool(is_ and rest == gold and _SENTENCE.fullmatch(subject)) and not (
        _DENIES.search(prediction) or _LIMITS.search(prediction)
    )


_YES = frozenset(("yes", "true", "correct"))
_ANSWERED = re.compile(
    r"(yes|no|true|false|correct|incorrect)(?:\s*[,.;:-]\s*|\s+(?=because|since|as\b))(.+)", re.S | re.I
)
_DENIES = re.compile(r"\b(?:not?|never|cannot|neither|nor|false|incorrect|wrong|without|fails?)\b|n't\b", re.I)
_LIMITS = re.compile(r"\b(?:but|however|unless|if|when|except|only|yes|sometimes|although|depends|or|maybe)\b", re.I)


def agrees_as_yes_or_no(gold: str, prediction: str) -> bool | None:
    """Whether "Yes, because …" says what the gold answer "Yes" says; None: it is another kind of answer, or hedged."""
    match, word = _ANSWERED.fullmatch(prediction.strip()), plain(gold)
    if not match or word not in ("yes", "no", "true", "false"):
        return None
    said = match[1].casefold() in _YES
    if _LIMITS.search(match[2]) or said and _DENIES.search(match[2]):
        return None
    if (word in ("yes", "no")) != (match[1].casefold() in ("yes", "no")):
        return None
    return said == (word in _YES)


_INEQUALITIES = tuple(
    (re.compile(pattern, re.I), sign)
    for pattern, sign in (
        (r"at least|no(?:t)? (?:less|fewer|smaller) than|(?:greater|more|larger) than or equal to|不小于|不少于|不低于"
         r"|大于(?:或)?等于|至少", "≥"),
        (r"at most|no(?:t)? (?:more|greater|larger) than|(?:less|fewer|smaller) than or equal to|不大于|不超过|不多于"
         r"|小于(?:或)?等于|至多|最多", "≤"),
        (r"(?:strictly )?(?:greater|more|larger) than|大于|超过", ">"),
        (r"(?:strictly )?(?:less|fewer|smaller) than|小于", "<"),
    )
)  # fmt: skip


def inequality(text: str) -> str | None:
    """x is at least 2 as x ≥ 2; None: no words for an inequality, or several."""
    for pattern, sign in _INEQUALITIES:
        if len(pattern.findall(text)) == 1:
            found = re.sub(r"\s*\b(?:is|be|must be|should be)\s+(?=[<>≤≥])", " ", pattern.sub(sign, text))
            return None if any(other.search(found) for other, _ in _INEQUALITIES) else found
    return None


_NAMES = {"max": "maximum", "min": "minimum", "最大值": "maximum", "最小值": "minimum", "greatest": "maximum",
          "largest": "maximum", "smallest": "minimum", "least": "minimum"}  # fmt: skip


def name(text: str) -> str:
    """What a thing is called, in one spelling: the maximum value is the maximum."""
    text = re.sub(r"^the | (?:value|number)$", "", text.casefold().strip())
    return _NAMES.get(text, text)
