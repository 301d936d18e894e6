"""Worker processes: signals to the group of their parent do not reach them, and they die with their parent."""

from __future__ import annotations

import collections
import ctypes
import multiprocessing
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

from mmprm_jax.interruption import SIGNALS
from mmprm_jax.records import UserError

_NO_GUARD = 64  # exit code of a worker that would start workers while it begins
_DEATHSIG = 1  # PR_SET_PDEATHSIG
# Workers begin with the signals blocked, and stay so. They die with the thread that starts them: this one stays.
_starter = ThreadPoolExecutor(1, "spawn", initializer=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS))


class _Worker(SpawnProcess):
    def start(self) -> None:
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            os._exit(_NO_GUARD)  # the parent tells
        _starter.submit(super().start).result()

    def run(self) -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_DEATHSIG, signal.SIGKILL)
        if os.getppid() != multiprocessing.parent_process().pid:  # it died before
            os._exit(1)
        super().run()

    def terminate(self) -> None:
        """A worker has nothing to save, and SIGTERM does not reach it."""
        self.kill()


def _quiet_tracker() -> None:
    """The process that tidies up behind a killed parent takes its warning options from here; it would warn of that."""
    option = "ignore:resource_tracker:UserWarning"
    sys.warnoptions.append(option)
    try:
        resource_tracker.ensure_running()
    finally:
        sys.warnoptions.remove(option)


class Spawn(SpawnContext):
    """A multiprocessing context; forked children of a process with XLA's threads may hang."""

    def __init__(self) -> None:
        super().__init__()
        _quiet_tracker()
        self._last: collections.deque[_Worker] = collections.deque(maxlen=64)

    def Process(self, *args: Any, **kwargs: Any) -> _Worker:  # noqa: N802
        self._last.append(_Worker(*args, **kwargs))
        return self._last[-1]

    def check(self) -> None:
        """Raises UserError when workers could not begin."""
        if any(worker.pid and worker.exitcode == _NO_GUARD for worker in list(self._last)):
            script = getattr(sys.modules["__main__"], "__file__", "the script")
            raise UserError(
                f"{script}: worker processes import it, and would run all of it again; put what it does below"
                ' `if __name__ == "__main__":`'
            )
