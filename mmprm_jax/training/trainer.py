"""One training loop for the policy and the PRM."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import nnx

from mmprm_jax.data import images
from mmprm_jax.metrics import Metrics, progress
from mmprm_jax.records import UserError
from mmprm_jax.sharding import parameter_shardings, put_batch
from mmprm_jax.training.checkpoints import Checkpoints
from mmprm_jax.training.losses import Loss


@dataclasses.dataclass(frozen=True)
class Settings:
    steps: int
    batch_size: int
    learning_rate: float
    warmup: float = 0.05  # fraction of the steps
    weight_decay: float = 0.01
    clip: float = 1.0  # global gradient norm
    shift: int = 1  # augmentation: pixels
    noise: float = 8.0  # augmentation: standard deviation, 0-255
    checkpoint_every: int = 100
    log_every: int = 10
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Rows of fixed length in host memory. ``image`` [N] indexes ``pixels`` uint8 [M, tiles, H, W, 3]."""

    columns: Mapping[str, np.ndarray]
    image: np.ndarray
    pixels: np.ndarray


def make_optimizer(s: Settings) -> optax.GradientTransformation:
    """AdamW with linear warm-up, cosine decay and clipping; vectors (norms, biases) are not decayed."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, s.learning_rate, max(1, round(s.warmup * s.steps)), s.steps, 0.02 * s.learning_rate
    )
    return optax.chain(
        optax.clip_by_global_norm(s.clip),
        optax.adamw(schedule, b2=0.98, weight_decay=s.weight_decay, mask=lambda p: jax.tree.map(lambda x: x.ndim > 2, p)),
    )


def batches(data: Dataset, s: Settings) -> grain.DatasetIterator:
    """Endless shuffled batches of host arrays; the content of batch i depends on (seed, i) only."""

    def assemble(rows: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        batch = {name: column[rows] for name, column in data.columns.items()}
        pixels = images.augment(data.pixels[data.image[rows]], rng, s.shift, s.noise)
        return {**batch, "pixels": images.normalise(pixels)}

    dataset = grain.MapDataset.range(len(data.image)).seed(s.seed).shuffle().repeat().batch(s.batch_size)
    return iter(dataset.random_map(assemble).to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))


def init_optimizer(optimizer: optax.GradientTransformation, params: Any, mesh: Any) -> Any:
    """The optimizer's state, laid out by the rules of the parameters."""

    def init(params: Any) -> Any:
        opt = optimizer.init(params)
        return jax.tree.map(lambda x, s: jax.sharding.reshard(x, s.spec), opt, parameter_shardings(opt, mesh))

    return jax.jit(init)(params)


@functools.partial(jax.jit, static_argnames=("graphdef", "loss_fn", "optimizer"), donate_argnames=("state",))
def train_step(state: Any, batch: Any, *, graphdef: Any, loss_fn: Loss, optimizer: Any) -> tuple[Any, dict[str, jax.Array]]:
    """One update of ``state`` = {params, opt}."""

    def mean_loss(params: Any) -> jax.Array:
        total, weight = loss_fn(nnx.merge(graphdef, params), batch)
        return total / jnp.maximum(weight, 1.0)

    loss, grads = jax.value_and_grad(mean_loss)(state["params"])
    updates, opt = optimizer.update(grads, state["opt"], state["params"])
    metrics = {"loss": loss, "grad_norm": optax.global_norm(grads)}
    return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, metrics


def fit(
    name: str, folder: epath.Path, graphdef: Any, params: Any, loss_fn: Loss, data: Dataset, s: Settings, mesh: Any
) -> Any:
    """Trains ``params`` for ``s.steps``; resumes from the newest checkpoint in ``folder``. Returns the parameters.

    Raises UserError on an empty data set, and when the loss stops being finite (with the step).
    """
    if not len(data.image):
        raise UserError(f"{name}: the training set is empty")
    optimizer = make_optimizer(s)
    opt = init_optimizer(optimizer, params, mesh)
    state = {"params": params, "opt": opt}
    source = batches(data, s)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        start, state, position = checkpoints.restore(state)
        if position is not None:
            source.set_state(position)
        with Metrics(folder, resume_step=start) as metrics, progress(s.steps, name, "step", start) as bar:
            for step in range(start, s.steps):
                batch = put_batch(next(source), mesh)
                state, values = train_step(state, batch, graphdef=graphdef, loss_fn=loss_fn, optimizer=optimizer)
                done = step + 1
                if done % s.log_every == 0 or done == s.steps:
                    scalars = {key: float(value) for key, value in values.items()}
                    if not np.isfinite(scalars["loss"]):
                        raise UserError(f"{name}: the loss is {scalars['loss']} at step {done}; lower the learning rate")
                    metrics.write(done, **scalars)
                    bar.set_postfix(loss=f"{scalars['loss']:.3f}", refresh=False)
                if done % s.checkpoint_every == 0 or done == s.steps:
                    checkpoints.save(done, state, source.get_state())
                bar.update()
    return state["params"]
