"""Verifying answers in worker processes: a hanging or dying one costs its answers a verdict, nothing else.

``Verifier`` may be called from any thread, from asyncio through ``asyncio.to_thread``.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

from absl import logging
from pebble import ProcessPool

from mmprm_jax import interruption
from mmprm_jax.answers.equivalence import compare, graded
from mmprm_jax.answers.verdict import Verdict
from mmprm_jax.records import Grading
from mmprm_jax.spawn import Spawn

_CHUNK = 256  # pairs sent to a worker at a time
_MEMORY = 2 * 2**30  # bytes of address space for a worker's answers


def limit_memory() -> None:
    """A worker that wants more than _MEMORY beyond what it has gets a MemoryError; where /proc tells what it has."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = used + _MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))


class Pool:
    """Worker processes that check items in chunks, each chunk with a deadline; close it, or use it in a ``with``."""

    def __init__(self, workers: int, seconds: float, check: Callable[[list[Any]], Sequence[Any]]):
        """workers: 0 checks in this process, without a time limit. check: a list -> as many results; it is pickled."""
        self._check, self._seconds = check, seconds
        self._spawn = Spawn()
        self._pool = (
            ProcessPool(max_workers=workers, context=self._spawn, initializer=limit_memory) if workers else None
        )

    def run(self, items: Sequence[Any]) -> list[Any | None]:
        """The result of each item, in order; None where an item took too long, ended its worker or raised.

        Raises UserError where workers cannot begin; Interrupted.
        """
        items = list(items)
        if self._pool is None:
            return list(self._check(items))
        chunks = [items[i : i + _CHUNK] for i in range(0, len(items), _CHUNK)]
        return [result for chunk, found in zip(chunks, self._chunks(chunks), strict=True)
                for result in (found if found is not None else self._one_by_one(chunk))]  # fmt: skip

    def _one_by_one(self, items: list[Any]) -> list[Any | None]:
        """Finds the items that a chunk failed for."""
        return [found and found[0] for found in self._chunks([[item] for item in items])]

    def _chunks(self, chunks: list[list[Any]]) -> list[Sequence[Any] | None]:
        """The results of each chunk; None where its worker failed."""
        assert self._pool is not None
        futures = [self._pool.schedule(self._check, args=[chunk], timeout=self._seconds) for chunk in chunks]
        return [self._result(future) for future in futures]

    def _result(self, future: Any) -> Sequence[Any] | None:
        """None after a time-out, the death of a worker, an error of the check: the items are checked one by one."""
        while not concurrent.futures.wait([future], interruption.POLL).done:
            interruption.check()
            self._spawn.check()
        self._spawn.check()
        return None if future.cancelled() or future.exception() else future.result()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()


Pair = tuple[str | None, str] | tuple[str | None, str, Grading]  # answer, gold, and maybe how they are compared


def _check(pairs: list[Pair]) -> list[Verdict]:
    return [compare(gold, answer, *map(graded, grading)) for answer, gold, *grading in pairs]


class Verifier:
    """(answer, gold) or (answer, gold, grading) -> whether each answer is right; close it, or use it in a ``with``.

    Equal answers are right; unequal ones are wrong, and so are those of which nothing is known: ``unknown`` counts
    these. A pair that takes longer than ``seconds``, or ends its worker, is one of them and is logged.
    """

    def __init__(self, workers: int = 1, seconds: float = 10.0, check: Any = _check):
        """workers: 0 verifies in this process, without a time limit. check: pairs -> Verdicts or bools."""
        self._pool, self._lock = Pool(workers, seconds, check), threading.Lock()
        self.verified = self.unknown = 0

    def __call__(self, pairs: Sequence[Pair]) -> list[bool]:
        pairs = list(pairs)
        found = self._pool.run(pairs)
        for pair, verdict in zip(pairs, found, strict=True):
            if verdict is None:
                logging.warning("no verdict on the answer %.80r to %.80r: counted as wrong", *pair[:2])
        with self._lock:
            self.verified += len(pairs)
            self.unknown += sum(v is None or isinstance(v, Verdict) and v.kind == "unknown" for v in found)
        return [bool(verdict) if isinstance(verdict, Verdict | None) else verdict for verdict in found]

    def close(self) -> None:
        self._pool.close()

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
