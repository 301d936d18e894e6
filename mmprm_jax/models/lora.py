"""Low-rank adapters (LoRA, arXiv 2106.09685) beside the decoder's matrices.

An adapter of a matrix W [*in, *out] is a [*in, rank] and b [rank, *out]; x W becomes x W + alpha / rank (x a) b, so
that no gradient of the size of W is computed. b is zero at first. ``merge`` adds the adapters to their matrices for
good.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from mmprm_jax.models.config import DecoderConfig, VLMConfig
from mmprm_jax.models.layers import weight
from mmprm_jax.sharding import BATCH, dot

Shape = tuple[int, ...]


class Adapter(nnx.Module):
    def __init__(self, fan_in: Shape, fan_out: Shape, cfg: DecoderConfig, rngs: nnx.Rngs):
        self.scale = cfg.lora_alpha / cfg.lora_rank
        self.a = weight(rngs, (*fan_in, cfg.lora_rank), math.prod(fan_in))
        self.b = nnx.Param(jnp.zeros((cfg.lora_rank, *fan_out)))

    def __call__(self, equation: str, x: jax.Array, *axes: Any) -> jax.Array:
        """What is added to ``dot(equation, x, W, *axes)``."""
        inputs, output = equation.split("->")
        left, right = inputs.split(",")
        contracted = "".join(letter for letter in right if letter not in output)
        produced = right.removeprefix(contracted)
        rows = "".join(letter for letter in left if letter not in contracted)
        narrow = dot(f"{left},{contracted}z->{rows}z", x, self.a[...], BATCH)
        return self.scale * dot(f"{rows}z,z{produced}->{output}", narrow, self.b[...], *axes)


class Adapters(nnx.Module):
    """Adapters by the names of their matrices; shapes: (in, out) of each."""

    def __init__(self, shapes: Mapping[str, tuple[Shape, Shape]], cfg: DecoderConfig, rngs: nnx.Rngs):
        for name, (fan_in, fan_out) in shapes.items():
            setattr(self, name, Adapter(fan_in, fan_out, cfg, rngs))


def adapters(shapes: Mapping[str, tuple[Shape, Shape]], cfg: DecoderConfig, rngs: nnx.Rngs) -> Adapters | None:
    """None without LoRA."""
    return Adapters(shapes, cfg, rngs) if cfg.lora_rank else None


def project(module: Any, name: str, equation: str, x: jax.Array, *axes: Any) -> jax.Array:
    """``dot(equation, x, W, *axes)`` with the matrix ``name`` of ``module`` as it is in use."""
    y = dot(equation, x, getattr(module, name)[...], *axes)
    return y if module.lora is None else y + getattr(module.lora, name)(equation, x, *axes)


def without(cfg: VLMConfig) -> VLMConfig:
    """The sizes of the merged model."""
    return dataclasses.replace(cfg, decoder=dataclasses.replace(cfg.decoder, lora_rank=0))


def merge(params: Any, cfg: VLMConfig) -> Any:
    """The parameters of ``without(cfg)``: every adapter is added to its matrix, in the matrix's dtype."""
    if not cfg.decoder.lora_rank:
        return params
    flat = traverse_util.flatten_dict(params, sep="/")
    scale = cfg.decoder.lora_alpha / cfg.decoder.lora_rank

    @jax.jit
    def add(matrix: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        delta = jax.vmap(lambda a, b: jnp.tensordot(a, b, 1))(a.astype(jnp.float32), b.astype(jnp.float32))
        return (matrix + scale * delta).astype(matrix.dtype)

    for path in [p for p in flat if "/lora/" in p and p.endswith("/a")]:
        module, name = path.removesuffix("/a").split("/lora/")
        a, b = flat.pop(path), flat.pop(f"{module}/lora/{name}/b")
        flat[f"{module}/{name}"] = add(flat[f"{module}/{name}"], a, b)
    return traverse_util.unflatten_dict(flat, sep="/")
