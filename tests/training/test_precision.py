"""Gradients in bfloat16 against those in float32 where a parameter's is a sum over 32,768 tokens.

A sum in bfloat16 ends at 256 equal addends: before parameters stayed float32 under the computation, the embedding of a
token seen 6,272 times had a gradient of 0.38 times the right norm.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import pytest
from toy_training import LOSSES

from mmprm_jax.evaluation import aggregate, statistics
from mmprm_jax.models import build
from mmprm_jax.models.config import VLMConfig
from mmprm_jax.rollout.engine import Sample
from mmprm_jax.sharding import put_rows
from mmprm_jax.training import losses, optimizers, trainer

ROWS, LENGTH, EXAMPLES, IMAGE, VOCAB = 64, 512, 4, 4, 512
CFG = VLMConfig.from_dict(
    {
        "vision": dict(
            image_size=16, patch_size=4, hidden_size=64, num_layers=2, num_heads=4, intermediate_size=128
        ),
        "decoder": dict(
            vocab_size=VOCAB, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
            intermediate_size=128, rms_norm_eps=1e-6, rope_theta=1e4, qkv_bias=True, out_bias=True, mlp_bias=True,
            qk_norm=True,
        ),
        "remat": "full",
    }
)  # fmt: skip


def sized(vision=True, **decoder):
    return dataclasses.replace(
        CFG, vision=CFG.vision if vision else None, decoder=dataclasses.replace(CFG.decoder, **decoder)
    )


def zipf_rows(cfg):
    """Rows of four examples, an image each; the ids follow Zipf's law with exponent 1.1."""
    rng = np.random.default_rng(0)
    frequency = np.arange(1, VOCAB - 4) ** -1.1
    tokens = rng.choice(np.arange(5, VOCAB), (ROWS, LENGTH), p=frequency / frequency.sum()).astype(np.int32)
    each = LENGTH // EXAMPLES
    n = np.where(rng.random((ROWS, LENGTH)) < 0.2, 8, 0).astype(np.int32)
    batch = {
        "tokens": tokens,
        "segment": np.tile(np.repeat(np.arange(1, EXAMPLES + 1, dtype=np.int32), each), (ROWS, 1)),
        "example": np.arange(ROWS * EXAMPLES, dtype=np.int32).reshape(ROWS, EXAMPLES),
        "response": rng.random((ROWS, LENGTH)) < 0.8,
        "n": n,
        "k": (n * rng.random((ROWS, LENGTH))).astype(np.int32),
    }
    if cfg.vision:
        for start in range(1, LENGTH, each):
            tokens[:, start : start + cfg.tokens_per_tile] = IMAGE
        batch["pixels"] = rng.standard_normal((ROWS, EXAMPLES, 16, 16, 3), np.float32)
    return batch


def gradients(cfg, loss, mesh, microbatches, dtype):
    """On host; every parameter, biases and adapters too, begins with something."""
    with jax.set_mesh(mesh):
        graphdef, params = build.initialise(cfg, IMAGE if cfg.vision else -1, 0, mesh)
        noise = iter(range(10**6))

        def moved(x):
            drawn = np.random.default_rng(next(noise)).standard_normal(x.shape, np.float32)
            return x + 0.05 * jax.device_put(drawn, x.sharding)

        params = jax.tree.map(moved, params)
        s = trainer.Settings(
            10, ROWS, optimizers.Settings("adamw", 1e-3), microbatches, dtype,
            freeze=("decoder",) if cfg.decoder.lora_rank else (),
        )  # fmt: skip
        task = trainer.make_task(graphdef, LOSSES[loss], s)
        state, frozen = trainer.new_state(params, task, mesh)
        run = jax.jit(lambda state, frozen, batch: trainer.gradients(state, frozen, batch, task))
        return jax.device_get(run(state, frozen, put_rows(zipf_rows(cfg), mesh))[2])


MESHES = {1: {"data": 1}, 8: {"data": 2, "fsdp": 2, "tensor": 2}}


@pytest.mark.parametrize(
    "cfg, loss, devices, microbatches",
    [
        (sized(vision=False), "soft", 1, 1),
        pytest.param(sized(), "policy", 1, 1, marks=pytest.mark.slow),
        pytest.param(sized(tied=True), "soft", 8, 4, marks=pytest.mark.slow),
        pytest.param(sized(lora_rank=4, lora_alpha=4.0), "policy", 8, 1, marks=pytest.mark.slow),
    ],
    ids=["prm", "policy", "tied-8-devices-4-microbatches", "adapters-8-devices"],
)
def test_no_gradient_loses_addends(mesh_of, cfg, loss, devices, microbatches):
    want = gradients(cfg, loss, mesh_of(data=1), 1, "float32")
    got = gradients(cfg, loss, mesh_of(**MESHES[devices]), microbatches, "bfloat16")
    errors = {}
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(want)[0], jax.tree.leaves(got), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert b.dtype == np.float32, name
        errors[name] = np.linalg.norm(b - a) / np.linalg.norm(a)
    assert not {name: round(float(x), 3) for name, x in errors.items() if x > 0.02}


def test_moments_in_bfloat16_follow_steady_gradients():
    """Rounded to the nearest, the second moments stop on their way down, and steps are 8 % too short."""
    plain = optax.scale_by_adam(b2=0.98)
    kept = optimizers._moments_in_bfloat16(plain)
    states, updates = {}, {}
    for optimizer in (plain, kept):
        states[optimizer] = optimizer.init(jnp.zeros(1000))
    for step in range(300):
        grads = jnp.full(1000, 0.03 if step < 100 else 0.01)
        for optimizer in (plain, kept):
            updates[optimizer], states[optimizer] = jax.jit(optimizer.update)(grads, states[optimizer])
    assert float(jnp.mean(updates[kept])) == pytest.approx(float(jnp.mean(updates[plain])), rel=0.01)


def test_rounding_at_random():
    x = jnp.array([1.0, 1 + 2**-9, -(1 + 2**-9), 1e-30, np.inf, np.nan, 0.0], jnp.float32)
    many = jax.vmap(lambda key: optimizers.stochastic_round(x, key))(jax.random.split(jax.random.key(0), 20_000))
    found = np.asarray(many.astype(jnp.float32), np.float64)
    assert set(np.unique(found[:, 0])) == {1.0} and set(np.unique(found[:, 6])) == {0.0}
    assert set(np.unique(found[:, 1])) == {1.0, 1 + 2**-7} and found[:, 1].mean() == pytest.approx(1 + 2**-9, abs=2e-4)
    assert found[:, 2].mean() == pytest.approx(-(1 + 2**-9), abs=2e-4)
    assert found[:, 3].mean() == pytest.approx(1e-30, rel=1e-3)
    assert np.all(np.isinf(found[:, 4])) and np.all(np.isnan(found[:, 5]))


def exact(margin, kappa, k, n):
    """-log BetaBinomial and its derivatives by margin and by kappa, from 50 digits."""
    m, kappa = mpmath.mpf(float(margin)), mpmath.mpf(float(kappa))
    mu, nu = 1 / (1 + mpmath.exp(-m)), 1 / (1 + mpmath.exp(m))

    def rising(a, count):
        return sum(mpmath.log(a + i) for i in range(count)), sum(1 / (a + i) for i in range(count))

    (right, by_a), (wrong, by_b), (total, by_both) = rising(mu * kappa, k), rising(nu * kappa, n - k), rising(kappa, n)
    value = mpmath.log(mpmath.binomial(n, k)) + right + wrong - total
    by_margin = kappa * mu * nu * (by_a - by_b)
    return [float(-x) for x in (value, by_margin, mu * by_a + nu * by_b - by_both)]


def test_beta_binomial_against_fifty_digits():
    cases = [
        (margin, kappa, k, n)
        for margin in (-40, -3, 0.3, 2, 9)
        for kappa in (1e-3, 0.1, 1, 30, 1e4, 1e6)
        for n in (1, 5, 8, 16)
        for k in sorted({0, 1, n // 2, n})
    ]
    columns = np.array(cases, np.float32).T
    with mpmath.workdps(50):
        want = np.array([exact(m, kappa, int(k), int(n)) for m, kappa, k, n in columns.T])

    def negative(margin, kappa, k, n):
        """Without the regulariser, which is 0.05 kappa |mu - k / n|."""
        regulariser = 0.05 * kappa * jnp.abs(jax.lax.stop_gradient(jax.nn.sigmoid(margin)) - k / n)
        return losses.beta_binomial(margin, kappa, k, n) - regulariser

    small = columns[1] < 1e3  # where the regulariser is large, a float32 total cannot show 1e-4
    np.testing.assert_allclose(negative(*columns)[small], want[small, 0], atol=1e-4, rtol=1e-6)
    np.testing.assert_allclose(-losses._log_beta_binomial(*columns), want[:, 0], atol=1e-4)
    by_margin, by_kappa = jax.grad(lambda *x: -jnp.sum(losses._log_beta_binomial(*x)), (0, 1))(*columns)
    np.testing.assert_allclose(by_margin, want[:, 1], atol=1e-4)
    np.testing.assert_allclose(columns[1] * by_kappa, columns[1] * want[:, 2], atol=1e-4)
    told = columns[3] > 1  # one rollout says nothing about kappa
    np.testing.assert_allclose(np.asarray(by_kappa)[told], want[told, 2], rtol=1e-3, atol=1e-16)


def test_labels_that_are_not_there_reach_nothing():
    """n = 0 has probability 1, and no gradient."""
    zero = jnp.zeros(3)
    value, gradient = jax.value_and_grad(lambda m: jnp.sum(losses._log_beta_binomial(m, zero + 1, zero, zero)))(zero)
    assert float(value) == 0 and not np.any(np.asarray(gradient))


def test_sums_of_the_evaluation_are_float64():
    """In float32 the logarithms of 20,000 tokens are off by 0.01 nats and more when added one after the other."""
    values = np.random.default_rng(0).exponential(2.0, 20_000).astype(np.float32)
    sample = Sample(tuple(range(len(values))), tuple(map(float, -values)))
    assert sample.logprob == pytest.approx(-math.fsum(map(float, values)), abs=1e-8)
    scores = np.full(20_000, np.float32(0.1))
    assert aggregate.AGGREGATORS["mean"](scores) == pytest.approx(float(np.float32(0.1)), abs=1e-12)
    assert aggregate.AGGREGATORS["product"](scores) == pytest.approx(20_000 * math.log(np.float32(0.1)), abs=1e-8)
    mean, stderr = statistics.mean_and_stderr(np.resize([1.0, 1.0, 0.0, 1.0], 20_000))
    assert mean == 0.75 and stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 19_999), rel=1e-9)
