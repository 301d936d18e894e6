"""The training step: what must not change its result, and what it must leave alone."""

import dataclasses
import functools
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import IMAGE_TOKEN, TINY
from flax import nnx
from toy_training import LOSSES, curve, rows_of, train

from mmprm_jax.models import build
from mmprm_jax.records import UserError
from mmprm_jax.sharding import put_rows
from mmprm_jax.training import losses, optimizers, trainer

ONE = {"data": 1}
DROP = dataclasses.replace(TINY, vision=dataclasses.replace(TINY.vision, drop_path=0.5))
ADAMW = optimizers.Settings("adamw", 3e-3, warmup=0.2)


@pytest.fixture(scope="module")
def curve_of(tmp_path_factory):
    """The losses of 20 steps; made once per setting."""

    @functools.cache
    def curve_of(shape, microbatches=1, cfg=TINY):
        folder = tmp_path_factory.mktemp("run")
        train(folder, dict(shape), cfg, microbatches=microbatches)
        return curve(folder)

    return curve_of


@pytest.mark.parametrize(
    "shape, microbatches",
    [
        pytest.param((("data", 8),), 1, marks=pytest.mark.slow),
        pytest.param((("fsdp", 4), ("tensor", 2)), 1, marks=pytest.mark.slow),
        pytest.param((("data", 2), ("fsdp", 2), ("tensor", 2)), 2, marks=pytest.mark.slow),
        ((("data", 1),), 4),
    ],
    ids=str,
)
def test_the_same_curve_on_every_mesh_and_in_parts(curve_of, shape, microbatches):
    want = curve_of((("data", 1),))
    assert len(want) == 20 and np.mean(want[-4:]) < 0.9 * np.mean(want[:4])
    np.testing.assert_allclose(curve_of(shape, microbatches), want, rtol=1e-5)


@pytest.mark.slow
def test_two_processes_give_the_same_curve(curve_of, tmp_path):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    command = [sys.executable, str(Path(__file__).with_name("toy_training.py")), str(tmp_path / "run")]
    command += ['{"data": 2, "fsdp": 2, "tensor": 2}', '{"microbatches": 2, "checkpoint_every": 7}', address]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    workers = [
        subprocess.Popen([*command, str(i)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for i in range(2)
    ]
    outputs = [worker.communicate(timeout=900)[0] for worker in workers]
    assert all(worker.returncode == 0 for worker in workers), outputs
    np.testing.assert_allclose(curve(tmp_path / "run"), curve_of((("data", 1),)), rtol=1e-5)


@functools.cache
def step_of(cfg, mesh, loss="policy", bad=None, **settings):
    """(state, scalars, initial parameters) on host after two steps. bad: a value that gets among the pixels."""
    chosen = {"steps": 10, "batch_size": 8, "optimizer": dataclasses.replace(ADAMW, warmup=0.0)} | settings
    with jax.set_mesh(mesh):
        graphdef, params = build.initialise(cfg, IMAGE_TOKEN, 0, mesh)
        task = trainer.make_task(graphdef, LOSSES[loss], trainer.Settings(**chosen))
        before = jax.device_get(params)
        state, frozen = trainer.new_state(params, task, mesh)
        rows = rows_of(1)
        if bad is not None:
            rows["pixels"][2, 0, 0, 0, 0] = bad
        batch = put_rows({name: x for name, x in rows.items() if name != "example"}, mesh)
        # Two: the rate of the first one is 0.
        state, _ = trainer.train_step(state, frozen, batch, task=task)
        state, scalars = trainer.train_step(state, frozen, batch, task=task)
    return jax.device_get(state), jax.device_get(scalars), before


def close(a, b, tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance), a, b)


def test_a_frozen_tower_stays_and_costs_nothing(mesh):
    folder_free, _, before = step_of(TINY, mesh, freeze=("vision", "decoder/layers/mlp/gate"))
    assert set(folder_free["params"]) == {"projector", "decoder"}
    assert "gate" not in folder_free["params"]["decoder"]["layers"]["mlp"]
    names = {str(path) for path, _ in jax.tree_util.tree_flatten_with_path(folder_free["opt"])[0]}
    assert not [name for name in names if "'vision'" in name or "'gate'" in name]
    free, _, _ = step_of(TINY, mesh)
    assert not np.array_equal(free["params"]["vision"]["patch"], before["vision"]["patch"])
    with pytest.raises(UserError, match="the model has no parameters visoin"):
        step_of(TINY, mesh, freeze=("visoin",))


def test_frozen_parameters_come_back_bit_for_bit_and_the_others_move(tmp_path, mesh_of):
    mesh = mesh_of(data=1)
    with jax.set_mesh(mesh):
        before = jax.device_get(build.initialise(TINY, IMAGE_TOKEN, 0, mesh)[1])
    after = jax.device_get(train(tmp_path, ONE, steps=3, freeze=("vision",)))
    jax.tree.map(np.testing.assert_array_equal, after["vision"], before["vision"])
    assert not np.array_equal(after["decoder"]["embed"], before["decoder"]["embed"])


def test_no_gradient_is_computed_for_a_frozen_tower(mesh):
    def operations(freeze):
        graphdef, params = build.abstract(TINY, IMAGE_TOKEN, mesh)
        s = trainer.Settings(10, 8, ADAMW, freeze=freeze)
        task = trainer.make_task(graphdef, losses.policy_loss, s)
        state, frozen = trainer.abstract_state(params, task, mesh)
        rows = rows_of(0)
        rows.pop("example")
        batch = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in rows.items()}
        return trainer.train_step.lower(state, frozen, batch, task=task).cost_analysis()["flops"]

    assert operations(("vision",)) < 0.8 * operations(())


def test_drop_path(mesh, mesh_of):
    model = nnx.merge(*build.initialise(DROP, IMAGE_TOKEN, 0, mesh))
    keep = np.asarray(model.vision.draw(jax.random.key(0), 500, 4))
    assert keep.shape == (500, 4, 2, 2) and np.all(keep[:, :, 0] == 1) and set(np.unique(keep[:, :, 1])) == {0, 2}
    assert keep[:, :, 1].mean() == pytest.approx(1, abs=0.05)
    # An image whose layer's branches are both left out goes through that layer unchanged.
    pixels = jnp.array(np.random.default_rng(0).standard_normal((2, 8, 8, 3), np.float32))
    factors = jnp.array([[[1, 1], [0, 0]], [[1, 1], [2, 0]]], jnp.float32)
    got = model.vision(pixels, factors)
    first = jax.tree.map(lambda x: x[:1], nnx.state(model.vision.layers))
    short = nnx.merge(nnx.graphdef(model.vision.layers), first)
    model.vision.layers = short
    want = model.vision(pixels)
    np.testing.assert_allclose(got[0], want[0], atol=1e-6)
    assert np.abs(got[1] - want[1]).max() > 1e-3
    # Keyed by seed and step only: neither the mesh nor microbatches change it.
    _, scalars, _ = step_of(DROP, mesh)
    _, others, _ = step_of(DROP, mesh_of(data=2, fsdp=2, tensor=2), microbatches=2)
    assert others["loss"] == pytest.approx(scalars["loss"], rel=1e-5)
    assert step_of(TINY, mesh)[1]["loss"] != pytest.approx(scalars["loss"], rel=1e-4)


def test_a_step_that_is_not_finite_changes_nothing(mesh):
    state, scalars, before = step_of(TINY, mesh, bad=np.inf, microbatches=2)
    assert not np.isfinite(scalars["loss"]) and state["step"] == 0
    jax.tree.map(np.testing.assert_array_equal, state["params"], before)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state["opt"]))


def test_the_step_and_its_examples_are_named(tmp_path):
    with pytest.raises(UserError) as caught:
        train(tmp_path, ONE, poison=7, checkpoint_every=5)
    ids = ", ".join(str(i) for i in np.unique(rows_of(7 % 4)["example"]) if i >= 0)
    message = str(caught.value)
    assert "at step 7 the loss is nan, the gradient norm nan" in message and f"examples: {ids}." in message
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("[0-9]*")) == ["5"]


def test_bfloat16_is_near_and_keeps_float32_masters(mesh):
    full, scalars, before = step_of(TINY, mesh)
    half, others, _ = step_of(TINY, mesh, dtype="bfloat16")
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(half["params"]))
    assert others["loss"] == pytest.approx(scalars["loss"], rel=2e-2) and others["loss"] != scalars["loss"]
    assert others["grad_norm"] == pytest.approx(scalars["grad_norm"], rel=5e-2)
    with pytest.raises(UserError, match="'float16' is not one of float32, bfloat16"):
        step_of(TINY, mesh, dtype="float16")


@pytest.mark.parametrize(
    "name, moments",
    [
        ("adamw", "bfloat16"),
        pytest.param("adafactor", "float32", marks=pytest.mark.slow),
        pytest.param("muon", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_optimizers_learn(tmp_path, name, moments):
    chosen = optimizers.Settings(name, 1e-2, warmup=0.1, moments=moments)
    train(tmp_path, ONE, optimizer=chosen)
    found = curve(tmp_path)
    assert np.mean(found[-4:]) < 0.9 * np.mean(found[:4])


def test_moments_in_bfloat16_take_half_the_memory(mesh):
    def size(moments):
        graphdef, params = build.abstract(TINY, IMAGE_TOKEN, mesh)
        s = trainer.Settings(10, 8, dataclasses.replace(ADAMW, moments=moments))
        state, _ = trainer.abstract_state(params, trainer.make_task(graphdef, losses.policy_loss, s), mesh)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state["opt"]))

    assert size("bfloat16") < 0.51 * size("float32")


def test_the_concentration_learns_ten_times_as_fast(mesh):
    cfg = dataclasses.replace(TINY, kappa=True)
    state, _, before = step_of(cfg, mesh, "beta_binomial", optimizer=dataclasses.replace(ADAMW, weight_decay=0.0))
    # AdamW's first steps are as long as the rate.
    moved = np.abs(state["params"]["kappa"]["bias"] - before["kappa"]["bias"]).max()
    other = np.abs(state["params"]["decoder"]["norm"]["scale"] - before["decoder"]["norm"]["scale"]).max()
    assert moved == pytest.approx(10 * other, rel=0.2)


def test_abstract_state_is_the_states(mesh_of):
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        graphdef, params = build.initialise(TINY, IMAGE_TOKEN, 0, mesh)
        _, shapes = build.abstract(TINY, IMAGE_TOKEN, mesh)
        s = trainer.Settings(10, 8, optimizers.Settings("muon", 1e-3, moments="bfloat16"), freeze=("vision",))
        task = trainer.make_task(graphdef, losses.policy_loss, dataclasses.replace(s, dtype="bfloat16"))
        want, got = trainer.new_state(params, task, mesh), trainer.abstract_state(shapes, task, mesh)

    def same(a, b):
        assert (a.shape, a.dtype) == (b.shape, b.dtype) and a.sharding.is_equivalent_to(b.sharding, a.ndim)

    jax.tree.map(same, want, got)
    assert jax.tree.leaves(want[1])[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("remat", [pytest.param("none", marks=pytest.mark.slow), "full", "attention"])
def test_the_program_does_not_grow_with_depth(mesh, remat):
    def lines(layers):
        cfg = dataclasses.replace(
            TINY,
            vision=dataclasses.replace(TINY.vision, num_layers=layers),
            decoder=dataclasses.replace(TINY.decoder, num_layers=layers),
            remat=remat,
        )
        graphdef, params = build.abstract(cfg, IMAGE_TOKEN, mesh)
        s = trainer.Settings(10, 8, ADAMW, microbatches=2, freeze=("vision",))
        task = trainer.make_task(graphdef, losses.policy_loss, s)
        state, frozen = trainer.abstract_state(params, task, mesh)
        rows = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in rows_of(0).items() if n != "example"}
        return len(trainer.train_step.lower(state, frozen, rows, task=task).as_text().splitlines())

    assert lines(64) <= lines(8)


def test_microbatches_must_divide_the_rows(tmp_path):
    with pytest.raises(UserError, match="microbatches: 3 do not divide the 8 rows"):
        train(tmp_path, ONE, microbatches=3)
