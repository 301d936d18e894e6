"""One training loop for the policy and the PRM."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import nnx

from mmprm_jax.metrics import Metrics, progress
from mmprm_jax.records import UserError
from mmprm_jax.sharding import put_batch
from mmprm_jax.training import optimizers
from mmprm_jax.training.checkpoints import Checkpoints
from mmprm_jax.training.input import Batches
from mmprm_jax.training.losses import Loss


@dataclasses.dataclass(frozen=True)
class Settings:
    steps: int
    batch_size: int
    optimizer: optimizers.Settings
    checkpoint_every: int = 100
    log_every: int = 10
    seed: int = 0


@functools.partial(jax.jit, static_argnames=("graphdef", "loss_fn", "optimizer"), donate_argnames=("state",))
def train_step(
    state: Any, batch: Any, *, graphdef: Any, loss_fn: Loss, optimizer: Any
) -> tuple[Any, dict[str, jax.Array]]:
    """One update of ``state`` = {params, opt}."""

    def mean_loss(params: Any) -> jax.Array:
        total, weight = loss_fn(nnx.merge(graphdef, params), batch)
        return total / jnp.maximum(weight, 1.0)

    loss, grads = jax.value_and_grad(mean_loss)(state["params"])

    def update(grads: Any, state: Any) -> Any:
        updates, opt = optimizer.update(grads, state["opt"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt}

    # Inside, the partitioner lays out what optimizers do to matrices (Muon multiplies them by themselves).
    layout = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, state)
    state = jax.sharding.auto_axes(update, out_sharding=layout)(grads, state)
    return state, {"loss": loss, "grad_norm": optax.global_norm(grads)}


def _adapt(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Until the model knows segments: rows of one example."""
    return {**batch, "valid": batch["segment"] > 0}


def fit(
    name: str, folder: epath.Path, graphdef: Any, params: Any, loss_fn: Loss, source: Batches, s: Settings, mesh: Any
) -> Any:
    """Trains ``params`` for ``s.steps``; resumes from the newest checkpoint in ``folder``. Returns the parameters.

    The buffers of ``params`` are donated: do not use them afterwards.

    Raises UserError when the loss stops being finite (with the step).
    """
    optimizer = optimizers.make(s.optimizer, s.steps)
    opt = optimizers.init(optimizer, params, mesh)
    state = {"params": params, "opt": opt}
    with Checkpoints(folder / "checkpoints") as checkpoints:
        start, state, position = checkpoints.restore(state)
        if position is not None:
            source.set_state(position)
        with Metrics(folder, resume_step=start + 1) as metrics, progress(s.steps, name, "step", start) as bar:
            for step in range(start, s.steps):
                batch = put_batch(_adapt(next(source)), mesh)
                state, values = train_step(state, batch, graphdef=graphdef, loss_fn=loss_fn, optimizer=optimizer)
                done = step + 1
                saved = done % s.checkpoint_every == 0 or done == s.steps
                if saved or done % s.log_every == 0:
                    scalars = {key: float(value) for key, value in values.items()}
                    if not np.isfinite(list(scalars.values())).all():
                        found = f"the loss is {scalars['loss']} and the gradient norm {scalars['grad_norm']}"
                        raise UserError(f"{name}: {found} at step {done}; lower the learning rate")
                    metrics.write(done, **scalars)
                    bar.set_postfix(loss=f"{scalars['loss']:.3f}", refresh=False)
                if saved:
                    checkpoints.save(done, state, source.get_state())
                bar.update()
    return state["params"]
