"""Compiles a job ahead of time for a TPU topology, on a machine without one (needs libtpu), or only counts (CUDA)."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from mmprm_jax.environment import versions
from mmprm_jax.fit import chips, cost, hlo, jobs
from mmprm_jax.records import UserError
from mmprm_jax.spawn import Child

# There is no TPU to ask for its neighbours, nor one to share, and nothing to log.
OFFLINE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


def measure(settings: jobs.Settings) -> dict[str, Any]:
    """What a job takes on its topology, in plain numbers, strings, lists and dicts.

    settings (resolved), chip, chips, mesh, parameters, flops (of a step by formula, all chips), tokens and examples of
    a step, and ``programs``: of each its name, argument bytes and, unless the arguments alone exceed the memory, what
    ``_compiled`` found. All of one chip. Raises UserError on unknown names, or when libtpu is missing.
    """
    settings, topology = jobs.resolve(settings)
    if topology.chip.tpu and "libtpu" not in versions():
        raise UserError("libtpu is missing: pip install 'mmprm_jax[tpu]'")
    with Child(_work, settings, topology) as child:
        return next(child)


def _devices(topology: chips.Topology) -> Sequence[Any]:
    if not topology.chip.tpu:
        jax.config.update("jax_num_cpu_devices", topology.count)
        return jax.devices("cpu")
    from jax.experimental import topologies

    return topologies.get_topology_desc(**topology.libtpu).devices


def _work(settings: jobs.Settings, topology: chips.Topology) -> Iterator[dict[str, Any]]:
    """A child's work."""
    os.environ.update(OFFLINE)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # what comes from there writes no text
    devices = _devices(topology)
    job, mesh = jobs.make(settings, devices)
    programs = []
    for program in job.programs:
        found: dict[str, Any] = {"name": program.name, "arguments": cost.local_bytes(program.args)}
        programs.append(found)
        if topology.chip.tpu and found["arguments"] <= topology.chip.bytes:
            with jax.set_mesh(mesh):
                found |= _compiled(program, job, topology)
    yield {
        "settings": dataclasses.asdict(settings),
        "chip": dataclasses.asdict(topology.chip),
        "chips": topology.count,
        "device": devices[0].device_kind,
        "mesh": {name: size for name, size in mesh.shape.items() if size > 1},
        "parameters": job.parameters,
        "flops": job.flops,
        "tokens": job.tokens,
        "examples": job.examples,
        "fewest_bytes": job.fewest_bytes,
        "programs": programs,
        "versions": versions(),
    }


def compile_text(lowered: Any, folder: str) -> tuple[Any, str]:
    """Compiles for a TPU: the executable and the text of its optimised program, which libtpu writes into ``folder``.

    ``Compiled.as_text()`` wants jaxlib to read libtpu's program, which it cannot when libtpu is much newer.
    """
    options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True, "xla_dump_hlo_pass_re": ""}
    compiled = lowered.compile(compiler_options=options)
    return compiled, _dumped(folder, "after_codegen")


def _dumped(folder: str, what: str) -> str:
    files = list(pathlib.Path(folder).glob(f"*.{what}.txt"))
    if len(files) != 1:
        raise UserError(f"libtpu wrote {len(files)} files *.{what}.txt, not one: pip install -U 'mmprm_jax[tpu]'")
    return files[0].read_text("utf-8")


def _compiled(program: jobs.Program, job: jobs.Job, topology: chips.Topology) -> dict[str, Any]:
    """memory (bytes), flops, bytes and sent (bytes by kind) of a compiled program; or ``exceeded``: why it cannot be.

    largest: the instructions that move most bytes. instructions: of the whole program, its size.
    """
    start = time.perf_counter()
    lowered = program.run.lower(*program.args, **program.kwargs)
    with tempfile.TemporaryDirectory() as folder:
        try:
            compiled, text = compile_text(lowered, folder)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or "hbm" not in str(error).lower():
                raise
            return {"exceeded": exceeded(str(error), _dumped(folder, "after_optimizations-memory-usage-report"))}
    seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
    parsed = hlo.parse(text)
    name = hlo.outer_loop(parsed) if program.turn else hlo.entry(text)
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "peak": held + memory.temp_size_in_bytes,
        "flops": hlo.sum_flops(parsed, name, job.kernels),
        "bytes": hlo.sum_bytes(parsed, name),
        "sent": hlo.collectives(parsed, name, topology.count),
        "largest": [{"bytes": size, "what": what} for size, what in hlo.largest(parsed, name, 10)],
        "instructions": sum(map(len, parsed.values())),
        "compile_seconds": seconds,
    }


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = r"([\d.]+)([KMGT]?)i?B?"


def exceeded(message: str, usage: str) -> dict[str, Any]:
    """Why a program does not fit: used and available bytes (None if unknown), and the largest buffers.

    message: the TPU compiler's error. usage: its report of buffers, the largest first, those in HBM before the others.
    """

    def size(number: str, unit: str) -> float:
        return float(number) * _UNITS[unit]

    used = re.search(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)", message)
    buffers = re.findall(rf"^.*?\); +{_SIZE}; +\d+; +\d+; (.*)", usage.split("\n\n")[0], re.MULTILINE)
    return {
        "used": size(*used.groups()[:2]) if used else None,
        "available": size(*used.groups()[2:]) if used else None,
        "largest": [{"bytes": size(number, unit), "what": what} for number, unit, what in buffers[:8]],
        "message": message[:2000],
    }
