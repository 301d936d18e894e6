"""TensorBoard event files of scalars: written without delay, and read again to find what a killed process lost.

A file is a sequence of records: length (8 bytes, little-endian), its checksum (4), an ``Event`` message, its checksum.
A file that goes on after an interruption says from which step on the files before it do not count any more.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping

from etils import epath
from google.protobuf.message import DecodeError
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter, masked_crc32c

_PREFIX = "events.out.tfevents."
_VERSION = "brain.Event:2"


def _files(directory: epath.PathLike) -> list[epath.Path]:
    """The event files, in the order in which TensorBoard reads them."""
    folder = epath.Path(directory)  # one in a bucket is not there before a file is
    return sorted(path for path in folder.iterdir() if path.name.startswith(_PREFIX)) if folder.exists() else []


def _events(path: epath.Path) -> Iterator[Event]:
    """The events up to the first record that is damaged, or was half written."""
    data, at = path.read_bytes(), 0
    while at + 12 <= len(data):
        header = data[at : at + 8]
        (length,), (check,) = struct.unpack("<Q", header), struct.unpack("<I", data[at + 8 : at + 12])
        if check != masked_crc32c(header) or at + 16 + length > len(data):
            return
        try:
            yield Event.FromString(data[at + 12 : at + 12 + length])
        except DecodeError:
            return
        at += 16 + length


def written(directory: epath.PathLike) -> set[tuple[int, str]]:
    """(step, name) of each scalar that TensorBoard shows of a directory."""
    found: set[tuple[int, str]] = set()
    for path in _files(directory):
        for event in _events(path):
            if event.session_log.status == SessionLog.START:
                found = {(step, name) for step, name in found if step < event.step}
            found.update((event.step, value.tag) for value in event.summary.value)
    return found


class EventFile:
    """A new event file in a local or ``gs://`` directory. Raises ImportError where that needs a package.

    purge_step: what other files say of this step and later ones is not shown any more; None: everything is.
    """

    def __init__(self, directory: epath.PathLike, purge_step: int | None = None):
        # numbered: two processes may begin within a second, and the order of the names counts
        name = f"{_PREFIX}{int(time.time()):010d}.{socket.gethostname()}.{len(_files(directory)):04d}"
        self._records = RecordWriter(f"{os.fspath(directory)}/{name}")
        self._write(Event(file_version=_VERSION))
        if purge_step is not None:
            self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds the scalars of a step; they are on disk after ``flush``."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._write(Event(step=step, summary=Summary(value=values)))

    def flush(self) -> None:
        self._records.flush()

    def close(self) -> None:
        self._records.close()
