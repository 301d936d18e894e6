"""What figures depend on beside the code and the settings: the processors, their number, and the libraries."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import jax

_PACKAGES = ("mmprm_jax", "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy",
             "ml-collections", "tokenizers", "transformers", "torch")  # fmt: skip
_VARIABLES = ("JAX_", "XLA_", "LIBTPU_", "TPU_", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "SLURM_PROCID")


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


def versions() -> dict[str, str]:
    """Python's, and those of the libraries that are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return found


def report() -> dict[str, str]:
    """What belongs into a bug report, a text for each name: versions, the machine, devices, variables that matter."""
    try:
        devices = jax.devices()
        found = f"{len(devices)} x {devices[0].device_kind} ({jax.default_backend()})"
    except RuntimeError as error:  # such as a driver that does not fit: what the report is about
        found = f"none: {' '.join(str(error).split())}"
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)}
    machine = {"platform": platform.platform(), "cpu": f"{cpu()}, {cores()} cores", "devices": found}
    return versions() | machine | variables


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
