"""Tokenizers, and the marker tokens that must be exactly one id each.

Four kinds: word-level and byte-level BPE (our own: of the embedded data, and what ``train_bpe`` makes of other data; a
file, or in a model folder with a tokenizer_config.json beside it), InternLM2 and Qwen2 (a released checkpoint's
folder). Everything is read as data: no code of the checkpoint runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers
from etils import epath
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from mmprm_jax.models.sentencepiece_tokenizer import SentencePieceCore
from mmprm_jax.records import UserError

IMAGE_START, IMAGE, IMAGE_END = "<img>", "<IMG_CONTEXT>", "</img>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
STEP, STEP_END, ANSWER, ANSWER_END = "<step>", "</step>", "<answer>", "</answer>"
# Marks that are one token in what some policies write.
_WRITTEN = "<think> </think> ◁think▷ ◁/think▷ <|begin_of_box|> <|end_of_box|> <|begin_of_thought|> <|end_of_thought|>"
PAD, PRM, YES, NO = "<pad>", "<prm>", "Yes", "No"
TAGS = (STEP, STEP_END, ANSWER, ANSWER_END)
MARKERS = (PAD, TURN_START, TURN_END, IMAGE_START, IMAGE, IMAGE_END, *TAGS)

_CONFIG, _SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
_ADDED, _FAST = "added_tokens.json", "tokenizer.json"
_FILES = (_CONFIG, _SPECIAL, _ADDED, _FAST, "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja")
# What a tokenizer_config.json leaves out, by class (without Fast).
_DEFAULTS = {
    "InternLM2Tokenizer": {"add_bos_token": True, "bos_token": "<s>", "pad_token": "</s>"},
    "Qwen2Tokenizer": {"add_bos_token": False, "bos_token": None, "pad_token": "<|endoftext|>"},
}
_OWN = "PreTrainedTokenizer"  # transformers' class for any tokenizer.json
# What transformers' InternVLProcessor asks of a tokenizer. There are no videos here: no token of their own either.
PROCESSOR_TOKENS = {
    "start_image_token": IMAGE_START, "end_image_token": IMAGE_END, "context_image_token": IMAGE, "video_token": IMAGE
}  # fmt: skip
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NO_FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


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
        if _CONFIG not in files:
            self._core: _FastCore | SentencePieceCore = _FastCore(_read_fast(files[_FAST], where))
            return
        config = _read_json(files, _CONFIG, where)
        kind = str(config.get("tokenizer_class")).removesuffix("Fast")
        if kind == _OWN:
            self._core = _FastCore(_read_fast(_required(files, _FAST, where), where))
            return
        if kind not in _DEFAULTS:
            raise UserError(
                f"{where}/{_CONFIG}: unknown tokenizer_class {kind!r}; known: {', '.join([*_DEFAULTS, _OWN])}"
            )
        added = _added_tokens(config, where)
        if kind == "Qwen2Tokenizer":
            self._core = _FastCore(_qwen2(files, added, where))
        else:
            self._core = SentencePieceCore(_required(files, "tokenizer.model", where), added, where)
        listed = _read_json(files, _ADDED, where) if _ADDED in files else {}
        for token, i in [*((t.content, i) for i, t in added.items()), *listed.items()]:
            if self._core.lookup(token) != i:
                raise UserError(
                    f"{where}: the added token {token!r} should have the id {i} and has {self._core.lookup(token)};"
                    f" the files are not of one checkpoint, copy them again"
                )
        config = _DEFAULTS[kind] | config
        if config.get("add_eos_token"):
            raise UserError(f"{where}/{_CONFIG}: add_eos_token is not supported; set it to false")
        self.pad = self._named(config, "pad_token")
        if config["add_bos_token"]:
            self.bos = (self._named(config, "bos_token"),)

    def _named(self, config: Mapping[str, Any], key: str) -> int:
        """The id of the token that the configuration names under ``key``."""
        token = _content(config[key])
        i = self._core.lookup(token) if isinstance(token, str) else None
        if i is None:
            raise UserError(f"{self._where}/{_CONFIG}: {key} is {token!r}, which is no token; name one")
        return i

    @classmethod
    def from_words(cls, words: Sequence[str]) -> Tokenizer:
        """A word-level tokenizer (words are separated by spaces) with the marker tokens."""
        vocab = {word: i for i, word in enumerate((*MARKERS, *words))}
        core = tokenizers.Tokenizer(models.WordLevel(vocab))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        core.add_special_tokens(list(MARKERS))
        return cls({_FAST: core.to_str().encode()}, "word-level tokenizer")

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
        core.pre_tokenizer, core.decoder = _byte_level_words(), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size - (least - len(MARKERS) - len(alphabet)), special_tokens=list(MARKERS),
            initial_alphabet=alphabet, show_progress=False, max_token_length=64,
        )  # fmt: skip
        core.train_from_iterator(texts, trainer)
        return cls({_FAST: _with_words(core.to_str(), (YES, NO)).encode()}, "byte-level tokenizer")

    @classmethod
    def load(cls, path: epath.PathLike) -> Tokenizer:
        """``path``: the file of a tokenizer of our own, or the folder of a model.

        Raises UserError when there is none, when it is damaged, and when its kind is unknown.
        """
        path = epath.Path(path)
        if not path.exists():
            raise UserError(f"{path}: no tokenizer there; name a checkpoint's folder or a tokenizer.json of our own")
        if not path.is_dir():
            return cls({_FAST: path.read_bytes()}, str(path))
        if not (path / _CONFIG).exists():
            raise UserError(f"{path}: no tokenizer there ({_CONFIG} is missing); copy the checkpoint's tokenizer files")
        return cls({name: (path / name).read_bytes() for name in _FILES if (path / name).exists()}, str(path))

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
        if _CONFIG not in self._files:
            path.write_bytes(self._files[_FAST])
            return
        path.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (path / name).write_bytes(content)

    def in_folder(self) -> Tokenizer:
        """The tokenizer as a model folder holds it: one of our own gets a tokenizer_config.json for transformers."""
        if _CONFIG in self._files:
            return self
        tokens = _read_json(self._files, _FAST, self._where)["added_tokens"]
        config = {
            "tokenizer_class": f"{_OWN}Fast", "clean_up_tokenization_spaces": False,
            "pad_token": PAD, "eos_token": TURN_END, "extra_special_tokens": PROCESSOR_TOKENS,
            "added_tokens_decoder": {str(t["id"]): {k: x for k, x in t.items() if k != "id"} for t in tokens},
        }  # fmt: skip
        content = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        return Tokenizer({**self._files, _CONFIG: content.encode()}, self._where)

    def for_transformers(self) -> Tokenizer:
        """As ``in_folder``, with the names by which transformers' InternVLProcessor finds the tokens of images."""
        files = self.in_folder()._files
        config = {"extra_special_tokens": PROCESSOR_TOKENS} | _read_json(files, _CONFIG, self._where)
        content = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        return Tokenizer({**files, _CONFIG: content.encode()}, self._where)

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
        files = _with_token(self._files, token, self._core.next_id() if i is None else i, self._where)
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
        is_word_level = isinstance(self._core, _FastCore) and self._core.is_word_level
        return tuple(t for t in self._core.special_texts if t != PRM) if is_word_level else TAGS

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

    def encode_literal(self, text: str) -> list[int]:
        """The ids of ``text`` with no special token among them; those of ``encode`` unless it holds a special token.

        Raises UserError as ``encode`` does, and when only a special id could stand for the text: a marker in a
        word-level tokenizer's text, a character that the vocabulary lacks.
        """
        ids = self._encode(self._core.encode_literal, text)
        if not self.special_ids.isdisjoint(ids):
            found = sorted(self.special_ids.intersection(ids))
            raise UserError(f"cannot tokenise {text[:80]!r} as plain text: it would give the special ids {found[:8]}")
        return ids

    @staticmethod
    def _encode(encode: Any, text: str) -> list[int]:
        try:
            return encode(text)
        except Exception as error:  # the libraries raise bare Exception, RuntimeError and TypeError
            raise UserError(f"cannot tokenise {text[:80]!r}: {_line(error)}") from None

    def encode_prompt(self, segments: Sequence[Segment]) -> tuple[list[int], list[int]]:
        """The ids of a prompt, ``bos`` in front, and the positions of its scores in order.

        Literal segments with no marker or score between them are encoded as one text. Raises UserError for a marker
        that is not one id and for a score that has no token to stand at.
        """
        ids, where, literal = list(self.bos), [], []
        for segment in segments:
            if segment.marker:
                ids += self._join(literal) + [self.id(segment.text)] * segment.count
            else:
                literal.append(segment.text)
            if segment.score:
                ids += self._join(literal)
                # counted alone: a score must not slip to the token of the text in front
                own = segment.count if segment.marker else len(self.encode_literal(segment.text))
                at = len(ids) - 1 - (segment.score == "before")
                if not own or at < 0:
                    raise UserError(f"no token to read a score {segment.score} {segment.text[:80]!r} of a prompt")
                where.append(at)
        return ids + self._join(literal), where

    def _join(self, literal: list[str]) -> list[int]:
        """The ids of the joined texts; empties the list."""
        text = "".join(literal)
        literal.clear()
        return self.encode_literal(text)

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text, as the original tokenizer gives it (InternLM2: not the inverse of ``encode``)."""
        return self._core.decode([int(i) for i in ids], skip_special)

    def id(self, token: str) -> int:
        """The one id of a marker token. Raises UserError when it is none or several."""
        known = self._core.lookup(token)
        ids = [] if known is None else self.encode(token)
        if ids != [known]:
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


class _FastCore:
    """A tokenizer of the ``tokenizers`` library."""

    def __init__(self, core: tokenizers.Tokenizer):
        self._core = core
        core.no_truncation()  # settings of a training run that the file may hold
        core.no_padding()
        self._literal = tokenizers.Tokenizer.from_str(core.to_str())
        self._literal.encode_special_tokens = True  # as ordinary text
        special = {i: t.content for i, t in core.get_added_tokens_decoder().items() if t.special}
        self.special_ids, self.special_texts = frozenset(special), tuple(special[i] for i in sorted(special))
        self.is_word_level = isinstance(core.model, models.WordLevel)

    def __len__(self) -> int:
        return self._core.get_vocab_size(with_added_tokens=True)

    def next_id(self) -> int:
        return max(self._core.get_vocab(with_added_tokens=True).values()) + 1

    def lookup(self, token: str) -> int | None:
        return self._core.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        return self._core.encode(text, add_special_tokens=False).ids

    def encode_literal(self, text: str) -> list[int]:
        return self._literal.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        return self._core.decode(ids, skip_special_tokens=skip_special)


def _line(error: Exception) -> str:
    """A library's message, short and on one line."""
    return " ".join(str(error).split())[:200]


def _required(files: Mapping[str, bytes], name: str, where: str) -> bytes:
    if name not in files:
        raise UserError(f"{where}: no tokenizer there ({name} is missing); copy the checkpoint's tokenizer files")
    return files[name]


def _read_json(files: Mapping[str, bytes], name: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(_required(files, name, where))
    except ValueError as error:
        raise UserError(f"{where}/{name}: not valid JSON ({error}); copy the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}/{name}: must hold a JSON object; copy the file again")
    return value


def _content(token: Any) -> Any:
    """The text of a token in a configuration: a string, or an object with flags."""
    return token.get("content") if isinstance(token, dict) else token


def _additional(config: Mapping[str, Any]) -> list[Any]:
    return [_content(token) for token in config.get("additional_special_tokens") or []]


def _added_tokens(config: Mapping[str, Any], where: str) -> dict[int, AddedToken]:
    """``added_tokens_decoder`` in the order of ids."""
    try:
        entries = sorted((int(i), entry) for i, entry in config["added_tokens_decoder"].items())
        added = {i: AddedToken(**entry) for i, entry in entries}
    except (KeyError, TypeError, ValueError, AttributeError):
        added = {}
    if not added or not all(token.content for token in added.values()):
        raise UserError(
            f"{where}/{_CONFIG}: no usable added_tokens_decoder (id to token); save the checkpoint's tokenizer again"
            " with transformers 4.34 or newer"
        )
    return added


def _read_fast(content: bytes, where: str) -> tokenizers.Tokenizer:
    """A tokenizer.json of our own: word-level, or byte-level with the markers."""
    core = _parse_fast(content, where)
    special = {t.content for t in core.get_added_tokens_decoder().values() if t.special}
    bpe = isinstance(core.model, models.BPE) and isinstance(core.decoder, decoders.ByteLevel)
    if not isinstance(core.model, models.WordLevel) and not (bpe and special.issuperset(MARKERS)):
        raise UserError(
            f"{where}: neither a word-level tokenizer nor one with the markers {', '.join(MARKERS)}; of a released"
            " checkpoint name the folder, not a file in it"
        )
    return core


def _byte_level_words() -> pre_tokenizers.PreTokenizer:
    """Qwen2's words (digits one by one) as bytes."""
    words = pre_tokenizers.Split(Regex(_QWEN2_WORDS), behavior="isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _with_words(content: str, words: Sequence[str]) -> str:
    """A BPE tokenizer.json in which ``words`` are vocabulary entries: merged from the left, after all other merges."""
    value = json.loads(content)
    vocab, merges = value["model"]["vocab"], value["model"]["merges"]
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                vocab[word[:end]] = len(vocab)
                merges.append([word[: end - 1], word[end - 1]])
    return json.dumps(value, ensure_ascii=False)


def _parse_fast(content: bytes, where: str) -> tokenizers.Tokenizer:
    try:
        core = tokenizers.Tokenizer.from_str(content.decode())
        entries = {token["content"]: token["id"] for token in json.loads(content)["added_tokens"]}
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{where}: not a tokenizer.json ({_line(error)}); copy the file again") from None
    for token, i in entries.items():
        if core.token_to_id(token) != i:  # the library renumbers silently
            raise UserError(f"{where}: the id {i} of {token!r} does not follow on the vocabulary; copy the file again")
    return core


def _qwen2(files: Mapping[str, bytes], added: Mapping[int, AddedToken], where: str) -> tokenizers.Tokenizer:
    """From tokenizer.json, or from vocab.json and merges.txt where there is none."""
    if _FAST in files:
        core = _parse_fast(files[_FAST], f"{where}/{_FAST}")
    else:
        vocab, text = _read_json(files, "vocab.json", where), _required(files, "merges.txt", where)
        try:
            lines = [line.strip() for line in text.decode().split("\n")]
            merges = [tuple(line.split()) for line in lines[lines[0].startswith("#version:") :] if line]
            core = tokenizers.Tokenizer(models.BPE(vocab, merges))
        except Exception as error:  # the library raises bare Exception
            raise UserError(
                f"{where}: vocab.json and merges.txt do not fit ({_line(error)}); copy both again"
            ) from None
        core.normalizer = normalizers.NFC()
        core.pre_tokenizer = _byte_level_words()
        core.decoder = decoders.ByteLevel()
    for token in added.values():
        if core.token_to_id(token.content) is None or _FAST not in files:
            (core.add_special_tokens if token.special else core.add_tokens)([token])
    return core


def _with_token(files: Mapping[str, bytes], token: str, i: int, where: str) -> dict[str, bytes]:
    """The files with one more special token, as add_tokens(special_tokens=True) and save_pretrained leave them."""
    new = {"content": token, **_NO_FLAGS}
    out = dict(files)

    def read(name: str) -> dict[str, Any]:
        return _read_json(files, name, where)

    def write(name: str, value: dict[str, Any], sort: bool) -> None:
        out[name] = (json.dumps(value, indent=2, sort_keys=sort, ensure_ascii=False) + "\n").encode()

    if _FAST in files:
        value = read(_FAST)
        value["added_tokens"] = [t for t in value["added_tokens"] if t["content"] != token]
        value["added_tokens"].append({"id": i, **new, "special": True})
        write(_FAST, value, sort=False)
    if _CONFIG in files:
        value = read(_CONFIG)
        value["added_tokens_decoder"] |= {str(i): {**new, "special": True}}
        value["additional_special_tokens"] = [*_additional(value), token]
        write(_CONFIG, value, sort=False)
    if _SPECIAL in files:
        value = read(_SPECIAL)
        value["additional_special_tokens"] = [*_additional(value), new]
        write(_SPECIAL, value, sort=True)
    if _ADDED in files:
        write(_ADDED, read(_ADDED) | {token: i}, sort=True)
    return out
