"""The named configurations have the sizes of the released models."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mmprm_jax.models import build
from mmprm_jax.models.released import RELEASED, released_config
from mmprm_jax.records import UserError

# Parameters in millions, as the models' cards and hubs state them.
PUBLISHED = {
    "internvl2_5-1b": 938.19,
    "internvl2_5-2b": 2205.75,
    "internvl2_5-4b": 3712.64,
    "internvl2_5-8b": 8075.37,
    "internvl2_5-26b": 25514.19,
    "internvl2_5-38b": 38388.16,
    "internvl2_5-78b": 78408.32,
    "internvl3-1b": 938,
    "internvl3-2b": 2090,
    "internvl3-8b": 7940,
    "internvl3-14b": 15100,
    "internvl3-38b": 38400,
    "internvl3-78b": 78400,
    "internvl3_5-1b": 1060,
    "internvl3_5-2b": 2350,
    "internvl3_5-4b": 4730,
    "internvl3_5-8b": 8530,
    "internvl3_5-14b": 15100,
    "internvl3_5-38b": 38400,
}


def parameters(name, mesh):
    return jax.tree.leaves(build.abstract(released_config(name), 0, mesh)[1])


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count(mesh, name):
    count = sum(math.prod(x.shape) for x in parameters(name, mesh))
    assert count == pytest.approx(PUBLISHED[name] * 1e6, rel=0.005)


def test_every_named_model_is_counted_or_tiny(mesh):
    tiny = set(RELEASED) - set(PUBLISHED)
    assert all(name.startswith("tiny-") for name in tiny) and len(tiny) == 3
    for name in tiny:
        assert sum(math.prod(x.shape) for x in parameters(name, mesh)) < 200_000


def test_tiny_models_compute(mesh):
    for name in RELEASED:
        if name.startswith("tiny-"):
            cfg = released_config(name)
            graphdef, params = build.initialise(cfg, 5, 0, mesh)
            logits = jax.jit(functools.partial(_logits, graphdef, cfg.tile))(params)
            assert logits.shape == (1, 8, 320) and bool(jnp.all(jnp.isfinite(logits)))


def _logits(graphdef, size, params):
    model = nnx.merge(graphdef, params)
    tokens = jnp.array([[1, 5, 5, 5, 5, 6, 7, 8]])
    hidden, _ = model(tokens, tokens > 0, jnp.ones((1, 1, size, size, 3)))
    return model.decoder.logits(hidden)


def test_large_models_are_spread_over_the_mesh(mesh_of):
    """On fsdp x tensor every matrix is split eight ways, but for the 8B's odd vocabulary, which is split over fsdp."""
    for name, most in (("internvl3-8b", 1.05), ("internvl2_5-8b", 1.3)):
        leaves = parameters(name, mesh_of(data=1, fsdp=2, tensor=4))
        whole = sum(math.prod(x.shape) for x in leaves)
        part = sum(math.prod(x.sharding.shard_shape(x.shape)) for x in leaves)
        assert part < most * whole / 8


def test_unknown_name():
    with pytest.raises(UserError, match="internvl2_5-8b"):
        released_config("InternVL2.5-8B")
