"""Orbax checkpoints of training state and of finished parameters."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from mmprm_jax import io, manifest
from mmprm_jax.interruption import saving
from mmprm_jax.processes import any_process, is_first, share, wait_for_all
from mmprm_jax.records import UserError


def absolute(path: epath.PathLike) -> epath.Path:
    """Orbax wants absolute paths; ``epath`` would take gs://BUCKET/FOLDER for a relative one."""
    path = epath.Path(path)
    return path if "://" in os.fspath(path) else path.absolute()


class Checkpoints:
    """Training states, saved asynchronously; each holds weights, optimizer and the position in the data.

    The newest ``keep`` stay on disk, and the ``best`` ones by the metric ``loss``. What a killed process left half
    written is removed. Orbax reads a flipped bit of an array as another number: the checksums of a checkpoint's files
    are in ``sums/checkpoint-<step>.json`` beside the folder.
    """

    def __init__(self, folder: epath.PathLike, keep: int = 2, best: int = 0):
        newest = policies.LatestN(keep)
        lowest = policies.BestN(get_metric_fn=lambda metrics: metrics["loss"], reverse=True, n=best)
        self._folder = absolute(folder)
        self._options = ocp.CheckpointManagerOptions(
            create=True,
            cleanup_tmp_directories=True,
            preservation_policy=policies.AnyPreservationPolicy([newest, lowest] if best else [newest]),
            async_options=ocp.AsyncOptions(post_finalization_callback=self._note),
        )
        self._manager = ocp.CheckpointManager(self._folder, options=self._options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        self._manager.close()

    def wait(self) -> None:
        """Until what has been saved is on disk."""
        with saving():
            self._manager.wait_until_finished()

    def save(self, step: int, state: Any, position: Any, metrics: Mapping[str, float]) -> None:
        """Begins to save; ``state`` may be donated at once. position: JSON, the same on every process."""
        self.wait()
        self._saving = step
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave({"position": position}))
        with saving():
            self._manager.save(step, args=args, metrics=dict(metrics))

    def restore(self, state: Any) -> tuple[int, Any, Any]:
        """(step, state, data position) of the newest good checkpoint, laid out as ``state``; (0, state, None) if none.

        A checkpoint that cannot be read is moved aside, with a warning, if an older one can; the mesh may be another
        one than that of the run which saved. Raises UserError if there are checkpoints and none can be read.
        """
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
        broken: list[int] = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            problem = ""
            try:
                problem = self._changed(step)
            except Exception as error:
                problem = str(error)
            if any_process(bool(problem)):  # before Orbax reads it, which says much about damaged files
                broken.append(step)
                logging.warning("%s: the checkpoint of step %d cannot be read (%s)", self._folder, step, problem)
                continue
            try:
                found = self._manager.restore(step, args=args)
                restored, position = found["state"], found["data"]["position"]
                problem = "" if restored is not None else "its state is missing"
            except Exception as error:  # whatever a damaged file makes of a reader
                problem = f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
            if any_process(bool(problem)):
                broken.append(step)
                logging.warning("%s: the checkpoint of step %d cannot be read (%s)", self._folder, step, problem)
                continue
            self._set_aside(broken, step)
            return step, restored, position
        if broken:
            raise UserError(
                f"{self._folder}: none of the checkpoints {broken} can be read as this model's ({problem}); delete the"
                " folder to begin again, or run with the settings that made them"
            )
        return 0, state, None

    def _note_path(self, step: int | str) -> epath.Path:
        return self._folder.parent / io.SUMS / f"checkpoint-{step}.json"

    def _note(self) -> None:
        """Notes the files of the checkpoint that is complete but for its name; the first process does."""
        step = str(self._saving)
        names = [step, *(path.name for path in self._folder.iterdir() if path.name.startswith(f"{step}.orbax"))]
        folder = self._folder / names[-1]
        files = list(io.walk(folder, lambda name: name == "_CHECKPOINT_METADATA"))  # times, and nothing that is read
        with ThreadPoolExecutor(8) as threads:
            entries = list(threads.map(io.measure, files))
        found = {p.relative_to(folder).as_posix(): dataclasses.asdict(x) for p, x in zip(files, entries, strict=True)}
        io.write_sealed(self._note_path(step), found)
        for old in self._note_path("").parent.glob("checkpoint-*.json"):
            number = old.name.removeprefix("checkpoint-").removesuffix(".json")
            if number != step and not (self._folder / number).exists():
                old.unlink(missing_ok=True)

    def _changed(self, step: int) -> str:
        """What is wrong with the files of a checkpoint, if they were noted. Each process looks at its share."""
        note, folder = self._note_path(step), self._folder / str(step)
        if not note.exists():
            logging.warning("%s: there is no checksum of it; it is taken as it is", folder)
            return ""
        wanted = io.read_sealed(note, f"delete it, and step {step} is read as it is")
        mine = share(sorted(wanted))
        with ThreadPoolExecutor(8) as threads:
            found = threads.map(lambda name: io.difference(folder / name, io.Entry(**wanted[name])), mine)
            return next((f"{folder / name}: {what}" for name, what in zip(mine, found, strict=True) if what), "")

    def _set_aside(self, broken: list[int], step: int) -> None:
        """Makes room for saving the broken steps again."""
        if not broken:
            return
        logging.warning("%s: going back to the checkpoint of step %d", self._folder, step)
        self._manager.close()
        if is_first():
            for bad in broken:
                target = self._folder.parent / f"{self._folder.name}_damaged" / str(bad)
                if target.exists():
                    target.rmtree()
                target.parent.mkdir(parents=True, exist_ok=True)
                (self._folder / str(bad)).rename(target)
        wait_for_all("checkpoints set aside")
        self._manager = ocp.CheckpointManager(self._folder, options=self._options)


def save_params(path: epath.PathLike, params: Any) -> None:
    """Writes a finished parameter tree; an older one there is replaced."""
    with saving(), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(absolute(path), params, force=True)


def load_params(path: epath.PathLike, abstract: Any) -> Any:
    """Reads a parameter tree into the shapes and shardings of ``abstract``.

    Raises UserError when there is none, when it is not what a finished stage wrote, or cannot be read.
    """
    path = absolute(path)
    if not path.exists():
        raise UserError(f"{path}: no weights there; the stage that trains them has not run")
    if is_first():
        manifest.check_file(path)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path, abstract)
    except Exception as error:  # whatever a damaged file makes of a reader
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{path}: these weights cannot be read as this model's ({type(error).__name__}: {reason}); make them again"
        ) from None
