"""Rows from files that others made: JSON, JSONL and Parquet in a stream, and the images that rows name.

A bad row is a ``Row`` with an error, never an end: what follows it is read.
"""

from __future__ import annotations

import codecs
import fnmatch
import functools
import io
import json
import lzma
import re
import stat
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mmprm_jax.data import images
from mmprm_jax.data.spans import end_of
from mmprm_jax.records import UserError

MAX_ROW = 16 * 2**20  # bytes of a JSONL line, characters of a row in a JSON list
_CHUNK = 2**20
_BATCH = 64  # rows of a Parquet file held at a time
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_SUFFIXES = (".json", ".jsonl", ".parquet")
_FORMATS = {"JPEG": "jpg", "TIFF": "tif"}


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
        if p.suffix in _SUFFIXES and p.is_file() and not (made and p.resolve().is_relative_to(made))
    )
    for pattern in patterns:
        found = [name for name in names if fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(Path(name).name, pattern)]
        if found:
            return Located(path, tuple(path / name for name in found), (path, trusted), revision)
    archives = [p.name for p in sorted(path.rglob("*.zip"))]
    seen = f"; it has {', '.join(names[:5])}{' …' * (len(names) > 5)}" if names else ""
    seen += f"; unpack {', '.join(archives[:3])} if the rows are in there" if archives else ""
    raise UserError(f"{path}: no file {' or '.join(patterns)} in this folder{seen}; name the file itself")


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
            if path.suffix == ".parquet":
                yield from _parquet(path, name)
            elif path.suffix == ".jsonl" or not _starts_with_list(path):
                yield from _lines(path, name)
            else:
                yield from _elements(path, name)
        except OSError as error:
            yield Row(name, 0, None, f"the file cannot be read ({error})")


def _starts_with_list(path: Path) -> bool:
    """Whether a .json file holds one list, or one object of rows over several lines; otherwise it is read as JSONL."""
    with path.open("rb") as file:
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
    with path.open("rb") as file:
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


class _Window:
    """A text file of which only a part is in memory, from ``at`` on."""

    def __init__(self, file: io.BufferedReader):
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
    with path.open("rb") as file:
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


class ImageFiles:
    """The images of a source: files below its folders, or members of the zip archives there."""

    def __init__(self, located: Located, folders: Sequence[str] = ("",)):
        """folders: where image paths may start, below the folder and below that of each file."""
        roots = dict.fromkeys([located.folder, *(file.parent for file in located.files)])
        self._folder = located.folder
        self._starts = [root / folder for root in roots for folder in folders]
        self._trusted = [path.resolve() for path in located.trusted]

    def read(self, name: Any) -> bytes:
        """The bytes of the image file called ``name`` in a row. Raises UserError when it is refused."""
        path = _inside(name)
        for start in self._starts:
            try:
                return self._file(start / path, name)
            except FileNotFoundError:
                continue
        for folder in ("", "images/", "data_images/"):
            for member in (f"{folder}{path}", str(path)):
                if (where := self._members.get(member)) is not None:
                    return _member(*where, name)
        raise UserError(f"{name}: image not found")

    def _file(self, path: Path, name: str) -> bytes:
        try:
            real = path.resolve(strict=True)
            if not any(real.is_relative_to(root) for root in self._trusted):
                raise UserError(f"{name}: a link that leads out of the source's folder")
            status = real.stat()
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{name}: no regular file")
            if status.st_size > images.MAX_BYTES:
                raise UserError(f"{name}: image file larger than {images.MAX_BYTES} bytes")
            return real.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError from None
        except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a circle
            raise UserError(f"{name}: not a readable file ({_brief(error)})") from None

    @functools.cached_property
    def _members(self) -> dict[str, tuple[zipfile.ZipFile, zipfile.ZipInfo]]:
        """Every file in every archive of the folder; the first of a name counts."""
        found: dict[str, tuple[zipfile.ZipFile, zipfile.ZipInfo]] = {}
        for path in sorted(self._folder.rglob("*.zip")):
            if not any(path.resolve().is_relative_to(root) for root in self._trusted):
                continue
            try:
                archive = zipfile.ZipFile(path)
            except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError):
                continue  # its images are then not found, and each row says so
            for info in archive.infolist():
                found.setdefault(info.filename, (archive, info))
        return found


def _inside(name: Any) -> PurePosixPath:
    """The path of an image as it may be written in a row. Raises UserError."""
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"the image's path is {name!r:.80}, not a text")
    path = PurePosixPath(name)
    if "\0" in name or path.is_absolute() or ".." in path.parts or "\\" in name or re.match(r"[A-Za-z][\w+.-]*:", name):
        raise UserError(f"{name!r:.200}: image paths must stay inside of the source's folder")
    return path


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> bytes:
    if info.file_size > images.MAX_BYTES:
        raise UserError(f"{name}: image file larger than {images.MAX_BYTES} bytes")
    try:
        with archive.open(info) as file:
            return file.read(images.MAX_BYTES + 1)  # the size in the archive's index may be a lie
    except (OSError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{name}: cannot be read from {Path(archive.filename or '').name} ({_brief(error)})") from None


def suffix(data: bytes) -> str:
    """The file name's ending that fits the bytes of an image that was opened before."""
    with Image.open(io.BytesIO(data)) as image:
        kind = image.format or "PNG"
    return _FORMATS.get(kind, kind.lower())
