"""How this process keeps the memory that it has freed."""

from __future__ import annotations

import ctypes
import logging
import sys

# Parameters of glibc's mallopt, from malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_GIB = 2**30


def keep_memory() -> bool:
    """Keeps freed memory for the next allocation, on Linux with glibc; returns whether it does.

    XLA allocates the temporaries of every step anew on CPUs. By default glibc maps each of them and unmaps it again,
    and the kernel clears the pages every time. Call it before threads start: later ones would have their own arenas.

    Cost: up to 1 GiB that is free stays with the process. Blocks of 1 GiB and more go back at once, as before.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library, such as musl
        return False
    settings = {_MMAP_THRESHOLD: _GIB, _TRIM_THRESHOLD: _GIB, _ARENA_MAX: 1}
    done = all([mallopt(name, value) for name, value in settings.items()])
    logging.getLogger(__name__).debug("glibc keeps freed memory: %s", done)
    return done
