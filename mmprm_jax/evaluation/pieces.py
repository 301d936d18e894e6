"""Files that are made piece by piece, by one or several processes, and of which an interruption loses little."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any

import jax
from absl import logging
from etils import epath

from mmprm_jax import interruption, io, records
from mmprm_jax.interruption import Interrupted
from mmprm_jax.processes import is_first, wait_for_all


class Pieces:
    """Context manager that keeps finished pieces of work beside ``path`` until ``finish`` writes the file itself.

    ``path.parts/<process>-<i>.jsonl`` hold checked lines {"key", "value"}, each file written whole. They are saved
    every ``seconds``, and on the way out of the context, whatever the reason: also when the process is asked to end.
    """

    def __init__(self, path: epath.Path, seconds: float = 30.0):
        self.path, self._folder = path, path.parent / f"{path.name}.parts"
        self._seconds = seconds
        self._unsaved: dict[str, Any] = {}
        self.done: dict[str, Any] = {}  # the value of each finished piece, as JSON has it
        self._mine = f"{jax.process_index():03d}"
        self._saves = sum(file.name.startswith(f"{self._mine}-") for file in self._read())

    def _read(self) -> list[epath.Path]:
        """Takes over what all processes have saved. Returns the files."""
        files = sorted(self._folder.glob("*.jsonl")) if self._folder.exists() else []
        for file in files:
            lines, intact = io.read_checked(file)
            if not intact:
                logging.warning("%s: damaged; what it held is made again", file)
            rows = map(json.loads, lines)
            self.done |= {row["key"]: row["value"] for row in rows}
        return files

    def __enter__(self) -> Pieces:
        self._saved = time.monotonic()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._save()
        if isinstance(error, Interrupted):
            error.message = f"{self.path.name}: stopped as asked, {len(self.done)} pieces of it are saved"

    def add(self, key: str, value: Any) -> None:
        """Takes a finished piece; value: anything that JSON holds. Raises Interrupted."""
        self.done[key] = self._unsaved[key] = value
        interruption.check(own=True)
        if time.monotonic() - self._saved > self._seconds:
            self._save()

    def finish(self, rows: Iterable[Any]) -> None:
        """Writes the records of the whole file, when all processes have come here; the pieces are no longer needed.

        rows: made of ``done``, one by one; by then it has the pieces of all processes.
        """
        self._save()
        wait_for_all(f"{self.path}: made")
        if is_first():
            self._read()
            records.write(self.path, rows, noted=True)
            if self._folder.exists():
                self._folder.rmtree()
        wait_for_all(f"{self.path}: written")

    def _save(self) -> None:
        with interruption.saving():
            self._write()

    def _write(self) -> None:
        if self._unsaved:
            lines = (io.checked_line(json.dumps({"key": k, "value": v})) for k, v in self._unsaved.items())
            io.write(self._folder / f"{self._mine}-{self._saves:06d}.jsonl", "".join(lines))
            self._saves += 1
            self._unsaved.clear()
        self._saved = time.monotonic()
