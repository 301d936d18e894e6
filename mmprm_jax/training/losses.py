"""Losses as (unreduced sum, weight), so that sums over microbatches and devices are exact.

Every loss takes a model and a batch of packed rows: tokens [B, S] int32; segment [B, S] int32, 0 at padding, else the
number of the example within its row; example [B, E], of which E counts: the examples that a row has at most (absent:
unknown); pixels [B, tiles, H, W, 3], absent for text-only models; what the loss itself needs; keep [B, tiles, layers,
2], absent without drop-path (see ``VisionTower.draw``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln

from mmprm_jax.models.vlm import VLM
from mmprm_jax.records import UserError
from mmprm_jax.settings import LABELS
from mmprm_jax.sharding import BATCH, fit_spec, reshape

Batch = Mapping[str, jax.Array]
Loss = Callable[[VLM, Batch], tuple[jax.Array, jax.Array]]
_TOKENS_AT_ONCE = 1024  # logits of so many tokens are in the memory of a device at a time


def hidden_states(model: VLM, batch: Batch) -> jax.Array:
    """[B, S, D] after the final norm."""
    most = batch["example"].shape[1] if "example" in batch else 0
    return model(batch["tokens"], batch["segment"], batch.get("pixels"), keep=batch.get("keep"), most=most)[0]


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
    whole = model.decoder.head()

    def losses(head: jax.Array, hidden: jax.Array, targets: jax.Array) -> jax.Array:
        logits = model.decoder.logits(hidden, head.astype(hidden.dtype))
        # A masked sum, not a gather: it stays local when the vocabulary is sharded.
        chosen = jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == targets[..., None], logits, 0.0), axis=-1)
        return jax.nn.logsumexp(logits, axis=-1) - chosen

    if length <= block:
        return losses(whole, hidden, targets)
    more = -length % block
    hidden, targets = (jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2)) for x in (hidden, targets))
    count = (length + more) // block

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(reshape(x, (rows, count, block, *x.shape[2:]), BATCH), 1, 0)

    # float32, so that the blocks' gradients add up in float32.
    head = whole.astype(jnp.float32)
    step = jax.checkpoint(lambda _, x: (None, losses(head, *x)), prevent_cse=False)
    _, found = jax.lax.scan(step, None, (split(hidden), split(targets)))
    return reshape(jnp.moveaxis(found, 0, 1), (rows, length + more), BATCH)[:, :length]


def prm_loss(kind: str, threshold: float, yes: int, no: int) -> Loss:
    """The loss of a PRM at every labelled ``<prm>``; its score is mu = softmax(Yes, No)[Yes] (MM-PRM section 3.3).

    ``kind``: "soft": cross-entropy with k / n; "hard": with 1 where k / n > ``threshold``, else 0; "beta_binomial":
    see ``beta_binomial``, for models with a kappa head. batch: k and n [B, S] int32, n = 0 where there is no label.
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

    margin: the log-odds of mu; kappa > 0; 0 <= k <= n; all float32 of one shape -> like them.
    """

    def rising(log_a: jax.Array, k: jax.Array) -> jax.Array:
        """log a (a + 1) ... (a + k - 1): finite for the smallest a, where gammaln(a) is not."""
        a = jnp.exp(log_a)
        return jnp.where(k > 0, log_a + gammaln(a + jnp.maximum(k, 1)) - gammaln(a + 1), 0.0)

    log_kappa = jnp.log(kappa)
    choose = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
    likelihood = (
        choose + rising(jax.nn.log_sigmoid(margin) + log_kappa, k)
        + rising(jax.nn.log_sigmoid(-margin) + log_kappa, n - k) - rising(log_kappa, n)
    )  # fmt: skip
    mu = jax.lax.stop_gradient(jax.nn.sigmoid(margin))
    return 0.05 * kappa * jnp.abs(mu - k / jnp.maximum(n, 1)) - likelihood
