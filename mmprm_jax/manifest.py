"""What the stages of a run wrote and what they made it from, and whether that is still there.

A finished stage's ``done.json`` is sealed and has a ``manifest``: ``files``, those in its folder, and ``made_of``,
those it was made from, each name with its size, sha256 and number of records. Names in ``files`` are relative to the
stage's folder, those in ``made_of`` to the work directory, or absolute. An unfinished stage has ``made_of`` in
``begun.json``.
The images of the problems are listed in ``data/images.jsonl``, which is one of the files of the stage ``data``.

Whoever reads a stage checks it first: nothing goes on with less than was there, or with something else.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from absl import logging
from etils import epath

from mmprm_jax import io
from mmprm_jax.errors import UserError
from mmprm_jax.io import Entry
from mmprm_jax.settings import Config

DONE, BEGUN, IMAGES = "done.json", "begun.json", "images.jsonl"
# What each folder of a work directory is made from, in the order in which they are made.
READS: Mapping[str, tuple[str, ...]] = {
    "data": (),
    "sft": ("data",),
    "annotate": ("data", "sft"),
    "sweep": ("data", "sft", "annotate"),
    "train_prm": ("data", "sft", "annotate"),
    "evaluate": ("data", "sft", "train_prm"),
    "guided": ("data", "sft", "train_prm", "evaluate"),
    "benchmarks": ("data", "sft", "train_prm", "evaluate"),
    "report": ("data", "sft", "annotate", "train_prm", "evaluate"),
}
# In a stage's folder, but not what it hands on: state to go on from, logs, and images, which have their own list.
_WORK = {DONE, BEGUN, io.SUMS, "checkpoints", "checkpoints_damaged", "input", "metrics.jsonl", "images"}
_warned: set[str] = set()  # work directories whose lack of checksums was logged
Entries = dict[str, Entry]


class Depth(enum.Enum):
    """How closely files are compared."""

    SIZES = 0  # what nobody reads
    RECORDS = 1  # the content of all but weights and images
    ALL = 2


class Run(Protocol):
    """What is used of a ``stages.Run``."""

    @property
    def config(self) -> Config: ...
    @property
    def workdir(self) -> epath.Path: ...
    @property
    def root(self) -> epath.Path: ...  # that names in ``made_of`` are relative to
    @property
    def data(self) -> epath.Path: ...
    def folder(self, stage: str) -> epath.Path: ...
    def record_files(self) -> list[epath.Path]: ...
    def image_files(self) -> Iterable[epath.Path]: ...


def reads(run: Run, stage: str) -> list[str]:
    """The stages that a stage is made from, with this configuration."""
    c = run.config
    if stage == "annotate" and (c.annotate.policy or c.annotate.servers or (c.policy and not c.sft.steps)):
        return [] if c.data.folder else ["data"]  # a policy that is there
    if stage == "train_prm" and not c.train_prm.trees and c.policy and not c.sft.steps:
        return []  # step labels that are there, too
    return [name for name in READS[stage] if c.train_prm.trees or name != "annotate"]


def read_done(folder: epath.Path, remedy: str) -> dict[str, Any] | None:
    """The content of a stage's ``done.json``; None when it has not finished. Raises UserError when it is damaged."""
    path = folder / DONE
    if not path.exists():
        return None
    found = io.read_sealed(path, remedy, unsealed=True)
    if "manifest" not in found:
        return found
    return io.read_sealed(path, remedy)


def remedy_for(run: Run, stage: str) -> str:
    """What to do when something of a stage is damaged, for messages."""
    folder = run.folder(stage)
    if folder == run.root / stage:
        return f"put it back, or --force-stage={stage} makes that stage and what follows anew"
    return f"put it back, or delete {folder}, and the same command makes it anew"


# ------------------------------------------------------------------------------------------------- checking


def check(run: Run, stages: Sequence[str], depth: Depth) -> None:
    """Compares what finished stages wrote, and what they were made from, with what is there. Raises UserError.

    Stages that have not finished are left out, and those of older versions, which noted nothing, are with a warning.
    """
    for stage in stages:
        remedy, folder = remedy_for(run, stage), run.folder(stage)
        found = _manifest(folder, remedy)
        if found is None:
            continue
        files, made_of = found
        for name, entry in files.items():
            _compare(folder / name, entry, _content(name, depth), f"than {stage} wrote", remedy)
        for name, entry in made_of.items():
            _compare(_located(run, name), entry, _content(name, depth), f"than when {stage} read it", remedy)
        if depth is Depth.ALL and IMAGES in files:
            _check_images(run, folder / IMAGES, stage, remedy)


def _manifest(folder: epath.Path, remedy: str) -> tuple[Entries, Entries] | None:
    """(files, made_of) of a finished stage; None if there is no such thing."""
    done = read_done(folder, remedy)
    if done is None:
        return None
    if "manifest" not in done:
        if os.fspath(folder.parent) not in _warned:
            logging.warning("%s: of an older version, without checksums: its stage is taken as it is", folder / DONE)
            _warned.add(os.fspath(folder.parent))
        return None
    found = done["manifest"]
    return _entries(found["files"]), _entries(found["made_of"])


def _entries(values: Mapping[str, Any]) -> Entries:
    return {name: Entry(**value) for name, value in values.items()}


def _content(name: str, depth: Depth) -> bool:
    """Whether the content of a file is looked at, and not only its size."""
    weights = "params" in name.split("/")[:-1] and not os.path.isabs(name)
    return depth is Depth.ALL or (depth is Depth.RECORDS and not weights)


def _compare(path: epath.Path, entry: Entry, content: bool, than: str, remedy: str) -> None:
    if found := io.difference(path, entry, content):
        what = f"{found} {than}" if found == "other content" else found
        raise UserError(f"{path}: {what}; {remedy}")


def _check_images(run: Run, path: epath.Path, stage: str, remedy: str) -> None:
    for line in path.read_text().splitlines():
        name, size, digest = json.loads(line)
        _compare(_located(run, name), Entry(size, digest), True, f"than {stage} found", remedy)


def check_file(path: epath.PathLike) -> None:
    """Compares one file with what the stage in whose folder it is says of it, if it is in one. Raises UserError."""
    path = epath.Path(path)
    for folder in list(path.parents)[:2]:
        if (folder / DONE).exists():
            remedy = f"put it back, or make {folder} anew, with --force-stage={folder.name} for a stage of a run"
            found = _manifest(folder, remedy)
            inside = path.relative_to(folder).as_posix()
            for name, entry in found[0].items() if found else ():
                if name == inside or name.startswith(f"{inside}/"):  # a folder of weights
                    _compare(folder / name, entry, True, f"than {folder.name} wrote", remedy)
            return


# ------------------------------------------------------------------------------------------------- a stage's life


def begin(run: Run, stage: str) -> None:
    """Checks what a stage is made from, and notes it. Raises UserError.

    An unfinished stage goes on only with what it began with; and a stage that others were made from is not made under
    their feet.
    """
    needed = reads(run, stage)
    check(run, needed, Depth.RECORDS if stage == "report" else Depth.ALL)
    if stage == "report":  # it is always made anew, of stages that have just been compared with each other
        return
    _check_later_stages(run, stage)
    path, made_of = run.folder(stage) / BEGUN, _made_of(run, needed)
    if path.exists():
        before = _entries(io.read_sealed(path, f"delete it if nothing changed, else {remedy_for(run, stage)}"))
        for name, entry in before.items():
            _compare(_located(run, name), entry, True, f"than when {stage} began", remedy_for(run, stage))
    else:
        io.write_sealed(path, {name: dataclasses.asdict(entry) for name, entry in made_of.items()})


def _check_later_stages(run: Run, stage: str) -> None:
    for later in list(READS)[list(READS).index(stage) + 1 :]:
        for name in (DONE, BEGUN):
            path = run.folder(later) / name
            if later == "report" or not path.exists():
                continue
            found = io.read_sealed(path, remedy_for(run, later), unsealed=True)
            made_of = found.get("manifest", {}).get("made_of", {}) if name == DONE else found
            if any(_located(run, x).is_relative_to(run.folder(stage)) for x in made_of):
                raise UserError(
                    f"{run.folder(stage) / DONE}: gone, and {later} was made from {stage}; {remedy_for(run, stage)}"
                )


def finish(run: Run, stage: str, figures: Mapping[str, Any]) -> None:
    """Writes ``done.json``: the figures, and what is in the stage's folder."""
    folder = run.folder(stage)
    if stage == "data":
        _list_images(run, folder / IMAGES)
    begun = folder / BEGUN
    if begun.exists():
        made_of = _entries(io.read_sealed(begun, remedy_for(run, stage)))
    else:
        made_of = _made_of(run, reads(run, stage))
    parts = {"files": _files(folder), "made_of": made_of}
    manifest = {part: {k: dataclasses.asdict(v) for k, v in found.items()} for part, found in parts.items()}
    io.write_sealed(folder / DONE, {**figures, "manifest": manifest})
    begun.unlink(missing_ok=True)


def _made_of(run: Run, stages: Sequence[str]) -> Entries:
    """The files of these stages, and the records that no stage wrote."""
    found: Entries = {}
    for stage in stages:
        folder = run.folder(stage)
        of_stage = _manifest(folder, remedy_for(run, stage))
        found |= {_name(run, folder / name): entry for name, entry in (of_stage[0] if of_stage else {}).items()}
    return found | {_name(run, path): io.measure(path) for path in run.record_files()}


def _files(folder: epath.Path) -> Entries:
    return {path.relative_to(folder).as_posix(): io.measure(path) for path in io.walk(folder, _is_work)}


def _is_work(name: str) -> bool:
    return name in _WORK or name.endswith((".tmp", ".part", ".parts")) or name.startswith("events.out.")


def _list_images(run: Run, path: epath.Path) -> None:
    """Images that we made are read for their checksum; of a user's own only the size is looked at."""
    ours = not run.config.data.folder
    lines = []
    for image in dict.fromkeys(run.image_files()):
        if io.is_remote(image) or not os.path.isfile(image):
            continue  # too slow to ask for; or found when it is opened
        digest = io.measure(image).sha256 if ours else None
        lines.append(json.dumps([_name(run, image), io.length(image), digest]) + "\n")
    io.write(path, "".join(lines))


def _name(run: Run, path: epath.Path) -> str:
    if path.is_relative_to(run.root):
        return path.relative_to(run.root).as_posix()
    return os.fspath(path if io.is_remote(path) else path.absolute())


def _located(run: Run, name: str) -> epath.Path:
    return run.root / name  # an absolute name stays what it is


# ------------------------------------------------------------------------------------------------- making anew


def force(run: Run, stage: str) -> None:
    """Moves what a stage made, and what was made from it, to ``<workdir>/replaced``. A user's own data stay."""
    moved = [stage]
    for later in list(READS)[list(READS).index(stage) + 1 :]:
        if set(reads(run, later)) & set(moved):
            moved.append(later)
    there = [name for name in moved if (run.workdir / name).exists()]
    if not there:
        return
    number = 1
    while (run.workdir / "replaced" / str(number)).exists():
        number += 1
    target = run.workdir / "replaced" / str(number)
    target.mkdir(parents=True)
    for name in reversed(there):  # last first: whatever is left after an interruption fits together
        folder = run.workdir / name
        if name == "data" and run.config.data.folder and _holds(folder, run.data):
            (folder / DONE).unlink(missing_ok=True)  # the user's own folder
        else:
            folder.rename(target / name)
    print(
        f"mmprm: moved {', '.join(there)} to {target}, to be made anew; if this is interrupted, go on without"
        " --force-stage",
        file=sys.stderr,
    )


def _holds(folder: epath.Path, path: epath.Path) -> bool:
    if io.is_remote(folder) or io.is_remote(path):
        return path.is_relative_to(folder)
    return epath.Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
