"""Making a model on a mesh: abstract, random, restored, and grown by a token."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax.sharding import PartitionSpec as P

from mmprm_jax.models.config import VLMConfig
from mmprm_jax.models.vlm import VLM
from mmprm_jax.sharding import parameter_shardings


def abstract(cfg: VLMConfig, image_token: int, mesh: Any, dtype: Any = jnp.float32) -> tuple[Any, Any]:
    """The graph definition and the parameters as ShapeDtypeStructs with their shardings (nothing is allocated)."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: VLM(cfg, image_token, nnx.Rngs(0))))
    shapes = nnx.to_pure_dict(state)
    shardings = parameter_shardings(shapes, mesh)
    return graphdef, jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s), shapes, shardings)


def initialise(cfg: VLMConfig, image_token: int, seed: int, mesh: Any) -> tuple[Any, Any]:
    """The graph definition and random parameters, made shard by shard; the same on every mesh."""
    graphdef, shapes = abstract(cfg, image_token, mesh)

    def init() -> Any:
        params = nnx.to_pure_dict(nnx.state(VLM(cfg, image_token, nnx.Rngs(seed))))
        return jax.tree.map(lambda x, s: jax.sharding.reshard(x, s.sharding.spec), params, shapes)

    return graphdef, jax.jit(init)()


def complete(params: Any, cfg: VLMConfig, image_token: int, seed: int, mesh: Any) -> Any:
    """``params`` with new ones for the parts of the model that they lack, e.g. a head; the others stay as they are."""
    _, shapes = abstract(cfg, image_token, mesh)
    have = traverse_util.flatten_dict(params, sep="/")
    missing = {k: x for k, x in traverse_util.flatten_dict(shapes, sep="/").items() if k not in have}

    def init() -> Any:  # what is not returned is not computed
        new = traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(VLM(cfg, image_token, nnx.Rngs(seed)))), sep="/")
        return {k: jax.sharding.reshard(new[k], x.sharding.spec) for k, x in missing.items()}

    return traverse_util.unflatten_dict(have | jax.jit(init)(), sep="/") if missing else params


def add_token(params: Any, mesh: Any, token: int | None = None) -> Any:
    """Parameters with one more token: the mean of the old rows, as the original adds ``<prm>``.

    token: its id, the first unused one; by default the vocabulary's size. A vocabulary padded beyond the tokenizer's
    has a row for it already, which is overwritten.
    """
    decoder = dict(params["decoder"])
    for name, axis in (("embed", 0), ("lm_head", 1)):
        if name not in decoder:  # a tied head
            continue
        whole = jax.sharding.reshard(decoder[name], P())  # a sharded axis cannot grow by one
        old, rest = (whole, None) if token is None else jnp.split(whole, [token], axis)
        parts = [old, old.mean(axis=axis, keepdims=True)]
        if rest is not None:
            parts.append(jax.lax.slice_in_dim(rest, 1, None, axis=axis) if rest.shape[axis] else rest)
        decoder[name] = jnp.concatenate(parts, axis=axis)
    params = {**params, "decoder": decoder}
    return jax.device_put(params, parameter_shardings(params, mesh))
