"""What every benchmark needs: the machine's description and limits."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mmprm_jax.environment import cores, cpu, versions


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
