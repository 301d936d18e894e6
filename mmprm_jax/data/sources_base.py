"""What a named data set is: how its rows become records, and where its files are found."""

from __future__ import annotations

import base64
import dataclasses
import math
import re
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmprm_jax.data.prompts import without_tags
from mmprm_jax.records import Grading, UserError

_DATA_URL = re.compile(r"data:[\w.+/-]*(?:;[\w.=+-]+)*,", re.I)
_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"RIFF", b"II*\0", b"MM\0*")  # what image files begin with
_SHORTEST = 64  # characters of an encoded image
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MAX_TEXT = 100_000  # characters of a question, an answer or a response

Record = Any  # Problem, SFTExample, StepExample or StepDetectionExample
Picture = str | bytes  # a path as the row has it, or an encoded image


@dataclass(frozen=True)
class Item:
    """A good row: its record, still without images, and the images that belong to it.

    benchmark: {"prompt": the official prompt, "mode": a key of ``answers.official.MODES``, and what that mode needs};
    None for training data.
    """

    record: Record
    pictures: tuple[Picture, ...] = ()
    benchmark: Mapping[str, Any] | None = None
    solution: str = ""  # of a demonstration, as the data set has it
    file: str = ""  # where the row is: relative to the source's folder
    row: int = 0  # counted from 1 in its file


@dataclass(frozen=True)
class Refused:
    """A row that gives no record."""

    file: str
    row: int  # counted from 1 in its file; 0: the file as a whole
    id: str | None  # of the row, where it has one
    reason: str


@dataclass(frozen=True)
class Source:
    """A named data set.

    parse: a row (JSON object, or Parquet row as Python values) and the split to an Item, or several; raises UserError
    with the reason when the row is bad. ``Item.record.id`` may be "": the reader then takes the place in the file.
    """

    name: str
    kind: str  # "problem", "sft", "labels" (StepExample) or "steps" (StepDetectionExample): of the records
    hub: str  # where it is published on the Hugging Face hub; "": nowhere, or unknown
    files: Mapping[str, tuple[str, ...]]  # split to the patterns of its files, in order of preference
    parse: Callable[[Mapping[str, Any], str], Item | Sequence[Item]]
    image_folders: tuple[str, ...] = ("", "images")  # where image paths may start


def text(row: Mapping[str, Any], *keys: str, empty: bool = False) -> str:
    """The first of the keys that the row has, as text. Raises UserError when none is there, or it is no text."""
    key = next((k for k in keys if row.get(k) is not None), None)
    if key is None:
        raise UserError(f"no {' or '.join(keys)}")
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{key} is {type(value).__name__}, not a text")
    if value != value or value in (math.inf, -math.inf):
        raise UserError(f"{key} is {value}")
    value = str(value)
    if not value.strip() and not empty:
        raise UserError(f"{key} is empty")
    if len(value) > MAX_TEXT:
        raise UserError(f"{key} has {len(value)} characters; the limit is {MAX_TEXT}")
    return value


def optional(row: Mapping[str, Any], key: str) -> str:
    """The key's text; "" where the row has none. Raises UserError."""
    return "" if row.get(key) is None else text(row, key, empty=True)


def texts(value: Any, key: str) -> tuple[str, ...]:
    """A list of texts. Raises UserError."""
    if value is None:
        return ()
    if not isinstance(value, Iterable) or isinstance(value, str | Mapping):
        raise UserError(f"{key} is {type(value).__name__}, not a list")
    return tuple(text({key: item}, key, empty=True) for item in value)


def identity(row: Mapping[str, Any], *keys: str) -> str:
    """The row's id, "" when it has none."""
    value = next((row[key] for key in keys if row.get(key) is not None), "")
    return str(value) if isinstance(value, str | int) and len(str(value)) <= 500 else ""


def picture(value: Any) -> tuple[Picture, ...]:
    """No image, a path, an encoded image, its base64 text or data URL, a {bytes, path} of the ``datasets`` library or
    an {url} of a chat, or a list of these. Raises UserError."""
    if value is None or value == "":
        return ()
    if isinstance(value, list):
        return tuple(found for item in value for found in picture(item))
    if isinstance(value, Mapping):
        value = next((value[key] for key in ("bytes", "path", "url") if value.get(key)), None)
    if isinstance(value, str):
        value = _decoded(value)
    if not isinstance(value, str | bytes):
        raise UserError(f"the image is {type(value).__name__}, not a path or an encoded image")
    return (value,)


def pictures_of(row: Mapping[str, Any], *keys: str) -> tuple[Picture, ...]:
    """Of the keys that speak of a row's images, what the first one says of the most of them. Raises UserError."""
    return max((picture(row.get(key)) for key in keys), key=len)


def _decoded(value: str) -> str | bytes:
    """The bytes of an image that stands in a data URL or as base64 text; a path as it is. Raises UserError."""
    head = _DATA_URL.match(value)
    if not head and value[:8].lower().startswith(("http:", "https:")):
        raise UserError(f"the image is at {value:.80}; download it, and name the file")
    if not head and (len(value) < _SHORTEST or not _begins_an_image(value[:16])):
        return value
    try:
        if head and not head[0].lower().endswith(";base64,"):
            return urllib.parse.unquote_to_bytes(value[head.end() :])
        return base64.b64decode("".join(value[head.end() if head else 0 :].split()), validate=True)
    except ValueError:
        if head:
            raise UserError(f"the image is a damaged data URL {value:.40}…") from None
        return value


def _begins_an_image(text: str) -> bool:
    try:
        return base64.b64decode(text, validate=True).startswith(_MAGIC)
    except ValueError:
        return False


_SHOWN_LINE = re.compile(r"^[^\S\n]*[(（]?([A-K])\s*[:.)）、．]", re.MULTILINE)
_SHOWN_INLINE = re.compile(r"(?:^|(?<=[\s(（)）]))([A-K])\s*[.)）、．](?=\s*\S)")


def shown(question: str) -> tuple[str, ...]:
    """The texts of the choices (A), (B), … that end a question, a line each or three and more in a row; else none."""
    for pattern, least in ((_SHOWN_LINE, 2), (_SHOWN_INLINE, 3)):
        marks = list(pattern.finditer(question))
        first = max((i for i, mark in enumerate(marks) if mark[1] == "A"), default=len(marks))
        marks = marks[first:]
        if len(marks) >= least and [mark[1] for mark in marks] == list(LETTERS[: len(marks)]):
            ends = [mark.start() for mark in marks[1:]] + [len(question)]
            parts = (question[mark.end() : end] for mark, end in zip(marks, ends, strict=True))
            texts = (without_tags(part).strip() for part in parts)
            return tuple(text.removesuffix("(").removesuffix("（").strip() for text in texts)
    return ()


def own_choices(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The texts of a row's own ``choices`` or ``options``, a list or an object by letter, without letters before them.

    Tables have a column for each letter instead. Raises UserError.
    """
    key = next((key for key in ("choices", "options") if row.get(key)), "")
    given = row.get(key)
    if not key and row.get("A") and any(row.get(letter) for letter in LETTERS[1:]):
        key, given = "the columns A, B, …", {letter: row[letter] for letter in LETTERS if row.get(letter)}
    if isinstance(given, Mapping):
        given = {letter: option for letter, option in given.items() if option is not None}
        if list(given) != list(LETTERS[: len(given)]):
            raise UserError(f"{key} must be a list, or an object with the letters from A on, not {list(given)!r:.60}")
        given = list(given.values())
    found = texts(given, key)
    marked = [re.match(rf"\s*[(（]?{x}\s*[:.)）、．]\s*", o) for x, o in zip(LETTERS, found, strict=False)]
    ends = [mark.end() for mark in marked if mark]
    if len(ends) < len(found):
        return found
    return tuple(option[end:] for option, end in zip(found, ends, strict=True))


def with_choices(question: str, options: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """The question with its choices, shown once, and their texts.

    Raises UserError when the question itself shows others.
    """
    there = shown(question)
    if not there or not options:
        return question + listed(options), tuple(options)
    only_letters = list(options) == list(LETTERS[: len(options)])
    last = there[-1]  # which more may follow: another line, another sentence
    ends = {_bare(text) for text in (last, last.split("\n")[0], re.split(r"[.;。；]\s", last)[0])}
    agree = all(_bare(a) in ("", _bare(b)) for a, b in zip(there[:-1], options, strict=False))
    agree = agree and not ends.isdisjoint(("", _bare(options[-1])))
    if len(there) != len(options) or not (agree or only_letters):
        raise UserError(f"the question shows the choices {'; '.join(there)!r:.100}, the row has {list(options)!r:.100}")
    return question, there if only_letters else tuple(options)


def _bare(option: str) -> str:
    return " ".join(option.split()).rstrip(" .,;。；，").casefold()


def listed(options: Sequence[str]) -> str:
    """``\\nChoices:\\n(A) …``; nothing for no options, or options that are only their letters."""
    return "" if list(options) == list(LETTERS[: len(options)]) else listed_always(options)


def listed_always(options: Sequence[str]) -> str:
    """``\\nChoices:\\n(A) …`` for any options; nothing for none."""
    return "\nChoices:" + "".join(f"\n({x}) {o}" for x, o in zip(LETTERS, options, strict=False)) if options else ""


def grading(
    options: Sequence[str] = (), unit: str | None = None, precision: float | None = None, kind: str | None = None
) -> Grading:
    """Raises UserError."""
    try:
        return Grading.of(options, unit, precision, kind)
    except ValueError as error:
        raise UserError(str(error)) from None


def replace_fields(record: Record, **values: Any) -> Record:
    """The record with other values."""
    return dataclasses.replace(record, **values)
