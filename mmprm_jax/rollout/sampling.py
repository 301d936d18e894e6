"""Drawing the next token. Parameters are arrays, one set per request: changing them never recompiles."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmprm_jax import settings
from mmprm_jax.schema import check

MAX_STOPS = 4
GREEDY = 1e-6  # logits divided by less would overflow
_LIKELY = 64  # the filters of a top-k up to this look at few tokens only
_BLOCK = 128  # tokens; the inverse CDF looks for the block first, then inside of it


@dataclasses.dataclass(frozen=True)
class Sampling(settings.Sampling):
    """How one request is sampled, in the order of ``transformers``. Raises ValueError outside of the ranges.

    Servers filter otherwise where several filters are set. vLLM applies min-p first, so that top-k and then top-p see
    what it left (vllm/v1/sample/sampler.py). SGLang applies top-k and top-p jointly, top-p by the shares of all tokens;
    with min-p its FlashInfer back end applies top-k, top-p and min-p one after the other, its PyTorch back end top-k
    and top-p jointly all the same (sglang/srt/layers/sampler.py). A temperature below GREEDY takes the most likely
    token, of equal ones the first.
    """

    stop: tuple[int, ...] = ()  # at most MAX_STOPS ids that end a sample; the stop token is part of it

    def __post_init__(self) -> None:
        check(self)
        if len(self.stop) > MAX_STOPS:
            raise ValueError(f"stop: {len(self.stop)} ids; at most {MAX_STOPS} end a sample")

    def arrays(self) -> dict[str, np.ndarray | np.generic]:
        """Scalars, and ``stop`` int32 [MAX_STOPS], filled up with -1."""
        return {
            "temperature": np.float32(self.temperature),
            "top_k": np.int32(self.top_k),
            "top_p": np.float32(self.top_p),
            "min_p": np.float32(self.min_p),
            "penalty": np.float32(self.repetition_penalty),
            "max_new": np.int32(self.max_new_tokens),
            "stop": np.array(self.stop + (-1,) * (MAX_STOPS - len(self.stop)), np.int32),
        }


def _sortable(x: jax.Array) -> jax.Array:
    """float32 -> int32 in the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _largest(good: Callable[[jax.Array], jax.Array], shape: tuple[int, ...]) -> jax.Array:
    """The largest int32 t with ``good(t)``, which must hold up to some t; the least int32 if it never does."""

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, without overflow
        ok = good(middle)
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle)

    limits = jnp.iinfo(jnp.int32)
    bounds = jnp.full(shape, limits.min, jnp.int32), jnp.full(shape, limits.max, jnp.int32)
    return jax.lax.fori_loop(0, 32, halve, bounds)[0]


def _thresholds(x: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """The least key (see ``_sortable``) that top-k, and then top-p of what that leaves, let pass among x [..., N]."""
    key, weight, none = _sortable(x), jnp.exp(x), jnp.full(top_k.shape, jnp.iinfo(jnp.int32).min)

    def mass(t: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(key >= t[..., None], weight, 0.0), axis=-1)

    def count(t: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(key >= t[..., None], 1.0, 0.0), axis=-1)  # exact below 2^24 tokens

    cut = jnp.any(top_k < x.shape[-1])
    kth = jax.lax.cond(cut, lambda: _largest(lambda t: count(t) >= top_k, top_k.shape), lambda: none)
    # No threshold reaches an infinite share, so that top_p = 1 keeps all.
    share = jnp.where(top_p < 1, top_p * mass(kth), jnp.inf)
    cut = jnp.any(top_p < 1)
    nucleus = jax.lax.cond(cut, lambda: _largest(lambda t: mass(t) >= share, top_k.shape), lambda: none)
    return jnp.maximum(kth, nucleus)


def _likely(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Few of x [..., V], and whether the _LIKELY largest are among them with all that equal these.

    Tokens are taken in groups: the _LIKELY groups with the largest maxima hold the largest tokens. Where more groups
    have the least of these maxima, not all of them are there.
    """
    size = math.isqrt(x.shape[-1] // _LIKELY)
    groups = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % size)], constant_values=-jnp.inf)
    groups = groups.reshape(*x.shape[:-1], size, -1)
    top = _sortable(jnp.max(groups, axis=-2))
    least = _largest(lambda t: jnp.sum(jnp.where(top >= t[..., None], 1.0, 0.0), axis=-1) >= _LIKELY, x.shape[:-1])
    number = jnp.cumsum(top >= least[..., None], axis=-1)  # of the chosen groups up to here
    at = jnp.zeros((*x.shape[:-1], _LIKELY), jnp.int32)
    for bit in reversed(range(number.shape[-1].bit_length())):  # bisection: how many groups end before the i-th chosen
        further = at + (1 << bit)
        before = jnp.take_along_axis(number, jnp.minimum(further, number.shape[-1]) - 1, axis=-1) <= jnp.arange(_LIKELY)
        at = jnp.where(before & (further < number.shape[-1]), further, at)
    few = jnp.take_along_axis(groups, at[..., None, :], axis=-1)
    return few.reshape(*x.shape[:-1], -1), number[..., -1] == _LIKELY


def _filtered(x: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """exp(x) [..., V] of the tokens that pass top-k and top-p, 0 for others."""
    size, none = x.shape[-1], jnp.full(top_k.shape, jnp.iinfo(jnp.int32).min)
    threshold, left = none, (top_k < size) | (top_p < 1)
    if size >= 4 * _LIKELY:
        short = top_k <= _LIKELY

        def among_few() -> tuple[jax.Array, jax.Array]:
            few, whole = _likely(x)
            found = short & whole
            return jnp.where(found, _thresholds(few, top_k, top_p), none), left & ~found

        threshold, left = jax.lax.cond(jnp.any(short), among_few, lambda: (none, left))
    # Each row goes its own way, whatever the others need: its result must not depend on them.
    rest = jax.lax.cond(jnp.any(left), lambda: _thresholds(x, top_k, top_p), lambda: none)
    return jnp.where(_sortable(x) >= jnp.where(left, rest, threshold)[..., None], jnp.exp(x), 0.0)


def _weights(logits: jax.Array, seen: jax.Array, p: dict[str, jax.Array]) -> jax.Array:
    """Unnormalised probabilities [..., V] after all filters; tokens that are out have 0."""
    greedy, penalty = p["temperature"] < GREEDY, p["penalty"][..., None]
    x = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    x = x / jnp.where(greedy, 1.0, p["temperature"])[..., None]
    x = x - jnp.max(x, axis=-1, keepdims=True)
    top_k, top_p = jnp.where(greedy, 1, jnp.where(p["top_k"] > 0, p["top_k"], x.shape[-1])), p["top_p"]
    # A conditional's operand is computed once. Otherwise x might be computed again, and be rounded otherwise, to be
    # compared with a threshold that was found among its values.
    few = jnp.any((top_k < x.shape[-1]) | (top_p < 1))
    weight = jax.lax.cond(few, _filtered, lambda x, *_: jnp.exp(x), x, top_k, top_p)
    return jnp.where(weight >= p["min_p"][..., None], weight, 0.0)


def _rank(cumulative: jax.Array, weight: jax.Array, target: jax.Array) -> jax.Array:
    """The first index of positive weight whose cumulative weight exceeds ``target``; else the last such index."""
    last = jnp.max(jnp.where(weight > 0, jnp.arange(weight.shape[-1]), 0), axis=-1)
    found = (weight > 0) & (cumulative > target[..., None])  # a rounded sum must not choose what has no weight
    return jnp.min(jnp.where(found, jnp.arange(weight.shape[-1]), last[..., None]), axis=-1)


def draw(
    logits: jax.Array, seen: jax.Array, uniform: jax.Array, parameters: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Inverse-CDF sampling, in the order of the ids, from the filtered distribution.

    logits [..., V] float32; seen [..., V] bool: tokens of prompt and answer so far; uniform [...] in [0, 1); parameters
    as from ``Sampling.arrays``, each [...] -> token [...] int32 and its log-probability [...] in nats under the
    unfiltered, unpenalised distribution at temperature 1. Nothing is sorted: thresholds are found by bisection. Tokens
    of equal logit are kept or left out together.
    """
    weight = _weights(logits, seen, parameters)
    uniform = jnp.where(parameters["temperature"] < GREEDY, 0.0, uniform)
    size = logits.shape[-1]
    blocks = jnp.pad(weight, [(0, 0)] * (weight.ndim - 1) + [(0, -size % _BLOCK)])
    blocks = blocks.reshape(*weight.shape[:-1], -1, _BLOCK)
    sums = blocks.sum(axis=-1)
    ends = jnp.cumsum(sums, axis=-1)
    target = uniform * ends[..., -1]
    block = _rank(ends, sums, target)
    at = jnp.arange(sums.shape[-1]) == block[..., None]
    start = jnp.sum(jnp.where(at, ends - sums, 0.0), axis=-1)
    inside = jnp.sum(jnp.where(at[..., None], blocks, 0.0), axis=-2)
    token = block * _BLOCK + _rank(start[..., None] + jnp.cumsum(inside, axis=-1), inside, target)
    chosen = jnp.sum(jnp.where(jnp.arange(size) == token[..., None], logits, 0.0), axis=-1)
    return token.astype(jnp.int32), chosen - jax.nn.logsumexp(logits, axis=-1)


def uniforms(keys: jax.Array, *indices: Any) -> jax.Array:
    """One number in [0, 1) for each key: uint32 [..., 2] folded with each of ``indices`` [...] in turn."""

    def one(key: jax.Array, *indices: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(key, impl="threefry2x32")
        for index in indices:
            key = jax.random.fold_in(key, index)
        return jax.random.uniform(key)

    shape = keys.shape[:-1]
    flat = jax.vmap(one)(keys.reshape(-1, 2), *(jnp.broadcast_to(i, shape).reshape(-1) for i in indices))
    return flat.reshape(shape)
