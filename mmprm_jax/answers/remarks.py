"""What stands in brackets behind an answer: another form of it, a reason, what was rejected, what it is."""

from __future__ import annotations

import re

from mmprm_jax.answers.normalise import trim

_NOTE = re.compile(r"\s*\(\s*(?:(?:the )?answers? (?:(?:are|is) )?)?(?:not unique|答案不唯一|不唯一)[^()]*\)\s*$", re.I)
_FOR_ALL = re.compile(r"(?<=\S),? \(?for (?:all|any|every|each) (?:real )?(?:numbers? )?[a-z](?: ?∈ ?R)?\)?$")
_OR = re.compile(r"\s*\(\s*(?:or|或)\s*(?:fill in\s*)?(.*)\)\s*$", re.I | re.S)
_THAT_IS = re.compile(
    r"[\s,;(]{1,4}(?:i\.e\.|that is(?: to say)?,|namely|or equivalently|equivalently|也就是|即)[\s,:]{0,4}", re.I
)
_BEHIND = re.compile(r"(?s)(.*\S)\s*\((?=[^()]*[^\W\d_]{2})((?:[^()]|\([^()]*\)){3,160})\)$")
_REASON = re.compile(r"(?:since|because|due to|by)\b|因为|由于|(?:SAS|ASA|AAS|SSS|HL|AA)$", re.I)
_IS = re.compile(
    r"(?!.*\b(?:is|are|was|not?|wrong|incorrect|false|if|when)\b)the (?:[a-z-]+ ?){1,4}", re.I
)  # no sentence
_REJECTED = re.compile(
    r"\b(?:reject(?:ed|ing|s)?|discard(?:ed|ing|s)?|extraneous|inadmissible|invalid|omit(?:ted|ting)?|not valid"
    r"|(?:does|do) not satisfy|impossible)\b|不合题意|不符合?(?:题意)?|舍去?|增根",
    re.I,
)
_ALSO = re.compile(r"\b(?:also|or|too|another|both|only|not unique)\b|也|或|又|另", re.I)
_OTHER = re.compile(r"\d|\b(?:negative|positive|smaller|larger|first|second|zero|other)\b|[负正小大零]", re.I)
_SEVERAL = re.compile(r"[±∓,;\n]| or | and |或|和|、")


def without_note(text: str) -> str:
    """Without a remark that other answers are right as well, and without "for all x"."""
    return trim(_FOR_ALL.sub("", _NOTE.sub("", text)))


def has_note(text: str) -> bool:
    return bool(_NOTE.search(text))


def forms(text: str) -> tuple[str, ...]:
    """A normalised answer, and the other form behind it: 5 (or 5.0); x > 2, i.e. (2, ∞)."""
    both = _THAT_IS.split(text)
    if len(both) == 2 and all(both):
        return (trim(both[0]), trim(both[1]))
    match = _OR.search(text)
    return (text[: match.start()].strip(), trim(match[1])) if match and match.start() else (text,)


def answer(text: str) -> str | None:
    """A normalised answer without the remark behind it, if that takes nothing from it and adds nothing to it."""
    match = _BEHIND.fullmatch(text)
    if not match:
        return None
    rest, remark = match[1], match[2].strip()
    if _ALSO.search(remark):
        return None
    if _REASON.match(remark) or _IS.fullmatch(remark):
        return rest
    if not _REJECTED.search(remark) or not _OTHER.search(remark) or _SEVERAL.search(_outside(rest)):
        return None  # it may be the answer that is rejected, or one of several answers
    value = rest.rpartition("=")[2].strip()
    return None if re.search(rf"(?<![\w.-]){re.escape(value)}(?![\w.])", remark) else rest


def _outside(text: str) -> str:
    """What is in no brackets."""
    return re.sub(r"\([^()]*\)", "", text)
