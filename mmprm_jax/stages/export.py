"""``mmprm export``: trees and step examples as rows that other projects read."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from mmprm_jax import finished_run, manifest, records
from mmprm_jax.data import export as rows
from mmprm_jax.data.sources_files import Located, read_rows
from mmprm_jax.records import StepExample, Tree, UserError
from mmprm_jax.search.labels import LabelSettings
from mmprm_jax.stages.train_prm import EXAMPLES


@dataclasses.dataclass(frozen=True)
class Trees:
    """Which solutions of trees become examples, as ``settings.TrainPRM`` has it."""

    mode: str = "default"
    max_paths: int = 16
    balance: bool = False
    seed: int = 0


def export(
    source: str | os.PathLike, target: Path, form: str, images: Path | None = None, tags: bool = False,
    trees: Trees = Trees(),
) -> rows.Written:  # fmt: skip
    """Writes the step examples of ``source`` to ``target``, whole or not at all.

    source: a file of trees or of step examples, or a folder: its examples.jsonl, else its trees. images: the folder
    that images are relative to; default: a run's data where the source is in a stage's folder, else the file's folder.
    form, tags: as in ``data.export.write``. Raises UserError as that does, and when there is no such source.
    """
    files = _files(Path(source))
    if target.resolve() in [path.resolve() for path in files]:
        raise UserError(f"{target}: is read, and would be replaced; choose another target")
    for path in files:
        manifest.check_file(path)
    found = (each for path in files for each in _examples(path, trees))
    return rows.write(target, found, form, images or _images(files[0]), tags)


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UserError(f"{source}: no such file or folder")
    found = sorted(source.glob("examples.jsonl")) or sorted(source.glob("trees-*.jsonl"))
    if not found:
        raise UserError(f"{source}: neither examples.jsonl nor trees-*.jsonl is in this folder; name a file")
    return found


def _images(path: Path) -> Path:
    """The folder that the images of a file are relative to."""
    workdir = path.resolve().parent.parent
    if not (workdir / "config.json").exists():
        return path.parent
    folder = finished_run.open_run(workdir).config.data.folder
    return Path(folder) if folder else workdir / "data"


def _examples(path: Path, trees: Trees) -> Iterator[tuple[str, StepExample]]:
    """The examples of a file, each with its place."""
    first = next(read_rows(Located(path.parent, (path,), (path.parent, path.resolve().parent))), None)
    if first is None or not first.value or "nodes" not in first.value:
        for line, example in records.read_numbered(path, StepExample):
            yield f"{path}, line {line}", example
        return
    chosen = LabelSettings(trees.max_paths, trees.balance)
    for line, tree in records.read_numbered(path, Tree):
        for example in EXAMPLES[trees.mode](tree, chosen, trees.seed):
            yield f"{path}, line {line}", example
