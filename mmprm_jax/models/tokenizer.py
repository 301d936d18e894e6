"""Tokenizers, and the marker tokens that must be exactly one id each."""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers
from etils import epath
from tokenizers import models, pre_tokenizers

from mmprm_jax.records import UserError

IMAGE_START, IMAGE, IMAGE_END = "<img>", "<IMG_CONTEXT>", "</img>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
STEP, STEP_END, ANSWER, ANSWER_END = "<step>", "</step>", "<answer>", "</answer>"
PAD, PRM, YES, NO = "<pad>", "<prm>", "Yes", "No"
MARKERS = (PAD, TURN_START, TURN_END, IMAGE_START, IMAGE, IMAGE_END, STEP, STEP_END, ANSWER, ANSWER_END)


class Tokenizer:
    """Text to ids and back. Segments are tokenised one by one, so that a prefix's ids never depend on what follows."""

    def __init__(self, core: tokenizers.Tokenizer):
        self._core = core

    @classmethod
    def from_words(cls, words: Sequence[str]) -> Tokenizer:
        """A word-level tokenizer (words are separated by spaces) with the marker tokens."""
        vocab = {word: i for i, word in enumerate((*MARKERS, *words))}
        core = tokenizers.Tokenizer(models.WordLevel(vocab))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        core.add_special_tokens(list(MARKERS))
        return cls(core)

    @classmethod
    def load(cls, path: epath.PathLike) -> Tokenizer:
        path = epath.Path(path)
        if not path.exists():
            raise UserError(f"{path}: no tokenizer there")
        return cls(tokenizers.Tokenizer.from_str(path.read_text()))

    def save(self, path: epath.PathLike) -> None:
        epath.Path(path).write_text(self._core.to_str())

    def with_token(self, token: str) -> Tokenizer:
        """A copy that also knows the special token ``token`` (the next free id)."""
        core = tokenizers.Tokenizer.from_str(self._core.to_str())
        core.add_special_tokens([token])
        return Tokenizer(core)

    def __len__(self) -> int:
        return self._core.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``. Raises UserError on a word outside a word-level vocabulary."""
        try:
            ids = self._core.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"cannot tokenise {text[:80]!r}: {error}") from None
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._core.decode(list(ids), skip_special_tokens=False)

    def id(self, token: str) -> int:
        """The one id of a marker token. Raises UserError when it is none or several."""
        ids = (
            self._core.encode(token, add_special_tokens=False).ids if self._core.token_to_id(token) is not None else []
        )
        if len(ids) != 1:
            raise UserError(f"the token {token!r} must be exactly one id of the tokenizer; it is {len(ids)}")
        return ids[0]
