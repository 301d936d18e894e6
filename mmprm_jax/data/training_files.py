"""Encoded training examples in ArrayRecord files: written once, in a stream, and read at random.

    NAME.array_record   one record per example
    NAME.json           what is in it and what it was made with; it is written last, so there is none beside half a file

A record is a line of JSON (the example's id and its images, each with its number of tiles), then the arrays of its
tokens, little-endian: token ids int32 [L], then the labels of the set's kind (``LABELS``), each [L].
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from absl import logging
from array_record.python import array_record_module
from etils import epath

from mmprm_jax import io
from mmprm_jax.records import UserError

FORMAT = 1
BINS = 32  # of the histogram of lengths
LABELS: Mapping[str, Mapping[str, np.dtype]] = {
    "policy": {"response": np.dtype(bool)},  # the token is to be predicted
    "prm": {"k": np.dtype("<i4"), "n": np.dtype("<i4")},  # k of n rollouts were right; n = 0: no label
    "labels": {"k": np.dtype("<f4"), "n": np.dtype("<i4")},  # the same; where n = 1, k may be a number in [0, 1]
}


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A training example: ids int32 [L], labels [L] by name, and its images in the order of their tokens."""

    id: str
    tokens: np.ndarray
    labels: Mapping[str, np.ndarray]
    images: tuple[tuple[str, int], ...] = ()  # file, relative to the folder of the records; number of tiles

    @property
    def tiles(self) -> int:
        """Tiles of all images."""
        return sum(count for _, count in self.images)

    def to_bytes(self, kind: str) -> bytes:
        """The record."""
        head = json.dumps({"id": self.id, "images": self.images}, separators=(",", ":")).encode() + b"\n"
        arrays: list[tuple[np.ndarray, Any]] = [(self.tokens, "<i4")]
        arrays += [(self.labels[name], dtype) for name, dtype in LABELS[kind].items()]
        # a number in [0, 1] would become 0 in an array of counts: that is an error
        return head + b"".join(np.asarray(a).astype(dtype, "C", "same_kind").tobytes() for a, dtype in arrays)

    @classmethod
    def from_bytes(cls, record: bytes, kind: str) -> Encoded:
        """Reads a record. Raises ValueError, KeyError or TypeError if it is none of that kind."""
        head, body = record.split(b"\n", 1)
        head, labels = json.loads(head), LABELS[kind]
        length, rest = divmod(len(body), 4 + sum(dtype.itemsize for dtype in labels.values()))
        if rest:
            raise ValueError(f"{len(body)} bytes are no whole number of tokens")
        arrays, at = {}, 0
        for name, dtype in {"tokens": np.dtype("<i4"), **labels}.items():
            arrays[name] = np.frombuffer(body, dtype, length, at)
            at += length * dtype.itemsize
        return cls(head["id"], arrays.pop("tokens"), arrays, tuple((name, int(n)) for name, n in head["images"]))


def _paths(path: epath.PathLike) -> tuple[epath.Path, epath.Path]:
    path = epath.Path(path)
    return path.parent / f"{path.name}.array_record", path.parent / f"{path.name}.json"


def checksum(paths: Iterable[epath.PathLike]) -> str:
    """A number that changes with the content of the files, for ``made_with``. Raises UserError if one is missing."""
    found = 0
    for path in paths:
        if not epath.Path(path).exists():
            raise UserError(f"{path}: no such file; put it there, or take its name out of the settings")
        with epath.Path(path).open("rb") as file:
            while block := file.read(2**20):
                found = zlib.crc32(block, found)
    return f"{found:08x}"


def _remote(path: epath.Path) -> bool:
    return "://" in os.fspath(path)  # ArrayRecord reads and writes local files only


def _summary(path: epath.PathLike) -> dict[str, Any]:
    """The JSON of a complete set. Raises UserError when it is missing or damaged."""
    file, summary = _paths(path)
    if not summary.exists():
        raise UserError(f"{summary}: no such file; what writes the training set has not run, or was interrupted")
    again = "delete it and run the stage again"
    try:
        found = io.read_sealed(summary, again, unsealed=True)
        if found["format"] != FORMAT:
            raise UserError(f"{summary}: format {found['format']}, this version reads {FORMAT}; {again}")
        missing = {"kind", "count", "longest", "most_tiles", "checksum", "bytes", "made_with"} - found.keys()
        if missing:
            raise ValueError(f"without {', '.join(sorted(missing))}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{summary}: damaged ({type(error).__name__}: {error}); {again}") from None
    if not file.exists() or file.stat().length != found["bytes"]:
        size = f"{file.stat().length} bytes" if file.exists() else "no file"
        raise UserError(f"{file}: {size} where {summary.name} says {found['bytes']} bytes; {again}")
    return found


def is_current(path: epath.PathLike, made_with: Mapping[str, Any]) -> bool:
    """Whether a complete set is there that was made with this."""
    try:
        return not _differences(_summary(path), made_with)
    except UserError:
        return False


def _differences(summary: Mapping[str, Any], made_with: Mapping[str, Any]) -> list[str]:
    wanted, found = json.loads(json.dumps(made_with)), summary["made_with"]
    return [f"{key} {found.get(key)!r}, not {value!r}" for key, value in wanted.items() if found.get(key) != value]


class _Count:
    """What the JSON says of the examples."""

    def __init__(self, max_tokens: int, max_tiles: int):
        self.max_tokens, self.max_tiles, self.width = max_tokens, max_tiles, -(-max_tokens // BINS)
        self.count = self.tokens = self.tiles = self.longest = self.most_tiles = 0
        self.histogram = [0] * BINS
        self.too_long: list[str] = []
        self.too_many_tiles: list[str] = []

    def add(self, example: Encoded) -> bool:
        """Counts an example; False: it exceeds a limit and is left out."""
        length, tiles = len(example.tokens), example.tiles
        if length > self.max_tokens or tiles > self.max_tiles:
            (self.too_long if length > self.max_tokens else self.too_many_tiles).append(example.id)
            return False
        self.count, self.tokens, self.tiles = self.count + 1, self.tokens + length, self.tiles + tiles
        self.longest, self.most_tiles = max(self.longest, length), max(self.most_tiles, tiles)
        self.histogram[max(0, length - 1) // self.width] += 1
        return True

    def reasons(self) -> str:
        """Why examples were left out, in words; empty if none was."""
        kinds = ((self.too_long, f"{self.max_tokens} tokens"), (self.too_many_tiles, f"{self.max_tiles} tiles"))
        return ", ".join(f"{len(ids)} with more than {limit} (the first is {ids[0]})" for ids, limit in kinds if ids)

    def to_dict(self) -> dict[str, Any]:
        names = ("count", "tokens", "tiles", "longest", "most_tiles")
        return {name: getattr(self, name) for name in names} | {
            "left_out": {"too_long": len(self.too_long), "too_many_tiles": len(self.too_many_tiles)},
            "lengths": {"bin": self.width, "counts": self.histogram},
        }


def write(
    path: epath.PathLike, kind: str, examples: Iterable[Encoded], max_tokens: int, max_tiles: int,
    made_with: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Writes the examples in a stream; one that exceeds a limit is left out and counted. Returns what the JSON says.

    A set that was there is replaced. made_with: plain JSON, to be compared when it is read. Raises UserError when no
    example is left.
    """
    file, summary = _paths(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    summary.unlink(missing_ok=True)
    counted, check = _Count(max_tokens, max_tiles), 0
    with tempfile.TemporaryDirectory(dir=None if _remote(file) else file.parent) as folder:
        local = epath.Path(folder) / file.name
        writer = array_record_module.ArrayRecordWriter(os.fspath(local), "group_size:1")
        try:
            for example in examples:
                if counted.add(example):
                    record = example.to_bytes(kind)
                    check = zlib.crc32(record, check)
                    writer.write(record)
        finally:
            writer.close()
        if counted.reasons():
            logging.warning("%s: left out: %s", file, counted.reasons())
        if not counted.count:
            raise UserError(f"{file}: no example to train on; left out: {counted.reasons() or 'none, there was none'}")
        found = {"format": FORMAT, "kind": kind, **counted.to_dict(), "checksum": f"{check:08x}"}
        found["bytes"] = local.stat().length
        if _remote(file):
            local.copy(file, overwrite=True)
        else:
            local.replace(file)
    found["made_with"] = dict(made_with)
    io.write_sealed(summary, found)
    return found


class TrainingSet:
    """A set of examples of one kind, read at random; ``images`` is the folder that their images are relative to.

    Reading is safe in threads. ``summary``: what its JSON says.
    """

    def __init__(
        self, path: epath.PathLike, kind: str, images: epath.PathLike, made_with: Mapping[str, Any] | None = None
    ):
        """made_with: what the set must have been made with, by name. Raises UserError."""
        self.path, self.kind, self.images = _paths(path)[0], kind, epath.Path(images)
        self.summary = _summary(path)
        if self.summary["kind"] != kind:
            raise UserError(f"{self.path}: examples of the kind {self.summary['kind']!r}; {kind!r} is needed")
        if differences := _differences(self.summary, made_with or {}):
            raise UserError(f"{self.path}: made with {'; '.join(differences)}; delete it and run the stage again")
        self._folder, local = None, self.path
        if _remote(self.path):
            self._folder = tempfile.TemporaryDirectory()  # lives as long as the set
            local = epath.Path(self._folder.name) / self.path.name
            self.path.copy(local)
        # without readahead: records are read in a random order
        self._reader = array_record_module.ArrayRecordReader(os.fspath(local), options="readahead_buffer_size:0")
        if self._reader.num_records() != len(self):
            raise UserError(
                f"{self.path}: damaged, {self._reader.num_records()} records instead of {len(self)}; delete it and run"
                " the stage again"
            )

    def __len__(self) -> int:
        return self.summary["count"]

    def __getitem__(self, row: int) -> Encoded:
        """Raises UserError naming the file and the row."""
        try:
            return Encoded.from_bytes(self._reader.read([row])[0], self.kind)
        except (RuntimeError, ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(f"{self.path}, row {row}: damaged ({error}); delete it and run the stage again") from None
