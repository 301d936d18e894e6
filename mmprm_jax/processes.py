"""The processes of one run: how they meet, who writes, who does which part, and waiting for each other."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from mmprm_jax import interruption
from mmprm_jax.records import UserError

_LONG = 30 * 24 * 3600 * 1000  # ms; a process that dies is noticed sooner
_waits: Counter[str] = Counter()  # a barrier's name serves once
T = TypeVar("T")


def connect() -> bool:
    """Connects to the other processes, which the environment, or a pod, names. Returns whether this is the first one.

    Raises UserError.
    """
    count, index = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
    try:
        jax.distributed.initialize(
            num_processes=int(count) if count else None, process_id=int(index) if index else None
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--distributed: the processes did not find each other ({error})") from None
    if jax.process_count() > 1:
        interruption.coordinate()
    return is_first()


def stop_requested(step: int) -> bool:
    """Whether to end behind ``step``. Several processes agree: every one asks for every step, in order."""
    requested = interruption.requested()
    return multihost_utils.reached_preemption_sync_point(step) if jax.process_count() > 1 else requested


def is_first() -> bool:
    """Whether this is the process that writes what all of them have."""
    return jax.process_index() == 0


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part of ``items``: every so many-th, which depends on nothing else."""
    return items[jax.process_index() :: jax.process_count()]


def any_process(value: bool) -> bool:
    """Whether it is so in any of the processes, which all ask."""
    if jax.process_count() == 1:
        return value
    wait_for_all("any process")  # often the first collective operation, whose set-up has half a minute
    return bool(np.any(multihost_utils.process_allgather(np.array(value))))


def check_on_first(check: Callable[[], None]) -> None:
    """Runs a check in the first process. Raises its UserError there, and one that says so in all others."""
    error = None
    if is_first():
        try:
            check()
        except UserError as found:
            error = found
    if any_process(error is not None):
        raise error or UserError("the first process has found something wrong, and says what")


def wait_for_all(name: str) -> None:
    """Waits for all processes, however long they take: a collective operation may give up after half a minute."""
    _waits[name] += 1
    ocp.multihost.get_barrier_sync_fn()(key=f"{name} {_waits[name]}", timeout_ms=_LONG)
