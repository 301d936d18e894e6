"""The final answer that a solution in free text commits to, found by rules."""

from __future__ import annotations

import re

BARE_WORDS = 12  # a response of so few words, without any marker, is an answer and nothing else
BOXES = 20  # so many are looked at, from the end

MARKER = re.compile(
    r"(?:^|(?<=[\s.,;:(*†#]))(?:"
    r"####"
    r"|(?:final\s+)?answer\s*(?:is\s*)?:(?:\s*the\s+(?:final\s+)?answer\s+is\b)?"
    r"|(?:the|our)\s+(?:final\s+|correct\s+)?(?:answer|option|choice)\s+(?:is|should\s+be)\b"
    r"|(?:最终)?答案(?:是|为)?\s*[:：]?"
    r")(?:\**)\s*:?\s*",
    re.IGNORECASE,
)


def last_boxed(text: str) -> tuple[int, int, str] | None:
    r"""The last ``\boxed{…}`` or ``\fbox{…}`` whose braces balance: its start, its end and what is inside."""
    for found in list(re.finditer(r"\\f?boxed\s*\{", text))[: -BOXES - 1 : -1]:
        depth = 0
        for brace in re.finditer(r"\\.|[{}]", text[found.end() - 1 :], re.DOTALL):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                end = found.end() - 1 + brace.end()
                return found.start(), end, text[found.end() : end - 1].strip()
    return None


def stated_answer(text: str) -> str | None:
    """What follows the last "Answer:", "The final answer is", "####" and the like, on its line; None: nothing does."""
    ends = [found.end() for found in MARKER.finditer(text)]
    if not ends:
        return None
    said = text[ends[-1] :].strip().split("\n")[0]
    return _bare(said) or None


def _bare(said: str) -> str:
    """An answer without the sentence's full stop, emphasis and whole-answer dollars."""
    said = said.strip().strip("*").strip()
    if said.endswith((".", "。")) and not said.endswith("..."):
        said = said[:-1].rstrip()
    if len(said) > 2 and said[0] == said[-1] == "$" and said.count("$") == 2:
        said = said[1:-1].strip()
    return said.strip("*").strip()


def find_answer(solution: str) -> str | None:
    """The answer a solution commits to: in its last box, else behind its last marker, else a few bare words."""
    boxed = last_boxed(solution)
    if boxed and boxed[2]:
        return boxed[2]
    stated = stated_answer(solution)
    if stated:
        return stated
    whole = solution.strip()
    bare = "\n" not in whole and "boxed{" not in whole and len(whole.split()) <= BARE_WORDS
    return _bare(whole) or None if bare else None
