"""What the TPU compiler makes of a decoding step, on a machine without a TPU (needs libtpu).

``rollout.device.decode`` is compiled ahead of time for a topology, with shapes in place of arrays, and the bytes that
one turn of its loop moves to and from HBM are read from the optimised program (see ``hlo``).
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mmprm_jax.bench import common, cost, hlo
from mmprm_jax.models import build
from mmprm_jax.models.config import VLMConfig
from mmprm_jax.models.released import named
from mmprm_jax.records import UserError
from mmprm_jax.rollout import device
from mmprm_jax.sharding import BATCH, make_mesh


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is compiled, in bfloat16: ``slots`` samples of at most ``columns`` tokens behind ``rows`` prefixes of
    ``width`` tokens with up to ``samples`` each, over ``tensor`` devices (0: all; the others split the batch)."""

    model: str = "internvl2_5-8b"
    slots: int = 256
    rows: int = 32
    samples: int = 16
    width: int = 1024
    columns: int = 128
    tensor: int = 0
    layers: int = 0  # 0: as many as the model has


def abstract(shape: Shape, mesh: Any) -> tuple[tuple[Any, ...], Any]:
    """The arguments of ``device.decode`` as ShapeDtypeStructs, and its graph definition; under ``mesh``."""
    decoder = named(shape.model).decoder
    decoder = dataclasses.replace(decoder, num_layers=shape.layers or decoder.num_layers)
    graphdef, params = build.abstract(VLMConfig(vision=None, decoder=decoder), -1, mesh, jnp.bfloat16)
    b = device.shards(mesh)

    def place(tree: Any, spec: Callable[[Any], P] = lambda x: x.sharding.spec) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec(x))), tree
        )

    def split(*sizes: int) -> Any:
        return jax.ShapeDtypeStruct((b, *sizes), jnp.int32, sharding=NamedSharding(mesh, P(BATCH)))

    layers = place(jax.eval_shape(functools.partial(device.unstack, graphdef=graphdef), params))
    sizes = -(-shape.slots // b), -(-shape.rows // b)
    with mock.patch.object(device, "_allocate", lambda _, tree: place(tree, lambda x: x.spec)):
        rows = device.new_rows(decoder, mesh, sizes[1], shape.width, jnp.bfloat16)
        state = device.new_state(decoder, mesh, *sizes, shape.samples, shape.columns, jnp.bfloat16)
    queue = {"order": split(sizes[1] * shape.samples), "head": split(), "tail": split()}
    limit = {name: jax.ShapeDtypeStruct((), jnp.int32) for name in ("most", "least", "free")}
    return (params, layers, rows, state, queue, limit), graphdef


def _compile(topology: str, shape: Shape) -> Iterator[dict[str, Any]]:
    """A child's work."""
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")  # there is no TPU to ask, or to share
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh({"fsdp": -1, "tensor": shape.tensor or len(devices)}, devices)
    with jax.set_mesh(mesh):
        args, graphdef = abstract(shape, mesh)
        start = time.perf_counter()
        compiled = device.decode.lower(*args, graphdef=graphdef, used=len(args[3]["own"][0])).compile()
        seconds = time.perf_counter() - start
        fewest = cost.step_bytes(*args[:4])
    program = hlo.parse(compiled.as_text())
    step = hlo.outer_loop(program)
    moved, memory = hlo.sum_bytes(program, step), compiled.memory_analysis()
    yield {
        "topology": topology,
        "device": devices[0].device_kind,
        "mesh": {name: size for name, size in mesh.shape.items() if size > 1},
        "shape": dataclasses.asdict(shape),
        "bytes": moved,
        "fewest_bytes": fewest,
        "ratio": moved / fewest["total"],
        "largest": [{"bytes": size, "what": what} for size, what in hlo.largest(program, step, 10)],
        "cost_analysis_bytes": compiled.cost_analysis()["bytes accessed"],
        "memory": {
            "arguments": memory.argument_size_in_bytes,
            "temporary": memory.temp_size_in_bytes,
            "peak": memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes,
        },
        "compile_seconds": seconds,
    }  # fmt: skip


def measure(topology: str, shape: Shape = Shape()) -> dict[str, Any]:  # noqa: B008
    """Compiles one decoding step for ``topology``, e.g. v5e:2x4, in a process of its own; bytes are of one device."""
    if "libtpu" not in common.versions():
        raise UserError("libtpu is missing: pip install 'mmprm_jax[bench]'")
    with common.Child(_compile, topology, shape) as child:
        return next(child)


def describe(found: dict[str, Any]) -> str:
    shape, gigabyte = found["shape"], 1e9
    mesh = " x ".join(f"{name} {size}" for name, size in found["mesh"].items())
    return (
        f"{found['topology']} ({mesh}): one decoding step of {shape['model']}, {shape['slots']} slots, {shape['rows']}"
        f" prefixes of {shape['width']} tokens, moves {found['bytes'] / gigabyte:.2f} GB on each device,"
        f" {found['ratio']:.2f} times the fewest ({found['fewest_bytes']['total'] / gigabyte:.2f} GB); memory"
        f" {found['memory']['peak'] / gigabyte:.1f} GB; compiled in {found['compile_seconds']:.0f} s"
    )
