"""Reading a finished run: ``open_run("runs/digits").prm``."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from mmprm_jax import io, manifest, records, schema
from mmprm_jax.data import digits
from mmprm_jax.evaluation import guided
from mmprm_jax.policy import Policy
from mmprm_jax.prm import PRM
from mmprm_jax.records import Problem, ScoredCandidate, StepExample, Tree, UserError
from mmprm_jax.search import store
from mmprm_jax.settings import Config


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """What the stages of a run have made. Nothing is written; every file is compared with what its stage noted.

    Each method raises UserError where its stage has not finished, or a file was damaged or changed.
    """

    workdir: epath.Path
    config: Config

    @functools.cached_property
    def policy(self) -> Policy:
        """The policy that was trained, or that the run began with if there was nothing to train."""
        folder = self._stage("sft")
        source = folder if self.config.sft.steps else self.config.policy
        return Policy.from_pretrained(source, max_tiles=self.config.max_tiles)

    @functools.cached_property
    def prm(self) -> PRM:
        """The PRM that was trained."""
        return PRM.from_pretrained(self._stage("train_prm"), max_tiles=self.config.max_tiles)

    def problems(self, split: str = "test") -> list[Problem]:
        """The problems of train, dev or test, in order; their images by paths that can be opened from here."""
        return records.open_problems(self._file("data", f"{split}.jsonl", self._data))

    def trees(self) -> Iterator[Tree]:
        """The search trees of the training problems, one in memory at a time; images as in ``problems``."""
        folder = self._stage("annotate")
        for path in folder.glob("trees-*.jsonl"):
            manifest.check_file(path)
        trees = store.iter_trees(folder)
        return (dataclasses.replace(t, problem=records.with_folder(t.problem, self._data)) for t in trees)

    def examples(self) -> list[StepExample]:
        """The step labels that the PRM was trained on: of the trees, then of files; images by paths that open."""
        config, found = self.config.train_prm, []
        self._stage("train_prm")
        if config.trees:
            own = records.read_all(self._file("train_prm", "examples.jsonl"), StepExample)
            found += [records.with_folder(x, self._data) for x in own]
        for name in config.files:
            path = self._file("train_prm", name, self._data)
            found += [records.with_folder(x, path.parent) for x in records.read_all(path, StepExample)]
        return found

    def step_values(self) -> list[StepExample]:
        """Monte Carlo estimates behind the steps of some test solutions, the first candidates; images as above."""
        found = records.read(self._file("evaluate", "test_steps.jsonl"), StepExample)
        return [records.with_folder(x, self._data) for x in found]

    def steps_right(self, problem_id: str, segments: Sequence[str]) -> list[bool]:
        """Whether the value after each step of a solution is right, as only the embedded problem set can tell.

        problem_id: of a development or test problem. The final answer has no entry. Raises UserError for another one.
        """
        truth = self._truth.get(problem_id)
        if truth is None:
            raise UserError(f"{problem_id}: the truth about its steps is not known; {self._data / 'truth.jsonl'} has it"
                            " for the dev and test problems of the embedded set")  # fmt: skip
        return digits.steps_right(truth, tuple(segments))

    def candidates(self, split: str = "test") -> dict[str, list[ScoredCandidate]]:
        """The scored candidates of dev or test, by the ids of their problems."""
        found: dict[str, list[ScoredCandidate]] = {}
        for x in records.read(self._file("evaluate", f"{split}_scored.jsonl"), ScoredCandidate):
            found.setdefault(x.candidate.problem_id, []).append(x)
        return found

    @functools.cached_property
    def metrics(self) -> dict[str, Any]:
        """The figures of the report."""
        return json.loads(self._file("report", "metrics.json").read_text())

    def guided(self) -> dict[str, dict[str, Any]]:
        """What ``mmprm guide`` found, by search, against Best-of-N at as many tokens; empty where it has not run."""
        found: dict[str, dict[str, Any]] = {}
        for name in guided.METHODS:
            path = self.workdir / "guided" / f"{name}.jsonl"
            if path.exists():
                io.check(path)
                solutions = records.read_all(path, guided.Guided)
                scored = list(self.candidates("test").values())
                found[name] = guided.compare(solutions, scored, self.metrics["prm_selected"])
        return found

    def sweep(self) -> dict[str, Any] | None:
        """The tables of ``mmprm sweep`` (``stages.sweep.tables``); None where it has not run."""
        path = self.workdir / "sweep" / "table.json"
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text())
        except ValueError:
            raise UserError(f"{path}: damaged; the same mmprm sweep writes it anew") from None

    @property
    def _data(self) -> epath.Path:
        """The folder of the problems and their images."""
        return epath.Path(self.config.data.folder) if self.config.data.folder else self.workdir / "data"

    @functools.cached_property
    def _truth(self) -> dict[str, digits.Truth]:
        path = self._data / "truth.jsonl"
        return {truth.id: truth for truth in records.read(path, digits.Truth)} if path.exists() else {}

    def _stage(self, name: str) -> epath.Path:
        folder = self.workdir / name
        if not (folder / manifest.DONE).exists():
            raise UserError(f"{folder}: this stage has not finished; run `mmprm {name}`")
        return folder

    def _file(self, stage: str, name: str, folder: epath.Path | None = None) -> epath.Path:
        """A file of a stage; folder: where it is, if not in the stage's own."""
        path = (folder or self._stage(stage)) / name
        if not path.exists():
            raise UserError(f"{path}: no such file")
        manifest.check_file(path)
        return path


def open_run(workdir: epath.PathLike) -> FinishedRun:
    """The run in a work directory, local or ``gs://``; its config file is not needed. Raises UserError."""
    workdir = epath.Path(workdir)
    path = workdir / "config.json"
    if not path.exists():
        raise UserError(f"{workdir}: no run is there (no config.json)")
    try:
        config, wrong = schema.build(Config, json.loads(path.read_text()))
    except (ValueError, AttributeError, TypeError):
        raise UserError(f"{path}: not a config") from None
    schema.raise_for((f"{path}: {key}", message) for key, message in wrong)
    return FinishedRun(workdir, config)
