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
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from mmprm_jax import io, manifest, records, stages
from mmprm_jax.answers.official import MODES
from mmprm_jax.data import training_files
from mmprm_jax.manifest import Depth
from mmprm_jax.processes import check_on_first, is_first, wait_for_all
from mmprm_jax.records import Candidate, Problem, UserError
from mmprm_jax.stages import evaluate
from mmprm_jax.stages.run import Run

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


class OfficialRules(evaluate.Rules):
    """The rules of a benchmark, row by row; where there is no row, the verifier has decided."""

    def __init__(self, problems: Sequence[Problem], rows: Mapping[str, dict[str, Any]]):
        """rows: of each problem its ``mode``, a key of MODES, what that needs, and maybe ``category``."""
        self._rows, self._golds = rows, {p.id: p.answer for p in problems}
        self.verdicts: Counter[str] = Counter()  # of these rules on the sampled candidates

    @property
    def modes(self) -> list[str]:
        return sorted({row["mode"] for row in self._rows.values()})

    def judge(self, candidate: Candidate) -> Candidate:
        row = self._rows.get(candidate.problem_id)
        if row is None:
            return candidate
        prediction = "".join(candidate.segments) if candidate.answer is None else candidate.answer
        verdict = MODES[row["mode"]]({"gold": self._golds[candidate.problem_id], **row, "prediction": prediction})
        self.verdicts[verdict.kind] += 1
        return dataclasses.replace(candidate, correct=verdict.kind == "equal")

    def category(self, problem: Problem) -> str:
        return str(self._rows.get(problem.id, {}).get("category") or problem.source)


def load_rules(file: epath.Path, problems: Sequence[Problem], scoring: str) -> OfficialRules:
    """The rules for a file of problems.

    scoring: "" for the mode of each prepared row, ``VERIFIER``, or a key of MODES for all. Raises UserError.
    """
    rows = {} if scoring == VERIFIER else scoring_rows(file)
    if scoring not in ("", VERIFIER):
        stages.choose(MODES, scoring, "--scoring")
        rows = {p.id: {**rows.get(p.id, {}), "mode": scoring} for p in problems}
    missing = [p.id for p in problems if rows and p.id not in rows]
    if missing:
        raise UserError(f"{file}: no scoring row for problem {missing[0]}; run mmprm prepare again")
    return OfficialRules(problems, rows)


def benchmark_run(base: Run, file: epath.Path) -> Run:
    """The run whose evaluation is that of another file of problems. It has a folder of its own."""
    section = dataclasses.replace(base.config.evaluate, calibration_problems=0)
    config = dataclasses.replace(base.config, evaluate=section)
    folder = base.workdir / "benchmarks" / f"{file.absolute().parent.name}-{file.stem}"
    return Run(config, base.workdir, base.config_text, base, {"evaluate": folder}, (file,))


def begin(base: Run, file: epath.Path, modes: Sequence[str], folder: epath.Path) -> None:
    """Takes the dev candidates over from the run. Raises UserError if the folder holds those of other problems."""
    made_of = {"problems": training_files.checksum([file]), "modes": list(modes)}
    note = folder / "problems.json"
    if note.exists() and io.read_sealed(note, f"delete {folder}", unsealed=True) != made_of:
        raise UserError(f"{folder}: holds the evaluation of other problems, or by other rules; delete it")
    folder.mkdir(parents=True, exist_ok=True)
    for name in _FROM_DEV if is_first() else ():
        if not (folder / name).exists():
            io.write(folder / name, (base.folder("evaluate") / name).read_bytes(), noted=True)
    if is_first():
        io.write_sealed(note, made_of)
    wait_for_all("benchmark: begun")


def run(base: Run, problems: str, scoring: str) -> Mapping[str, Any]:
    """Evaluates the file. Returns the figures of ``evaluate``, and ``scoring``. Raises UserError, Interrupted."""
    if base.figures("evaluate") is None:
        raise UserError(f"{base.workdir}: its evaluation has not finished; run `mmprm evaluate` there first")
    check_on_first(lambda: manifest.check(base, ["data", "sft", "train_prm", "evaluate"], Depth.RECORDS))
    file = epath.Path(problems)
    test, other = records.read_problems(file), benchmark_run(base, file)
    rules = load_rules(file, test, scoring)
    begin(base, file, rules.modes, other.folder("evaluate"))

    def make(other: Run) -> dict[str, Any]:
        own = evaluate.make_inputs(other)
        return evaluate.evaluate(dataclasses.replace(own, test=test, data=file.parent, controls=False, rules=rules))

    stages.run_stage(other, "evaluate", make)
    return other.finished("evaluate")
