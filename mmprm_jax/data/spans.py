"""What a solution must not be cut inside of: formulas, environments, code fences, ``[asy]`` figures and tables.

Only what is closed counts, lest a stray mark swallow all that follows; a code fence that is never closed reaches to the
end, as in Markdown. Every pass is linear in the length of the text.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator

Span = tuple[int, int]

_VERBATIM = re.compile(
    r"^[ \t]{0,12}(?P<fence>`{3,}|~{3,})(?P<info>[^\n]*)$"
    r"|(?P<asy>\[asy\])|(?P<asy_end>\[/asy\])|(?P<table><table\b)|(?P<table_end></table>)",
    re.MULTILINE,
)
_CLOSES = {"asy": "[/asy]", "table": "</table>"}
_DISPLAY = re.compile(  # \\[2pt] in a matrix opens nothing
    r"\\\\|\\\$|(?P<open>\\\[)|(?P<close>\\\])|(?P<dollars>\$\$)"
    r"|\\begin\{(?P<begin>[A-Za-z]{1,30}\*?)\}|\\end\{(?P<end>[A-Za-z]{1,30}\*?)\}"
)
_INLINE = re.compile(r"\\\\|\\\$|(?P<open>\\\()|(?P<close>\\\))|(?P<dollar>\$)|(?P<blank>\n[ \t\r]*\n)")
_BLANK = re.compile(r"\n[ \t\r]*\n")
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,30} [A-Za-z]{2,30} [A-Za-z]{2,30}\b")


def uncuttable(text: str) -> list[Span]:
    """The spans (start, end) of a text that no cut may lie inside of, in order, apart from each other."""
    blocks = displays(text)
    inline = (span for a, b in _gaps(blocks, len(text)) for span in _inline(text, a, b)) if _has_inline(text) else ()
    return _merged([*blocks, *inline])


def displays(text: str) -> list[Span]:
    """Those of them that stand apart: all but formulas in a line."""
    verbatim = _merged(_verbatim(text))
    if "$$" not in text and "\\" not in text:
        return verbatim
    return _merged([*verbatim, *(span for a, b in _gaps(verbatim, len(text)) for span in _displays(text, a, b))])


def _has_inline(text: str) -> bool:
    return "$" in text or r"\(" in text


def _merged(spans: Iterable[Span]) -> list[Span]:
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start < found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def _gaps(spans: list[Span], length: int) -> Iterator[Span]:
    at = 0
    for start, end in spans:
        yield at, start
        at = end
    yield at, length


def _verbatim(text: str) -> Iterator[Span]:
    """Code fences, figures, HTML tables."""
    last = {kind: text.rfind(mark) for kind, mark in _CLOSES.items()}
    opened: tuple[str, int, str] | None = None  # kind, where, the fence
    for found in _VERBATIM.finditer(text):
        fence, info = found["fence"], (found["info"] or "").strip()
        kind = "fence" if fence else found.lastgroup or ""
        if opened is None:
            inline = fence and fence[0] == "`" and "`" in info  # ```code``` in a line
            if not inline and (fence or found.end() <= last.get(kind, -1)):
                opened = kind, found.start(), fence or ""
        elif opened[0] == "fence":
            if fence and fence.startswith(opened[2]) and not info:
                yield opened[1], min(found.end() + 1, len(text))
                opened = None
        elif kind == f"{opened[0]}_end":
            yield opened[1], found.end()
            opened = None
    if opened:
        yield opened[1], len(text) if opened[0] == "fence" else last[opened[0]] + len(_CLOSES[opened[0]])


def end_of(pattern: re.Pattern[str], text: str, *where: int) -> int:
    """Where the match of a pattern ends that always matches, if with nothing. where: begin and end in the text."""
    found = pattern.match(text, *where)
    assert found is not None
    return found.end()


def _key(found: re.Match[str]) -> tuple[str, bool, bool]:
    """(what is opened or closed, whether it may open, whether it may close)."""
    kind = found.lastgroup
    if kind in ("open", "close"):
        return "[", kind == "open", kind == "close"
    if kind == "dollars":
        return "$$", True, True
    return f"{{{found[kind or 0]}", kind == "begin", kind == "end"


def _displays(text: str, a: int, b: int) -> Iterator[Span]:
    """``$$…$$``, ``\\[…\\]`` and environments between a and b."""
    last: dict[str, int] = {}  # where the last mark is that closes this
    for found in _DISPLAY.finditer(text, a, b):
        if found.lastgroup:
            key, _, closes = _key(found)
            if closes:
                last[key] = found.start()
    name, start, depth = "", 0, 0
    for found in _DISPLAY.finditer(text, a, b):
        if not found.lastgroup:
            continue
        key, opens, closes = _key(found)
        if depth and key == name and closes:
            depth -= 1
            if not depth and (key[0] == "{" or not _is_text(text, start, found.start())):
                yield start, found.end()
            elif not depth and opens and found.end() <= last[key]:  # the $$ before was a stray one
                start, depth = found.start(), 1
        elif opens and found.end() <= last.get(key, -1):
            if not depth or key == name == "[":  # which are not nested: the one before was a stray one
                name, start, depth = key, found.start(), 1
            elif key == name:
                depth += 1
    if depth and name[0] == "{":  # more begun than ended
        yield start, text.index("}", last[name]) + 1


def _is_text(text: str, start: int, end: int) -> bool:
    """Whether there are paragraphs of words between two marks: these do not belong together."""
    return bool(_BLANK.search(text, start, end) and _PROSE.search(text, start, end))


def _inline(text: str, a: int, b: int) -> Iterator[Span]:
    """``$…$`` and ``\\(…\\)`` between a and b, which no empty line is inside of."""
    dollars: list[int] = []
    opened = -1
    for found in itertools.chain(_INLINE.finditer(text, a, b), (None,)):
        kind = found.lastgroup if found else "blank"
        if found is None or kind == "blank":
            yield from _pairs(text, dollars)
            dollars, opened = [], -1
        elif kind == "dollar":
            dollars.append(found.start())
        elif kind == "open":
            opened = found.start()
        elif kind == "close" and opened >= 0:
            yield opened, found.end()
            opened = -1


def _pairs(text: str, dollars: list[int]) -> Iterator[Span]:
    """The formulas of a paragraph. Of an odd number of dollars one is none of a formula, such as that of a price."""
    if len(dollars) % 2 == 0:
        yield from ((start, end + 1) for start, end in zip(dollars[::2], dollars[1::2], strict=True))
        return
    opened = -1
    for at in dollars:  # as Pandoc: no space behind the first, none before the second, no digit behind that
        before, after = text[at - 1 : at], text[at + 1 : at + 2]
        if opened >= 0 and before.strip() and not after.isdigit():
            yield opened, at + 1
            opened = -1
        elif after.strip():
            opened = at
