"""What sampled files of two runs must have in common on this machine."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmprm_jax.rollout import device

_LOGPROB = re.compile(r'"logprob": ?(-?[\d.e-]+)')


@functools.cache
def rows_are_independent():
    """Whether a row of a matrix product is the same however many there are, as the engine's programs need it.

    Not so on some CPUs (AMD EPYC, jax 0.10.2): the last two of 3 n + 2 rows are summed in another order, so that the
    last digits of log-probabilities depend on what is sampled together.
    """
    rng = np.random.default_rng(0)
    rows, matrix = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((1024, 64), (64, 128)))
    product = jax.jit(jnp.matmul, compiler_options=device._options("cpu"))
    whole = np.asarray(product(rows, matrix))
    return all(np.array_equal(product(rows[:n], matrix), whole[:n]) for n in (8, 16, 32, 64, 128, 256, 512))


def assert_same_files(found, expected):
    """Texts by name, equal to the last digit; log-probabilities to 1e-3 nats where rows are not independent."""
    if not rows_are_independent():
        for name in expected:
            a, b = (list(map(float, _LOGPROB.findall(texts[name]))) for texts in (found, expected))
            assert a == pytest.approx(b, abs=1e-3), name
        found, expected = ({k: _LOGPROB.sub("", text) for k, text in texts.items()} for texts in (found, expected))
    assert found == expected
