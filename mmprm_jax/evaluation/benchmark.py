"""``mmprm benchmark PROBLEMS.jsonl``: the policy and the PRM of a finished run on other problems, officially scored.

``PROBLEMS.jsonl`` is what ``mmprm prepare`` makes of a benchmark, its images beside it. Sampling and scoring are the
run's (``config.evaluate``), and so are the aggregator's choice on dev and the figures; only whether a candidate is
right is decided by the rules of the benchmark: by the mode that the prepared rows name (``answers.official``). Where
these rules leave it to a judge, the candidate counts as wrong, and ``scoring`` says how many there were.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from etils import epath

from mmprm_jax import io, manifest, records, stages
from mmprm_jax.answers.official import MODES
from mmprm_jax.data import training_files
from mmprm_jax.manifest import Depth
from mmprm_jax.processes import in_first, is_first, wait_for_all
from mmprm_jax.records import Candidate, Problem, UserError

VERIFIER = "verifier"  # scoring by answers.equivalence, as in training
_FROM_DEV = ("dev_candidates.jsonl", "dev_scored.jsonl")


def scoring_rows(problems: epath.Path) -> dict[str, dict[str, Any]]:
    """What ``mmprm prepare`` wrote for the official scoring of a file of problems, by id; empty: it is no benchmark's.

    Raises UserError for a damaged file, or a mode that does not exist.
    """
    path = problems.parent / "prepare" / problems.stem / "benchmark.jsonl"
    if not path.exists():
        return {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines also splits at what may stand in a text
        rows = {str(row["id"]): row for row in map(json.loads, filter(None, lines))}
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path}: damaged; run mmprm prepare again") from None
    unknown = {row.get("mode") for row in rows.values()} - set(MODES)
    if unknown:
        raise UserError(f"{path}: no official scoring {unknown.pop()!r}; there are {', '.join(MODES)}")
    return rows


class BenchmarkRun(stages.Run):
    """A run whose test problems are those of another file. Its evaluation has a folder of its own."""

    def __init__(self, base: stages.Run, problems: epath.Path, scoring: str):
        """scoring: "" for the mode of each prepared row, ``VERIFIER``, or a key of MODES for all. Raises UserError."""
        evaluate = dataclasses.replace(base.config.evaluate, calibration_problems=0)
        config = dataclasses.replace(base.config, evaluate=evaluate)
        super().__init__(config, base.workdir, base.config_text)
        self._base, self._file = base, problems
        self._name = f"{problems.absolute().parent.name}-{problems.stem}"
        self.language, self.data, self.controls = base.language, problems.parent, False
        self.sampled = self.folder("evaluate")
        self._found = records.read_problems(problems)
        self._rows = {} if scoring == VERIFIER else scoring_rows(problems)
        if scoring not in ("", VERIFIER):
            stages.choose(MODES, scoring, "--scoring")
            self._rows = {p.id: {**self._rows.get(p.id, {}), "mode": scoring} for p in self._found}
        self._golds = {p.id: p.answer for p in self._found}
        missing = [p.id for p in self._found if self._rows and p.id not in self._rows]
        if missing:
            raise UserError(f"{problems}: no scoring row for problem {missing[0]}; run mmprm prepare again")
        self.verdicts: Counter[str] = Counter()  # of the official rules on the sampled candidates

    def folder(self, stage: str) -> epath.Path:
        return self.workdir / "benchmarks" / self._name if stage == "evaluate" else self.workdir / stage

    def problems(self, split: str) -> list[Problem]:
        return self._found if split == "test" else self._base.problems(split)

    def record_files(self) -> list[epath.Path]:
        return [self._file, *self._base.record_files()]

    def judged(self, candidate: Candidate) -> Candidate:
        row = self._rows.get(candidate.problem_id)
        if row is None:
            return candidate
        prediction = "".join(candidate.segments) if candidate.answer is None else candidate.answer
        verdict = MODES[row["mode"]]({"gold": self._golds[candidate.problem_id], **row, "prediction": prediction})
        self.verdicts[verdict.kind] += 1
        return dataclasses.replace(candidate, correct=verdict.kind == "equal")

    def category(self, problem: Problem) -> str:
        return str(self._rows.get(problem.id, {}).get("category") or problem.source)

    def begin(self) -> None:
        """Takes the dev candidates over from the run. Raises UserError if the folder holds those of other problems."""
        modes = sorted({row["mode"] for row in self._rows.values()})
        made_of = {"problems": training_files.checksum([self._file]), "modes": modes}
        folder, note = self.folder("evaluate"), self.folder("evaluate") / "problems.json"
        if note.exists() and io.read_sealed(note, f"delete {folder}", unsealed=True) != made_of:
            raise UserError(f"{folder}: holds the evaluation of other problems, or by other rules; delete it")
        folder.mkdir(parents=True, exist_ok=True)
        for name in _FROM_DEV if is_first() else ():
            if not (folder / name).exists():
                io.write(folder / name, (self._base.folder("evaluate") / name).read_bytes(), noted=True)
        if is_first():
            io.write_sealed(note, made_of)
        wait_for_all("benchmark: begun")


def run(base: stages.Run, problems: str, scoring: str) -> Mapping[str, Any]:
    """Evaluates the file. Returns the figures of ``evaluate``, and ``scoring``. Raises UserError, Interrupted."""
    if base.figures("evaluate") is None:
        raise UserError(f"{base.workdir}: its evaluation has not finished; run `mmprm evaluate` there first")
    in_first(lambda: manifest.check(base, ["data", "sft", "train_prm", "evaluate"], Depth.RECORDS))
    other = BenchmarkRun(base, epath.Path(problems), scoring)
    other.begin()
    stages.run_stage(other, "evaluate")
    return other.figures("evaluate")
