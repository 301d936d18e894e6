"""Is a final answer right? The quick rules of ``equivalence``; nothing in an answer is ever evaluated as code."""

from __future__ import annotations

from mmprm_jax.answers.equivalence import compare


def is_correct(answer: str | None, gold: str) -> bool:
    """Whether a predicted answer equals the gold answer. None (no answer found) is wrong, and so is what is unknown."""
    return bool(compare(gold, answer))
