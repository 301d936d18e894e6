"""AdamW and Muon, with warm-up, cosine decay and clipping."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from mmprm_jax.records import UserError
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


@dataclasses.dataclass(frozen=True)
class Settings:
    name: str  # adamw or muon
    learning_rate: float  # the peak
    warmup: float = 0.05  # fraction of the steps
    weight_decay: float = 0.01
    clip: float = 1.0  # global gradient norm


def _matrices(params: Any) -> Any:
    def find(path: tuple, _: Any) -> MuonDimensionNumbers | None:
        return next((numbers for pattern, numbers in MATRICES if re.search(pattern, path_name(path))), None)

    return jax.tree_util.tree_map_with_path(find, params)


def _decayed(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(re.search(pattern, path_name(path)) for pattern, _ in MATRICES), params
    )


def make(s: Settings, steps: int) -> optax.GradientTransformation:
    """The optimizer for a run of ``steps`` updates. Raises UserError on an unknown name.

    Muon (https://kellerjordan.github.io/posts/muon) scales its updates to the size of AdamW's, so that the two take
    similar learning rates.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, s.learning_rate, max(1, round(s.warmup * steps)), steps, 0.02 * s.learning_rate
    )
    if s.name == "adamw":
        optimizer = optax.adamw(schedule, b2=0.98, weight_decay=s.weight_decay, mask=_decayed)
    elif s.name == "muon":
        optimizer = muon(
            schedule,
            weight_decay=s.weight_decay,
            adam_b2=0.98,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=_matrices,
        )
    else:
        raise UserError(f"optimizer.name: {s.name!r} is not an optimizer; choose adamw or muon")
    return optax.chain(optax.clip_by_global_norm(s.clip), optimizer)


def init(optimizer: optax.GradientTransformation, params: Any, mesh: Any) -> Any:
    """The optimizer's state, laid out by the rules of the parameters."""

    def build(params: Any) -> Any:
        opt = optimizer.init(params)
        return jax.tree.map(lambda x, s: jax.sharding.reshard(x, s.spec), opt, parameter_shardings(opt, mesh))

    return jax.jit(build)(params)
