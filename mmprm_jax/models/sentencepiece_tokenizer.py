"""InternLM2's tokenizer (a sentencepiece model and added tokens) as its original slow class encodes and decodes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import sentencepiece
import tokenizers

from mmprm_jax.records import UserError

# transformers' clean_up_tokenization, which the original class always applies; the order matters
_CLEAN_UP = {s: s[1:] for s in (" .", " ?", " !", " ,")} | {" ' ": "'"}
_CLEAN_UP |= {s: s[1:] for s in (" n't", " 'm", " 's", " 've", " 're")}


class SentencePieceCore:
    """Encodes and decodes. ``added``: id to added token; ids from the number of pieces on lie above the model.

    Raises UserError (beginning with ``where``, the folder) for a damaged model and for added tokens that do not fit it.
    """

    def __init__(self, model: bytes, added: Mapping[int, tokenizers.AddedToken], where: str):
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
            count = len(self._sp) if model else 0  # an empty file is accepted, and then logs an error
        except RuntimeError:
            count = 0
        if not count:
            raise UserError(f"{where}/tokenizer.model: not a sentencepiece model; copy the released file again")
        above = sorted(i for i in added if i >= count)
        if above != list(range(count, count + len(above))):
            raise UserError(
                f"{where}: the ids of the added tokens above the model ({above[0]} to {above[-1]}) must follow on its"
                f" {count} pieces; tokenizer.model and tokenizer_config.json are not of one checkpoint, copy both again"
            )
        if unfit := [token.content for token in added.values() if token.lstrip or token.rstrip or token.single_word]:
            raise UserError(f"{where}: {unfit[0]!r} has lstrip, rstrip or single_word, which are not supported")
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._count, self._added = count, {i: token.content for i, token in added.items()}
        self._ids = {content: i for i, content in self._added.items()}
        self._apart = frozenset(above) | (added.keys() - self.special_ids)  # decode sets these off with spaces
        self._split = _splitter(self._ids)
        # Literal text: the pieces of special tokens (``[UNUSED_TOKEN_146]`` of <|im_start|>) must not match.
        special_pieces = {i for i in self.special_ids if i < count} - {self._sp.unk_id()}
        self._literal_sp = sentencepiece.SentencePieceProcessor(model_proto=_as_control(model, special_pieces))
        self._literal_split = _splitter(self._added[i] for i in added.keys() - self.special_ids)

    def __len__(self) -> int:
        return self._count + sum(i >= self._count for i in self._added)

    def next_id(self) -> int:
        return len(self)

    def lookup(self, token: str) -> int | None:
        """The id of a piece or an added token; None when there is none."""
        if token in self._ids:
            return self._ids[token]
        i = self._sp.piece_to_id(token)
        return None if i == self._sp.unk_id() else i

    def encode(self, text: str) -> list[int]:
        return self._encode(self._sp, self._split, text)

    def encode_literal(self, text: str, inside: bool = False) -> list[int]:
        return self._encode(self._literal_sp, self._literal_split, text)

    def _encode(self, sp: sentencepiece.SentencePieceProcessor, split: re.Pattern[str], text: str) -> list[int]:
        ids = []
        for i, part in enumerate(split.split(text)):
            if i % 2:
                ids.append(self._ids[part])
            elif part:
                ids += sp.encode(part)
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """Raises UserError on an id outside of the vocabulary."""
        if skip_special:
            ids = [i for i in ids if i not in self.special_ids]
        parts: list[str] = []
        for apart, group in itertools.groupby(ids, key=self._apart.__contains__):
            run = list(group)
            parts += [self._added[i] for i in run] if apart else [self._decode_part(run)]
        return " ".join([part for part in parts[:-1] if part] + parts[-1:])

    def _decode_part(self, ids: Sequence[int]) -> str:
        """A run of pieces and of special tokens that live inside the model."""
        out: list[str] = []
        run: list[int] = []
        after_special = False
        for i in ids:
            if i in self._added:
                # the space is the original's: before the run that precedes the token, not before the token
                out += ["" if after_special else " ", self._sp.decode(run), self._added[i]]
                run, after_special = [], True
            elif 0 <= i < self._count:
                run.append(i)
                after_special = False
            else:
                raise UserError(f"cannot decode: the id {i} is not one of the tokenizer's {len(self)}")
        text = "".join([*out, self._sp.decode(run)])
        for old, new in _CLEAN_UP.items():
            text = text.replace(old, new)
        return text


def _splitter(tokens: Iterable[str]) -> re.Pattern[str]:
    """Splits a text at the tokens, the longest first; the tokens are the odd elements of the result."""
    return re.compile("(" + ("|".join(re.escape(t) for t in sorted(tokens, key=len, reverse=True)) or "(?!)") + ")")


def _as_control(model: bytes, ids: set[int]) -> bytes:
    """The model with these pieces turned into CONTROL pieces, which no text encodes to.

    The protobuf message is edited as bytes: importing sentencepiece's own message class breaks that of transformers.
    """
    out, piece = bytearray(), 0
    for number, body in _fields(model):
        if number == 1:  # a piece
            if piece in ids:
                body += b"\x18\x03"  # type = CONTROL; the last value of a field counts
            piece += 1
        out += _varint(number << 3 | 2) + _varint(len(body)) + body
    return bytes(out)


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """The fields of a valid ModelProto, all of which are length-delimited: number and body."""
    at = 0
    while at < len(message):
        key, at = _read_varint(message, at)
        size, at = _read_varint(message, at)
        yield key >> 3, message[at : at + size]
        at += size


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte, at = data[at], at + 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
