"""The records that cross the borders between stages, and their files.

Every stage reads JSONL files of one record type and writes JSONL files of the next, so each stage can run alone, on
another machine or on somebody else's data. A solution is a tuple of *segments*: the verbatim text of each
``<step>…</step>`` and, last, of the ``<answer>…</answer>``; of a policy that writes no tags, parts that joined are all
it wrote, the last one with the answer (``data.steps``). A *prefix* is the first j segments of a solution.
Images are stored as paths relative to the file that names them.
"""

from __future__ import annotations

import dataclasses
import decimal
import difflib
import json
import math
import os
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar, cast

from absl import logging
from etils import epath

from mmprm_jax import io, markup
from mmprm_jax.errors import UserError as UserError

KINDS = ("number", "choice", "expression", "equation", "interval", "tuple", "list", "text")  # of answers
MOST_ROLLOUTS = 2**24  # of a label: whole numbers up to there are exact in float32
_MOST_OPTIONS = 26
_MOST_DECIMALS = 40


@dataclasses.dataclass(frozen=True)
class Grading:
    """What a data set says about an answer beside the answer; every verdict goes by it. ``of`` makes one."""

    options: tuple[tuple[str, str], ...] = ()  # of a multiple choice: letter, text
    unit: str = ""  # of an answer that is a bare number
    precision: int | None = None  # decimals to which both sides are rounded
    kind: str = ""  # of the answer, one of KINDS; "": not told

    def __bool__(self) -> bool:
        """Whether it says anything."""
        return self != Grading()

    @classmethod
    def of(
        cls,
        options: Sequence[str] | Mapping[str, str] | None = None,
        unit: str | None = None,
        precision: float | None = None,
        kind: str | None = None,
    ) -> Grading:
        """options: texts in order, or by letter. Raises ValueError naming what is wrong."""
        texts = list(options.values()) if isinstance(options, Mapping) else options or ()
        listed = isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts)
        if not listed or len(texts) > _MOST_OPTIONS:
            raise ValueError('"options" is a list of at most 26 texts, or an object of letters and texts')
        if not isinstance(unit, str | None):
            raise ValueError('"unit" is a text')
        if isinstance(precision, bool) or not isinstance(precision, int | float | None):
            raise ValueError('"precision" is a number of decimals')
        if precision is not None and not (0 <= precision <= _MOST_DECIMALS and float(precision).is_integer()):
            raise ValueError(f"precision {precision!r:.40} is no number of decimals")
        if kind and kind not in KINDS:
            raise ValueError(f"kind {kind!r:.40} is none of {', '.join(KINDS)}")
        letters = list(options) if isinstance(options, Mapping) else string.ascii_uppercase
        pairs = tuple(zip(letters, texts, strict=False))
        return cls(pairs, unit or "", None if precision is None else int(precision), kind or "")

    def to_dict(self) -> dict[str, Any]:
        """What ``of`` reads, without what is not told."""
        letters, texts = [letter for letter, _ in self.options], [text for _, text in self.options]
        usual = letters == list(string.ascii_uppercase[: len(letters)])
        found = {"options": texts if usual else dict(self.options), "unit": self.unit, "precision": self.precision}
        return {key: value for key, value in {**found, "kind": self.kind}.items() if value not in ([], {}, "", None)}


class _Illustrated:
    """A record with images."""

    images: tuple[str, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.images, tuple):
            raise TypeError(f"images must be a tuple of file names, not {self.images!r:.80}")


@dataclasses.dataclass(frozen=True)
class Problem(_Illustrated):
    """A question with a verifiable answer."""

    id: str
    question: str
    answer: str
    images: tuple[str, ...] = ()  # paths of the image files, relative to the problem file, in order
    source: str = ""  # which data set it comes from
    grading: Grading = Grading()

    def _repr_html_(self) -> str:
        return markup.scoped(markup.problem(self))


@dataclasses.dataclass(frozen=True)
class SFTExample(_Illustrated):
    """One demonstration for supervised fine-tuning of the policy."""

    id: str
    question: str
    response: str  # the whole assistant turn
    images: tuple[str, ...] = ()
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One sampled completion of a prefix. ``segments`` holds only what follows the prefix."""

    segments: tuple[str, ...]  # empty: nothing could be parsed
    correct: bool  # the final answer was verified against the problem's answer
    n_tokens: int  # sampled tokens, the stop token included


@dataclasses.dataclass(frozen=True)
class Request:
    """Asks a sampler for ``n`` independent rollouts of ``problem`` that continue ``prefix``."""

    problem: Problem
    prefix: tuple[str, ...]
    n: int
    repeat: int = 0  # how often the same prefix was asked for before; a repeat has rollouts of its own


@dataclasses.dataclass(frozen=True)
class Failure:
    """A request that no sampler could answer."""

    reason: str


class Sampler(Protocol):
    """Answers requests, many at a time and in any order. Implementations: ``rollout.rollouts``, ``rollout.remote``."""

    def submit(self, requests: Sequence[Request]) -> None:
        """Takes requests on; returns at once."""

    def collect(self) -> list[tuple[Request, tuple[Rollout, ...] | Failure]]:
        """The answers that are ready, each request once; waits until there is one. Empty: nothing is outstanding."""

    def release(self, problem_id: str) -> None:
        """Nothing more will be asked of this problem: what is kept for it may go."""


@dataclasses.dataclass(frozen=True)
class Node:
    """A prefix whose value was estimated: k of n rollouts from it reached the right answer."""

    parent: int  # index into Tree.nodes; -1 for the root
    segments: tuple[str, ...]  # what this node adds to its parent's prefix; empty for the root
    k: int
    n: int
    visits: int  # how often a rollout of this node was selected
    rollouts: tuple[Rollout, ...]


@dataclasses.dataclass(frozen=True)
class Tree:
    """The finished search tree of one problem. Parents come before their children."""

    problem: Problem
    nodes: tuple[Node, ...]
    searches: tuple[tuple[int, int], ...]  # (node, index of the rollout in it) in the order of selection

    def prefix(self, node: int) -> tuple[str, ...]:
        """All segments from the root to ``node``."""
        parts: list[tuple[str, ...]] = []
        while node >= 0:
            parts.append(self.nodes[node].segments)
            node = self.nodes[node].parent
        return tuple(segment for part in reversed(parts) for segment in part)

    def _repr_html_(self) -> str:
        return markup.scoped(markup.problem(self.problem) + markup.tree(self))


@dataclasses.dataclass(frozen=True)
class StepExample(_Illustrated):
    """A solution with a label per step: k[i] of n[i] rollouts from segments[: i + 1] were right.

    Labels that others made are counts, too: right or wrong is k = 1 or 0 of n = 1, and a number v in [0, 1], which is
    no count of anything, is k = v of n = 1.
    """

    id: str
    problem_id: str
    question: str
    segments: tuple[str, ...]
    k: tuple[float, ...]  # whole numbers, but for labels that were numbers in [0, 1]
    n: tuple[int, ...]  # 0: this prefix was not estimated and carries no label
    images: tuple[str, ...] = ()

    @property
    def counted(self) -> bool:
        """Whether every label is a count."""
        return all(k % 1 == 0 for k in self.k)

    def check(self) -> None:
        """Raises ValueError unless there are labels as above for each step."""
        lengths = {len(self.segments), len(self.k), len(self.n)}
        if len(lengths) > 1 or not all(0 <= k <= n for k, n in zip(self.k, self.n, strict=False)):
            raise ValueError(f"needs counts 0 <= k <= n for each of its {len(self.segments)} steps")
        if max(self.n, default=0) > MOST_ROLLOUTS:
            raise ValueError(f"n {max(self.n)} is more than {MOST_ROLLOUTS}")
        for k, n in zip(self.k, self.n, strict=True):
            if k % 1 and n != 1:
                raise ValueError(f"k {k!r} of n {n} is no whole number, which only a label of n 1 may be")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One of the N sampled solutions of a problem."""

    problem_id: str
    segments: tuple[str, ...]
    answer: str | None  # the extracted final answer; None: there is none
    correct: bool
    logprob: float
    n_tokens: int


@dataclasses.dataclass(frozen=True)
class ScoredCandidate:
    """A candidate with one PRM score in [0, 1] per segment."""

    candidate: Candidate
    scores: tuple[float, ...]

    def _repr_html_(self) -> str:
        verdict = "right" if self.candidate.correct else "wrong"
        answer = "no answer" if self.candidate.answer is None else self.candidate.answer
        title = f'<p class="{verdict}"><span class="text">{markup.escape(answer)}</span></p>'
        return markup.scoped(title + markup.solution(self.candidate.segments, self.scores))


Record = TypeVar("Record")
_MOST_DIGITS = 400  # of an answer that is a number in JSON
_NESTED = {"problem": Problem, "candidate": Candidate, "rollouts": Rollout, "nodes": Node, "grading": Grading}


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


class _Number(float):
    """A number that knows how it was written: the decimals of an answer count."""

    text: str

    def __new__(cls, text: str) -> _Number:
        number = super().__new__(cls, text)
        number.text = text
        return number


def number_text(value: int | float) -> str:
    """A number from JSON as a text without an exponent. Raises ValueError for one that is not finite, or huge."""
    if isinstance(value, int):
        return str(value)
    number = decimal.Decimal(getattr(value, "text", repr(value)))
    if not math.isfinite(value) or abs(number.adjusted()) > _MOST_DIGITS:
        raise ValueError(f"{value!r:.80} is no number that can be an answer")
    return format(number, "f")


def _as_text(name: str, value: Any) -> Any:
    """Numbers as texts where people write numbers: ids are whole ones, answers any."""
    whole = type(value) is int and name in ("id", "problem_id", "source", "answer")
    if whole or (isinstance(value, float) and name == "answer"):
        return number_text(value)
    return value


_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "str": (str, "text"),
    "int": (int, "whole number"),
    "float": ((int, float), "number"),
    "bool": (bool, "truth value"),
}


def _check(name: str, kind: str, value: Any) -> None:
    """Raises ValueError when a value has another type, which would be found out late or never."""
    if kind.startswith("tuple"):
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name} must be a list, found {value!r:.80}")
        items, kind = value, kind.removeprefix("tuple[").removesuffix(", ...]")
    else:
        items = (value,)
    kind, _, optional = kind.partition(" | ")
    if kind not in _KINDS:
        return
    types, word = _KINDS[kind]
    for item in items:
        if item is None and optional:
            continue
        if not isinstance(item, types) or (kind != "bool" and isinstance(item, bool)):
            what = f"a {word}" if items is not value else f"a list of {word}s"
            raise ValueError(f"{name} must be {what}, found {value!r:.80}")


def _all_images(row: dict[str, Any]) -> dict[str, Any]:
    """``row`` with ``images`` where it says ``image``, as files of one image have it. Raises ValueError."""
    row = dict(row)
    image, images = row.pop("image"), row.get("images") or []
    _check("image", "str | None", image)
    if image is not None and images and image not in images:
        raise ValueError("image and images name different files; leave one out")
    return row | {"images": images or ([] if image is None else [image])}


def from_dict(cls: type[Record], row: dict[str, Any], unknown: Callable[[type, str], None] | None = None) -> Record:
    """Builds a record from its JSON object.

    Whole numbers are taken as ids, numbers as answers, ``image`` as the only image, null as the default where there is
    one. ``unknown`` is called with every key that the record does not have; None: such a key is an error. Raises
    ValueError naming missing and unknown keys, and wrong types.
    """
    fields = {f.name: f for f in dataclasses.fields(cast(Any, cls))}
    if "image" in row and "image" not in fields and "images" in fields:
        row = _all_images(row)
    others = sorted(set(row) - set(fields))
    missing = sorted(n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in row)
    if missing or (others and unknown is None):
        raise ValueError(f"not a {cls.__name__}: missing keys {missing}, unknown keys {others}")
    if unknown:
        for name in others:
            unknown(cls, name)
    values: dict[str, Any] = {}
    for name in [name for name in row if name in fields]:
        value, nested = _as_text(name, row[name]), _NESTED.get(name)
        if value is None and fields[name].default is not dataclasses.MISSING:
            continue
        _check(name, str(fields[name].type), value)
        if nested is Grading:
            values[name] = grading_of(value, unknown)
        elif nested and isinstance(value, list):
            values[name] = tuple(from_dict(nested, v, unknown) for v in value)
        elif nested:
            values[name] = from_dict(nested, value, unknown)
        else:
            values[name] = _tuples(value)
    return cls(**values)


_warned: set[tuple[str, str]] = set()


def warn_unknown(path: epath.PathLike, kind: str, key: str, known: Iterable[str]) -> None:
    """Warns, once for each file and key, that a key is none of a record's; names the one that may have been meant."""
    if (os.fspath(path), key) in _warned:
        return
    _warned.add((os.fspath(path), key))
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.7)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    logging.warning("%s: the key %.80r is none of a %s's and is not used%s", path, key, kind, meant)


def grading_of(row: Any, unknown: Callable[[type, str], None] | None = None) -> Grading:
    """A grading from its JSON object. unknown: as in ``from_dict``. Raises ValueError."""
    if not isinstance(row, Mapping):
        raise ValueError(f"grading must be an object, found {row!r:.80}")
    fields = [f.name for f in dataclasses.fields(Grading)]
    others = sorted(set(row) - set(fields))
    if others and unknown is None:
        raise ValueError(f"not a Grading: unknown keys {others}")
    if unknown:
        for name in others:
            unknown(Grading, name)
    try:
        return Grading.of(**{name: row[name] for name in fields if name in row})
    except ValueError as error:
        raise ValueError(f"grading: {error}") from None


def _plain(value: Any) -> Any:
    """As ``dataclasses.asdict``, in the form that files have always had where it can say all.

    A single image is ``image``; a grading that says nothing is left out.
    """
    if isinstance(value, Grading):
        return value.to_dict()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    row = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if not isinstance(value, _Illustrated):
        return row
    if len(value.images) < 2:
        image = value.images[0] if value.images else None
        row = {"image" if name == "images" else name: image if name == "images" else x for name, x in row.items()}
    return {name: x for name, x in row.items() if name != "grading" or x}


def to_json(record: Any) -> str:
    """One line of JSON; equal records give equal bytes."""
    text = json.dumps(_plain(record), ensure_ascii=False, separators=(",", ":"))
    # half a surrogate pair, which UTF-8 cannot hold, stays a JSON escape
    return text.encode(errors="backslashreplace").decode()


def write(path: epath.PathLike, records: Iterable[Any], noted: bool = False) -> int:
    """Writes a JSONL file in a stream, whole or not at all. Returns the number of records.

    noted: with a checksum beside it, as ``io.replacing``.
    """
    count = 0
    with io.replacing(path, noted) as file:
        for record in records:
            file.write(to_json(record).encode() + b"\n")
            count += 1
    return count


def read(path: epath.PathLike, cls: type[Record]) -> Iterator[Record]:
    """Yields the records of a JSONL file; of keys that they do not have it warns once.

    Raises UserError naming the file and the line of the first bad one.
    """
    for _, record in read_numbered(path, cls):
        yield record


def read_numbered(path: epath.PathLike, cls: type[Record]) -> Iterator[tuple[int, Record]]:
    """As ``read``, with the number of each record's line, from 1."""
    path = epath.Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file; the stage that writes it has not run, or the path is wrong")
    exact = "answer" in (f.name for f in dataclasses.fields(cast(Any, cls)))

    def unknown(cls: type, key: str) -> None:
        known = [f.name for f in dataclasses.fields(cls)]
        warn_unknown(path, cls.__name__, key, [*known, *["image"] * ("images" in known)])

    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line, parse_float=_Number if exact else None)
                if not isinstance(row, dict):
                    raise ValueError(f"expected a JSON object, found {type(row).__name__}")
                record = from_dict(cls, row, unknown)
            except (ValueError, TypeError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: {error}") from None
            yield number, record


def read_all(path: epath.PathLike, cls: type[Record]) -> list[Record]:
    """All records of a file that must not be empty. Raises UserError."""
    records = list(read(path, cls))
    if not records:
        raise UserError(f"{path}: holds no {cls.__name__} record")
    return records


def read_problems(path: epath.PathLike) -> list[Problem]:
    """All problems of a file that must not be empty. Raises UserError, also when an id is there twice."""
    problems, seen = read_all(path, Problem), set()
    for problem in problems:
        if problem.id in seen:
            raise UserError(f"{path}: the id {problem.id!r} is there twice; solutions are matched to problems by it")
        seen.add(problem.id)
    return problems


def open_problems(path: epath.PathLike) -> list[Problem]:
    """As ``read_problems``, their images by paths that can be opened from here."""
    folder = epath.Path(path).parent
    return [with_folder(problem, folder) for problem in read_problems(path)]


Illustrated = TypeVar("Illustrated", bound=_Illustrated)


def with_folder(record: Illustrated, folder: epath.PathLike) -> Illustrated:
    """A record whose images were relative to ``folder``, with paths that can be opened from here."""
    images = tuple(str(epath.Path(folder) / name) for name in record.images)
    return dataclasses.replace(cast(Any, record), images=images)
