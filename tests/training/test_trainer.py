"""The training loop: it learns, resumes exactly, and does not depend on the mesh."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from array_source import ArraySource
from flax import nnx

from mmprm_jax import metrics
from mmprm_jax.records import UserError
from mmprm_jax.training import optimizers, trainer
from mmprm_jax.training.losses import policy_loss

SETTINGS = trainer.Settings(
    steps=12, batch_size=8, optimizer=optimizers.Settings("adamw", 1e-2, warmup=0.2), checkpoint_every=5, log_every=1
)
MUON = dataclasses.replace(SETTINGS, optimizer=dataclasses.replace(SETTINGS.optimizer, name="muon"))
ONE, EIGHT = (("data", 1),), (("data", 2), ("fsdp", 2), ("tensor", 2))


@pytest.fixture(scope="module")
def data(tiny):
    rows = tiny.batch(20, 12, 1, seed=5)
    columns = {"tokens": rows["tokens"], "segment": rows["valid"].astype(np.int32)}
    columns["response"] = rows["valid"] & (np.arange(12) > 5)
    return {**columns, "pixels": rows["pixels"]}


@pytest.fixture(scope="module")
def fit(tiny, data, mesh_of):
    """``fit(folder, settings, mesh shape) -> parameters`` on host."""

    def fit(folder, settings, shape):
        mesh = mesh_of(**dict(shape))
        with jax.set_mesh(mesh):
            source = ArraySource(data, settings.batch_size, settings.seed)
            return jax.device_get(
                trainer.fit("test", folder, tiny.graphdef, tiny.place(mesh), policy_loss, source, settings, mesh)
            )

    return fit


Run = collections.namedtuple("Run", "folder params compiled")


@pytest.fixture(scope="module")
def run(fit, tmp_path_factory):
    """An uninterrupted run; made once per setting."""

    @functools.cache
    def run(settings, shape):
        folder = tmp_path_factory.mktemp("run")
        before = trainer.train_step._cache_size()
        params = fit(folder, settings, shape)
        return Run(folder, params, trainer.train_step._cache_size() - before)

    return run


def losses(folder):
    return [row["loss"] for row in metrics.read(folder)]


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [SETTINGS, MUON], ids=["adamw", "muon"])
def test_learns_and_is_the_same_on_one_and_eight_devices(run, settings):
    one, eight = run(settings, ONE), run(settings, EIGHT)
    assert one.compiled == eight.compiled == 1
    curve = losses(one.folder)
    assert [row["step"] for row in metrics.read(one.folder)] == list(range(1, 13))
    assert np.mean(curve[-3:]) < 0.9 * curve[0]
    np.testing.assert_allclose(losses(eight.folder), curve, rtol=1e-5)


class Stop(Exception):
    pass


@pytest.mark.parametrize("shape", [ONE, pytest.param(EIGHT, marks=pytest.mark.slow)], ids=["1 device", "8 devices"])
def test_interrupted_and_resumed_is_bit_identical(run, fit, tmp_path, monkeypatch, shape):
    whole = run(SETTINGS, shape)

    class Interrupted(metrics.Metrics):
        def write(self, step, **scalars):
            super().write(step, **scalars)
            if step == 8:
                raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "Metrics", Interrupted)
        with pytest.raises(Stop):
            fit(tmp_path, SETTINGS, shape)
    assert [row["step"] for row in metrics.read(tmp_path)] == list(range(1, 9))

    seen, put_rows = [], trainer.put_rows
    monkeypatch.setattr(trainer, "put_rows", lambda batch, mesh: seen.append(1) or put_rows(batch, mesh))
    equal(fit(tmp_path, SETTINGS, shape), whole.params)
    assert len(seen) == 12 - 5  # from the checkpoint of step 5
    assert metrics.read(tmp_path) == metrics.read(whole.folder)

    equal(fit(tmp_path, SETTINGS, shape), whole.params)  # nothing left to do
    assert len(seen) == 12 - 5 and metrics.read(tmp_path) == metrics.read(whole.folder)


class Line(nnx.Module):
    """A model of one parameter, for what needs no model."""

    def __init__(self):
        self.w = nnx.Param(jnp.ones(()))


def fit_line(folder, loss_fn, mesh, **changes):
    graphdef, state = nnx.split(Line())
    source = ArraySource({"x": np.ones(4, np.float32)}, 2)
    settings = dataclasses.replace(SETTINGS, batch_size=2, steps=9, **changes)
    params = jax.tree.map(lambda x: jax.device_put(x, jax.NamedSharding(mesh, jax.P())), nnx.to_pure_dict(state))
    return trainer.fit("line", folder, graphdef, params, loss_fn, source, settings, mesh)


def test_loss_that_is_not_finite(tmp_path, mesh):
    def loss_fn(model, batch):
        return jnp.log(model.w[...] - 0.98), jnp.float32(1)  # downhill to nan

    where = r"line: at step [2-9] the loss is (nan|-inf), the gradient norm .* examples: [0-3], [0-3]"
    with pytest.raises(UserError, match=where):
        fit_line(tmp_path, loss_fn, mesh)


def test_weight_is_the_denominator_and_may_be_zero(tmp_path, mesh):
    fit_line(tmp_path, lambda model, batch: (6 * model.w[...], jnp.sum(batch["x"])), mesh)
    assert losses(tmp_path)[0] == pytest.approx(3) and metrics.read(tmp_path)[0]["grad_norm"] == pytest.approx(3)
    params = fit_line(tmp_path / "zero", lambda model, batch: (0 * model.w[...], jnp.float32(0)), mesh)
    assert losses(tmp_path / "zero") == [0] * 9 and params["w"] == 1


def test_unknown_optimizer(tmp_path, mesh):
    with pytest.raises(UserError, match="optimizer.name: 'sgd' is not one of adamw, adafactor, muon"):
        fit_line(tmp_path, policy_loss, mesh, optimizer=optimizers.Settings("sgd", 1.0))
