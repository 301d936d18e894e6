"""Packed rows against one example a row, and losses against sums that are made otherwise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import IMAGE_TOKEN, TINY
from flax import nnx
from scipy import stats
from toy_training import LOSSES, example, pack

from mmprm_jax.models import build
from mmprm_jax.models.config import RopeScaling
from mmprm_jax.sharding import put_batch
from mmprm_jax.training import losses

# Positions beyond max_position: the rotary angles go by the length of the example.
SCALED = dataclasses.replace(TINY.decoder, rope_scaling=RopeScaling("dynamic", 2.0, 6))
CFG = dataclasses.replace(TINY, kappa=True, decoder=SCALED)


@pytest.fixture(scope="module")
def run(mesh_of, tiny):
    mesh = mesh_of(data=1)
    with jax.set_mesh(mesh):
        graphdef, params = build.initialise(CFG, IMAGE_TOKEN, 0, mesh)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), jax.device_get(params))

    def run(loss, batch):
        batch = {name: x for name, x in batch.items() if name != "example"}
        with jax.set_mesh(mesh):
            total = jax.jit(jax.value_and_grad(lambda p, b: loss(nnx.merge(graphdef, p), b), has_aux=True))
            return jax.device_get(total(tiny.place(mesh, params), put_batch(batch, mesh)))

    return run


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(1)
    return [example(rng, *shape) for shape in [(11, 1), (7, 0), (14, 2), (9, 1), (5, 0)]]


@pytest.mark.parametrize("kind", ["policy", "soft", "beta_binomial"])
def test_packed_is_unpacked(run, examples, kind):
    a, b, c, d, e = examples
    (want, weight), grads = run(LOSSES[kind], pack([[x] for x in examples], 14, 2))
    (got, packed_weight), packed_grads = run(LOSSES[kind], pack([[b, a, d], [e, c]], 30, 3))
    assert packed_weight == weight > 5 and got == pytest.approx(want, rel=1e-5)
    scale = max(np.abs(g).max() for g in jax.tree.leaves(grads))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * scale), packed_grads, grads)
    moved = {name for name, g in grads.items() if max(np.abs(x).max() for x in jax.tree.leaves(g)) > 1e-3 * scale}
    assert moved == {"vision", "projector", "decoder"} | ({"kappa"} if kind == "beta_binomial" else set())


def test_losses_of_single_tokens(run, examples):
    def per_token(batch):
        response = batch["response"]

        def loss(model, b):
            targets, weight = losses.policy_targets(b)
            found = losses.token_losses(model, losses.hidden_states(model, b), targets)
            return jnp.sum(found * weight), found

        (_, found), _ = run(loss, batch)
        same = (batch["segment"][:, 1:] == batch["segment"][:, :-1]) & (batch["segment"][:, 1:] > 0)
        return np.concatenate([f[:-1][s & r[1:]] for f, s, r in zip(found, same, response, strict=True)])

    want = per_token(pack([[x] for x in examples], 14, 2))
    got = per_token(pack([examples[:2], examples[2:4], examples[4:]], 30, 3))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert len(want) == sum(x["response"][1:].sum() for x in examples)


@pytest.mark.slow
@pytest.mark.parametrize("shape, tied", [(dict(data=1), False), (dict(data=2, fsdp=2, tensor=2), True)], ids=str)
def test_logits_in_blocks(mesh_of, examples, monkeypatch, shape, tied):
    """Blocks that do not divide the row give the losses and gradients of the whole logits."""
    mesh = mesh_of(**shape)
    cfg = dataclasses.replace(TINY, decoder=dataclasses.replace(TINY.decoder, tied=tied))
    batch = pack([[x] for x in examples[:4]], 14, 2)
    batch.pop("example")
    found = []
    for tokens in (10**6, 4 * 5 if len(shape) == 1 else 5):
        monkeypatch.setattr(losses, "_TOKENS_AT_ONCE", tokens)
        with jax.set_mesh(mesh):
            graphdef, params = build.initialise(cfg, IMAGE_TOKEN, 0, mesh)
            grad = jax.jit(jax.value_and_grad(lambda p, b, g=graphdef: losses.policy_loss(nnx.merge(g, p), b)[0]))
            placed = put_batch(batch, mesh)
            assert ("4x14x40xf32" in grad.lower(params, placed).as_text()) == (tokens == 10**6)  # all logits at once
            found.append(jax.device_get(grad(params, placed)))
    (want, grads), (got, others) = found
    assert got == pytest.approx(want, rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * abs(want)), others, grads)


@pytest.mark.parametrize("k, n", [(0, 1), (1, 1), (0, 8), (8, 8), (3, 8), (5, 16)])
def test_beta_binomial_against_scipy(k, n):
    margin = np.linspace(-4, 4, 9).astype(np.float32)[:, None]
    kappa = np.geomspace(0.01, 30, 7).astype(np.float32)[None]
    mu = 1 / (1 + np.exp(-margin.astype(np.float64)))
    want = -stats.betabinom.logpmf(k, n, mu * kappa, (1 - mu) * kappa) + 0.05 * kappa * np.abs(mu - k / n)
    margins, kappas = np.broadcast_arrays(margin, kappa)
    counts = [jnp.full(margins.shape, x, jnp.float32) for x in (k, n)]
    got = losses.beta_binomial(jnp.array(margins), jnp.array(kappas), *counts)
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)
    # The regulariser moves kappa only: mu is detached in it.
    slope = jax.grad(lambda m: losses.beta_binomial(m, jnp.float32(3.0), *(c[0, 0] for c in counts)))(jnp.float32(0.7))

    def likelihood(m):
        p = 1 / (1 + np.exp(-m))
        return -stats.betabinom.logpmf(k, n, p * 3, (1 - p) * 3)

    assert slope == pytest.approx((likelihood(0.7 + 1e-5) - likelihood(0.7 - 1e-5)) / 2e-5, rel=1e-3, abs=1e-5)


def test_beta_binomial_stays_finite():
    margin, kappa = jnp.array([-200.0, 200, -90, 90]), jnp.array([1e-3, 1e-3, 500, 500])
    for k in (0.0, 4.0, 8.0):
        args = (margin, kappa, jnp.full(4, k), jnp.full(4, 8.0))
        grads = jax.grad(lambda *x: losses.beta_binomial(*x).sum(), (0, 1))(*args)
        assert np.all(np.isfinite(losses.beta_binomial(*args))) and np.all(np.isfinite(grads))
