"""Tokenizers, and the marker tokens that must be exactly one id each.

Our own are word-level and byte-level BPE (of the embedded data, and what ``train_bpe`` makes of other data; a file, or
in a model folder with a tokenizer_config.json beside it). Those of released checkpoints' folders: ``tokenizer_files``.
Everything is read as data: no code of the checkpoint runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers
from etils import epath
from tokenizers import decoders, models, pre_tokenizers, trainers

from mmprm_jax.models import tokenizer_files
from mmprm_jax.models.sentencepiece_tokenizer import SentencePieceCore
from mmprm_jax.models.tokenizer_files import CONFIG, FAST, FAST_CLASS, FILES, FastCore
from mmprm_jax.records import UserError

IMAGE_START, IMAGE, IMAGE_END = "<img>", "<IMG_CONTEXT>", "</img>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
STEP, STEP_END, ANSWER, ANSWER_END = "<step>", "</step>", "<answer>", "</answer>"
# Marks that are one token in what some policies write.
_WRITTEN = "<think> </think> ◁think▷ ◁/think▷ <|begin_of_box|> <|end_of_box|> <|begin_of_thought|> <|end_of_thought|>"
PAD, PRM, YES, NO = "<pad>", "<prm>", "Yes", "No"
TAGS = (STEP, STEP_END, ANSWER, ANSWER_END)
MARKERS = (PAD, TURN_START, TURN_END, IMAGE_START, IMAGE, IMAGE_END, *TAGS)

# What transformers' InternVLProcessor asks of a tokenizer. There are no videos here: no token of their own either.
PROCESSOR_TOKENS = {
    "start_image_token": IMAGE_START, "end_image_token": IMAGE_END, "context_image_token": IMAGE, "video_token": IMAGE
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Segment:
    """A piece of a prompt.

    marker: ``text`` is a special token (exactly one id), repeated ``count`` times; otherwise it is literal text, in
    which special tokens are not recognised, so that it can inject neither a turn's end nor a ``<prm>``.
    score: "at": a step score is read at this segment's last token; "before": at the token before that one, whose
    logits predict it; "": none.
    """

    text: str
    marker: bool = False
    count: int = 1
    score: str = ""

    def __post_init__(self):
        if self.score not in ("", "at", "before"):
            raise ValueError(f"score must be '', 'at' or 'before', not {self.score!r}")
        if self.count < 0 or (self.count != 1 and not self.marker):
            raise ValueError(f"only a marker repeats, 0 times or more; count is {self.count}")


class Tokenizer:
    """Text to ids and back. Immutable.

    bos: the ids that stand before every prompt (one or none). pad: the id that fills rows. special_ids: the ids of the
    special tokens. All are Python ints below ``len(tokenizer)``.
    """

    def __init__(self, files: Mapping[str, bytes], where: str):
        """``files``: name to content; only a tokenizer.json for the kinds of our own. ``where``: for messages."""
        self._files, self._where = dict(files), where
        self.bos: tuple[int, ...] = ()
        self.pad: int = 0
        if CONFIG in files:
            read = tokenizer_files.read_folder(files, where)
            self._core, self.bos, self.pad = read.core, read.bos, read.pad
        else:
            self._core = tokenizer_files.read_own(files[FAST], where, MARKERS)

    @classmethod
    def from_words(cls, words: Sequence[str]) -> Tokenizer:
        """A word-level tokenizer (words are separated by spaces) with the marker tokens."""
        vocab = {word: i for i, word in enumerate((*MARKERS, *words))}
        core = tokenizers.Tokenizer(models.WordLevel(vocab))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        core.add_special_tokens(list(MARKERS))
        return cls({FAST: core.to_str().encode()}, "word-level tokenizer")

    @classmethod
    def train_bpe(cls, texts: Iterable[str], size: int) -> Tokenizer:
        """A byte-level BPE tokenizer of at most ``size`` tokens, learned from ``texts``; with the marker tokens.

        It decodes what it encodes to the same text, whatever that is; equal texts give an equal tokenizer. Raises
        UserError when there is no room for the markers and the bytes.
        """
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        least = len(MARKERS) + len(alphabet) + sum(len(word) - 1 for word in (YES, NO))
        if size < least:
            raise UserError(f"a byte-level vocabulary of {size} tokens; it needs {least} at least")
        core = tokenizers.Tokenizer(models.BPE())
        core.pre_tokenizer, core.decoder = tokenizer_files.byte_level_words(), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size - (least - len(MARKERS) - len(alphabet)), special_tokens=list(MARKERS),
            initial_alphabet=alphabet, show_progress=False, max_token_length=64,
        )  # fmt: skip
        core.train_from_iterator(texts, trainer)
        return cls({FAST: tokenizer_files.with_words(core.to_str(), (YES, NO)).encode()}, "byte-level tokenizer")

    @classmethod
    def load(cls, path: epath.PathLike) -> Tokenizer:
        """``path``: the file of a tokenizer of our own, or the folder of a model.

        Raises UserError when there is none, when it is damaged, and when its kind is unknown.
        """
        path = epath.Path(path)
        if not path.exists():
            raise UserError(f"{path}: no tokenizer there; name a checkpoint's folder or a tokenizer.json of our own")
        if not path.is_dir():
            return cls({FAST: path.read_bytes()}, str(path))
        names = FILES if (path / FAST).exists() else (*FILES, *tokenizer_files.FOREIGN)
        files = {name: (path / name).read_bytes() for name in names if (path / name).exists()}
        if FAST in files:  # which says everything that transformers needs too
            files = {CONFIG: json.dumps({"tokenizer_class": FAST_CLASS}).encode()} | files
        elif CONFIG not in files:
            raise UserError(f"{path}: no tokenizer there ({CONFIG} is missing); copy the checkpoint's tokenizer files")
        return cls(files, str(path))

    @property
    def fingerprint(self) -> str:
        """Changes with any of the tokenizer's files."""
        return hashlib.sha256(repr(sorted(self._files.items())).encode()).hexdigest()[:16]

    def save(self, path: epath.PathLike) -> None:
        """Writes the file of a tokenizer of our own, or the files of a checkpoint's tokenizer into a folder.

        The files are the ones loaded, byte for byte, but for what ``with_token`` changed. The original's Python files
        are not among them.
        """
        path = epath.Path(path)
        if CONFIG not in self._files:
            path.write_bytes(self._files[FAST])
            return
        path.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (path / name).write_bytes(content)

    def in_folder(self) -> Tokenizer:
        """The tokenizer as a model folder holds it: one of our own gets a tokenizer_config.json for transformers."""
        if CONFIG in self._files:
            return self
        tokens = tokenizer_files.read_json(self._files, FAST, self._where)["added_tokens"]
        config = {
            "tokenizer_class": FAST_CLASS, "clean_up_tokenization_spaces": False,
            "pad_token": PAD, "eos_token": TURN_END, "extra_special_tokens": PROCESSOR_TOKENS,
            "added_tokens_decoder": {str(t["id"]): {k: x for k, x in t.items() if k != "id"} for t in tokens},
        }  # fmt: skip
        content = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        return Tokenizer({**self._files, CONFIG: content.encode()}, self._where)

    def for_transformers(self) -> Tokenizer:
        """As ``in_folder``, with the names by which transformers' InternVLProcessor finds the tokens of images."""
        files = self.in_folder()._files
        config = tokenizer_files.read_json(files, CONFIG, self._where)
        extra = config.get("extra_special_tokens") or {}
        if isinstance(extra, list):  # transformers 5 has the names beside the list, 4 in place of it
            config = PROCESSOR_TOKENS | config
        else:
            config |= {"extra_special_tokens": PROCESSOR_TOKENS | extra}
        content = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        return Tokenizer({**files, CONFIG: content.encode()}, self._where)

    @property
    def is_internlm2(self) -> bool:
        """Whether transformers has its class as remote code only."""
        return isinstance(self._core, SentencePieceCore)

    def with_token(self, token: str) -> Tokenizer:
        """A copy that also knows the special token ``token``: with the next free id, or its own if it is a token."""
        if not token:
            raise UserError("a token to add must not be empty")
        i = self._core.lookup(token)
        if i in self.special_ids:
            return self
        files = tokenizer_files.with_token(self._files, token, self._core.next_id() if i is None else i, self._where)
        return Tokenizer(files, self._where)

    @property
    def special_ids(self) -> frozenset[int]:
        return self._core.special_ids

    @property
    def own_markers(self) -> tuple[str, ...]:
        """The tokens that stand for their text in a tokenizer of our own: the tags of steps.

        Of a word-level tokenizer all special ones: no other ids could stand for them. Never ``<prm>``, which no text
        may bring in.
        """
        if isinstance(self._core, FastCore) and self._core.is_word_level:
            return tuple(t for t in self._core.special_texts if t != PRM)
        return TAGS

    @property
    def written(self) -> tuple[str, ...]:
        """The marks of thoughts and boxes that are one token: a policy that wrote one reads it as that."""
        return tuple(mark for mark in _WRITTEN.split() if self._core.lookup(mark) in self.special_ids)

    def __len__(self) -> int:
        return len(self._core)

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, without bos; special tokens in it are recognised.

        Raises UserError on text that has no ids: a word outside a word-level vocabulary, a lone surrogate.
        """
        return self._encode(self._core.encode, text)

    def encode_literal(self, text: str, inside: bool = False) -> list[int]:
        """The ids of ``text`` with no special token among them; those of ``encode`` unless it holds a special token.

        inside: the text stands behind a special token, where some tokenizers put no space in front of it. Raises
        UserError as ``encode`` does, and when only a special id could stand for the text: a marker in a word-level
        tokenizer's text, a character that the vocabulary lacks.
        """
        ids = self._encode(lambda text: self._core.encode_literal(text, inside), text)
        if not self.special_ids.isdisjoint(ids):
            found = sorted(self.special_ids.intersection(ids))
            raise UserError(f"cannot tokenise {text[:80]!r} as plain text: it would give the special ids {found[:8]}")
        return ids

    @staticmethod
    def _encode(encode: Any, text: str) -> list[int]:
        try:
            return encode(text)
        except Exception as error:  # the libraries raise bare Exception, RuntimeError and TypeError
            raise UserError(f"cannot tokenise {text[:80]!r}: {tokenizer_files.line(error)}") from None

    def encode_prompt(self, segments: Sequence[Segment]) -> tuple[list[int], list[int]]:
        """The ids of a prompt, ``bos`` in front, and the positions of its scores in order.

        Literal segments with no marker or score between them are encoded as one text. Raises UserError for a marker
        that is not one id and for a score that has no token to stand at.
        """
        ids, inside = list(self.bos), False
        where: list[int] = []
        literal: list[str] = []

        def join() -> list[int]:
            text = "".join(literal)
            literal.clear()
            return self.encode_literal(text, inside)

        for segment in segments:
            if segment.marker:
                ids += join() + [self.id(segment.text)] * segment.count
                inside = inside or segment.count > 0
            else:
                literal.append(segment.text)
            if segment.score:
                ids += join()
                # counted alone: a score must not slip to the token of the text in front
                own = segment.count if segment.marker else len(self.encode_literal(segment.text, inside))
                at = len(ids) - 1 - (segment.score == "before")
                if not own or at < 0:
                    raise UserError(f"no token to read a score {segment.score} {segment.text[:80]!r} of a prompt")
                where.append(at)
        return ids + join(), where

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text, as the original tokenizer gives it (InternLM2: not the inverse of ``encode``)."""
        return self._core.decode([int(i) for i in ids], skip_special)

    def id(self, token: str) -> int:
        """The one id of a marker token. Raises UserError when it is none or several."""
        known = self._core.lookup(token)
        ids = [] if known is None else self.encode(token)
        if known is None or ids != [known]:
            found = "it is not in the vocabulary" if known is None else f"as text it gives {ids[:8]}, not [{known}]"
            raise UserError(f"the token {token!r} must be exactly one id of the tokenizer; {found}")
        return known

    def piece(self, token: str) -> int:
        """The id of a vocabulary entry, looked up and not encoded (Yes and No). Raises UserError when it is missing."""
        i = self._core.lookup(token)
        if i is None:
            raise UserError(f"the tokenizer ({self._where}) has no vocabulary entry {token!r}; choose one that it has")
        return i

    def check(self, tokens: Sequence[str]) -> None:
        """Raises one UserError that names every marker among ``tokens`` that is not exactly one id."""
        errors = []
        for token in tokens:
            try:
                self.id(token)
            except UserError as error:
                errors.append(str(error))
        if errors:
            raise UserError(f"{self._where}: " + "; ".join(errors))
