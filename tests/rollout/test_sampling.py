"""The distribution of drawn tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mmprm_jax.rollout.sampling import Sampling, draw

DRAWS = 20_000
LOGITS = np.array([0.3, -1.0, 2.0, 2.0, -4.0, 0.0, 1.1, -0.5], np.float32)
traces = []


@jax.jit
def jitted(logits, uniform, parameters):
    traces.append(None)
    return draw(logits, uniform, parameters)


@pytest.fixture(scope="module")
def uniform():
    return jax.random.uniform(jax.random.key(0), (DRAWS,))


def exact(sampling):
    """The filtered distribution in float64, token by token."""
    p = np.exp(LOGITS.astype(np.float64) / sampling.temperature)
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    kept, mass = [], 0.0
    for i in order[: sampling.top_k or None]:
        if mass >= sampling.top_p:
            break
        kept.append(i)
        mass += p[i]
    return np.where(np.isin(np.arange(len(p)), kept), p, 0) / p[kept].sum()


@pytest.mark.parametrize(
    "sampling, kept",
    [
        (Sampling(), 8),
        (Sampling(temperature=0.5), 8),
        (Sampling(temperature=3.0), 8),
        (Sampling(top_k=3), 3),
        (Sampling(top_k=1), 1),
        (Sampling(top_k=99), 8),
        (Sampling(top_p=0.8), 3),
        (Sampling(top_p=0.3), 1),  # the first token of two equals
        (Sampling(top_p=0.01), 1),
        (Sampling(temperature=2.0, top_p=0.6), 3),
        (Sampling(temperature=2.0, top_k=4, top_p=0.95), 4),
    ],
    ids=str,
)
def test_distribution(uniform, sampling, kept):
    tokens, logprob = jitted(jnp.broadcast_to(LOGITS, (DRAWS, 8)), uniform, sampling.arrays())
    p = exact(sampling)
    assert np.sum(p > 0) == kept
    counts = np.bincount(tokens, minlength=8)
    assert np.all(counts[p == 0] == 0)
    assert kept == 1 or stats.chisquare(counts[p > 0], DRAWS * p[p > 0]).pvalue > 1e-3
    unfiltered = LOGITS - np.log(np.exp(LOGITS).sum())
    np.testing.assert_allclose(logprob, unfiltered[tokens], atol=1e-5)


def test_low_temperature_is_greedy(uniform):
    logits = np.where(np.arange(8) == 3, np.float32(2.01), LOGITS)  # a little above token 2
    tokens, _ = jitted(jnp.broadcast_to(logits, (DRAWS, 8)), uniform, Sampling(temperature=1e-4).arrays())
    assert np.all(np.asarray(tokens) == 3)


def test_parameters_do_not_recompile(uniform):
    logits = jnp.broadcast_to(LOGITS, (DRAWS, 8))
    jitted(logits, uniform, Sampling().arrays())
    before = len(traces)
    for sampling in (Sampling(0.3), Sampling(1.0, 5), Sampling(2.0, 3, 0.5)):
        jitted(logits, uniform, sampling.arrays())
    assert len(traces) == before


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, 5, 0.9)], ids=str)
def test_extreme_uniforms_and_logits(sampling):
    """The ends of the unit interval, ruled out tokens and a vocabulary whose probabilities do not sum to exactly 1."""
    size = 50_000
    logits = np.random.default_rng(0).standard_normal((3, size)).astype(np.float32)
    logits[2, 10:] = -1e30
    ends = jnp.array([0.0, 1 - 2**-24, 1 - 2**-24])
    tokens, logprob = draw(jnp.array(logits), ends, sampling.arrays())
    assert int(tokens[0]) == logits[0].argmax() and 0 <= int(tokens[1]) < size and int(tokens[2]) < 10
    assert np.all(np.isfinite(logprob))
