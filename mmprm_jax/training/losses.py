"""Losses as (unreduced sum, weight), so that sums over microbatches and devices are exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from mmprm_jax.models.vlm import VLM
from mmprm_jax.records import UserError

Batch = Mapping[str, jax.Array]
Loss = Callable[[VLM, Batch], tuple[jax.Array, jax.Array]]


def policy_loss(model: VLM, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Next-token cross-entropy over the response.

    batch: tokens [B, S], valid [B, S], pixels [B, T, H, W, 3], response [B, S] (True at tokens to be predicted).
    Returns the summed loss in nats and the number of predicted tokens.
    """
    hidden, _ = model(batch["tokens"], batch["valid"], batch["pixels"])
    logits = model.decoder.logits(hidden[:, :-1])
    targets, weight = batch["tokens"][:, 1:], batch["response"][:, 1:].astype(jnp.float32)
    # A masked sum, not a gather: it stays local when the vocabulary is sharded.
    chosen = jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == targets[..., None], logits, 0.0), axis=-1)
    loss = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.sum(loss * weight), jnp.sum(weight)


def prm_loss(kind: str, threshold: float, yes: int, no: int) -> Loss:
    """Two-way cross-entropy over the logits of Yes and No at every labelled ``<prm>`` (MM-PRM section 3.3).

    ``kind``: "soft": the target is k / n; "hard": 1 where k / n > ``threshold``, else 0. batch: tokens, valid, pixels
    as in ``policy_loss``; k and n [B, S] int32, n = 0 where there is no label. Returns the sum in nats and the number
    of labels. Raises UserError on an unknown kind.
    """
    if kind not in ("soft", "hard"):
        raise UserError(f"train_prm.label: {kind!r} is not a label kind; choose soft or hard")

    def loss_fn(model: VLM, batch: Batch) -> tuple[jax.Array, jax.Array]:
        hidden, _ = model(batch["tokens"], batch["valid"], batch["pixels"])
        logits = model.decoder.logits_of(hidden, (yes, no))
        target = batch["k"] / jnp.maximum(batch["n"], 1)
        if kind == "hard":
            target = (target > threshold).astype(jnp.float32)
        log_yes, log_no = (
            jax.nn.log_sigmoid(logits[..., 0] - logits[..., 1]),
            jax.nn.log_sigmoid(logits[..., 1] - logits[..., 0]),
        )
        weight = (batch["n"] > 0).astype(jnp.float32)
        return -jnp.sum(weight * (target * log_yes + (1 - target) * log_no)), jnp.sum(weight)

    return loss_fn
