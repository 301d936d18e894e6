"""The images that the rows of a source name: files of its folders, and members of the archives there."""

from __future__ import annotations

import functools
import io
import lzma
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any

from PIL import Image

from mmprm_jax.data import images
from mmprm_jax.data.sources_files import Located
from mmprm_jax.records import UserError

_FORMATS = {"JPEG": "jpg", "TIFF": "tif"}
_MOST_PARTS = 64  # of a path that is looked for below --image-root
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")  # no member can be read without all before it


@dataclass(frozen=True)
class _Member:
    """A file in an archive."""

    archive: str
    size: int
    open: Callable[[], IO[bytes]]


class ImageFiles:
    """The images of a source: files below its folders, or members of the zip and tar archives there."""

    def __init__(self, located: Located, folders: Sequence[str] = ("",), root: Path | None = None):
        """folders: where image paths may start, below the folder and below that of each file. root: see ``_rooted``."""
        roots = dict.fromkeys([located.folder, *(file.parent for file in located.files)])
        more = [root] if root else []
        self._folder, self._root = located.folder, root
        self._starts = [start / folder for start in roots for folder in folders] + more
        self._trusted = [path.resolve() for path in (*located.trusted, *more)]
        self._named: dict[Path, str] = {}  # what a file below the root was called

    def read(self, name: Any) -> bytes:
        """The bytes of the image file called ``name`` in a row. Raises UserError when it is refused."""
        path = _path(name)
        if path.is_absolute() or isinstance(path, PureWindowsPath):
            return self._rooted(path, name)
        for start in self._starts:
            try:
                return self._file(start / path, name)
            except FileNotFoundError:
                continue
        for folder in ("", "images/", "data_images/"):
            for member in (f"{folder}{path}", str(path)):
                if (where := self._members.get(member)) is not None:
                    return _read(where, name)
        packed = sorted(p.name for p in self._folder.rglob("*") if p.name.endswith(_COMPRESSED))
        more = f"; unpack {', '.join(packed[:3])} if it is in there" if packed else ""
        raise UserError(f"{name}: image not found{more}")

    def _rooted(self, path: PurePosixPath | PureWindowsPath, name: str) -> bytes:
        """The image of a path on another machine: below the root, by as much of the path's end as there is.

        Raises UserError when two different paths come to one file: which of both it is, nobody knows.
        """
        if self._root is None:
            raise UserError(f"{name!r:.200}: a path on another machine; --image-root=FOLDER says where the images are")
        parts = path.parts[bool(path.anchor) :]
        if not parts or ".." in parts or len(parts) > _MOST_PARTS:
            raise UserError(f"{name!r:.200}: is no path of an image")
        for i in range(len(parts)):
            file = self._root.joinpath(*parts[i:])
            try:
                data = self._file(file, name)
            except FileNotFoundError:
                continue
            other = self._named.setdefault(file, name)
            if other != name:
                both = f"{name!r:.200} and {other!r:.200} would both be {file}"
                raise UserError(f"{both}; choose an --image-root that keeps them apart")
            return data
        raise UserError(f"{name!r:.200}: no end of this path is below --image-root={self._root}")

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
            raise UserError(f"{name}: not a readable file ({str(error)[:200]})") from None

    @functools.cached_property
    def _members(self) -> dict[str, _Member]:
        """Every file in every archive, also without the folder that all of an archive are in; the first counts."""
        found: dict[str, _Member] = {}
        for path in sorted(p for p in self._folder.rglob("*") if p.suffix in (".zip", ".tar")):
            if not any(path.resolve().is_relative_to(root) for root in self._trusted):
                continue
            try:
                members = dict(_zip(path) if path.suffix == ".zip" else _tar(path))
            except (OSError, zipfile.BadZipFile, tarfile.TarError, NotImplementedError, ValueError, EOFError):
                continue  # its images are then not found, and each row says so
            tops = {name.partition("/")[0] for name in members}
            for name, member in members.items():
                found.setdefault(name, member)
                if len(tops) == 1 and "/" in name:
                    found.setdefault(name.partition("/")[2], member)
        return found


def _zip(path: Path) -> Iterator[tuple[str, _Member]]:
    archive = zipfile.ZipFile(path)
    for info in archive.infolist():
        if not info.is_dir():
            yield info.filename, _Member(path.name, info.file_size, functools.partial(archive.open, info))


def _tar(path: Path) -> Iterator[tuple[str, _Member]]:
    with tarfile.open(path, "r:") as archive:
        members = [info for info in archive if info.isreg() and not info.issparse()]  # no link, no device
    for info in members:
        yield info.name.removeprefix("./"), _Member(path.name, info.size, functools.partial(_part, path, info))


def _part(path: Path, info: tarfile.TarInfo) -> IO[bytes]:
    """A member of a tar archive, whose bytes stand in it as they are."""
    with path.open("rb") as file:
        file.seek(info.offset_data)
        return io.BytesIO(file.read(info.size))


def _path(name: Any) -> PurePosixPath | PureWindowsPath:
    """The path of an image as it may stand in a row: absolute, of Windows, or below the folder. Raises UserError."""
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"the image's path is {name!r:.80}, not a text")
    windows = "\\" in name or re.match("[A-Za-z]:", name)
    path = PureWindowsPath(name) if windows else PurePosixPath(name)
    if "\0" in name or ".." in path.parts or not windows and re.match(r"[A-Za-z][\w+.-]*:", name):
        raise UserError(f"{name!r:.200}: image paths must stay inside of the source's folder")
    return path


def _read(member: _Member, name: str) -> bytes:
    if member.size > images.MAX_BYTES:
        raise UserError(f"{name}: image file larger than {images.MAX_BYTES} bytes")
    try:
        with member.open() as file:
            return file.read(images.MAX_BYTES + 1)  # the size in the archive's index may be a lie
    except (
        OSError, zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, RuntimeError, EOFError, ValueError,
    ) as error:  # fmt: skip
        raise UserError(f"{name}: cannot be read from {member.archive} ({str(error)[:200]})") from None


def suffix(data: bytes) -> str:
    """The file name's ending that fits the bytes of an image that was opened before."""
    with Image.open(io.BytesIO(data)) as image:
        kind = image.format or "PNG"
    return _FORMATS.get(kind, kind.lower())
