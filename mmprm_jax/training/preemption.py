"""Being asked to end: SIGTERM, or the notice that a pod's machine is about to go."""

from __future__ import annotations

import signal
import sys
import threading
from typing import NoReturn

import jax
from jax.experimental import multihost_utils


class Preempted(SystemExit):
    """The work so far is saved; the same command goes on from there. The exit code is that of a SIGTERM."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


class Preemption:
    """Context manager in which SIGTERM ends the process at the next poll only.

    Several processes poll together (``jax.distributed`` catches the signal there): all learn of it at the same step,
    even if one of them only was asked.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before = None

    def __enter__(self) -> Preemption:
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, *_: object) -> None:
        self._asked = True

    def reached(self, step: int) -> bool:
        """Whether to stop behind step ``step``; every process asks for every step, in order."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def stop(self, message: str) -> NoReturn:
        """Says so and ends the process."""
        print(f"mmprm: {message}; the same command goes on from here", file=sys.stderr, flush=True)
        raise Preempted
