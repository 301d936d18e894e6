"""Verifying answers in worker processes: a hanging or dying one costs its answers a verdict, nothing else."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from typing import Any

from absl import logging
from pebble import ProcessPool

from mmprm_jax.answers.verify import is_correct

_CHUNK = 256  # pairs sent to a worker at a time


def _check(pairs: list[tuple[str | None, str]]) -> list[bool]:
    return [is_correct(answer, gold) for answer, gold in pairs]


class Verifier:
    """(answer, gold) pairs -> whether each answer is right; close it after use, or use it in a ``with``.

    A pair that takes longer than ``seconds``, or ends its worker, counts as wrong and is told in the log.
    """

    def __init__(self, workers: int = 1, seconds: float = 10.0, check: Any = _check):
        """workers: 0 verifies in this process, without a time limit. check: list of pairs -> list of verdicts."""
        self._check, self._seconds = check, seconds
        spawn = multiprocessing.get_context("spawn")  # a forked child of a process with XLA's threads may hang
        self._pool = ProcessPool(max_workers=workers, context=spawn) if workers else None

    def __call__(self, pairs: Sequence[tuple[str | None, str]]) -> list[bool]:
        pairs = list(pairs)
        if self._pool is None:
            return self._check(pairs)
        chunks = [pairs[i : i + _CHUNK] for i in range(0, len(pairs), _CHUNK)]
        return [verdict for chunk, found in zip(chunks, self._run(chunks), strict=True)
                for verdict in (found if found is not None else self._one_by_one(chunk))]  # fmt: skip

    def _one_by_one(self, pairs: list[tuple[str | None, str]]) -> list[bool]:
        """Finds the pairs that a chunk failed for."""
        verdicts = []
        for pair, found in zip(pairs, self._run([[pair] for pair in pairs]), strict=True):
            if found is None:
                logging.warning("no verdict on the answer %.80r to %.80r: counted as wrong", *pair)
            verdicts.append(bool(found and found[0]))
        return verdicts

    def _run(self, chunks: list[list[tuple[str | None, str]]]) -> list[list[bool] | None]:
        """The verdicts of each chunk; None where its worker failed."""
        futures = [self._pool.schedule(self._check, args=[chunk], timeout=self._seconds) for chunk in chunks]
        found: list[list[bool] | None] = []
        for future in futures:
            try:
                found.append(future.result())
            except Exception:  # a time-out, a worker that died, an error of the check: it is told one by one
                found.append(None)
        return found

    def close(self) -> None:
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
