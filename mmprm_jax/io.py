"""Files that are whole or not there, and that show when they are no longer what was written.

- ``replacing``, ``write`` and ``write_json`` put a file in its place when it is complete.
- A *noted* file has its size and checksum in ``sums/<name>.json`` beside it, written before the file itself: ``check``
  compares them. This serves files inside of unfinished work.
- A *sealed* JSON object carries a checksum over its own content (``write_sealed``, ``read_sealed``).
- A checked line is a line with its checksum in front (``checked_line``, ``read_checked``), for journals that grow.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

from absl import logging
from etils import epath

from mmprm_jax.errors import UserError

SUMS = "sums"
_SEAL = "seal"
_BLOCK = 2**20
_unnoted: set[str] = set()  # folders of which it has been said that their files cannot be checked


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is one of an object store, which can neither append nor fsync."""
    return "://" in os.fspath(path)


def read_at_most(path: epath.PathLike, most: int) -> bytes:
    """The bytes of a file, cut behind ``most`` + 1: whoever gets more than ``most`` knows that it is too large.

    Raises OSError, and FileNotFoundError, also for a pipe or a device, which may have no end.
    """
    name = os.fspath(path)
    if not is_remote(path) and not (stat.S_ISREG(os.stat(name).st_mode) or os.path.isdir(name)):
        raise OSError(f"{name} is no regular file")
    with epath.Path(path).open("rb") as file:
        return file.read(most + 1)


# ------------------------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def replacing(path: epath.PathLike, noted: bool = False, lasting: bool = False) -> Iterator[BinaryIO]:
    """A binary file that takes the place of ``path`` at the end of the context, and not at all after an error.

    noted: with a checksum for ``check``. lasting: even if the machine, not only this process, is switched off.
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{path.name}.tmp"
    with temporary.open("wb") as file:
        yield file
        if lasting and not is_remote(path):
            file.flush()
            os.fsync(file.fileno())
    if noted:  # first: a file without its note could not be checked
        write_sealed(_note(path), dataclasses.asdict(_read(temporary, _has_records(path))), lasting)
    temporary.replace(path)


def write(path: epath.PathLike, content: bytes | str, noted: bool = False, lasting: bool = False) -> None:
    """Writes a whole file; as ``replacing``. Half a surrogate pair, which UTF-8 cannot hold, becomes a JSON escape."""
    with replacing(path, noted, lasting) as file:
        file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)


def write_json(path: epath.PathLike, values: Mapping[str, Any], lasting: bool = False) -> None:
    """Writes strict JSON; a NaN or an infinity becomes null."""
    write(path, json.dumps(_strict(values), indent=1, allow_nan=False) + "\n", lasting=lasting)


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ------------------------------------------------------------------------------------------------- sealed JSON


def seal_of(values: Mapping[str, Any]) -> str:
    """The sha256 of a JSON object, whatever the order of its keys."""
    text = json.dumps(_strict(values), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_sealed(path: epath.PathLike, values: Mapping[str, Any], lasting: bool = False) -> None:
    """As ``write_json``, with a checksum of the content in it."""
    write_json(path, {**values, _SEAL: seal_of(values)}, lasting)


def read_sealed(path: epath.PathLike, remedy: str, unsealed: bool = False) -> dict[str, Any]:
    """The object that ``write_sealed`` wrote. Raises UserError in one line if it is any other.

    remedy: what to do then, for the message. unsealed: a file without a checksum is taken as it is.
    """
    try:
        found = json.loads(epath.Path(path).read_bytes())
        if not isinstance(found, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, not JSON ({' '.join(str(error).split())}); {remedy}") from None
    seal = found.pop(_SEAL, None)
    if seal != seal_of(found) and not (unsealed and seal is None):
        raise UserError(f"{path}: damaged, its content does not fit its seal; {remedy}")
    return found


# ------------------------------------------------------------------------------------------------- checksums


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a file was when it was written."""

    bytes: int
    sha256: str | None  # None: only the size is known
    records: int | None = None  # lines of a JSONL file


_measured: dict[tuple[Any, ...], Entry] = {}  # a file is read once by a process, as long as it stays the same


def _has_records(path: epath.Path) -> bool:
    return path.suffix == ".jsonl"


def measure(path: epath.PathLike) -> Entry:
    """Size, checksum and number of records of a file."""
    path = epath.Path(path)
    version: tuple[Any, ...]
    if is_remote(path):
        remote = path.stat()
        version = (os.fspath(path), remote.length, remote.mtime)
    else:
        local = os.stat(path)
        version = (os.fspath(path), local.st_size, local.st_mtime_ns, local.st_ino)
    if version not in _measured:
        _measured[version] = _read(path, _has_records(path))
    return _measured[version]


def _read(path: epath.Path, records: bool) -> Entry:
    digest, size, lines = hashlib.sha256(), 0, 0
    last = b"\n"
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
            lines += block.count(b"\n") if records else 0
            last = block[-1:]
    return Entry(size, digest.hexdigest(), lines + (last != b"\n") if records else None)


def walk(folder: epath.Path, skipped: Callable[[str], bool] = lambda name: False) -> Iterator[epath.Path]:
    """All files below a folder, in order, without those, and the folders, whose name is ``skipped``."""
    for path in sorted(folder.iterdir()):
        if not skipped(path.name):
            yield from walk(path, skipped) if path.is_dir() else (path,)


def length(path: epath.PathLike) -> int:
    """Bytes of a file."""
    return epath.Path(path).stat().length if is_remote(path) else os.stat(path).st_size


def difference(path: epath.PathLike, entry: Entry, content: bool = True) -> str:
    """In what a file differs from ``entry``, in words; empty if it does not. content: False looks at the size only."""
    try:
        size = length(path)
        if size != entry.bytes:
            return f"{_size(measure(path))} where there were {_size(entry)}"
        if not content or entry.sha256 is None or measure(path).sha256 == entry.sha256:
            return ""
    except (FileNotFoundError, NotADirectoryError):
        return "gone"
    except IsADirectoryError:
        return "a folder"
    return "other content"


def _size(entry: Entry) -> str:
    return f"{entry.bytes} bytes" + (f" ({entry.records} records)" if entry.records is not None else "")


def _note(path: epath.Path) -> epath.Path:
    return path.parent / SUMS / f"{path.name}.json"


def check(path: epath.PathLike) -> None:
    """Compares a noted file with its note. Raises UserError; a file without a note is taken, with a warning."""
    path = epath.Path(path)
    note = _note(path)
    if not note.exists():
        if os.fspath(path.parent) not in _unnoted:
            logging.warning("%s: there is no checksum of %s, or more files; they are taken as they are", path.parent,
                            path.name)  # fmt: skip
            _unnoted.add(os.fspath(path.parent))
        return
    remedy = "delete it, the same command goes on with {} as it is"
    try:
        entry = Entry(**read_sealed(note, remedy.format(path.name)))
    except TypeError:
        raise UserError(f"{note}: damaged; {remedy.format(path.name)}") from None
    if found := difference(path, entry):
        raise UserError(f"{path}: damaged, {found}; delete it, the same command makes it again")


# ------------------------------------------------------------------------------------------------- checked lines


def checked_line(text: str) -> str:
    """``text``, which has no line break, with its checksum in front."""
    return f"{zlib.crc32(text.encode()):08x} {text}\n"


def read_checked(path: epath.PathLike) -> tuple[list[str], bool]:
    """The texts of the intact lines of a file, and whether all its lines are intact; none if there is no file."""
    path = epath.Path(path)
    if not path.exists():
        return [], True
    *lines, rest = path.read_bytes().split(b"\n")
    good = [line[9:].decode() for line in lines if line[:9] == f"{zlib.crc32(line[9:]):08x} ".encode()]
    return good, len(good) == len(lines) and not rest
