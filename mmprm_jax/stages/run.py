"""A run: its configuration, and where the files of its stages are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from mmprm_jax import manifest, records
from mmprm_jax.data import digits
from mmprm_jax.records import Problem, SFTExample, StepExample
from mmprm_jax.settings import Config
from mmprm_jax.sharding import AXES, make_mesh, make_own_mesh

Figures = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """A configuration and the folders of its stages. It never changes, loads no model and computes nothing.

    config_text: as the report shows it. base: the run whose stages this one reads where it has none of its own, as
    ``folders`` says: those of the stages that are made here. files: of records that no stage wrote, beside those of the
    data.
    """

    config: Config
    workdir: epath.Path
    config_text: str = ""
    base: Run | None = None
    folders: Mapping[str, epath.Path] = dataclasses.field(default_factory=dict)
    files: tuple[epath.Path, ...] = ()

    @property
    def root(self) -> epath.Path:
        """The work directory that the names of files in manifests are relative to."""
        return self.base.root if self.base else self.workdir

    @property
    def data(self) -> epath.Path:
        """The folder of the problems and their images."""
        return epath.Path(self.config.data.folder) if self.config.data.folder else self.folder("data")

    def folder(self, stage: str) -> epath.Path:
        """Where a stage writes."""
        if stage in self.folders:
            return self.folders[stage]
        return self.base.folder(stage) if self.base else self.workdir / stage

    def figures(self, stage: str) -> Figures | None:
        """What a finished stage reported; None when it has not finished. Raises UserError if that is damaged."""
        found = manifest.read_done(self.folder(stage), manifest.remedy_for(self, stage))
        return None if found is None else {key: value for key, value in found.items() if key != "manifest"}

    def finished(self, stage: str) -> Figures:
        """``figures`` of a stage that has finished."""
        found = self.figures(stage)
        assert found is not None
        return found

    def problems(self, split: str) -> list[Problem]:
        """The problems of train, dev or test."""
        return records.read_problems(self.data / f"{split}.jsonl")

    def record_files(self) -> list[epath.Path]:
        """The files of records, and the tokenizer, that no stage wrote."""
        given = [*self.files, *self._labels()]
        if not self.config.data.folder:
            return given
        names = [f"{name}.jsonl" for name in (*digits.SPLITS, "truth")] + ["tokenizer.json", *self._demonstrations()]
        found = (self.data / name for name in dict.fromkeys(names))
        return [*given, *(path for path in found if path.exists())]

    def image_files(self) -> Iterator[epath.Path]:
        """The images that the records name."""
        for split in digits.SPLITS:
            problems = records.read(self.data / f"{split}.jsonl", Problem)
            yield from (self.data / name for p in problems for name in p.images)
        for path in (self.data / name for name in self._demonstrations()):
            found = records.read(path, SFTExample) if path.exists() else ()  # reported by the stage that needs it
            yield from (path.parent / name for x in found for name in x.images)
        for path in self._labels():
            yield from (path.parent / name for x in records.read(path, StepExample) for name in x.images)

    def _labels(self) -> list[epath.Path]:
        """The files of step labels that are there; one that is not is reported by the stage that needs it."""
        return [path for path in (self.data / name for name in self.config.train_prm.files) if path.exists()]

    def _demonstrations(self) -> Sequence[str]:
        return self.config.sft.files if self.config.sft.steps else ()


def run_mesh(config: Config) -> Mesh:
    """Over the devices of all processes."""
    return make_mesh(_shape(config))


def process_mesh(config: Config) -> Mesh:
    """Over the devices of this process."""
    return run_mesh(config) if jax.process_count() == 1 else make_own_mesh(_shape(config))


def _shape(config: Config) -> dict[str, int]:
    return dict(zip(AXES, config.mesh, strict=True))
