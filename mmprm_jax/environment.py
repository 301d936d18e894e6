"""What figures depend on beside the code and the settings: the processors, their number, and the libraries."""

from __future__ import annotations

import os
import platform
from typing import Any

import jax


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu() -> str:
    """The kind of CPU, e.g. ``AMD EPYC 7B13``."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:  # not Linux
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def describe() -> dict[str, Any]:
    """Plain JSON: cpu, cores, jax (its version), backend, device (its kind), devices, processes."""
    return {
        "cpu": cpu(),
        "cores": cores(),
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
    }
