"""Losses against sums written out by hand. The model is a stand-in whose hidden states are its pixels."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from mmprm_jax.records import UserError
from mmprm_jax.training.losses import policy_loss, prm_loss

ROWS, LENGTH, SIZE, VOCAB = 4, 6, 5, 11
YES, NO = 8, 3


class Model:
    def __init__(self):
        self.head = jnp.array(np.random.default_rng(0).standard_normal((SIZE, VOCAB), np.float32))
        self.decoder = types.SimpleNamespace(
            head=lambda dtype: self.head,
            logits=lambda hidden, head: hidden @ head,
            logits_of=lambda hidden, tokens: hidden @ self.head[:, jnp.array(tokens)],
        )

    def __call__(self, tokens, segment, pixels, keep, max_segments):
        return pixels, None


@pytest.fixture
def batch():
    rng = np.random.default_rng(1)
    n = rng.integers(1, 9, (ROWS, LENGTH)) * (rng.random((ROWS, LENGTH)) < 0.6)
    return {
        "tokens": rng.integers(0, VOCAB, (ROWS, LENGTH), np.int32),
        "segment": np.ones((ROWS, LENGTH), np.int32),
        "pixels": rng.standard_normal((ROWS, LENGTH, SIZE), np.float32),
        "response": rng.random((ROWS, LENGTH)) < 0.5,
        "k": (n * rng.random((ROWS, LENGTH))).round().astype(np.int32),
        "n": n.astype(np.int32),
    }


def call(loss, batch):
    total, weight = loss(Model(), {name: jnp.array(value) for name, value in batch.items()})
    return float(total), float(weight)


def by_hand_policy(batch):
    total, count = 0.0, 0
    logits = batch["pixels"].astype(np.float64) @ np.asarray(Model().head, np.float64)
    for b in range(ROWS):
        for t in range(1, LENGTH):  # the first token is never predicted
            if batch["response"][b, t]:
                before = logits[b, t - 1]
                total -= before[batch["tokens"][b, t]] - np.log(np.exp(before).sum())
                count += 1
    return total, count


def by_hand_prm(batch, kind, threshold):
    total, count = 0.0, 0
    logits = batch["pixels"].astype(np.float64) @ np.asarray(Model().head, np.float64)
    for b, t in np.ndindex(ROWS, LENGTH):
        if batch["n"][b, t]:
            p = 1 / (1 + np.exp(logits[b, t, NO] - logits[b, t, YES]))
            share = batch["k"][b, t] / batch["n"][b, t]
            y = share if kind == "soft" else float(share > threshold)
            total -= y * np.log(p) + (1 - y) * np.log(1 - p)
            count += 1
    return total, count


def test_policy_loss(batch):
    batch["response"][:, 0] = True  # must not count: nothing comes before it
    assert call(policy_loss, batch) == pytest.approx(by_hand_policy(batch), rel=1e-5)


KINDS = [("soft", 0.0), ("hard", 0.0), ("hard", 0.5)]


@pytest.mark.parametrize("kind, threshold", KINDS)
def test_prm_loss(batch, kind, threshold):
    batch["k"][0, :2], batch["n"][0, :2] = (2, 0), (4, 3)  # exactly at the thresholds .5 and 0: "greater" decides
    expected = by_hand_prm(batch, kind, threshold)
    assert call(prm_loss(kind, threshold, YES, NO), batch) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind, threshold", [("soft", 0.0), ("hard", 0.0), ("hard", 0.5)])
def test_labels_that_are_no_counts(batch, kind, threshold):
    """Numbers in [0, 1] of n = 1: soft takes them as they are, hard compares them with the threshold."""
    share = np.where(batch["n"] > 0, batch["k"] / np.maximum(batch["n"], 1), 0).astype(np.float32)
    share[0, :2], batch["n"][0, :2] = (0.5, 0.0), 1  # at the thresholds
    batch["k"], batch["n"] = share, (batch["n"] > 0).astype(np.int32)
    expected = by_hand_prm(batch, kind, threshold)
    assert call(prm_loss(kind, threshold, YES, NO), batch) == pytest.approx(expected, rel=1e-5)


def test_kinds_differ(batch):
    assert len({round(call(prm_loss(kind, threshold, YES, NO), batch)[0], 3) for kind, threshold in KINDS}) == 3


LOSSES = [policy_loss, prm_loss("soft", 0.0, YES, NO), prm_loss("hard", 0.5, YES, NO)]


@pytest.mark.parametrize("loss", LOSSES, ids=["policy", "soft", "hard"])
def test_halves_add_up(batch, loss):
    whole = np.array(call(loss, batch))
    halves = [call(loss, {name: value[rows] for name, value in batch.items()}) for rows in (slice(0, 2), slice(2, 4))]
    np.testing.assert_allclose(np.sum(halves, axis=0), whole, rtol=1e-5)
    assert whole[1] > 0


@pytest.mark.parametrize("loss", LOSSES, ids=["policy", "soft", "hard"])
def test_unlabelled_positions_carry_nothing(batch, loss):
    before = call(loss, batch)
    labelled = np.roll(batch["response"], -1, axis=1) if loss is policy_loss else batch["n"] > 0
    if loss is policy_loss:
        labelled[:, -1] = False
    batch["pixels"] = np.where(labelled[..., None], batch["pixels"], batch["pixels"] * -3)
    batch["tokens"] = np.where(batch["response"], batch["tokens"], 0)
    batch["k"] = np.where(batch["n"] > 0, batch["k"], 5)
    assert call(loss, batch) == before
    nothing = {**batch, "response": np.zeros_like(batch["response"]), "n": np.zeros_like(batch["n"])}
    assert call(loss, nothing) == (0, 0)


def test_confident_predictions_stay_finite(batch):
    batch["pixels"] *= 1e4
    for loss in LOSSES:
        assert np.isfinite(call(loss, batch)[0])


def test_unknown_kind():
    with pytest.raises(UserError, match="'beta' is not a label kind; choose soft, hard, beta_binomial"):
        prm_loss("beta", 0.0, YES, NO)
