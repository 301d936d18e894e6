"""Losses as (unreduced sum, weight), so that sums over microbatches and devices are exact.

Every loss takes a model and a batch of packed rows: tokens [B, S] int32; segment [B, S] int32, 0 at padding, else the
number of the example within its row; example [B, E], of which E counts: the examples that a row has at most (absent:
unknown); pixels [B, tiles, H, W, 3], absent for text-only models; what the loss itself needs; keep [B, tiles, layers,
2], absent without drop-path (see ``VisionTower.draw``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mmprm_jax.models.vlm import VLM
from mmprm_jax.records import UserError
from mmprm_jax.settings import LABELS
from mmprm_jax.sharding import BATCH, fit_spec, reshape

Batch = Mapping[str, jax.Array]
Loss = Callable[[VLM, Batch], tuple[jax.Array, jax.Array]]
_TOKENS_AT_ONCE = 1024  # logits of so many tokens are in the memory of a device at a time


def hidden_states(model: VLM, batch: Batch) -> jax.Array:
    """[B, S, D] after the final norm."""
    max_segments = batch["example"].shape[1] if "example" in batch else 0
    return model(
        batch["tokens"], batch["segment"], batch.get("pixels"), keep=batch.get("keep"), max_segments=max_segments
    )[0]


def policy_targets(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Each position's next token [B, S], and whether it is one to be predicted, float32 [B, S].

    That is a response token whose predecessor belongs to the same example.
    """
    targets = jnp.pad(batch["tokens"][:, 1:], ((0, 0), (0, 1)))
    same = batch["segment"][:, 1:] == batch["segment"][:, :-1]
    weight = jnp.pad(batch["response"][:, 1:] & same & (batch["segment"][:, 1:] != 0), ((0, 0), (0, 1)))
    return targets, weight.astype(jnp.float32)


def policy_loss(model: VLM, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Next-token cross-entropy over the response.

    batch: response [B, S] bool, True at tokens to be predicted. Returns the summed loss in nats and the number of
    predicted tokens.
    """
    targets, weight = policy_targets(batch)
    losses = token_losses(model, hidden_states(model, batch), targets)
    return jnp.sum(losses * weight), jnp.sum(weight)


def token_losses(model: VLM, hidden: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy of ``targets`` [B, S] in nats, float32 [B, S], from hidden states [B, S, D].

    The logits, tokens x vocabulary, are computed for a block of tokens at a time, and once more in the backward pass.
    """
    rows, length, _ = hidden.shape
    spread = fit_spec((rows,), (BATCH,))[0] is not None
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    local = rows // math.prod(sizes.get(axis, 1) for axis in BATCH) if spread else rows
    block = max(1, _TOKENS_AT_ONCE // local)
    head = model.decoder.head(hidden.dtype)

    def losses(hidden: jax.Array, targets: jax.Array) -> jax.Array:
        logits = model.decoder.logits(hidden, head)
        # A masked sum, not a gather: it stays local when the vocabulary is sharded.
        chosen = jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == targets[..., None], logits, 0.0), axis=-1)
        return jax.nn.logsumexp(logits, axis=-1) - chosen

    if length <= block:
        return losses(hidden, targets)
    more = -length % block
    hidden, targets = (jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2)) for x in (hidden, targets))
    count = (length + more) // block

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(reshape(x, (rows, count, block, *x.shape[2:]), BATCH), 1, 0)

    step = jax.checkpoint(lambda _, x: (None, losses(*x)), prevent_cse=False)
    _, found = jax.lax.scan(step, None, (split(hidden), split(targets)))
    return reshape(jnp.moveaxis(found, 0, 1), (rows, length + more), BATCH)[:, :length]


def prm_loss(kind: str, threshold: float, yes: int, no: int) -> Loss:
    """The loss of a PRM at every labelled ``<prm>``; its score is mu = softmax(Yes, No)[Yes] (MM-PRM section 3.3).

    ``kind``: "soft": cross-entropy with k / n; "hard": with 1 where k / n > ``threshold``, else 0; "beta_binomial":
    see ``beta_binomial``, for models with a kappa head. batch: k and n [B, S] int32, n = 0 where there is no label.
    Of a label that is no count, n is 1 and k float32 in [0, 1]: "soft" and "hard" take it, "beta_binomial" does not.
    Returns the sum in nats and the number of labels. Raises UserError on an unknown kind.
    """
    if kind not in LABELS:
        raise UserError(f"train_prm.label: {kind!r} is not a label kind; choose {', '.join(LABELS)}")

    def loss_fn(model: VLM, batch: Batch) -> tuple[jax.Array, jax.Array]:
        hidden = hidden_states(model, batch)
        logits = model.decoder.logits_of(hidden, (yes, no))
        margin = logits[..., 0] - logits[..., 1]
        weight = ((batch["n"] > 0) & (batch["segment"] != 0)).astype(jnp.float32)
        # Zeros where there is no label: what stands there must not reach the sums, nor their gradients.
        margin = jnp.where(weight > 0, margin, 0.0)
        if kind == "beta_binomial":
            kappa = jnp.where(weight > 0, model.concentration(hidden), 1.0)
            k, n = (jnp.where(weight > 0, batch[name], 0).astype(jnp.float32) for name in "kn")
            losses = beta_binomial(margin, kappa, k, n)
        else:
            target = batch["k"] / jnp.maximum(batch["n"], 1)
            if kind == "hard":
                target = (target > threshold).astype(jnp.float32)
            target = jnp.where(weight > 0, target, 0.0)
            losses = -(target * jax.nn.log_sigmoid(margin) + (1 - target) * jax.nn.log_sigmoid(-margin))
        return jnp.sum(losses * weight), jnp.sum(weight)

    return loss_fn


def beta_binomial(margin: jax.Array, kappa: jax.Array, k: jax.Array, n: jax.Array) -> jax.Array:
    """-log BetaBinomial(k | n, mu kappa, (1 - mu) kappa) + 0.05 kappa |mu - k / n| with mu detached (2605.15529).

    margin: the log-odds of mu; kappa > 0; 0 <= k <= n, whole numbers; all float32 of one shape -> like them, nats.
    """
    mu = jax.lax.stop_gradient(jax.nn.sigmoid(margin))
    return 0.05 * kappa * jnp.abs(mu - k / jnp.maximum(n, 1)) - _log_beta_binomial(margin, kappa, k, n)


@jax.custom_vjp
def _log_beta_binomial(margin: jax.Array, kappa: jax.Array, k: jax.Array, n: jax.Array) -> jax.Array:
    """The logarithm of the probability, a term for each rollout.

    With a = mu kappa, b = (1 - mu) kappa and m = n - k it is the product of (a + i)/(kappa + i) (m + 1 + i)/(1 + i)
    over i < k and (b + j)/(kappa + k + j) over j < m. Differences of gammaln lose all digits where kappa is large.
    """
    return _log_beta_binomial_forward(margin, kappa, k, n)[0]


def _log_beta_binomial_forward(margin: jax.Array, kappa: jax.Array, k: jax.Array, n: jax.Array) -> tuple[Any, Any]:
    mu, nu = jax.nn.sigmoid(margin), jax.nn.sigmoid(-margin)
    m = n - k

    def add(i: jax.Array, sums: Any) -> Any:
        total, by_margin, by_kappa = sums
        right, wrong = i < k, i < m
        a, b = mu * kappa + i, nu * kappa + i
        # The first factors of a and b are mu and nu themselves, which may be too small for a float32.
        log_a = jnp.where(i == 0, jax.nn.log_sigmoid(margin), jnp.log(a / (kappa + i)))
        log_b = jnp.where(i == 0, jax.nn.log_sigmoid(-margin) - jnp.log1p(k / kappa), jnp.log(b / (kappa + k + i)))
        total += jnp.where(right, log_a + jnp.log((m + 1 + i) / (1 + i)), 0.0) + jnp.where(wrong, log_b, 0.0)
        share_a = jnp.where(i == 0, nu, mu * nu * kappa / a)
        share_b = jnp.where(i == 0, mu, mu * nu * kappa / b)
        by_margin += jnp.where(right, share_a, 0.0) - jnp.where(wrong, share_b, 0.0)
        # mu / a - 1 / (kappa + i) and nu / b - 1 / (kappa + k + i), brought over one denominator by hand.
        change_a = -i * nu / (a * (kappa + i))
        change_b = jnp.where(i == 0, k / (kappa * (kappa + k)), (k * nu - i * mu) / (b * (kappa + k + i)))
        by_kappa += jnp.where(right & (i > 0), change_a, 0.0) + jnp.where(wrong, change_b, 0.0)
        return total, by_margin, by_kappa

    zero = jnp.zeros_like(margin)
    largest = jnp.max(n, initial=0.0).astype(jnp.int32)
    total, *gradient = jax.lax.fori_loop(0, largest, lambda i, sums: add(i.astype(jnp.float32), sums), (zero,) * 3)
    return total, tuple(gradient)


def _log_beta_binomial_backward(gradient: Any, above: jax.Array) -> tuple[Any, ...]:
    by_margin, by_kappa = gradient
    return above * by_margin, above * by_kappa, None, None


_log_beta_binomial.defvjp(_log_beta_binomial_forward, _log_beta_binomial_backward)
