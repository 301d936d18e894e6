"""Scalars of a running stage: a JSONL file, TensorBoard and a progress bar."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import tqdm
from absl import logging
from etils import epath

from mmprm_jax import events, io
from mmprm_jax.errors import UserError

if TYPE_CHECKING:  # not required by the package
    import pandas

_REMOTE_SECONDS = 30.0  # between two uploads of the whole file: object stores cannot append
_LINE_SECONDS = 10.0  # between two progress lines where stderr is not a terminal


def read(directory: epath.PathLike) -> list[dict[str, Any]]:
    """The rows of ``<directory>/metrics.jsonl``, oldest first; none if there is no file. Torn lines are left out."""
    path = epath.Path(directory) / "metrics.jsonl"
    rows = []
    *lines, torn = path.read_bytes().split(b"\n") if path.exists() else [b""]
    damaged = 0
    for line in (*lines, torn):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            damaged += line != torn  # a killed process leaves half a line
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    if damaged:
        logging.warning("%s: %d damaged lines are left out", path, damaged)
    return rows


def read_metrics(folder: epath.PathLike) -> pandas.DataFrame:
    """The scalars that the stages of a run logged, as a pandas frame: ``read_metrics("runs/digits").loc["sft"]``.

    folder: a work directory, local or ``gs://``, or the folder of one stage. Rows are indexed by stage and step, both
    in order; a column for each scalar, NaN where a stage has none. Raises UserError where nothing was logged, and
    without pandas.
    """
    try:
        import pandas
    except ImportError:
        raise UserError("read_metrics: pandas is missing; pip install 'mmprm_jax[notebooks]'") from None
    folder = epath.Path(folder)
    stages = [folder, *sorted(path.parent for path in folder.glob("*/metrics.jsonl"))]
    rows = [{"stage": stage.name, **row} for stage in stages for row in read(stage)]
    if not rows:
        raise UserError(f"{folder}: no metrics.jsonl there, nor in a folder of it; no stage has logged anything")
    return pandas.DataFrame(rows).set_index(["stage", "step"]).sort_index(kind="stable")


class Metrics:
    """Context manager that appends scalars to ``<directory>/metrics.jsonl`` and to TensorBoard events beside it.

    Args:
      directory: ``<workdir>/<stage>``, local or ``gs://``; it is created.
      resume_step: the next step that will be written; earlier runs' rows at or beyond it are dropped. 0 starts afresh,
        None keeps every row.
      enabled: False writes nothing; pass ``jax.process_index() == 0``.
    """

    def __init__(self, directory: epath.PathLike, resume_step: int | None = None, enabled: bool = True):
        self._enabled = enabled
        if not enabled:
            return
        directory = epath.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / "metrics.jsonl"
        rows = [row for row in read(directory) if resume_step is None or row["step"] < resume_step]
        self._lines = [json.dumps(row) + "\n" for row in rows]
        self._board = _board(directory, resume_step, rows)
        self._rewrite()
        self._file = self._path.open("a") if _can_append(self._path) else None

    def write(self, step: int, **scalars: Any) -> None:
        """Writes one row. A scalar is anything that ``float`` takes; a device array is waited for."""
        if not self._enabled:
            return
        row = {name: value if isinstance(value, int) else float(value) for name, value in scalars.items()}
        line = json.dumps({"step": int(step), **row}) + "\n"
        if self._board:
            self._board.write(int(step), row)
        if self._file:
            self._file.write(line)
            self._file.flush()
            if self._board:
                self._board.flush()
        else:
            self._lines.append(line)
            if time.monotonic() - self._written >= _REMOTE_SECONDS:
                self._rewrite()

    def close(self) -> None:
        """Writes what is left. Closing twice is harmless."""
        if not self._enabled:
            return
        self._enabled = False
        if self._file:
            self._file.close()
        else:
            self._rewrite()
        if self._board:
            self._board.close()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _rewrite(self) -> None:
        io.write(self._path, "".join(self._lines))
        if self._board:
            self._board.flush()
        self._written = time.monotonic()


def _can_append(path: epath.Path) -> bool:
    return "://" not in os.fspath(path)


def _board(directory: epath.Path, resume_step: int | None, rows: Sequence[dict[str, Any]]) -> events.EventFile | None:
    """A new event file; of ``rows``, it has what no other one has: a process may have been killed between the two."""
    try:
        board = events.EventFile(directory, resume_step)
    except ImportError as error:
        logging.warning("no TensorBoard events in %s (%s); metrics.jsonl is complete", directory, error)
        return None
    there = events.written(directory)
    for row in rows:
        step = row["step"]
        lost = {name: value for name, value in row.items() if name != "step" and (step, name) not in there}
        if lost:
            board.write(step, lost)
    return board


class _Lines(tqdm.tqdm):
    """A progress bar for log files: whole lines, at most one in ten seconds and one at the end."""

    _printed = float("-inf")

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if msg is None and time.monotonic() - self._printed >= _LINE_SECONDS:
            self._printed = time.monotonic()
            self.fp.write(f"{self}\n")
            self.fp.flush()
        return False

    def clear(self, nolock: bool = False) -> None:
        """Nothing to clear: a line stays."""

    def close(self) -> None:
        if not self.disable:
            self._printed = float("-inf")
            self.display()
        super().close()


def progress(total: int | None, desc: str, unit: str, initial: int = 0, enabled: bool = True) -> tqdm.tqdm:
    """A progress bar on stderr with rate and time left; ``update(n)`` and ``set_postfix(name=value)`` as in tqdm.

    Args:
      total: how many units there are; None: not known.
      desc: what is being done.
      unit: what is counted, in the singular.
      initial: units that an earlier run has done; they do not count towards the rate.
      enabled: False shows nothing; pass ``jax.process_index() == 0``.
    """
    options = {"total": total, "desc": desc, "unit": f" {unit}", "initial": initial, "disable": not enabled}
    if sys.stderr.isatty():
        return tqdm.tqdm(file=sys.stderr, dynamic_ncols=True, mininterval=0.5, **options)
    line = "{desc}: {percentage:.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
    return _Lines(file=sys.stderr, leave=False, mininterval=0.5, bar_format=line if total else None, **options)
