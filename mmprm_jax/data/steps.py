"""Solutions as others write them, restructured into ``<step>…</step>…<answer>…</answer>`` by rules.

Nothing is invented: a step is a part of the solution as it stands, the answer is what the solution commits to last.
"""

from __future__ import annotations

import re

from mmprm_jax.answers import extract
from mmprm_jax.data.prompts import final_answer, split_segments

LONG = 400  # characters; a paragraph longer than this is cut into sentences

_TAGS = re.compile(r"</?(?:step|answer)>")
_HEADING = re.compile(r"^[ \t]*(?:\*\*|#+\s*)?step\s*\d+\b", re.IGNORECASE | re.MULTILINE)
_SENTENCE = re.compile(r"(?<=[.!?。！？])\s+(?=[A-Z\u4e00-\u9fff\\$])|(?<=[。！？])")


def restructure(solution: str, answer: str | None = None) -> str | None:
    """The solution as ``<step>…</step>…<answer>…</answer>``; None when no final answer is found in it.

    answer: the final answer where the data set says it; otherwise ``extract.answer``. A solution in that format already
    is returned as it is. The result always parses: its segments are the whole text.
    """
    segments = split_segments(solution)
    if segments and final_answer(segments) and _packed("".join(segments)) == _packed(solution):
        return "".join(segments)
    solution = _untagged(solution.replace("\r\n", "\n").replace("\r", "\n"))
    answer = _untagged(answer) if answer else extract.answer(solution)
    if not answer or not extract.PHRASE.sub("", answer).strip(" :：*.#"):  # "The answer is", and no more
        return None
    steps = [step for step in split_steps(solution) if not _only_answer(step, answer)]
    return "".join(f"<step>{step}</step>" for step in steps) + f"<answer>{answer}</answer>"


def _untagged(text: str) -> str:
    return _TAGS.sub(" ", _TAGS.sub("", text)).strip()  # the blank: "</st</step>ep>" gives a tag once, but not twice


def _packed(text: str) -> str:
    return re.sub(r"\s+", "", text)


def _only_answer(step: str, answer: str) -> bool:
    """Whether a step says nothing beside the answer, which has its own place."""
    rest = extract.PHRASE.sub("", step)
    rest = re.sub(r"\\f?boxed\b|[\s$*.。{}#†]|\\[()\[\]]", "", rest)
    return rest in ("", re.sub(r"[\s$*.。{}#†]|\\[()\[\]]", "", answer))


def split_steps(solution: str) -> list[str]:
    """The steps of a solution in order: by "Step N" headings, else paragraphs, else lines, else sentences.

    A formula set apart (``$$…$$``, ``\\[…\\]``, an environment) is never cut, and one that begins a paragraph goes with
    the text before it.
    """
    headings = [found.start() for found in _HEADING.finditer(solution)]
    if len(headings) >= 2:
        cuts = [0, *(headings if headings[0] else headings[1:]), len(solution)]
        parts = [solution[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    else:
        parts = re.split(r"\n\s*\n", solution)
        if len(parts) == 1:
            parts = solution.split("\n")
        if len(parts) == 1 and len(solution) > LONG:
            parts = _SENTENCE.split(solution)
    joined: list[str] = []
    for part in parts:
        if joined and (not _balanced(joined[-1]) or _formula(part)):
            joined[-1] += "\n" + part
        else:
            joined.append(part)
    return [part.strip() for part in joined if part.strip()]


def _balanced(part: str) -> bool:
    pairs = ((r"\[", r"\]"), (r"\(", r"\)"), (r"\begin{", r"\end{"))
    return part.count("$$") % 2 == 0 and all(part.count(a) <= part.count(b) for a, b in pairs)


def _formula(part: str) -> bool:
    return part.lstrip().startswith(("$$", r"\[", r"\begin{"))
