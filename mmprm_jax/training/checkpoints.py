"""Orbax checkpoints of training state and of finished parameters."""

from __future__ import annotations

import os
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from mmprm_jax.records import UserError


def absolute(path: epath.PathLike) -> epath.Path:
    """Orbax wants absolute paths; ``epath`` would take gs://BUCKET/FOLDER for a relative one."""
    path = epath.Path(path)
    return path if "://" in os.fspath(path) else path.absolute()


class Checkpoints:
    """The last two training states, saved asynchronously; each holds weights, optimizer and the data position."""

    def __init__(self, folder: epath.PathLike):
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        self._manager = ocp.CheckpointManager(absolute(folder), options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def save(self, step: int, state: Any, position: Any) -> None:
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(position))
        self._manager.save(step, args=args)

    def restore(self, state: Any) -> tuple[int, Any, Any]:
        """(step, state, data position) of the newest checkpoint, laid out as ``state``; (0, state, None) if none."""
        step = self._manager.latest_step()
        if step is None:
            return 0, state, None
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=args)
        return step, restored["state"], restored["data"]


def save_params(path: epath.PathLike, params: Any) -> None:
    """Writes a finished parameter tree; an older one there is replaced."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(absolute(path), params, force=True)


def load_params(path: epath.PathLike, abstract: Any) -> Any:
    """Reads a parameter tree into the shapes and shardings of ``abstract``. Raises UserError when there is none."""
    path = absolute(path)
    if not path.exists():
        raise UserError(f"{path}: no weights there; the stage that trains them has not run")
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, abstract)
