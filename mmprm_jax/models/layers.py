"""Building blocks shared by the vision tower and the decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from mmprm_jax.models.config import RopeScaling
from mmprm_jax.records import UserError
from mmprm_jax.sharding import BATCH, dot, fit_spec, gather, reshape

Module = TypeVar("Module", bound=nnx.Module)


def weight(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int) -> nnx.Param:
    """A float32 matrix drawn from a normal of standard deviation 1/sqrt(fan_in)."""
    return nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32) * fan_in**-0.5)


def stack(create: Callable[[nnx.Rngs], Module], count: int, rngs: nnx.Rngs) -> Module:
    """``count`` modules with their parameters stacked along a new first axis, for ``scan_layers``."""
    return nnx.vmap(create, in_axes=0, out_axes=0)(rngs.split(count))


# What the backward pass finds again, by name; it computes the rest once more, layer by layer. None: everything.
_ATTENTION = jax.checkpoint_policies.save_only_these_names("attention")  # the result of models.attention
REMAT: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": _ATTENTION,
    "dots": jax.checkpoint_policies.save_from_both_policies(jax.checkpoint_policies.dots_saveable, _ATTENTION),
    "dots_no_batch": jax.checkpoint_policies.save_from_both_policies(  # not the scores of attention
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _ATTENTION
    ),
}


def scan_layers(layers: nnx.Module, body: Callable[..., Any], carry: Any, xs: Any = None, remat: str = "none") -> Any:
    """``jax.lax.scan`` of ``body(layer, carry, x) -> (carry, y)`` over stacked layers: compiled once for any depth.

    ``remat``: a name of REMAT. Raises UserError on another one.
    """
    if remat not in REMAT:
        raise UserError(f"model.remat: {remat!r} is not one of {', '.join(REMAT)}")
    graphdef, state = nnx.split(layers)

    dtype = jax.tree.leaves(carry)[0].dtype

    def gathered(x: jax.Array) -> jax.Array:
        """TPU's partitioner would rather go around a ring, one product for each device's part: 4 times the HBM traffic.

        Masters in another dtype are gathered by ``dot``, when they are rounded.
        """
        return gather(x) if x.dtype == dtype else x

    def step(carry: Any, inputs: Any) -> Any:
        layer_state, x = inputs
        return body(nnx.merge(graphdef, jax.tree.map(gathered, layer_state)), carry, x)

    if remat != "none":
        step = jax.checkpoint(step, policy=REMAT[remat], prevent_cse=False)
    return jax.lax.scan(step, carry, (state, xs))


def _wide(function: Callable[..., jax.Array], x: jax.Array, parameter: jax.Array) -> jax.Array:
    """``function(x, parameter)`` in the wider dtype of the two, rounded to that of ``x``.

    The gradient by a parameter that is spread over tokens is a sum over them: it is float32 if the parameter is.
    """
    dtype = jnp.promote_types(x.dtype, parameter.dtype)
    return function(x.astype(dtype), parameter.astype(dtype)).astype(x.dtype)


def plus(x: jax.Array, bias: nnx.Param | jax.Array | None) -> jax.Array:
    """x + bias in the dtype of x, if there is a bias."""
    return x if bias is None else _wide(jnp.add, x, bias[...])


def times(x: jax.Array, scale: nnx.Param) -> jax.Array:
    """x * scale in the dtype of x."""
    return _wide(jnp.multiply, x, scale[...])


def rms_normalise(x: jax.Array, scale: jax.Array, eps: float, axes: int | tuple[int, ...] = -1) -> jax.Array:
    """x / rms(x) * scale over ``axes``, computed in float32."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=axes, keepdims=True) + eps)
    return (y * scale).astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, computed in float32."""

    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones((size,)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_normalise(x, self.scale[...], self.eps)


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


def rotary_table(
    positions: jax.Array, length: jax.Array, depth: int, theta: float, scaling: RopeScaling | None
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotary angles, each float32 [B, S, depth / 2].

    positions [B, S]; length [B], or [B, S] for rows of several sequences: tokens of each whole sequence, which dynamic
    scaling goes by. A sequence's table depends on itself only, unlike that of ``transformers``, where the longest of a
    batch counts.
    """
    if length.ndim == 1:
        length = length[:, None]
    half = depth // 2
    exponent = -jnp.arange(half, dtype=jnp.float32) / half
    angle = positions[..., None].astype(jnp.float32)
    if scaling is not None and scaling.kind == "linear":
        angle = angle / scaling.factor
    if scaling is not None and scaling.kind == "dynamic":
        longer = jnp.maximum(length, scaling.max_position).astype(jnp.float32) / scaling.max_position
        grown = theta * (scaling.factor * longer - (scaling.factor - 1)) ** (depth / (depth - 2))
        angle = angle * grown[..., None] ** exponent
    else:
        angle = angle * theta**exponent
    return jnp.cos(angle), jnp.sin(angle)


def rotary(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary position embedding, half-split layout. x [B, S, ..., D], table from ``rotary_table`` -> like x."""
    half = x.shape[-1] // 2
    cos, sin = (t.reshape(t.shape[:2] + (1,) * (x.ndim - 3) + (half,)) for t in table)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Grouped-query softmax attention.

    q [B, S, G, R, D] (G key/value heads, R query heads each), k and v [B, T, G, D], mask [B, S, T] (True: attend) or
    None for all -> [B, S, G, R, D]. The softmax is float32.
    """
    b, s, g, r, d = q.shape
    t = k.shape[1]
    # Plain batched matrix products: XLA on CPU takes three times as long for einsums that leave the layout to it.
    q = reshape((q * d**-0.5).transpose(0, 2, 3, 1, 4), (b, g, r * s, d), BATCH, "tensor")
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    scores = reshape(dot("bgnd,bgtd->bgnt", q, k, BATCH, "tensor", dtype=jnp.float32), (b, g, r, s, t), BATCH, "tensor")
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, -1e30)
    weights = reshape(jax.nn.softmax(scores, axis=-1).astype(v.dtype), (b, g, r * s, t), BATCH, "tensor")
    out = dot("bgnt,bgtd->bgnd", weights, v, BATCH, "tensor")
    return reshape(out, (b, g, r, s, d), BATCH, "tensor").transpose(0, 3, 1, 2, 4)


def shared_attention(q: jax.Array, prefix: Any, known: jax.Array, suffix: Any, mask: jax.Array) -> jax.Array:
    """Softmax attention of rows over one prefix for each n of them, and over their own tokens.

    q [R n, S, G, Q, D]; prefix: keys and values [R, P, G, D], of which ``known`` [R, P] count; suffix: keys and values
    [R n, S, G, D] with mask [R n, S, S] (True: attend) -> like q. The softmax is float32.
    """
    count, n = len(known), len(q) // len(known)
    whole = fit_spec((count,), (BATCH,))[0] is not None
    first = (BATCH, None) if whole else (None, BATCH)  # where the devices of a batch go: to problems or to rows

    def split(x: jax.Array, *axes: Any) -> jax.Array:
        return reshape(x, (count, n, *x.shape[1:]), *first, *axes)

    q = split(q * q.shape[-1] ** -0.5, None, "tensor")
    k, v = (split(x, None, "tensor") for x in suffix)
    before = dot("rnsgqd,rpgd->rngqsp", q, prefix[0], *first, "tensor", dtype=jnp.float32)
    before = jnp.where(known[:, None, None, None, None, :], before, -1e30)
    own = dot("rnsgqd,rntgd->rngqst", q, k, *first, "tensor", dtype=jnp.float32)
    own = jnp.where(split(mask)[:, :, None, None], own, -1e30)
    weights = jax.nn.softmax(jnp.concatenate([before, own], axis=-1), axis=-1).astype(v.dtype)
    before, own = jnp.split(weights, [before.shape[-1]], axis=-1)
    out = dot("rngqsp,rpgd->rnsgqd", before, prefix[1], *first, None, "tensor")
    out = out + dot("rngqst,rntgd->rnsgqd", own, v, *first, None, "tensor")
    return reshape(out, (count * n, *out.shape[2:]), BATCH, None, "tensor")
