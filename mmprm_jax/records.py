"""The records that cross the borders between stages, and their files.

Every stage reads JSONL files of one record type and writes JSONL files of the next, so each stage can run alone, on
another machine or on somebody else's data. A solution is a tuple of *segments*: the verbatim text of each
``<step>…</step>`` and, last, of the ``<answer>…</answer>``. A *prefix* is the first j segments of a solution.
Images are stored as paths relative to the file that names them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from etils import epath

from mmprm_jax import io
from mmprm_jax.errors import UserError as UserError


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question with a verifiable answer."""

    id: str
    question: str
    answer: str
    image: str | None = None  # path of the image file, relative to the problem file; None: text only
    source: str = ""  # which data set it comes from


@dataclasses.dataclass(frozen=True)
class SFTExample:
    """One demonstration for supervised fine-tuning of the policy."""

    id: str
    question: str
    response: str  # the whole assistant turn
    image: str | None = None
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


@dataclasses.dataclass(frozen=True)
class StepExample:
    """A solution with Monte Carlo counts per step: k[i] of n[i] rollouts from segments[: i + 1] were right."""

    id: str
    problem_id: str
    question: str
    segments: tuple[str, ...]
    k: tuple[int, ...]
    n: tuple[int, ...]  # 0: this prefix was not estimated and carries no label
    image: str | None = None


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


Record = TypeVar("Record")
_NESTED = {"problem": Problem, "candidate": Candidate, "rollouts": Rollout, "nodes": Node}


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _check(name: str, kind: str, value: Any) -> None:
    """Raises ValueError when a text or a list is something else, which would be found out late or never."""
    if kind in ("str", "str | None"):
        if not (isinstance(value, str) or (value is None and kind != "str")):
            raise ValueError(f"{name} must be a text, found {value!r:.80}")
    elif kind.startswith("tuple") and not isinstance(value, list | tuple):
        raise ValueError(f"{name} must be a list, found {value!r:.80}")
    elif kind == "tuple[str, ...]" and not all(isinstance(x, str) for x in value):
        raise ValueError(f"{name} must be a list of texts")


def from_dict(cls: type[Record], row: dict[str, Any]) -> Record:
    """Builds a record from its JSON object. Raises ValueError naming missing and unknown keys, and wrong types."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(row) - set(fields))
    missing = sorted(n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in row)
    if unknown or missing:
        raise ValueError(f"not a {cls.__name__}: missing keys {missing}, unknown keys {unknown}")
    values = {}
    for name, value in row.items():
        _check(name, fields[name].type, value)
        nested = _NESTED.get(name)
        if nested and isinstance(value, list):
            values[name] = tuple(from_dict(nested, v) for v in value)
        elif nested:
            values[name] = from_dict(nested, value)
        else:
            values[name] = _tuples(value)
    return cls(**values)


def to_json(record: Any) -> str:
    """One line of JSON; equal records give equal bytes."""
    text = json.dumps(dataclasses.asdict(record), ensure_ascii=False, separators=(",", ":"))
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
    """Yields the records of a JSONL file. Raises UserError naming the file and the line of the first bad one."""
    path = epath.Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file; the stage that writes it has not run, or the path is wrong")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"expected a JSON object, found {type(row).__name__}")
                record = from_dict(cls, row)
            except (ValueError, TypeError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: {error}") from None
            yield record


def read_all(path: epath.PathLike, cls: type[Record]) -> list[Record]:
    """All records of a file that must not be empty. Raises UserError."""
    records = list(read(path, cls))
    if not records:
        raise UserError(f"{path}: holds no {cls.__name__} record")
    return records
