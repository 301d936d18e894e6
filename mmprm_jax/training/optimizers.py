"""AdamW, Adafactor and Muon, with warm-up, cosine decay and clipping."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from mmprm_jax.settings import Optimizer as Settings
from mmprm_jax.sharding import parameter_shardings, path_name

# The matrices that Muon orthogonalises: which axes are reduced and which are produced; a layer axis is a batch axis.
# Embeddings, the output head, norms and biases are left to AdamW.
MATRICES: tuple[tuple[str, MuonDimensionNumbers], ...] = (
    (r"decoder/layers/attention/q$", MuonDimensionNumbers(1, (2, 3, 4))),
    (r"decoder/layers/attention/[kv]$", MuonDimensionNumbers(1, (2, 3))),
    (r"decoder/layers/attention/o$", MuonDimensionNumbers((1, 2, 3), 4)),
    (r"vision/layers/attention/qkv$", MuonDimensionNumbers(1, (3, 4))),
    (r"vision/layers/attention/proj$", MuonDimensionNumbers((1, 2), 3)),
    (r"layers/mlp/(gate|up|down|fc1|fc2)$", MuonDimensionNumbers(1, 2)),
    (r"projector/fc[12]$", MuonDimensionNumbers(0, 1)),
)


# Learning rates of some parameters, as multiples.
UPDATE_SCALES: tuple[tuple[str, float], ...] = ((r"^kappa/", 10.0),)  # the concentration's head (arXiv 2605.15529)
MOMENTS = ("float32", "bfloat16")


def _matrices(params: Any) -> Any:
    def find(path: tuple, _: Any) -> MuonDimensionNumbers | None:
        return next((numbers for pattern, numbers in MATRICES if re.search(pattern, path_name(path))), None)

    return jax.tree_util.tree_map_with_path(find, params)


def _decayed(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(re.search(pattern, path_name(path)) for pattern, _ in MATRICES), params
    )


def _moments_in_bfloat16(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """``optimizer`` with its float32 state kept in bfloat16 between updates, which are computed in float32.

    It is rounded up or down at random: a moving average that is rounded to the nearest stops where its change is below
    half a unit in the last place, for the second moments up to 20 % away from what it should be.
    """

    def cast(tree: Any, old: Any, new: Callable[[jax.Array], jax.Array]) -> Any:
        return jax.tree.map(lambda x: new(x) if x.dtype == old else x, tree)

    def init(params: Any) -> Any:
        state = cast(optimizer.init(params), jnp.float32, lambda x: x.astype(jnp.bfloat16))
        return {"optimizer": state, "step": jnp.zeros((), jnp.int32)}

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        old = cast(state["optimizer"], jnp.bfloat16, lambda x: x.astype(jnp.float32))
        updates, new = optimizer.update(grads, old, params)
        leaf, key = itertools.count(), jax.random.fold_in(jax.random.key(0), state["step"])
        new = cast(new, jnp.float32, lambda x: stochastic_round(x, jax.random.fold_in(key, next(leaf))))
        return updates, {"optimizer": new, "step": state["step"] + 1}

    return optax.GradientTransformation(init, update)


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 to one of its two neighbours in bfloat16, so that the mean is x; what bfloat16 holds stays as it is."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # Adding less than one unit of the upper half carries into it as often as the lower half is large.
    raised = bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((raised >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def _scale_updates() -> optax.GradientTransformation:
    def factor(path: tuple, update: Any) -> Any:
        return update * next((times for pattern, times in UPDATE_SCALES if re.search(pattern, path_name(path))), 1.0)

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(factor, updates))


def _adafactor(schedule: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """Factored second moments, no first ones (arXiv 1804.04235), with AdamW's decay and learning rates."""
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(weight_decay, _decayed),
        optax.scale_by_learning_rate(schedule),
    )


@functools.cache
def make(s: Settings, steps: int) -> optax.GradientTransformation:
    """The optimizer for a run of ``steps`` updates; equal settings give one object, and so one compiled step.

    Muon (https://kellerjordan.github.io/posts/muon) scales its updates to the size of AdamW's, so that the two take
    similar learning rates.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, s.learning_rate, max(1, round(s.warmup * steps)), steps, 0.02 * s.learning_rate
    )
    if s.name == "adamw":
        optimizer = optax.adamw(schedule, b2=0.98, weight_decay=s.weight_decay, mask=_decayed)
    elif s.name == "adafactor":
        optimizer = _adafactor(schedule, s.weight_decay)
    elif s.name == "muon":
        optimizer = muon(
            schedule,
            weight_decay=s.weight_decay,
            adam_b2=0.98,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=_matrices,
        )
    else:
        raise ValueError(f"{s.name!r} is not an optimizer")
    if s.moments != "float32":
        optimizer = _moments_in_bfloat16(optimizer)
    return optax.chain(optax.clip_by_global_norm(s.clip), optimizer, _scale_updates())


def init(optimizer: optax.GradientTransformation, params: Any, mesh: Any) -> Any:
    """The optimizer's state, laid out by the rules of the parameters."""

    def build(params: Any) -> Any:
        opt = optimizer.init(params)
        return jax.tree.map(lambda x, s: jax.sharding.reshard(x, s.spec), opt, parameter_shardings(opt, mesh))

    return jax.jit(build)(params)
