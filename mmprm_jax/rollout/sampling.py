"""Drawing the next token. Parameters are arrays: changing them never recompiles."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Raises ValueError outside of: temperature > 0; top_k >= 0, 0 keeps all tokens; top_p in (0, 1].

    top_p keeps the smallest set of tokens that has this probability.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and 0 < self.top_p <= 1 and self.top_k >= 0):
            raise ValueError(f"{self}: temperature must be positive, top_p in (0, 1], top_k 0 or positive")

    def arrays(self) -> dict[str, Any]:
        return {
            "temperature": jnp.float32(self.temperature),
            "top_k": jnp.int32(self.top_k),
            "top_p": jnp.float32(self.top_p),
        }


def draw(logits: jax.Array, uniform: jax.Array, parameters: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Inverse-CDF sampling from the filtered distribution.

    logits [..., V] float32, uniform [...] in [0, 1) -> token [...] int32 and its log-probability [...] under the
    unfiltered distribution at temperature 1. Tokens of equal logit are ordered by id.
    """
    size = logits.shape[-1]
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) + 0 * logits.astype(jnp.int32)
    negative, order = jax.lax.sort((-logits, ids), dimension=-1, num_keys=1, is_stable=True)
    probabilities = jax.nn.softmax(-negative / parameters["temperature"], axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    top_k = jnp.where(parameters["top_k"] > 0, parameters["top_k"], size)
    keep = (before < parameters["top_p"]) & (jnp.arange(size) < top_k)
    keep = keep | (jnp.arange(size) == 0)
    kept = jnp.where(keep, probabilities, 0.0)
    cumulative = jnp.cumsum(kept, axis=-1)
    rank = jnp.sum(cumulative <= uniform[..., None] * cumulative[..., -1:], axis=-1)
    rank = jnp.minimum(rank, jnp.sum(keep, axis=-1) - 1)
    chosen = jnp.arange(size) == rank[..., None]
    token = jnp.sum(jnp.where(chosen, order, 0), axis=-1)
    logprob = jnp.sum(jnp.where(chosen, -negative, 0.0), axis=-1) - jax.nn.logsumexp(logits, axis=-1)
    return token, logprob
