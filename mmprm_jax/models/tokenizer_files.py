"""The files of a tokenizer: reading them into what encodes and decodes, and adding a token to them.

A tokenizer.json says everything and is read as the ``tokenizers`` library reads it, whatever its kind: byte-level or
SentencePiece-like BPE, word-level, Unigram; saved by transformers 4 (tokens listed in ``added_tokens_decoder``) or 5
(``extra_special_tokens``). Without one, Qwen2's vocab.json with merges.txt and InternLM2's tokenizer.model are read.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from mmprm_jax.models.sentencepiece_tokenizer import SentencePieceCore
from mmprm_jax.records import UserError

CONFIG, FAST = "tokenizer_config.json", "tokenizer.json"
FAST_CLASS = "PreTrainedTokenizerFast"  # transformers' class for any tokenizer.json
_SPECIAL, _ADDED, _MODEL = "special_tokens_map.json", "added_tokens.json", "tokenizer.model"
FILES = (CONFIG, _SPECIAL, _ADDED, FAST, _MODEL, "vocab.json", "merges.txt", "chat_template.jinja")
_DEFAULTS: dict[str, dict[str, Any]] = {  # what a tokenizer_config.json leaves out, by class (without Fast)
    "InternLM2Tokenizer": {"add_bos_token": True, "bos_token": "<s>", "pad_token": "</s>"},
    "Qwen2Tokenizer": {"add_bos_token": False, "bos_token": None, "pad_token": "<|endoftext|>"},
}
_KINDS = {  # files of other kinds, and what they are
    _MODEL: "SentencePiece's tokenizer.model", "tekken.json": "Mistral's tekken.json", "spiece.model": "spiece.model",
    "sentencepiece.bpe.model": "sentencepiece.bpe.model", "qwen.tiktoken": "tiktoken's ranks",
    "tiktoken.model": "tiktoken's ranks", "vocab.txt": "WordPiece's vocab.txt",
    "vocab.json": "vocab.json with merges.txt",
}  # fmt: skip
FOREIGN = tuple(_KINDS)
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NO_FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


class FastCore:
    """A tokenizer of the ``tokenizers`` library."""

    def __init__(self, core: tokenizers.Tokenizer):
        self._core = core
        core.no_truncation()  # settings of a training run that the file may hold
        core.no_padding()
        content = core.to_str()
        self._literal = tokenizers.Tokenizer.from_str(content)
        self._literal.encode_special_tokens = True  # as ordinary text
        inside = json.dumps(_without_first_prefix(json.loads(content)))
        self._inside = tokenizers.Tokenizer.from_str(inside)
        self._inside.encode_special_tokens = True
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

    def encode_literal(self, text: str, inside: bool = False) -> list[int]:
        return (self._inside if inside else self._literal).encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        return self._core.decode(ids, skip_special_tokens=skip_special)


Core = FastCore | SentencePieceCore


@dataclasses.dataclass(frozen=True)
class Read:
    """What a folder's files say. bos: ids in front of every prompt, one or none; pad: fills rows."""

    core: Core
    bos: tuple[int, ...]
    pad: int


def read_folder(files: Mapping[str, bytes], where: str) -> Read:
    """The tokenizer of a model folder; CONFIG is among ``files``. Raises UserError beginning with ``where``."""
    config = read_json(files, CONFIG, where)
    kind = str(config.get("tokenizer_class")).removesuffix("Fast")
    core: FastCore | SentencePieceCore
    slow = kind == "InternLM2Tokenizer" and _MODEL in files  # its tokenizer.json, if any, is somebody's conversion
    if FAST in files and not slow:
        core = _complete(_parse_fast(files[FAST], f"{where}/{FAST}"), config, where)
    elif kind == "Qwen2Tokenizer":
        core = _complete(_qwen2(files, where), config, where)
    elif kind == "InternLM2Tokenizer":
        if "added_tokens_decoder" not in config:
            raise _unusable(where)
        core = SentencePieceCore(required(files, _MODEL, where), _added_tokens(config, where), where)
    else:
        raise UserError(_refusal(files, config, where))
    listed = read_json(files, _ADDED, where) if _ADDED in files else {}
    added = _added_tokens(config, where)
    for token, i in [*((t.content, i) for i, t in added.items()), *listed.items()]:
        if core.lookup(token) != i:
            raise UserError(
                f"{where}: the added token {token!r} should have the id {i} and has {core.lookup(token)};"
                f" the files are not of one checkpoint, copy them again"
            )
    config = {**_DEFAULTS.get(kind, {}), **config}
    if config.get("add_eos_token"):
        raise UserError(f"{where}/{CONFIG}: add_eos_token is not supported; set it to false")
    return Read(core, _begin(core, config, where), _pad(core, config, where))


def _begin(core: Core, config: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """The ids in front of a text: as tokenizer_config.json says, else as tokenizer.json's post-processor puts them."""
    if isinstance(config.get("add_bos_token"), bool):
        asked = config["add_bos_token"] and config.get("bos_token") is not None
        return (_named(core, config, "bos_token", where),) if asked else ()
    if isinstance(core, SentencePieceCore) or not core._core.encode("").ids:
        return ()
    plain, whole = core.encode("a"), core._core.encode("a").ids
    count = len(whole) - len(plain)
    if whole[count:] == plain and count <= 1:
        return tuple(whole[:count])
    if whole[:1] + plain == whole[: len(plain) + 1] and config.get("add_eos_token") is False:
        return (whole[0],)
    raise UserError(
        f"{where}/{FAST}: its post-processor puts {count} tokens around a text, and only one in front of it is"
        f" supported; set add_bos_token in {CONFIG} to true or false"
    )


def _pad(core: Core, config: Mapping[str, Any], where: str) -> int:
    """The token that is named; rows are masked, so without one any will do: the end's, or the first."""
    for key in ("pad_token", "eos_token"):
        if config.get(key) is not None:
            return _named(core, config, key, where)
    return 0


def _named(core: Core, config: Mapping[str, Any], key: str, where: str) -> int:
    """The id of the token that the configuration names under ``key``."""
    token = content_of(config.get(key))
    i = core.lookup(token) if isinstance(token, str) else None
    if i is None:
        raise UserError(f"{where}/{CONFIG}: {key} is {token!r}, which is no token; name one")
    return i


def _refusal(files: Mapping[str, bytes], config: Mapping[str, Any], where: str) -> str:
    """Why a folder without tokenizer.json cannot be read, with the name of its kind."""
    found = [text for name, text in _KINDS.items() if name in files]
    name = config.get("tokenizer_class")
    kind = f"unknown tokenizer_class {name!r}" + (f" ({found[0]})" if found else "")
    return (
        f"{where}: {kind} and no {FAST}, from which any kind is read; write one with transformers:"
        " AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )


def line(error: Exception) -> str:
    """A library's message, short and on one line."""
    return " ".join(str(error).split())[:200]


def required(files: Mapping[str, bytes], name: str, where: str) -> bytes:
    if name not in files:
        raise UserError(f"{where}: no tokenizer there ({name} is missing); copy the checkpoint's tokenizer files")
    return files[name]


def read_json(files: Mapping[str, bytes], name: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(required(files, name, where))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}/{name}: not valid JSON ({error}); copy the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}/{name}: must hold a JSON object; copy the file again")
    return value


def content_of(token: Any) -> Any:
    """The text of a token in a configuration: a string, or an object with flags."""
    return token.get("content") if isinstance(token, dict) else token


def _contents(tokens: Any) -> list[Any]:
    return [content_of(token) for token in tokens or []]


def _unusable(where: str) -> UserError:
    return UserError(
        f"{where}/{CONFIG}: no usable added_tokens_decoder (id to token); copy the released file again, which has one"
    )


def _added_tokens(config: Mapping[str, Any], where: str) -> dict[int, AddedToken]:
    """``added_tokens_decoder`` in the order of ids; transformers 5 leaves it out where there is a tokenizer.json."""
    try:
        entries = sorted((int(i), entry) for i, entry in config.get("added_tokens_decoder", {}).items())
        added = {i: AddedToken(**entry) for i, entry in entries}
    except (TypeError, ValueError, AttributeError):
        raise _unusable(where) from None
    if not all(token.content for token in added.values()):
        raise _unusable(where)
    return added


def read_own(content: bytes, where: str, markers: Sequence[str]) -> FastCore:
    """The file of a tokenizer of our own: word-level, or byte-level with the markers."""
    core = _parse_fast(content, where)
    special = {t.content for t in core.get_added_tokens_decoder().values() if t.special}
    bpe = isinstance(core.model, models.BPE) and isinstance(core.decoder, decoders.ByteLevel)
    if not isinstance(core.model, models.WordLevel) and not (bpe and special.issuperset(markers)):
        raise UserError(
            f"{where}: neither a word-level tokenizer nor one with the markers {', '.join(markers)}; of a released"
            " checkpoint name the folder, not a file in it"
        )
    return FastCore(core)


def byte_level_words() -> pre_tokenizers.PreTokenizer:
    """Qwen2's words (digits one by one) as bytes."""
    words = pre_tokenizers.Split(Regex(_QWEN2_WORDS), behavior="isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def with_words(content: str, words: Sequence[str]) -> str:
    """A BPE tokenizer.json in which ``words`` are vocabulary entries: merged from the left, after all other merges."""
    value = json.loads(content)
    vocab, merges = value["model"]["vocab"], value["model"]["merges"]
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                vocab[word[:end]] = len(vocab)
                merges.append([word[: end - 1], word[end - 1]])
    return json.dumps(value, ensure_ascii=False)


def _without_first_prefix(value: Any) -> Any:
    """A tokenizer.json for text behind a special token: a prefix that only the first text of all gets is left out."""
    if isinstance(value, list):
        return [_without_first_prefix(x) for x in value]
    pre = value.get("pre_tokenizer") if isinstance(value, dict) else None
    if isinstance(pre, dict):
        parts = [_never_first(part) for part in pre.get("pretokenizers", [])]
        return {**value, "pre_tokenizer": {**_never_first(pre), **({"pretokenizers": parts} if parts else {})}}
    return value


def _never_first(pre: dict[str, Any]) -> dict[str, Any]:
    first = pre.get("type") == "Metaspace" and pre.get("prepend_scheme") == "first"
    return {**pre, "prepend_scheme": "never"} if first else pre


def _parse_fast(content: bytes, where: str) -> tokenizers.Tokenizer:
    try:
        core = tokenizers.Tokenizer.from_str(content.decode())
        entries = {token["content"]: token["id"] for token in json.loads(content)["added_tokens"]}
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{where}: not a tokenizer.json ({line(error)}); copy the file again") from None
    for token, i in entries.items():
        if core.token_to_id(token) != i:  # the library renumbers silently
            raise UserError(f"{where}: the id {i} of {token!r} does not follow on the vocabulary; copy the file again")
    return core


def _qwen2(files: Mapping[str, bytes], where: str) -> tokenizers.Tokenizer:
    """From vocab.json and merges.txt."""
    vocab, text = read_json(files, "vocab.json", where), required(files, "merges.txt", where)
    try:
        lines = [row.strip() for row in text.decode().split("\n")]
        merges: Any = [tuple(row.split()) for row in lines[lines[0].startswith("#version:") :] if row]
        core = tokenizers.Tokenizer(models.BPE(vocab, merges))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{where}: vocab.json and merges.txt do not fit ({line(error)}); copy both again") from None
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = byte_level_words()
    core.decoder = decoders.ByteLevel()
    return core


def _complete(core: tokenizers.Tokenizer, config: Mapping[str, Any], where: str) -> FastCore:
    """``core`` with the tokens that only the configuration has, as transformers adds them when it loads."""
    known = {token.content for token in core.get_added_tokens_decoder().values()}
    for token in _added_tokens(config, where).values():
        if token.content not in known:
            (core.add_special_tokens if token.special else core.add_tokens)([token])
            known.add(token.content)
    for text in _named_tokens(config):
        if text not in known:
            core.add_special_tokens([AddedToken(text, special=True, normalized=False)])
            known.add(text)
    return FastCore(core)


def _named_tokens(config: Mapping[str, Any]) -> Iterator[str]:
    """The special tokens that a configuration names, in transformers' order."""
    extra = config.get("extra_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, dict) else extra
    more = config.get("additional_special_tokens") or []
    lists = [x for x in (extra, more) if isinstance(x, list)]
    for token in (*(config.get(key) for key in _NAMED), *(t for x in lists for t in x)):
        text = content_of(token)
        if isinstance(text, str) and text:
            yield text


def with_token(files: Mapping[str, bytes], token: str, i: int, where: str) -> dict[str, bytes]:
    """The files with one more special token, as add_tokens(special_tokens=True) and save_pretrained leave them."""
    new = {"content": token, **_NO_FLAGS}
    out = dict(files)

    def read(name: str) -> dict[str, Any]:
        return read_json(files, name, where)

    def write(name: str, value: dict[str, Any], sort: bool) -> None:
        out[name] = (json.dumps(value, indent=2, sort_keys=sort, ensure_ascii=False) + "\n").encode()

    if FAST in files:
        value = read(FAST)
        value["added_tokens"] = [t for t in value["added_tokens"] if t["content"] != token]
        value["added_tokens"].append({"id": i, **new, "special": True})
        write(FAST, value, sort=False)
    if CONFIG in files:
        value = read(CONFIG)
        if "added_tokens_decoder" in value:
            value["added_tokens_decoder"] |= {str(i): {**new, "special": True}}
            value["additional_special_tokens"] = [*_contents(value.get("additional_special_tokens")), token]
        elif isinstance(value.get("extra_special_tokens", []), list):  # transformers 5
            value["extra_special_tokens"] = [*_contents(value.get("extra_special_tokens")), token]
        write(CONFIG, value, sort=False)
    if _SPECIAL in files:
        value = read(_SPECIAL)
        value["additional_special_tokens"] = [*_contents(value.get("additional_special_tokens")), new]
        write(_SPECIAL, value, sort=True)
    if _ADDED in files:
        write(_ADDED, read(_ADDED) | {token: i}, sort=True)
    return out
