"""Worker processes: signals to the group of their parent do not reach them, and they die with their parent."""

from __future__ import annotations

import collections
import ctypes
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

from mmprm_jax import interruption
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
        parent = multiprocessing.parent_process()
        if parent is None or os.getppid() != parent.pid:  # it died before
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

    def Process(self, *args: Any, **kwargs: Any) -> _Worker:  # type: ignore[override]  # noqa: N802
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


class Child:
    """A generator that runs in a process of its own: ``next`` lets it go on to its next value, and waits for it.

    make: a function of a module, called with ``args`` in the child. Raises UserError when the child fails.
    """

    def __init__(self, make: Callable[..., Iterator[Any]], *args: Any):
        self._spawn = Spawn()
        self._pipe, other = self._spawn.Pipe()
        self._process = self._spawn.Process(target=_serve, args=(other, make, args), daemon=True)
        self._process.start()
        other.close()

    def __next__(self) -> Any:
        try:
            self._pipe.send(None)
            while not self._pipe.poll(interruption.POLL):
                interruption.check()
            good, value = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(10)
            self._spawn.check()
            raise UserError(f"a process of the benchmark ended with {self._process.exitcode}: out of memory?") from None
        if not good:
            raise UserError(f"a process of the benchmark failed:\n{value}")
        return value

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: Any) -> None:
        self._pipe.close()  # a child that waits ends by itself
        self._process.join(5)
        self._process.terminate()
        self._process.join()


def _serve(pipe: Any, make: Callable[..., Iterator[Any]], args: tuple[Any, ...]) -> None:
    values: Iterator[Any] = iter(())
    try:
        pipe.recv()
        values = make(*args)
        for value in values:
            pipe.send((True, value))
            pipe.recv()
        pipe.send((False, "it had nothing more to do"))
    except EOFError:  # the parent is done
        pass
    except Exception:
        pipe.send((False, traceback.format_exc()))
