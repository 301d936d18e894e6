"""Reading a finished run: ``open_run("runs/digits").prm``."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from typing import Any

from etils import epath

from mmprm_jax import manifest, records, schema
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
        folder = epath.Path(self.config.data.folder) if self.config.data.folder else self.workdir / "data"
        found = records.read_problems(self._file("data", f"{split}.jsonl", folder))
        return [dataclasses.replace(p, images=tuple(str(folder / name) for name in p.images)) for p in found]

    def trees(self) -> Iterator[Tree]:
        """The search trees of the training problems, one in memory at a time."""
        folder = self._stage("annotate")
        for path in folder.glob("trees-*.jsonl"):
            manifest.check_file(path)
        return store.iter_trees(folder)

    def examples(self) -> list[StepExample]:
        """The step labels that the PRM was trained on: of the trees, whose images are relative to the run's data, then
        of files, with their images by paths that can be opened from here."""
        config, data, found = self.config.train_prm, self.config.data.folder or self.workdir / "data", []
        self._stage("train_prm")
        if config.trees:
            found += records.read_all(self._file("train_prm", "examples.jsonl"), StepExample)
        for name in config.files:
            path = self._file("train_prm", name, epath.Path(data))
            for example in records.read_all(path, StepExample):
                images = tuple(str(path.parent / image) for image in example.images)
                found.append(dataclasses.replace(example, images=images))
        return found

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
