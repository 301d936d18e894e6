"""What every benchmark needs: children that take turns, the machine's description and limits."""

from __future__ import annotations

import os
import platform
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from mmprm_jax import interruption
from mmprm_jax.environment import cores, cpu, versions
from mmprm_jax.records import UserError
from mmprm_jax.spawn import Spawn


def machine() -> dict[str, Any]:
    """What a figure was measured on: cpu, cores, load (runnable processes, mean of the last minute), versions."""
    return {"cpu": cpu(), "cores": cores(), "load": load(), "system": platform.platform(), "versions": versions()}


def load() -> float:
    """Runnable processes, mean of the last minute; beyond those of the benchmark they make its figures too low."""
    return os.getloadavg()[0]


def _seconds(f: Callable[[], Any], repeats: int) -> float:
    """The shortest of ``repeats`` calls after one that compiles."""
    jax.block_until_ready(f())
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(f())
        taken.append(time.perf_counter() - start)
    return min(taken)


def peak_flops(size: int = 2048, dtype: Any = jnp.float32, repeats: int = 8) -> float:
    """FLOP/s of the default device in a large square matrix product, the best of ``repeats``."""
    a = jnp.full((size, size), 0.5, dtype)
    product = jax.jit(lambda a, b: a @ b)
    return 2 * size**3 / _seconds(lambda: product(a, a), repeats)


def copy_bandwidth(size: int = 1 << 28, repeats: int = 8) -> float:
    """Bytes/s that the default device reads and writes when it copies ``size`` bytes, the best of ``repeats``."""
    x = jnp.zeros((size // 4,), jnp.float32)
    change = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / _seconds(lambda: change(x), repeats)


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
    values = iter(())
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
