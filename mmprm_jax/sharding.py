"""Where every array lives: mesh axes, one rule table for parameters, and helpers for activations.

The mesh has three Explicit axes: ``data`` (replicas), ``fsdp`` (parameters and batch) and ``tensor`` (heads and hidden
units). Batches are split over data x fsdp. An axis that does not divide a dimension is dropped for that dimension, so
that small models run on any mesh.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmprm_jax.records import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

# First match wins; paths are joined by "/". A leading layer axis, where there is one, is never split. The second layout
# of a rule is for shapes that the first does not divide: released vocabularies are odd numbers.
RULES: tuple[tuple[str | P, ...], ...] = (
    (r"decoder/embed$", P("tensor", "fsdp"), P(None, ("fsdp", "tensor"))),
    (r"decoder/lm_head$", P("fsdp", "tensor"), P(("fsdp", "tensor"))),
    (r"decoder/layers/attention/[qkv]$", P(None, "fsdp", "tensor")),
    (r"decoder/layers/attention/o$", P(None, "tensor", None, None, "fsdp")),
    (r"decoder/layers/mlp/(gate|up)$", P(None, "fsdp", "tensor")),
    (r"decoder/layers/mlp/down$", P(None, "tensor", "fsdp")),
    (r"decoder/layers/attention/[qkv]_bias$", P(None, "tensor")),
    (r"decoder/layers/mlp/(gate|up)_bias$", P(None, "tensor")),
    # Adapters: a [layers, *in, rank] and b [layers, rank, *out] as the matrices [layers, *in, *out] beside them.
    (r"lora/(q|k|v|gate|up)/a$", P(None, "fsdp")),
    (r"lora/(q|k|v|gate|up)/b$", P(None, None, "tensor")),
    (r"lora/(o|down)/a$", P(None, "tensor")),
    (r"lora/(o|down)/b$", P(None, None, "fsdp")),
    (r"vision/layers/attention/qkv$", P(None, "fsdp", None, "tensor")),
    (r"vision/layers/attention/proj$", P(None, "tensor", None, "fsdp")),
    (r"vision/layers/mlp/fc1$", P(None, "fsdp", "tensor")),
    (r"vision/layers/mlp/fc2$", P(None, "tensor", "fsdp")),
    (r"vision/layers/attention/qkv_bias$", P(None, None, "tensor")),
    (r"vision/layers/mlp/fc1_bias$", P(None, "tensor")),
    (r"(projector|score)/fc[12]$", P("fsdp", "tensor")),
    (r".*", P()),
)


def make_mesh(shape: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of ``devices`` (default: all); ``shape``: the size of each axis, -1 (one only): all remaining devices."""
    sizes = [int(shape.get(axis, 1)) for axis in AXES]
    devices = jax.devices() if devices is None else devices
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
        raise UserError(f"mesh {dict(shape)}: sizes must be positive, and at most one may be -1")
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // -math.prod(sizes)
    if math.prod(sizes) != len(devices):
        raise UserError(f"mesh {dict(shape)} does not fit {len(devices)} devices")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Explicit,) * 3, devices=devices)


def make_own_mesh(shape: Mapping[str, int]) -> Mesh:
    """The mesh of this process's devices alone, for work that processes share without talking to each other.

    Its axis ``tensor`` is that of ``shape``, ``fsdp`` the largest part of it that fits, ``data`` the remaining devices.
    Raises UserError if ``tensor`` does not fit.
    """
    devices = jax.local_devices()
    tensor = len(devices) if shape["tensor"] == -1 else shape["tensor"]
    if len(devices) % tensor:
        raise UserError(f"mesh {dict(shape)}: tensor={tensor} does not divide the {len(devices)} devices of a process")
    room = len(devices) // tensor
    fsdp = room if shape["fsdp"] == -1 else math.gcd(shape["fsdp"], room)
    return make_mesh({"data": room // fsdp, "fsdp": fsdp, "tensor": tensor}, devices)


def fit_spec(shape: tuple[int, ...], axes: tuple[Any, ...], mesh: Any = None) -> P:
    """The PartitionSpec ``axes`` without the axes that do not divide their dimension of ``shape``."""
    sizes = dict((mesh or jax.sharding.get_abstract_mesh()).shape)
    kept = []
    for size, axis in zip(shape, tuple(axes) + (None,) * (len(shape) - len(axes)), strict=True):
        parts = math.prod(sizes.get(name, 1) for name in names(axis))
        kept.append(axis if names(axis) and size % parts == 0 else None)
    return P(*kept)


def dot(equation: str, a: jax.Array, b: jax.Array, *axes: Any, dtype: Any = None) -> jax.Array:
    """``jnp.einsum`` whose result is sharded as ``axes`` (one mesh axis or None for each dimension).

    ``dtype``: of the accumulation and the result; default: that of ``a``. A float32 parameter ``b`` of a computation in
    another dtype is rounded to that of ``a`` first, but its gradient is not: it is summed in float32, over the devices
    as well.
    """
    inputs, output = equation.split("->")
    sizes: dict[str, int] = {}
    for letters, operand in zip(inputs.split(","), (a, b), strict=True):
        sizes.update(zip(letters, operand.shape, strict=True))
    spec = fit_spec(tuple(sizes[letter] for letter in output), axes)
    if a.dtype != b.dtype:
        return _rounded_dot(equation, spec, dtype, jax.typeof(b).sharding.spec, a, b)
    return jnp.einsum(equation, a, b, out_sharding=spec, preferred_element_type=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _rounded_dot(equation: str, spec: P, dtype: Any, layout: P, a: jax.Array, b: jax.Array) -> jax.Array:
    """``dot`` of ``a`` and a float32 ``b`` (sharded as ``layout``), which is rounded to the dtype of ``a``."""
    return _rounded_dot_forward(equation, spec, dtype, layout, a, b)[0]


def _rounded_dot_forward(equation: str, spec: P, dtype: Any, layout: P, a: jax.Array, b: jax.Array) -> tuple[Any, Any]:
    b = gather(b.astype(a.dtype))  # rounded first: half the bytes to send
    return jnp.einsum(equation, a, b, out_sharding=spec, preferred_element_type=dtype), (a, b)


def _rounded_dot_backward(
    equation: str, spec: P, dtype: Any, layout: P, saved: Any, grad: jax.Array
) -> tuple[Any, Any]:
    a, b = saved
    inputs, output = equation.split("->")
    left, right = inputs.split(",")
    by_a = jnp.einsum(f"{output},{right}->{left}", grad, b, out_sharding=jax.typeof(a).sharding.spec)
    return by_a.astype(a.dtype), _sum_products(f"{left},{output}->{right}", layout, a, grad)


_rounded_dot.defvjp(_rounded_dot_forward, _rounded_dot_backward)


def _sum_products(equation: str, layout: P, a: jax.Array, b: jax.Array) -> jax.Array:
    """The einsum, float32, of operands whose contracted dimensions are spread over devices; laid out as ``layout``.

    Each device adds up its own rows, and one collective the devices' sums. Asked for the layout at once, TPU's
    partitioner goes around a ring, with a product for each device's part of the result: 10 % more HBM traffic in all.
    """
    inputs, output = equation.split("->")
    summed: set[str] = set()
    for letters, x in zip(inputs.split(","), (a, b), strict=True):
        for letter, axes in zip(letters, jax.typeof(x).sharding.spec, strict=True):
            summed |= set(names(axes)) if letter not in output else set()
    of_devices = P(*(without(axes, summed) for axes in layout), unreduced=summed)
    total = jnp.einsum(equation, a, b, out_sharding=of_devices, preferred_element_type=jnp.float32)
    return jax.sharding.reshard(total, layout)


def gather(x: jax.Array) -> jax.Array:
    """``x`` from all devices of the axis fsdp, by one collective."""
    return jax.sharding.reshard(x, P(*(without(axes, {"fsdp"}) for axes in jax.typeof(x).sharding.spec)))


def names(axes: Any) -> tuple[str, ...]:
    """The mesh axes that a dimension of a PartitionSpec names."""
    return (axes,) if isinstance(axes, str) else axes or ()


def without(axes: Any, left_out: Collection[str]) -> Any:
    """A dimension of a PartitionSpec without some axes."""
    return tuple(axis for axis in names(axes) if axis not in left_out) or None


def gather_rounded(x: jax.Array, spec: P, dtype: Any) -> jax.Array:
    """``x``, laid out as ``spec``, for many uses by ``dot`` in ``dtype``: rounded, so that only the half is sent.

    It keeps its own dtype, and its gradient is not rounded.
    """
    return _gather_rounded(spec, dtype, jax.typeof(x).sharding.spec, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gather_rounded(spec: P, dtype: Any, layout: P, x: jax.Array) -> jax.Array:
    return jax.sharding.reshard(x.astype(dtype), spec).astype(x.dtype)


_gather_rounded.defvjp(
    lambda spec, dtype, layout, x: (_gather_rounded(spec, dtype, layout, x), None),
    lambda spec, dtype, layout, _, grad: (jax.sharding.reshard(grad, layout),),
)


def reshape(x: jax.Array, shape: tuple[int, ...], *axes: Any) -> jax.Array:
    """``x.reshape(shape)`` with the result sharded as ``axes``."""
    return jnp.reshape(x, shape, out_sharding=fit_spec(shape, axes))


def take_rows(table: jax.Array, indices: tuple[jax.Array, ...] | jax.Array, *axes: Any) -> jax.Array:
    """``table[indices]`` with the result sharded as ``axes``."""
    first = indices[0] if isinstance(indices, tuple) else indices
    used = len(indices) if isinstance(indices, tuple) else 1
    shape = jnp.broadcast_shapes(*[i.shape for i in (indices if isinstance(indices, tuple) else (first,))])
    return table.at[indices].get(out_sharding=fit_spec(shape + table.shape[used:], axes), mode="clip")


def path_name(path: tuple) -> str:
    """A tree path as ``decoder/layers/attention/q``."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def parameter_shardings(abstract: Any, mesh: Mesh) -> Any:
    """The NamedSharding of every leaf of a parameter (or optimizer) tree, by RULES on its path."""

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        first, *others = next(specs for pattern, *specs in RULES if re.search(str(pattern), path_name(path)))
        if len(first) > len(leaf.shape):
            first, others = P(), []
        fitted = [fit_spec(leaf.shape, tuple(spec), mesh) for spec in (first, *others)]
        # A layout fits when none of its axes had to be dropped.
        whole = [f for f, spec in zip(fitted, (first, *others), strict=True) if tuple(f)[: len(spec)] == tuple(spec)]
        return NamedSharding(mesh, (whole or fitted)[0])

    return jax.tree_util.tree_map_with_path(sharding, abstract)


def row_share(mesh: Mesh) -> tuple[int, int]:
    """(index, count): the rows of a batch are split into ``count`` equal parts, of which this process has one.

    Processes that hold the same rows (the axis tensor goes over both) have the same part. Raises UserError on a mesh
    that scatters a process's rows.
    """
    blocks = math.prod(mesh.shape[axis] for axis in BATCH)
    held = NamedSharding(mesh, P(BATCH)).addressable_devices_indices_map((blocks,))
    mine = sorted({index[0].indices(blocks)[0] for index in held.values() if index})
    first, count = mine[0], len(mine)
    if mine != list(range(first, first + count)) or first % count or blocks % count:
        raise UserError(f"mesh {dict(mesh.shape)}: the rows {mine} of a process do not lie together; order the axes")
    return first // count, blocks // count


def put_rows(batch: Mapping[str, np.ndarray | None], mesh: Mesh) -> dict[str, jax.Array]:
    """As ``put_batch``, where each process has the rows of its own part (see ``row_share``); None is left out."""
    _, count = row_share(mesh)
    placed = {}
    for name, array in batch.items():
        if array is None:
            continue
        shape = (len(array) * count, *array.shape[1:])
        spec = fit_spec(shape, (BATCH,), mesh)
        if count > 1 and spec[0] is None:
            blocks = math.prod(mesh.shape[axis] for axis in BATCH)
            raise UserError(f"a batch of {shape[0]} rows cannot be split over {blocks} devices; set batch_size to fit")
        placed[name] = jax.make_array_from_process_local_data(NamedSharding(mesh, spec), array, shape)
    return placed


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts host arrays, the same on every process, on the mesh, split along their first dimension."""
    return {
        name: jax.device_put(array, NamedSharding(mesh, fit_spec(array.shape, (BATCH,), mesh)))
        for name, array in batch.items()
    }
