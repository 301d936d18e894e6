"""Rows from files that others made: JSON, JSONL, TSV and Parquet in a stream; ``image_files`` has their images.

A bad row is a ``Row`` with an error, never an end: what follows it is read.
"""

from __future__ import annotations

import codecs
import csv
import fnmatch
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmprm_jax.data.spans import end_of
from mmprm_jax.records import UserError

MAX_ROW = 16 * 2**20  # bytes of a JSONL line, characters of a row in a JSON list
_CHUNK = 2**20
_BATCH = 64  # rows of a Parquet file held at a time
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_SUFFIXES = (".json", ".jsonl", ".tsv", ".parquet")


@dataclass(frozen=True)
class Row:
    """A row of a source: its value, or why it could not be read."""

    file: str  # relative to the source's folder
    number: int  # counted from 1 in its file; 0: the file as a whole
    value: dict[str, Any] | None
    error: str = ""


@dataclass(frozen=True)
class Located:
    """Where a source's files are."""

    folder: Path
    files: tuple[Path, ...]
    trusted: tuple[Path, ...]  # folders that symbolic links may lead to
    revision: str = ""  # the commit on the hub; "": local files


def locate(path_or_id: str, patterns: Sequence[str], output: Path | None = None) -> Located:
    """The data files of a source: a file, a folder, or a hub id (``org/name`` or ``org/name@revision``) downloaded.

    patterns: tried in order below the folder; the files of the first one that has any are taken, sorted. output: a
    folder in it whose files do not count: they were made from the others.
    Raises UserError when there is nothing.
    """
    path = Path(path_or_id)
    if path.is_file():
        return Located(path.parent, (path,), (path.parent, path.resolve().parent))
    trusted, revision = path, ""
    if not path.is_dir():
        path = _download(path_or_id)
        trusted, revision = path.parent.parent, path.name  # a snapshot is links to ../../blobs
    folder, made = path.resolve(), output and output.resolve()
    made = made if made and made != folder and made.is_relative_to(folder) else None
    names = sorted(
        p.relative_to(path).as_posix()
        for p in path.rglob("*")
        if _kind(p.name) in _SUFFIXES and p.is_file() and not (made and p.resolve().is_relative_to(made))
    )
    for pattern in patterns:
        plain = {name: name.removesuffix(".gz") for name in names}
        found = [x for x, y in plain.items() if fnmatch.fnmatch(y, pattern) or fnmatch.fnmatch(Path(y).name, pattern)]
        if found:
            return Located(path, tuple(path / name for name in found), (path, trusted), revision)
    archives = [p.name for p in sorted(path.rglob("*.zip"))]
    seen = f"; it has {', '.join(names[:5])}{' …' * (len(names) > 5)}" if names else ""
    seen += f"; unpack {', '.join(archives[:3])} if the rows are in there" if archives else ""
    raise UserError(f"{path}: no file {' or '.join(patterns)} in this folder{seen}; name the file itself")


def _kind(name: str) -> str:
    """What a file's name says of its rows: its ending, without that of a compressed file."""
    return Path(name.removesuffix(".gz")).suffix


def _open(path: Path) -> IO[bytes]:
    """Opens a file, also a compressed one. Raises OSError, EOFError or zlib.error, of a damaged one before any row."""
    if path.suffix != ".gz":
        return path.open("rb")
    with gzip.open(path) as file:
        while file.read(_CHUNK):  # the checksum, without which a row may be any, stands at the end
            pass
    return gzip.open(path)  # type: ignore[return-value]


def _download(name: str) -> Path:
    if not _HUB_ID.fullmatch(name):
        raise UserError(f"{name}: neither a file, a folder nor a hub id (org/name or org/name@revision)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repo, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repo, repo_type="dataset", revision=revision or None))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().split("\n")[0]
        raise UserError(
            f"{name}: no such file or folder, and it could not be downloaded from the hub ({first})"
        ) from None


def read_rows(located: Located) -> Iterator[Row]:
    """The rows of all files, in order."""
    for path in located.files:
        name = path.relative_to(located.folder).as_posix()
        if not any(path.resolve().is_relative_to(root.resolve()) for root in located.trusted):
            yield Row(name, 0, None, "a link that leads out of the source's folder")
            continue
        try:
            kind = _kind(path.name)
            if kind == ".parquet":
                yield from _parquet(path, name)
            elif kind == ".tsv":
                yield from _table(path, name)
            elif kind == ".jsonl" or not _starts_with_list(path):
                yield from _lines(path, name)
            else:
                yield from _elements(path, name)
        except (OSError, EOFError, zlib.error) as error:  # the last two of a compressed file
            yield Row(name, 0, None, f"the file cannot be read ({error})")


def _starts_with_list(path: Path) -> bool:
    """Whether a .json file holds one list, or one object of rows over several lines; otherwise it is read as JSONL."""
    with _open(path) as file:
        first = file.readline(MAX_ROW).removeprefix(codecs.BOM_UTF8).strip()
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return True  # it goes on: [{…}, …] or {"1": {…}, …}
    return not isinstance(value, dict) or (bool(value) and all(isinstance(v, dict) for v in value.values()))


def _row(name: str, number: int, value: Any) -> Row:
    if isinstance(value, dict):
        return Row(name, number, value)
    return Row(name, number, None, f"expected a JSON object, found {type(value).__name__}")


def _lines(path: Path, name: str) -> Iterator[Row]:
    with _open(path) as file:
        number = 0
        while line := file.readline(MAX_ROW + 1):
            number += 1
            if len(line) > MAX_ROW:
                while line and not line.endswith(b"\n"):
                    line = file.readline(_CHUNK)
                yield Row(name, number, None, f"a line longer than {MAX_ROW} bytes")
                continue
            line = line.removeprefix(codecs.BOM_UTF8).strip()
            if not line:
                continue
            try:
                yield _row(name, number, json.loads(line.decode()))
            except (ValueError, RecursionError) as error:
                yield Row(name, number, None, f"not JSON ({_brief(error)})")


def _table(path: Path, name: str) -> Iterator[Row]:
    """Tab-separated values below a line of names, quoted where they hold tabs, quotes or lines; empty ones are none."""
    csv.field_size_limit(MAX_ROW)
    with _open(path) as file:
        table = csv.reader(_texts(file), "excel-tab")
        names, number = next(table, []), 0
        while True:
            try:
                cells = next(table, None)
            except csv.Error as error:
                number += 1
                yield Row(name, number, None, f"no tab-separated values ({_brief(error)})")
                continue
            if cells is None:
                return
            if not cells:  # an empty line
                continue
            number += 1
            if len(cells) != len(names):
                yield Row(name, number, None, f"{len(cells)} values below {len(names)} names")
                continue
            try:
                "".join(cells).encode()
            except UnicodeEncodeError:
                yield Row(name, number, None, "not UTF-8")
            else:
                yield Row(name, number, {key: cell for key, cell in zip(names, cells, strict=True) if cell})


def _texts(file: IO[bytes]) -> Iterator[str]:
    """The lines of a file, in pieces where they are long; what is not UTF-8 as lone surrogates."""
    decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
    while line := file.readline(_CHUNK):
        yield decode(line)
    yield decode(b"", True)


class _Window:
    """A text file of which only a part is in memory, from ``at`` on."""

    def __init__(self, file: IO[bytes]):
        self._file, self._decode = file, codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
        self.text, self.at, self.ended = "", 0, False

    def more(self) -> None:
        data = self._file.read(_CHUNK)
        self.ended = not data
        self.text = self.text[self.at :] + self._decode(data, final=self.ended)
        self.at = 0


_SKIP = re.compile(r'[\s,]*(?:"(?:[^"\\]|\\.){0,200}"\s*:\s*(?=[{"\[]))?')


_OPENED = re.compile(r"\s*[\[{]?")
_BLANKS = re.compile(r"[ \t]*")


def _elements(path: Path, name: str) -> Iterator[Row]:
    """The members of a JSON list (or the values of a JSON object), without holding more than one and a chunk."""
    number, resume = 0, _Resume()
    with _open(path) as file:
        window = _Window(file)
        window.more()
        window.at = end_of(_OPENED, window.text, 0)
        while True:
            if not window.ended and len(window.text) - window.at < 512:
                window.more()
                continue
            begin, window.at = window.at, end_of(_SKIP, window.text, window.at)
            left = window.text[window.at : window.at + 64].strip()
            if left in ("", "]", "}"):
                if left == "":
                    yield Row(name, number + 1, None, "the file ends inside of the list; is it whole?")
                return
            number += 1
            before = window.text[begin : window.at]
            value, error = _decode(window)
            if error is None:
                resume.learn(value, before)
                yield _row(name, number, value)
            else:
                found = resume.go_on(window)
                yield Row(name, number, None, error)
                if not found:
                    return


def _decode(window: _Window, move: bool = True) -> tuple[Any, str | None]:
    """The value that begins at the window's position, which moves behind it; or why there is none."""
    while True:
        try:
            value, end = json.JSONDecoder().raw_decode(window.text, window.at)
            window.text[window.at : end].encode()
        except json.JSONDecodeError as error:
            cut_off = error.msg.startswith("Unterminated") or error.pos >= len(window.text) - 16
            if cut_off and not window.ended and len(window.text) - window.at <= MAX_ROW:
                window.more()
                continue
            return None, f"not JSON ({error.msg})"
        except UnicodeEncodeError:
            return None, "not UTF-8"
        except (ValueError, RecursionError) as error:
            return None, f"not JSON ({_brief(error)})"
        if end == len(window.text) and not window.ended:  # a number may go on
            window.more()
            continue
        window.at = end if move else window.at
        return value, None


class _Resume:
    """Where the next row begins behind a damaged one.

    Rows on lines of their own begin with a line that is indented as theirs were: a text in JSON has no line breaks.
    Otherwise a row begins where a whole object has the keys of a row that was seen; before there is one, where it has
    the damaged row's first key.
    """

    def __init__(self):
        self._indent: str | None = None
        self._keys: set[frozenset[str]] = set()

    def learn(self, value: Any, before: str) -> None:
        """``value`` was a good row; ``before``: the text between it and what came before."""
        if isinstance(value, dict):
            self._keys.add(frozenset(value))
        line = before.rpartition("\n")
        if line[1]:
            self._indent = line[2][: end_of(_BLANKS, line[2], 0)]

    def go_on(self, window: _Window) -> bool:
        """Moves to the beginning of the next row; False: there is none."""
        indent = self._indent
        first = re.compile(r'\{\s*"([^"\\]{1,100})"').match(window.text, window.at)
        starts = re.compile(r'\{\s*"' if indent is None else rf"\n{re.escape(indent)}(?=[^\s}}\]])")
        while True:
            window.at += 1
            while not (found := starts.search(window.text, window.at)):
                if window.ended:
                    return False
                window.at = max(window.at, len(window.text) - 512)  # a start may be cut off
                window.more()
            window.at = found.start()
            if indent is not None or self._is_row(window, first and first[1]):
                return True

    def _is_row(self, window: _Window, first: str | None) -> bool:
        value, error = _decode(window, move=False)
        if error is not None:
            return False
        return frozenset(value) in self._keys if self._keys else first in (None, next(iter(value), None))


def _brief(error: BaseException) -> str:
    return str(error)[:200]


def _parquet(path: Path, name: str) -> Iterator[Row]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH):
                for i in range(batch.num_rows):
                    number += 1
                    try:
                        yield Row(name, number, batch.slice(i, 1).to_pylist()[0])
                    except (ValueError, OverflowError) as error:  # a text that is not UTF-8, a date out of range
                        yield Row(name, number, None, f"a value that cannot be read ({_brief(error)})")
    except (pa.ArrowException, OSError) as error:
        yield Row(name, number + 1 if number else 0, None, f"Parquet damaged from here on ({_brief(error)})")
