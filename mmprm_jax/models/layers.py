"""Building blocks shared by the vision tower and the decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from mmprm_jax.sharding import BATCH, dot

Module = TypeVar("Module", bound=nnx.Module)


def weight(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int) -> nnx.Param:
    """A float32 matrix drawn from a normal of standard deviation 1/sqrt(fan_in)."""
    return nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32) * fan_in**-0.5)


def stack(create: Callable[[nnx.Rngs], Module], count: int, rngs: nnx.Rngs) -> Module:
    """``count`` modules with their parameters stacked along a new first axis, for ``scan_layers``."""
    return nnx.vmap(create, in_axes=0, out_axes=0)(rngs.split(count))


def scan_layers(layers: nnx.Module, body: Callable[..., Any], carry: Any, xs: Any = None, remat: bool = False) -> Any:
    """``jax.lax.scan`` of ``body(layer, carry, x) -> (carry, y)`` over stacked layers: compiled once for any depth."""
    graphdef, state = nnx.split(layers)

    def step(carry: Any, inputs: Any) -> Any:
        layer_state, x = inputs
        return body(nnx.merge(graphdef, layer_state), carry, x)

    return jax.lax.scan(jax.checkpoint(step) if remat else step, carry, (state, xs))


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, computed in float32."""

    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones((size,)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...]).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, computed in float32."""

    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones((size,)))
        self.bias = nnx.Param(jnp.zeros((size,)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


def rotary(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding, half-split layout. x [B, S, ..., D], positions [B, S] -> like x."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None].astype(jnp.float32) * frequency
    angle = angle.reshape(angle.shape[:2] + (1,) * (x.ndim - 3) + (half,))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Grouped-query softmax attention.

    q [B, S, G, R, D] (G key/value heads, R query heads each), k and v [B, T, G, D], mask [B, S, T] (True: attend) or
    None for all -> [B, S, G, R, D]. The softmax is float32.
    """
    scores = dot("bsgrd,btgd->bgrst", q * q.shape[-1] ** -0.5, k, BATCH, "tensor").astype(jnp.float32)
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return dot("bgrst,btgd->bsgrd", weights, v, BATCH, None, "tensor")
