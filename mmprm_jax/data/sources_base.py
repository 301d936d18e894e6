"""What a named data set is: how its rows become records, and where its files are found."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mmprm_jax.data.prompts import PLACEHOLDER
from mmprm_jax.records import UserError

MAX_TEXT = 100_000  # characters of a question, an answer or a response

Record = Any  # Problem, SFTExample or StepDetectionExample
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

    parse: a row (JSON object, or Parquet row as Python values) and the split to an Item; raises UserError with the
    reason when the row is bad. ``Item.record.id`` may be "": the reader then takes the place in the file.
    """

    name: str
    kind: str  # "problem", "sft" or "steps": of the records
    hub: str  # where it is published on the Hugging Face hub; "": nowhere, or unknown
    files: Mapping[str, tuple[str, ...]]  # split to the patterns of its files, in order of preference
    parse: Callable[[Mapping[str, Any], str], Item]
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
    """No image, a path, the {bytes, path} of the ``datasets`` library, or a list of one of these. Raises UserError."""
    if value is None or value == "":
        return ()
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, str | bytes):
        raise UserError(f"the image is {type(value).__name__}, not a path or an encoded image")
    return (value,)


def match_image_tags(question: str, images: int) -> str:
    """A question whose image tags fit: as many ``<image>`` as images, or none.

    Numbered tags (``<image1>``, ``<image_1>``) of a problem with one image become ``<image>`` when there is one, else
    words. Raises UserError when tags and images do not fit together.
    """
    numbered = re.compile(r"<image_?(\d+)>")
    if len(numbered.findall(question)) == 1 and images == 1:
        question = numbered.sub(PLACEHOLDER, question)
    question = numbered.sub(r"(image \1)", question)
    if question.count(PLACEHOLDER) not in (0, images):
        raise UserError(f"the text has {question.count(PLACEHOLDER)} {PLACEHOLDER} placeholders, but {images} images")
    return question


def replace_fields(record: Record, **values: Any) -> Record:
    """The record with other values."""
    return dataclasses.replace(record, **values)
