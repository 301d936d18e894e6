"""Dates in words and figures."""

from __future__ import annotations

import re

from mmprm_jax.answers.values import Date

_MONTHS = "january february march april may june july august september october november december".split()
_MONTH = rf"({'|'.join(_MONTHS)}|{'|'.join(month[:3] for month in _MONTHS)}|sept)\.?"
_DAY = r"(\d{1,2})(?:st|nd|rd|th)?"
_YEAR = r"(\d{4})"
_FORMS = tuple(
    (re.compile(pattern, re.I), order)
    for pattern, order in (
        (rf"{_MONTH} {_DAY}(?:,? {_YEAR})?", "MDY"),
        (rf"(?:the )?{_DAY} (?:of )?{_MONTH}(?:,? {_YEAR})?", "DMY"),
        (rf"{_YEAR}-(\d\d)-(\d\d)", "YMD"),
        (rf"{_YEAR}/(\d\d)/(\d\d)", "YMD"),
        (r"(?:(\d{4}) ?年 ?)?(\d{1,2}) ?月 ?(\d{1,2}) ?[日号]", "YMD"),
    )
)


def date(text: str) -> Date | None:
    """March 5, 5 March, 3月5日 and 2024-03-05; not 3/5. None: no date."""
    for pattern, order in _FORMS:
        if match := pattern.fullmatch(text):
            part = dict(zip(order, match.groups(), strict=True))
            month = part["M"]
            number = int(month) if month.isdigit() else [m[:3] for m in _MONTHS].index(month[:3].casefold()) + 1
            if not (1 <= number <= 12 and 1 <= int(part["D"]) <= 31):
                return None
            return Date(int(part["Y"]) if part["Y"] else None, number, int(part["D"]))
    return None
