"""The building blocks against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmprm_jax.models import layers
from mmprm_jax.models.config import RopeScaling
from mmprm_jax.models.vision import pixel_shuffle

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape, np.float32)


def attention_loop(q, k, v, mask):
    """Definition, one query head at a time; query head h of H reads key/value head h // (H / G)."""
    batch, length, groups, per_group, depth = q.shape
    heads = q.reshape(batch, length, groups * per_group, depth).astype(np.float64)
    out = np.zeros_like(heads)
    for b, s, h in np.ndindex(heads.shape[:3]):
        scores = k[b, :, h // per_group].astype(np.float64) @ heads[b, s, h] / np.sqrt(depth)
        weights = np.exp(scores - scores.max()) * mask[b, s]
        out[b, s, h] = weights / weights.sum() @ v[b, :, h // per_group]
    return out.reshape(q.shape)


def test_attention(mesh):
    q, k, v = normal(2, 5, 2, 3, 4), normal(2, 7, 2, 4), normal(2, 7, 2, 4)
    mask = RNG.random((2, 5, 7)) < 0.6
    mask[..., 0] = True
    np.testing.assert_allclose(
        layers.attention(*map(jnp.array, (q, k, v, mask))), attention_loop(q, k, v, mask), atol=1e-5
    )
    np.testing.assert_allclose(
        layers.attention(*map(jnp.array, (q, k, v)), None), attention_loop(q, k, v, np.ones_like(mask)), atol=1e-5
    )


def test_attention_with_nothing_to_attend_is_finite(mesh):
    q, k = jnp.array(normal(1, 2, 1, 1, 4)), jnp.array(normal(1, 3, 1, 4))
    mask = jnp.zeros((1, 2, 3), bool)
    value, grads = jax.value_and_grad(lambda q: layers.attention(q, k, k, mask).sum())(q)
    assert np.isfinite(value) and np.all(np.isfinite(grads))


def test_attention_keeps_bfloat16(mesh):
    q, k, v = normal(1, 4, 2, 2, 8), normal(1, 4, 2, 8), normal(1, 4, 2, 8)
    out = layers.attention(*(jnp.array(x, jnp.bfloat16) for x in (q, k, v)), None)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(np.float32), attention_loop(q, k, v, np.ones((1, 4, 4))), atol=0.05)


def rotary_loop(x, positions, theta):
    """Each pair (x[i], x[i + D/2]) is a complex number turned by position * theta^(-2i/D)."""
    x, half = x.astype(np.float64), x.shape[-1] // 2
    turn = np.exp(1j * positions[..., None] * theta ** (-2 * np.arange(half) / x.shape[-1]))
    turn = turn.reshape(turn.shape[:2] + (1,) * (x.ndim - 3) + (half,))
    z = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([z.real, z.imag], axis=-1)


def turned(x, positions, theta, length=0, scaling=None):
    lengths = jnp.full(len(x), length)
    return layers.rotary(jnp.array(x), layers.rotary_table(jnp.array(positions), lengths, x.shape[-1], theta, scaling))


@pytest.mark.parametrize("heads", [(), (3,), (3, 2)])
def test_rotary(mesh, heads):
    x, positions = normal(2, 5, *heads, 6), RNG.integers(0, 50, (2, 5))
    got = turned(x, positions, 1e4)
    np.testing.assert_allclose(got, rotary_loop(x, positions, 1e4), atol=2e-5)


def test_rotary_sees_relative_positions_only(mesh):
    q, k = jnp.array(normal(1, 1, 8)), jnp.array(normal(1, 1, 8))

    def score(i, j):
        return float(jnp.sum(turned(q, [[i]], 100.0) * turned(k, [[j]], 100.0)))

    assert score(9, 4) == pytest.approx(score(25, 20), abs=1e-5) and abs(score(9, 4) - score(9, 6)) > 1e-3


def test_linear_scaling_divides_positions(mesh):
    x, positions = normal(2, 5, 6), RNG.integers(0, 50, (2, 5))
    got = turned(x, positions, 1e4, 50, RopeScaling("linear", 4.0))
    np.testing.assert_allclose(got, rotary_loop(x, positions / 4, 1e4), atol=2e-5)


def test_dynamic_scaling_raises_the_base_by_each_row_s_own_length(mesh):
    x, positions = normal(3, 5, 6), np.tile(np.arange(5), (3, 1))
    table = layers.rotary_table(
        jnp.array(positions), jnp.array([5, 16, 24]), 6, 100.0, RopeScaling("dynamic", 2.0, max_position=16)
    )
    got = layers.rotary(jnp.array(x), table)
    for row, theta in enumerate((100.0, 100.0, 100.0 * (2 * 24 / 16 - 1) ** (6 / 4))):
        np.testing.assert_allclose(got[row : row + 1], rotary_loop(x[row : row + 1], positions[:1], theta), atol=2e-5)


def test_norms(mesh):
    x, scale, bias = 0.1 * normal(2, 3, 8) + 0.05, normal(8), normal(8)
    rms, norm = layers.RMSNorm(8, 1e-2), layers.LayerNorm(8, 1e-2)  # an epsilon that matters
    rms.scale[...] = norm.scale[...] = jnp.array(scale)
    norm.bias[...] = jnp.array(bias)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(rms(x), wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-2) * scale, rtol=1e-5)
    centred = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-2)
    np.testing.assert_allclose(norm(x), centred * scale + bias, rtol=1e-4, atol=1e-6)
    assert rms(jnp.array(x, jnp.bfloat16)).dtype == norm(jnp.array(x, jnp.bfloat16)).dtype == jnp.bfloat16


def test_pixel_shuffle(mesh):
    x = normal(2, 4, 6, 3)
    got = np.asarray(pixel_shuffle(jnp.array(x), 2))
    # InternVL's own sequence of views and permutations (ps_version v2), in numpy.
    y = x.reshape(2, 4, 3, 6).transpose(0, 2, 1, 3).reshape(2, 3, 2, 12).transpose(0, 2, 1, 3).reshape(2, 6, 12)
    np.testing.assert_array_equal(got, y)
    np.testing.assert_array_equal(got[1, 4], np.concatenate([x[1, 2, 2], x[1, 2, 3], x[1, 3, 2], x[1, 3, 3]]))


def test_stacked_layers_differ_and_run_in_order(mesh):
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.w = layers.weight(rngs, (64, 64), 16)

    stacked = layers.stack(Layer, 3, nnx.Rngs(0))
    w = np.asarray(stacked.w[...])
    assert w.shape == (3, 64, 64) and len({round(float(v), 6) for v in w[:, 0, 0]}) == 3
    assert w.std() == pytest.approx(0.25, rel=0.05)
    for remat in layers.REMAT:
        body = lambda layer, x, add: (jnp.tanh(x @ layer.w[...]) + add, x.sum())  # noqa: E731
        out, sums = layers.scan_layers(stacked, body, jnp.ones((1, 64)), jnp.arange(3.0), remat=remat)
        x, expected = np.ones((1, 64)), []
        for i in range(3):
            expected.append(x.sum())
            x = np.tanh(x @ w[i]) + i
        np.testing.assert_allclose(out, x, atol=1e-3)
        np.testing.assert_allclose(sums, expected, rtol=1e-4)
