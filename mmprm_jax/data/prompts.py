"""Prompts and the step format ``<step>…</step>…<answer>…</answer>``."""

from __future__ import annotations

import re

from mmprm_jax.models import tokenizer as tok

_SEGMENT = re.compile(r"<step>.*?</step>|<answer>.*?</answer>", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def policy_prompt(question: str, image_tokens: int) -> str:
    """The user turn and the opening of the assistant turn (ChatML as InternVL2.5, without a system message).

    ``image_tokens``: visual tokens of the problem's image; 0 for a text-only problem.
    """
    image = f"{tok.IMAGE_START}{tok.IMAGE * image_tokens}{tok.IMAGE_END}\n" if image_tokens else ""
    return f"{tok.TURN_START}user\n{image}{question}{tok.TURN_END}\n{tok.TURN_START}assistant\n"


def split_segments(text: str) -> tuple[str, ...]:
    """The complete steps and the answer of a response, in order, verbatim; text outside of them is dropped.

    Nothing after the first ``<answer>`` counts. A response cut off inside a step keeps the steps before it.
    """
    segments = []
    for match in _SEGMENT.finditer(text):
        segments.append(match.group())
        if match.group().startswith(tok.ANSWER):
            break
    return tuple(segments)


def final_answer(segments: tuple[str, ...]) -> str | None:
    """The text of the ``<answer>`` that ends a solution, or None when it has none."""
    match = _ANSWER.fullmatch(segments[-1]) if segments else None
    return match.group(1).strip() if match else None
