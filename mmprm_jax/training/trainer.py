"""One training step and one loop for the policy and the PRM."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import nnx, traverse_util
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P

from mmprm_jax import settings
from mmprm_jax.interruption import Interrupted
from mmprm_jax.metrics import Metrics, progress
from mmprm_jax.processes import stop_requested
from mmprm_jax.records import UserError
from mmprm_jax.schema import problems, raise_for
from mmprm_jax.sharding import BATCH, fit_spec, parameter_shardings, put_rows, reshape
from mmprm_jax.training import optimizers
from mmprm_jax.training.checkpoints import Checkpoints
from mmprm_jax.training.losses import Loss

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Settings(settings.Trainer):
    """What ``fit`` takes; adapters are trained, whatever ``freeze`` names."""

    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Task:
    """What a training step is compiled for, beside the shapes; two equal ones share a program."""

    graphdef: Any
    loss_fn: Loss
    optimizer: optax.GradientTransformation
    microbatches: int = 1
    dtype: str = "float32"
    freeze: tuple[str, ...] = ()
    seed: int = 0  # of drop-path


class Source(Protocol):
    """Endless batches of host arrays: this process's rows (see ``sharding.row_share``) of each step.

    The state can be written as JSON and is the same on every process; with it, the following batches are the same.
    """

    def __next__(self) -> Mapping[str, np.ndarray]: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...


def make_task(graphdef: Any, loss_fn: Loss, s: Settings) -> Task:
    """Raises UserError on settings that are not allowed."""
    raise_for(problems(s))
    optimizer = optimizers.make(s.optimizer, s.steps)
    return Task(graphdef, loss_fn, optimizer, s.microbatches, s.dtype, tuple(s.freeze), s.seed)


def split(params: Any, freeze: tuple[str, ...]) -> tuple[Any, Any]:
    """(trained, frozen): two trees of the leaves of ``params``; adapters are trained, wherever they are.

    Raises UserError on a name that freezes nothing.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    for name in freeze:
        if not any(f"{path}/".startswith(f"{name}/") for path in flat):
            raise UserError(f"freeze: the model has no parameters {name}/...; it has {', '.join(params)}")
    frozen = {p for p in flat for name in freeze if f"{p}/".startswith(f"{name}/") and "/lora/" not in p}
    parts = ({p: x for p, x in flat.items() if (p in frozen) == which} for which in (False, True))
    return tuple(traverse_util.unflatten_dict(part, sep="/") for part in parts)


def join(trained: Any, frozen: Any) -> Any:
    """The parameters that ``split`` split."""
    flat = [traverse_util.flatten_dict(tree, sep="/") for tree in (trained, frozen)]
    return traverse_util.unflatten_dict(flat[0] | flat[1], sep="/")


def new_state(params: Any, task: Task, mesh: Any) -> tuple[Any, Any]:
    """(state, frozen) of a run that begins with ``params``; the buffers of float32 ``params`` become the state's.

    state = {params: float32, opt, step int32}: what a step changes. frozen: the other parameters, in the dtype of the
    computation.
    """
    trained, frozen = split(params, task.freeze)
    trained = jax.tree.map(lambda x: x.astype(jnp.float32), trained)
    frozen = jax.tree.map(lambda x: x.astype(DTYPES[task.dtype]), frozen)
    step = jax.device_put(jnp.zeros((), jnp.int32), jax.NamedSharding(mesh, P()))
    return {"params": trained, "opt": optimizers.init(task.optimizer, trained, mesh), "step": step}, frozen


def abstract_state(params: Any, task: Task, mesh: Any) -> tuple[Any, Any]:
    """As ``new_state``, of ShapeDtypeStructs (from ``build.abstract``) in place of arrays: nothing is allocated."""
    trained, frozen = split(params, task.freeze)

    def like(tree: Any, dtype: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), tree)

    trained, frozen = like(trained, jnp.float32), like(frozen, DTYPES[task.dtype])
    opt = jax.eval_shape(task.optimizer.init, trained)
    opt = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), opt, parameter_shardings(opt, mesh)
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=jax.NamedSharding(mesh, P()))
    return {"params": trained, "opt": opt, "step": step}, frozen


@functools.partial(jax.jit, static_argnames=("task",), donate_argnames=("state",))
def train_step(state: Any, frozen: Any, batch: Mapping[str, jax.Array], *, task: Task) -> tuple[Any, Any]:
    """One update of ``state`` (see ``new_state``) by ``batch`` [rows, ...] on the mesh in use.

    The loss is the sum over all rows divided by the total weight, whatever the number of microbatches. A step whose
    loss or gradient norm is not finite changes nothing. Returns the state and scalars: loss, weight, grad_norm and
    param_norm, float32.
    """
    total, weight, grads = gradients(state, frozen, batch, task)
    grads = jax.tree.map(lambda g: g / jnp.maximum(weight, 1.0), grads)
    loss, norm = total / jnp.maximum(weight, 1.0), optax.global_norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)

    def update(grads: Any, state: Any, finite: jax.Array) -> Any:
        updates, opt = task.optimizer.update(grads, state["opt"], state["params"])
        new = {"params": optax.apply_updates(state["params"], updates), "opt": opt, "step": state["step"] + 1}
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)

    # Inside, the partitioner lays out what optimizers do to matrices (Muon multiplies them by themselves).
    layout = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, state)
    scalars = {"loss": loss, "weight": weight, "grad_norm": norm, "param_norm": optax.global_norm(state["params"])}
    return jax.sharding.auto_axes(update, out_sharding=layout)(grads, state, finite), scalars


def gradients(state: Any, frozen: Any, batch: Mapping[str, jax.Array], task: Task) -> tuple[jax.Array, jax.Array, Any]:
    """Summed loss, total weight, and the sum's gradient by ``state["params"]``, float32; over all microbatches."""

    def total(params: Any, part: Any) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(task.graphdef, join(params, frozen))
        model.dtype = DTYPES[task.dtype]  # params stay float32: a gradient has the dtype of what it is taken by
        loss, weight = task.loss_fn(model, part)
        return loss.astype(jnp.float32), weight.astype(jnp.float32)

    run = jax.value_and_grad(total, has_aux=True)
    batch = dict(batch)
    tower = getattr(nnx.merge(task.graphdef, join(state["params"], frozen)), "vision", None)
    if tower is not None and tower.cfg.drop_path and batch.get("pixels") is not None:
        # Drawn for all rows at once, so that it does not depend on the number of microbatches.
        key = jax.random.fold_in(jax.random.key(task.seed), state["step"])
        keep = tower.draw(key, *batch["pixels"].shape[:2])
        batch["keep"] = jax.sharding.reshard(keep, fit_spec(keep.shape, (BATCH,)))
    if task.microbatches == 1:
        (loss, weight), grads = run(state["params"], batch)
        return loss, weight, grads

    def part_of(x: jax.Array) -> jax.Array:
        """[rows, ...] -> [microbatches, rows / microbatches, ...]; every device keeps its rows."""
        x = reshape(x, (x.shape[0] // task.microbatches, task.microbatches, *x.shape[1:]), BATCH)
        return jnp.moveaxis(x, 1, 0)

    def add(sums: Any, part: Any) -> tuple[Any, None]:
        (loss, weight), grads = run(state["params"], part)
        return jax.tree.map(jnp.add, sums, (loss, weight, grads)), None

    zero = jnp.zeros((), jnp.float32)
    start = (zero, zero, jax.tree.map(jnp.zeros_like, state["params"]))
    return jax.lax.scan(add, start, {name: part_of(x) for name, x in batch.items()})[0]


def fit(
    name: str, folder: epath.Path, graphdef: Any, params: Any, loss_fn: Loss, source: Source, s: Settings, mesh: Any
) -> Any:
    """Trains ``params`` for ``s.steps``; resumes from the newest good checkpoint in ``folder``. Returns the parameters.

    The trained ones come back as float32, the frozen ones in ``s.dtype``. The buffers of ``params`` are donated: do not
    use them afterwards. Every process calls it, with a source of its own rows.

    Raises UserError when loss or gradient stop being finite (with the step and its examples) and when no checkpoint can
    be read; Interrupted when the process has been asked to end, after a checkpoint.
    """
    task = make_task(graphdef, loss_fn, s)
    state, frozen = new_state(params, task, mesh)
    first = jax.process_index() == 0
    with Checkpoints(folder / "checkpoints", keep=s.keep, best=s.keep_best) as checkpoints:
        start, state, position = checkpoints.restore(state)
        if position is not None:
            source.set_state(position)
        with (
            Metrics(folder, resume_step=start + 1, enabled=first) as metrics,
            progress(s.steps, name, "step", start, enabled=first) as bar,
        ):
            before = None  # the step before this one: looked at while this one runs
            for step in range(start, s.steps):
                batch = next(source)
                done, examples = step + 1, batch.get("example")
                state, scalars = train_step(state, frozen, put_rows(batch, mesh), task=task)
                if before:
                    _check(name, *before)
                before = (done, scalars, examples)
                stop = stop_requested(done)
                saved = stop or done % s.checkpoint_every == 0 or done == s.steps
                if saved or done % s.log_every == 0:
                    values = _check(name, *before)
                    metrics.write(done, **values)
                    bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)
                if saved:
                    checkpoints.save(done, state, source.get_state(), {"loss": values["loss"]})
                bar.update()
                if stop and done < s.steps:
                    checkpoints.wait()
                    raise Interrupted(f"{name}: stopped at step {done} as asked, checkpoint saved")
    return join(state["params"], frozen)


def _check(name: str, step: int, scalars: Any, examples: np.ndarray | None) -> dict[str, float]:
    """The scalars on host. Raises UserError when the step could not be taken."""
    values = {key: float(value) for key, value in scalars.items()}
    if np.isfinite([values["loss"], values["grad_norm"]]).all():
        return values
    ids = "unknown"
    if examples is not None:
        if jax.process_count() > 1:
            examples = multihost_utils.process_allgather(examples)
        ids = ", ".join(str(i) for i in np.unique(examples) if i >= 0)
    raise UserError(
        f"{name}: at step {step} the loss is {values['loss']}, the gradient norm {values['grad_norm']}, the norm of the"
        f" parameters {values['param_norm']:.6g}; the step's examples: {ids}. The weights were not changed by it. Lower"
        " the learning rate, or look at these examples"
    )
