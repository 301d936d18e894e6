"""Being asked to end: SIGINT (Ctrl-C), SIGTERM, and SIGHUP (a closed terminal); the one place for signals.

A command runs in ``handling``. No handler raises: an exception inside of a library's callback is lost, or ends the
process in a bad way. Instead loops poll, by ``check`` or ``requested``, where nothing can be lost, and end with
``Interrupted``; what they save, they save in ``saving``. Where nothing polls (imports, loading, compilation) a thread
ends the process when ``GRACE`` is over: that loses no more than kill -9, as every file is written whole or not at all.
A second signal ends the process at once.

Worker processes are no command: see ``spawn``.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

GRACE = 6.0  # seconds from the signal to the next poll
TOGETHER = 60.0  # of several processes, which agree on where to end
CLOSING = 3.0  # seconds to end in when everything is saved
POLL = 0.2  # seconds; the longest wait without a poll
_SAME = 1.0  # seconds; `timeout` sends its signal to the process and to the group: that is not a second one
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(SystemExit):
    """The work so far is saved. The exit code is that of the signal, ``message`` what is shown."""

    apart = False  # one of several processes leaves the others

    def __init__(self, message: str = "stopped as asked") -> None:
        super().__init__(128 + (_watch.signal if _watch and _watch.signal else signal.SIGTERM))
        self.message = message
        if _watch:
            _watch.leaving = True


class _Watch:
    """Handlers for the signals, and the thread that they wake, whatever the main thread is doing."""

    def __init__(self, outcome: str) -> None:
        self.signal, self.event = 0, threading.Event()
        self.alone, self.leaving = True, False
        self._notify_all: Callable[[int], Any] | None = None  # JAX's own handler
        self._outcome, self._since, self._done, self._reported = outcome, 0.0, False, False
        self._saves, self._saved = 0, 0.0
        self._polled, self._rounds = 0.0, collections.deque([0.0] * 4, maxlen=4)
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._fd_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        # nohup, and a shell's background job, begin with signals ignored: SIGHUP stays so
        taken = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        self._before = {n: signal.signal(n, self._handle) for n in taken}
        threading.Thread(target=self._run, name="signals", daemon=True).start()

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        self._done = True
        os.write(self._write, b"\0")  # the thread ends, and closes the pipe

    def _handle(self, number: int, frame: object) -> None:
        """The handler: the next poll knows. It takes no lock, which the main thread may hold."""
        self.signal = self.signal or number

    def join(self) -> None:
        """Takes SIGTERM back from JAX, whose handler tells all processes: it is called by ours."""
        libc = ctypes.CDLL(None)
        libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
        of_jax = libc.signal(signal.SIGTERM, None)
        signal.signal(signal.SIGTERM, self._handle)
        self._notify_all = ctypes.CFUNCTYPE(None, ctypes.c_int)(of_jax) if of_jax else None
        self.alone = False

    def poll(self) -> None:
        """Notes that a loop is alive, and how long its last rounds took."""
        now = time.monotonic()
        self._rounds.append(now - self._polled if self._polled else 0.0)
        self._polled = now

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        self._saves += 1
        try:
            yield
        finally:
            self._saved = time.monotonic()
            self._saves -= 1

    def report(self, message: str) -> None:
        """Writes the one line, without the locks of ``sys.stderr``: the main thread may hold them."""
        if self._reported:
            return
        self._reported = True
        begin = "\n" if os.isatty(2) else ""  # behind a progress bar
        with contextlib.suppress(OSError):
            os.write(2, f"{begin}mmprm: {message}; the same command {self._outcome}\n".encode())

    def _run(self) -> None:
        while not self._done:
            left = self._seconds_left()
            if left is not None and left <= 0:
                self._exit(self.signal)
            ready, _, _ = select.select([self._read], [], [], left)
            for number in os.read(self._read, 64) if ready else ():
                if number in self._before:
                    self._receive(number)
        os.close(self._read)
        os.close(self._write)

    def _receive(self, number: int) -> None:
        now = time.monotonic()
        if self._since and now - self._since > _SAME:
            self._exit(number)
        if not self._since:
            self._since, self.signal = now, self.signal or number
            self.event.set()
            if self._notify_all:
                self._notify_all(signal.SIGTERM)

    def _seconds_left(self) -> float | None:
        """Seconds until the process is ended; None: nobody asked. Saving takes as long as it takes."""
        if not self._since:
            return None
        if self._saves:
            return POLL
        # A loop with long rounds, such as steps of a large model, is waited for; compiling once makes no long rounds.
        usual = sorted(self._rounds)[-2]
        grace, rounds = (GRACE, 2) if self.alone or self.leaving else (TOGETHER, 4)
        until = max(self._since + grace, self._saved + CLOSING, self._polled + rounds * usual)
        return until - time.monotonic()

    def _exit(self, number: int) -> None:
        self.report("ended as asked")
        os._exit(128 + number)


_watch: _Watch | None = None


@contextlib.contextmanager
def handling(outcome: str = "goes on from here", *, permanent: bool = False) -> Iterator[None]:
    """In it signals are polled for; Interrupted is shown as one line. Outermost, and in the main thread, or nothing.

    outcome: what the same command does, run again. permanent: to the end of the process, which is about to come.
    """
    global _watch
    if _watch or threading.current_thread() is not threading.main_thread():
        yield
        return
    watch = _watch = _Watch(outcome)
    if permanent:  # the last thing before Python takes the handlers away: everything is done, the exit code stays
        atexit.register(lambda: [signal.signal(n, signal.SIG_IGN) for n in SIGNALS])
    try:
        yield
    except Interrupted as interrupted:
        watch.report(interrupted.message)
        if interrupted.apart and permanent:  # JAX would wait for the others, with Python's lock held
            sys.stdout.flush()
            os._exit(int(interrupted.code or 0))
        raise
    finally:
        if not permanent:
            _watch = None
            watch.close()


def requested() -> bool:
    """Whether to end: a loop that asks ends soon after, with ``Interrupted``. Threads other than the main one: no."""
    if _watch is None or threading.current_thread() is not threading.main_thread():
        return False
    _watch.poll()
    return _watch.signal != 0


def check(own: bool = False) -> None:
    """Raises Interrupted when asked to end; of several processes only where the work is this one's ``own``."""
    if requested() and _watch and (own or _watch.alone):
        error = Interrupted()
        error.apart = not _watch.alone
        raise error


def sleep(seconds: float) -> None:
    """Raises Interrupted as ``check``, as soon as asked."""
    if _watch is None:
        time.sleep(seconds)
    else:
        _watch.event.wait(seconds)
        check()


def saving() -> contextlib.AbstractContextManager[None]:
    """Inside, only a second signal ends the process."""
    return _watch.saving() if _watch else contextlib.nullcontext()


def coordinate() -> None:
    """From now on this is one of several processes: ``processes.stop_requested`` says when they end together."""
    if _watch:
        _watch.join()
