"""Self-attention over whole rows, with a back end for each kind of device.

A row holds one or more examples, one behind the other; ``segment`` [B, S] is 0 at padding, else the number of the
example within its row. Tokens attend to their own segment only. The back end is that of the devices of the mesh in use
(compiling ahead of time for other devices than there are works, too): ``splash`` on TPUs, ``cudnn`` on CUDA devices in
half precision, else ``xla``, the reference.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mmprm_jax.models.layers import attention
from mmprm_jax.sharding import BATCH, fit_spec

ATTENTION = "attention"  # the name of the result for rematerialisation policies
_SHORTEST = 256  # tokens from which on splash pays
_LANES = 128


def segment_positions(segment: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rotary positions and lengths, both int32 [B, S], of the examples in packed rows.

    segment [B, S], int or bool. Positions count from 0 in each run of equal numbers, of which the length is the size.
    """
    index = jax.lax.broadcasted_iota(jnp.int32, segment.shape, 1)
    change = segment[:, 1:] != segment[:, :-1]
    first = jnp.pad(change, ((0, 0), (1, 0)), constant_values=True)
    last = jnp.pad(change, ((0, 0), (0, 1)), constant_values=True)
    start = jax.lax.cummax(jnp.where(first, index, 0), axis=1)
    end = jax.lax.cummin(jnp.where(last, index, segment.shape[1]), axis=1, reverse=True)
    return index - start, end - start + 1


def self_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment: jax.Array | None,
    causal: bool,
    backend: str = "",
    max_segments: int = 0,
) -> jax.Array:
    """Grouped-query softmax attention of each row over itself.

    q [B, S, G, R, D] (G key/value heads, R query heads each), k and v [B, S, G, D]; segment [B, S] int32, None: each
    row is one example -> [B, S, G, R, D]. ``causal``: a token sees no later one. ``max_segments``: the most
    examples that a row has, 0: unknown; if it is known, cuDNN computes nothing across them. The softmax is float32.
    """
    backend = backend or choose_backend(q)
    if backend == "cudnn":
        out = _cudnn(q, k, v, segment, causal, max_segments)
    else:
        out = {"xla": _xla, "splash": _splash}[backend](q, k, v, segment, causal)
    return checkpoint_name(out, ATTENTION)


def _platform() -> str:
    """Of the devices that are compiled for."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return "cpu" if device is None else device.platform


def choose_backend(q: jax.Array) -> str:
    """The back end for queries [B, S, G, R, D] on the devices of the mesh in use."""
    platform = _platform()
    if platform == "tpu" and q.shape[1] >= _SHORTEST:
        return "splash"
    if platform in ("cuda", "gpu") and q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0:
        return "cudnn" if q.shape[1] > 1 and q.shape[-1] <= _LANES else "xla"
    return "xla"


def _mask(segment: jax.Array | None, length: int, causal: bool) -> jax.Array | None:
    """[B or 1, S, S] bool, True: attend; None: everywhere."""
    mask = None
    if causal:
        steps = jnp.arange(length)
        mask = (steps[:, None] >= steps[None, :])[None]
    if segment is not None:
        same = segment[:, :, None] == segment[:, None, :]
        mask = same if mask is None else mask & same
    return mask


def _xla(q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array | None, causal: bool) -> jax.Array:
    return attention(q, k, v, _mask(segment, q.shape[1], causal))


def _per_device(run: Any, q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array | None) -> jax.Array:
    """``run`` on each device's rows and heads: kernels know nothing of meshes."""
    heads = (BATCH, None, "tensor")
    specs = [fit_spec(x.shape, heads) for x in (q, k, v)]
    args = [jax.sharding.reshard(x, spec) for x, spec in zip((q, k, v), specs, strict=True)]
    if segment is not None:
        specs.append(fit_spec(segment.shape, (BATCH,)))
        args.append(jax.sharding.reshard(segment, specs[-1]))
    return jax.shard_map(run, in_specs=tuple(specs), out_specs=specs[0], check_vma=False)(*args)


def _cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array | None, causal: bool, max_segments: int = 0
) -> jax.Array:
    def run(q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array | None = None) -> jax.Array:
        flat = q.reshape(*q.shape[:2], -1, q.shape[-1])
        if segment is not None and max_segments and _hopper():
            return _cudnn_packed(flat, k, v, segment, causal, max_segments).reshape(q.shape)
        mask = _mask(segment, q.shape[1], False)
        mask = None if mask is None else mask[:, None]
        out = jax.nn.dot_product_attention(flat, k, v, mask=mask, is_causal=causal, implementation="cudnn")
        return out.reshape(q.shape)

    return _per_device(run, q, k, v, segment)


def _hopper() -> bool:
    """Whether the devices are new enough for cuDNN's packed layout."""
    return float(getattr(jax.local_devices()[0], "compute_capability", 0)) >= 9


def _cudnn_packed(
    q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array, causal: bool, max_segments: int
) -> jax.Array:
    """q [B, S, N, D], k and v [B, S, G, D] -> like q. No work and no memory for pairs of different examples."""
    # The public jax.nn.dot_product_attention has no offsets.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))  # its offsets are for equal heads only
    starts, sizes = segment_runs(segment, max_segments + 1)  # padding is one more
    kind = MaskType.PADDING_CAUSAL if causal else MaskType.PADDING
    scale = q.shape[-1] ** -0.5
    return dot_product_attention(q, k, v, None, None, sizes, sizes, starts, starts, scale=scale, mask_type=kind)


def segment_runs(segment: jax.Array, max_segments: int) -> tuple[jax.Array, jax.Array]:
    """The runs of equal numbers in segment [B, S]: first tokens [B, N + 1] and sizes [B, N], int32, N = max_segments.

    -1 where there is no further run; a row must not have more than ``max_segments``.
    """
    rows, length = segment.shape
    index = jax.lax.broadcasted_iota(jnp.int32, segment.shape, 1)
    first = jnp.pad(segment[:, 1:] != segment[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    number, row = jnp.cumsum(first, axis=1) - 1, jnp.arange(rows)[:, None]
    starts = jnp.full((rows, max_segments + 1), -1, jnp.int32)
    starts = starts.at[row, jnp.where(first, number, length + max_segments)].set(index, mode="drop")
    sizes = jnp.zeros((rows, max_segments), jnp.int32).at[row, number].add(1, mode="drop")
    return starts, jnp.where(sizes > 0, sizes, -1)


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array | None, causal: bool) -> jax.Array:
    """Rows are padded to whole blocks and heads to whole lanes; what is added is a segment of its own."""
    length, depth = q.shape[1], q.shape[-1]
    size = -(-length // _LANES) * _LANES
    more = (-length % _LANES, -depth % _LANES)
    if segment is None and more[0]:
        segment = jnp.zeros(q.shape[:2], jnp.int32)

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, 0), (0, more[0]), *[(0, 0)] * (x.ndim - 3), (0, more[1])])

    if segment is not None:
        segment = jnp.pad(segment, ((0, 0), (0, more[0])), constant_values=-1)

    def run(q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array | None = None) -> jax.Array:
        kernel = _kernel(q.shape[2] * q.shape[3], size, causal)
        heads = q.reshape(*q.shape[:2], -1, q.shape[-1]).swapaxes(1, 2)
        ids = None if segment is None else _segment_ids(segment)
        out = jax.vmap(kernel)(heads, k.swapaxes(1, 2), v.swapaxes(1, 2), ids)
        return out.swapaxes(1, 2).reshape(q.shape)

    out = _per_device(run, pad(q * depth**-0.5), pad(k), pad(v), segment)
    return out[:, :length, ..., :depth]


def _segment_ids(segment: jax.Array) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    return SegmentIds(segment, segment)


def _kernel(heads: int, length: int, causal: bool) -> Any:
    """The kernel for one row of ``length`` tokens, a multiple of 128."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block = max(b for b in range(_LANES, 1024 + 1, _LANES) if length % b == 0)
    inner = max(b for b in range(_LANES, 512 + 1, _LANES) if block % b == 0)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=inner, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=inner, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    one = (splash.CausalMask if causal else splash.FullMask)((length, length))
    return splash.make_splash_mha(
        splash.MultiHeadMask([one] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=1,
        residual_checkpoint_name=ATTENTION, interpret=_platform() != "tpu",
    )  # fmt: skip
