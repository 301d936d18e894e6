"""``mmprm verify pairs.jsonl``: a verdict and its reason for each row, to audit the verifier on one's own data.

A row: ``{"gold": str, "prediction": str or null}`` and, if known, ``options`` (a list of texts, or {letter: text}),
``unit`` (of a gold answer that is a bare number), ``precision`` (decimals), or ``grading``, an object of these as files
of problems have it, and ``question`` (for the judge). With ``equal`` (true or false: what a person says) the summary
also tells how often the verifier agrees. Other modes are the benchmarks' official rules (``official.MODES``); they read
the benchmark's own keys.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from mmprm_jax.answers.equivalence import compare, graded
from mmprm_jax.answers.judge import Judge
from mmprm_jax.answers.verdict import VERSION, Verdict, unknown
from mmprm_jax.answers.workers import Pool
from mmprm_jax.records import Grading, UserError, grading_of

SECONDS = 5.0  # for a pair
_BLOCK = 2048  # rows in memory for each process
_MAX_LINE = 2**24  # bytes

Row = Mapping[str, Any]


def default(row: Row) -> Verdict:
    """Our own rules. Raises ValueError or TypeError for a row that is none."""
    gold, prediction = row.get("gold"), row.get("prediction")
    if not isinstance(gold, str):
        raise ValueError('a row needs "gold", a text (a number as a text, too: its decimals count)')
    if "prediction" not in row or not isinstance(prediction, str | None):
        raise ValueError('a row needs "prediction", a text or null')
    return compare(gold, prediction, graded(_grading(row)))


def _grading(row: Row) -> Grading:
    """Of the row's own keys, or of those in its ``grading``, as problems have them."""
    own = grading_of(row.get("grading") or {}).to_dict()
    found = {key: row.get(key) for key in ("options", "unit", "precision")}
    return Grading.of(**own | {key: value for key, value in found.items() if value is not None})


def find_mode(name: str) -> Callable[[Row], Verdict]:
    """The rules of a mode. Raises UserError for an unknown one."""
    if name == "default":
        return default
    from mmprm_jax.answers.official import MODES

    if name not in MODES:
        raise UserError(f"--mode={name}: no such mode; there are default, {', '.join(sorted(MODES))}")
    return MODES[name]


@dataclasses.dataclass(frozen=True)
class _Line:
    """A line of the file, or why it is no row."""

    number: int
    row: Row | None
    error: str = ""

    @property
    def good(self) -> Row:
        """The row of a line without an error."""
        assert self.row is not None
        return self.row


def check(rows: list[Row | None], mode: str) -> list[Verdict | str]:
    """Runs in a worker: a verdict, or what is wrong with the row."""
    rules, found = find_mode(mode), []
    for row in rows:
        try:
            found.append(rules(row) if row is not None else "")
        except KeyError as error:
            found.append(f"a row needs the key {error} in mode {mode}")
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, UserError) as error:
            found.append(f"{error}" if str(error) else type(error).__name__)
    return found


def _read(path: str) -> Iterator[_Line]:
    with open(path, "rb") as file:
        for number in itertools.count(1):
            line = file.readline(_MAX_LINE)
            if not line:
                return
            if not line.strip():
                continue
            try:
                if len(line) == _MAX_LINE and not line.endswith(b"\n"):
                    while (rest := file.readline(_MAX_LINE)) and not rest.endswith(b"\n"):
                        pass
                    raise ValueError(f"over {_MAX_LINE} bytes")
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"expected a JSON object, found {type(row).__name__}")
                yield _Line(number, row)
            except (ValueError, RecursionError) as error:
                yield _Line(number, None, str(error))


class _Tally:
    """Counts for the summary."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.labelled = self.agreed = 0

    def add(self, row: Row | None, verdict: Verdict | None) -> None:
        self.kinds["errors" if verdict is None else verdict.kind] += 1
        if row and verdict is not None and isinstance(row.get("equal"), bool):
            self.labelled += 1
            self.agreed += bool(verdict) == row["equal"]

    def summary(self, mode: str) -> str:
        kinds = self.kinds
        text = f"{kinds.total()} rows: " + ", ".join(f"{kinds[k]} {k}" for k in ("equal", "unequal", "unknown"))
        text += f", {kinds['errors']} with an error" if kinds["errors"] else ""
        text += f"; as labelled: {self.agreed} of {self.labelled}" if self.labelled else ""
        return f"{text} (mode {mode}, verifier {VERSION})"


def verify_file(
    path: str,
    output: str | None = None,
    mode: str = "default",
    jobs: int = 0,
    judge: Judge | None = None,
    seconds: float = SECONDS,
) -> tuple[str, bool]:
    """Writes each row with ``verdict`` and ``reason``, or ``error`` and ``line``, in order; streams.

    output: a file, written as it goes; None: standard output. jobs: processes; 0: one for each CPU, at most 8. Returns
    (the summary, whether every row was good). Raises UserError.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    if output and os.path.exists(output) and os.path.samefile(path, output):
        raise UserError(f"--output={output} is the file that is read")
    if jobs < 0:
        raise UserError(f"--jobs={jobs} is no number of processes")
    find_mode(mode)
    jobs = jobs or min(8, os.cpu_count() or 1)
    tally = _Tally()
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(output, "w", encoding="utf-8")) if output else sys.stdout
        pool = Pool(jobs, seconds, functools.partial(check, mode=mode))
        stack.callback(pool.close)
        lines = _read(path)
        while block := list(itertools.islice(lines, _BLOCK * jobs)):
            _write(file, block, _verdicts(pool, block, judge, seconds), tally)
    return tally.summary(mode), not tally.kinds["errors"]


def _verdicts(pool: Pool, block: Sequence[_Line], judge: Judge | None, seconds: float) -> list[Verdict | str]:
    late = unknown(f"no verdict in {seconds:g} s, or the worker ended")
    found = pool.run([line.row for line in block])
    verdicts = [
        line.error or (late if verdict is None else verdict) for line, verdict in zip(block, found, strict=True)
    ]
    if judge:
        asked = {i: verdict for i, verdict in enumerate(verdicts) if isinstance(verdict, Verdict)}
        judged = judge([block[i].good for i in asked], list(asked.values()))
        for i, verdict in zip(asked, judged, strict=True):
            verdicts[i] = verdict
    return verdicts


def _write(file: TextIO, block: Sequence[_Line], verdicts: Sequence[Verdict | str], tally: _Tally) -> None:
    for line, verdict in zip(block, verdicts, strict=True):
        if isinstance(verdict, str):
            tally.add(line.row, None)
            row = {**(line.row or {}), "error": verdict, "line": line.number}
        else:
            tally.add(line.row, verdict)
            row = {**line.good, "verdict": verdict.kind, "reason": verdict.reason}
        file.write(json.dumps(row) + "\n")
    file.flush()
