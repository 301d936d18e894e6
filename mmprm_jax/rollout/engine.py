"""The sampling engine: tokens in, tokens and log-probabilities out. It knows no text.

One jitted call prefills a batch of prefixes (image and tokens) once and samples n continuations of each. The n samples
of a prefix share one copy of its keys and values; each sample has a cache of its own for what it adds.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from mmprm_jax.data.images import normalise
from mmprm_jax.models.vlm import VLM
from mmprm_jax.rollout.sampling import Sampling, draw
from mmprm_jax.sharding import BATCH, dot, fit_spec, put_batch


@dataclasses.dataclass(frozen=True)
class Sample:
    tokens: tuple[int, ...]  # the stop token included, if it was reached
    logprob: float  # sum over tokens, temperature 1, in nats


def _shared_attention(q: Any, prefix: Any, mask: Any, suffix: Any, length: Any) -> jax.Array:
    """Softmax attention of each sample over its group's prefix and its own suffix.

    q [R, n, G, Q, D]; prefix (k, v) [R, P, G, D] with mask [R, P]; suffix (k, v) [R, n, T, G, D], of which the first
    ``length`` entries count -> [R, n, G, Q, D].
    """
    q = q * q.shape[-1] ** -0.5
    before = dot("rngqd,rpgd->rgqnp", q, prefix[0], BATCH, "tensor", dtype=jnp.float32)
    before = jnp.where(mask[:, None, None, None, :], before, -1e30)
    after = dot("rngqd,rntgd->rgqnt", q, suffix[0], BATCH, "tensor", dtype=jnp.float32)
    after = jnp.where(jnp.arange(after.shape[-1]) < length, after, -1e30)
    top = jnp.maximum(before.max(axis=-1), after.max(axis=-1))[..., None]
    before, after = jnp.exp(before - top), jnp.exp(after - top)
    total = before.sum(axis=-1) + after.sum(axis=-1)
    out = dot("rgqnp,rpgd->rngqd", before, prefix[1], BATCH, None, "tensor", dtype=jnp.float32)
    out = out + dot("rgqnt,rntgd->rngqd", after, suffix[1], BATCH, None, "tensor", dtype=jnp.float32)
    return (out / total.transpose(0, 3, 1, 2)[..., None]).astype(q.dtype)


@functools.partial(jax.jit, static_argnames=("graphdef", "n", "max_new", "stop"))
def _generate(params: Any, batch: Any, sampling: Any, *, graphdef: Any, n: int, max_new: int, stop: int) -> Any:
    """batch: tokens, valid [R, P] (left-padded), pixels, keys [R, 2] -> tokens [R, n, T], lengths, logprobs [R, n]."""
    model: VLM = nnx.merge(graphdef, params)
    rows, mask = batch["tokens"].shape[0], batch["valid"]
    hidden, prefix = model(batch["tokens"], mask, batch["pixels"])
    first = jnp.sum(mask, axis=1)[:, None]
    keys = jax.vmap(lambda k: jax.vmap(lambda i: jax.random.fold_in(k, i))(jnp.arange(n)))(
        jax.random.wrap_key_data(jax.sharding.reshard(batch["keys"], P()), impl="threefry2x32")
    )

    def pick(hidden: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = model.decoder.logits(hidden)
        logits = jax.sharding.reshard(logits, fit_spec(logits.shape, (BATCH,)))
        uniform = jax.vmap(jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, t))))(keys)
        return draw(jnp.broadcast_to(logits, (rows, n, logits.shape[-1])), uniform, sampling)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        layer, (t, cache) = state
        cache = tuple(
            jax.lax.dynamic_update_slice(c, x[None, :, :, None], (layer, 0, 0, t, 0, 0))
            for c, x in zip(cache, (k, v), strict=True)
        )
        own = tuple(jax.lax.dynamic_index_in_dim(c, layer, keepdims=False) for c in cache)
        shared = tuple(jax.lax.dynamic_index_in_dim(c, layer, keepdims=False) for c in prefix)
        return _shared_attention(q, shared, mask, own, t + 1), (t, cache)

    def running(state: Any) -> jax.Array:
        return (state["t"] < max_new - 1) & ~jnp.all(state["done"])

    def step(s: Any) -> Any:
        t = s["t"]
        x = model.decoder.embed_tokens(s["last"])
        rope = model.decoder.rope(first + t + jnp.zeros_like(s["last"]), first[:, 0] + t + 1)
        hidden, (_, cache) = model.decoder.decode(x, rope, attend, (t, s["cache"]))
        token, logprob = pick(hidden, t + 1)
        live = ~s["done"]
        return {
            "t": t + 1,
            "last": token,
            "cache": cache,
            "tokens": jnp.where((jnp.arange(max_new) == t + 1) & live[..., None], token[..., None], s["tokens"]),
            "logprob": s["logprob"] + jnp.where(live, logprob, 0.0),
            "length": s["length"] + live,
            "done": s["done"] | (token == stop),
        }

    token, logprob = pick(hidden[:, -1:], jnp.int32(0))
    layers, _, _, groups, depth = prefix[0].shape
    shape = (layers, rows, n, max_new, groups, depth)
    spec = fit_spec(shape, (None, BATCH, None, None, "tensor"))
    state = {
        "t": jnp.int32(0),
        "last": token,
        "cache": (jnp.zeros(shape, prefix[0].dtype, out_sharding=spec),) * 2,
        "tokens": jnp.where(jnp.arange(max_new) == 0, token[..., None], 0),
        "logprob": logprob,
        "length": jnp.ones_like(token),
        "done": token == stop,
    }
    state = jax.lax.while_loop(running, step, state)
    return state["tokens"], state["length"], state["logprob"]


class Engine:
    """Samples continuations for any number of prefixes, ``rows`` prefixes at a time."""

    def __init__(
        self,
        graphdef: Any,
        params: Any,
        mesh: Any,
        sampling: Sampling,
        *,
        stop: int,
        rows: int,
        max_new: int,
        bucket: int = 16,
    ):
        self._graphdef, self._params, self._mesh = graphdef, params, mesh
        self._sampling = sampling.arrays()
        self._stop, self._rows, self._max_new, self._bucket = stop, rows, max_new, bucket

    def sample(
        self, prefixes: Sequence[Sequence[int]], pixels: np.ndarray, keys: np.ndarray, n: int
    ) -> list[list[Sample]]:
        """``n`` samples of each prefix.

        pixels uint8 [N, tiles, H, W, 3]; keys uint32 [N, 2]: sample i of a prefix depends on its key and i, not on the
        other prefixes. Prefixes of similar length share a batch; the padded width is a prefix's own, so that its
        companions cannot change a rounding.
        """
        if not len(prefixes) == len(keys) == len(pixels):
            raise ValueError("prefixes, pixels and keys must have the same length")
        widths = [-(-len(prefix) // self._bucket) * self._bucket for prefix in prefixes]
        results: list[list[Sample]] = [[] for _ in prefixes]
        for width, chosen in self._plan(widths, [len(prefix) for prefix in prefixes]):
            tokens, lengths, logprobs = self._batch(
                [prefixes[i] for i in chosen], pixels[chosen], keys[chosen], n, width
            )
            for row, i in enumerate(chosen):
                results[i] = [
                    Sample(tuple(tokens[row, j, : lengths[row, j]].tolist()), float(logprobs[row, j])) for j in range(n)
                ]
        return results

    def _plan(self, widths: list[int], lengths: list[int]) -> Iterator[tuple[int, list[int]]]:
        """(width, indices) of each batch: one width, at most ``rows`` prefixes, similar lengths together."""
        for width in sorted(set(widths)):
            same = sorted((i for i, w in enumerate(widths) if w == width), key=lambda i: lengths[i])
            for start in range(0, len(same), self._rows):
                yield width, same[start : start + self._rows]

    def _batch(self, prefixes: list[Sequence[int]], pixels: np.ndarray, keys: np.ndarray, n: int, width: int) -> Any:
        tokens, valid = np.zeros((self._rows, width), np.int32), np.zeros((self._rows, width), bool)
        for row, prefix in enumerate(prefixes):
            tokens[row, width - len(prefix) :] = prefix
            valid[row, width - len(prefix) :] = True
        valid[len(prefixes) :, -1] = True
        fill = [(0, self._rows - len(prefixes))]
        batch = {
            "tokens": tokens,
            "valid": valid,
            "pixels": normalise(np.pad(pixels, fill + [(0, 0)] * (pixels.ndim - 1))),
            "keys": np.pad(keys, fill + [(0, 0)]),
        }
        out = _generate(
            self._params, put_batch(batch, self._mesh), self._sampling,
            graphdef=self._graphdef, n=n, max_new=self._max_new, stop=self._stop,
        )  # fmt: skip
        return jax.device_get(out)
