"""Making, growing, saving and loading parameters."""

import jax
import numpy as np
import pytest
from flax import nnx

from mmprm_jax.models import build
from mmprm_jax.records import UserError
from mmprm_jax.sharding import make_mesh, make_own_mesh
from mmprm_jax.training.checkpoints import load_params, save_params


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def initialised(tiny, mesh_of):
    """Parameters of one seed, made on one device and on eight."""
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        return tiny.place(mesh_of(data=1), tiny.initial), build.initialise(tiny.cfg, tiny.image_token, 0, mesh)[1]


def test_initialise_is_the_same_on_every_mesh(initialised):
    one, eight = initialised
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), one, eight)  # the same draws
    assert len(eight["decoder"]["embed"].sharding.device_set) == 8
    assert np.asarray(one["decoder"]["embed"]).std() == pytest.approx(16**-0.5, rel=0.1)
    q = np.asarray(one["decoder"]["layers"]["attention"]["q"])
    assert q.std() == pytest.approx(16**-0.5, rel=0.1) and np.abs(q[0] - q[1]).max() > 0.1  # each layer its own


@pytest.mark.parametrize("which", [0, 1], ids=["1 device", "8 devices"])
def test_add_token(mesh_of, initialised, which):
    mesh = (mesh_of(data=1), mesh_of(data=2, fsdp=2, tensor=2))[which]
    before = initialised[which]
    with jax.set_mesh(mesh):
        after = build.add_token(before, mesh)
    old, new = jax.device_get(before["decoder"]), jax.device_get(after["decoder"])
    assert new["embed"].shape == (41, 16) and new["lm_head"].shape == (16, 41)
    np.testing.assert_array_equal(new["embed"][:40], old["embed"])
    np.testing.assert_array_equal(new["lm_head"][:, :40], old["lm_head"])
    np.testing.assert_allclose(new["embed"][40], old["embed"].mean(0), atol=1e-6)
    np.testing.assert_allclose(new["lm_head"][:, 40], old["lm_head"].mean(1), atol=1e-6)
    equal(
        {**before, "decoder": {**old, "embed": 0, "lm_head": 0}},
        {**after, "decoder": {**new, "embed": 0, "lm_head": 0}},
    )


def test_the_model_computes_with_an_added_token(mesh, tiny, initialised):
    params = build.add_token(initialised[0], mesh)
    logits = nnx.merge(tiny.graphdef, params).decoder.logits(jax.numpy.ones((1, 1, 16)))
    assert logits.shape == (1, 1, 41)
    assert float(logits[0, 0, 40]) == pytest.approx(float(logits[0, 0, :40].mean()), abs=1e-5)


def test_an_odd_vocabulary_computes_the_same_on_every_mesh(tiny, mesh_of, initialised):
    """41 tokens: embedding and head are split along the hidden axis, since no axis divides the vocabulary."""
    tokens, found = jax.numpy.array([[7, 40, 12, 5], [40, 9, 8, 7]]), []
    for shape, before in zip((dict(data=1), dict(data=2, fsdp=2, tensor=2)), initialised, strict=True):
        mesh = mesh_of(**shape)
        with jax.set_mesh(mesh):
            params = build.add_token(before, mesh)
            spec = params["decoder"]["embed"].sharding.spec
            assert tuple(spec) == ((None, ("fsdp", "tensor")) if len(shape) > 1 else ("tensor", "fsdp"))

            def run(params):
                model = nnx.merge(tiny.graphdef, params)
                hidden, _ = model(tokens, tokens > 0, None)
                return model.decoder.logits(hidden), model.decoder.logits_of(hidden, (40, 9))

            found.append(jax.device_get(jax.jit(run)(params)))
    (one, few), (eight, few_eight) = found
    scale = np.abs(one).max()
    np.testing.assert_allclose(eight, one, atol=1e-5 * scale)
    np.testing.assert_allclose(few, one[..., [40, 9]], atol=1e-5 * scale)
    np.testing.assert_allclose(few_eight, few, atol=1e-5 * scale)


def test_save_and_load_on_another_mesh(tmp_path, tiny, mesh_of, initialised):
    save_params(tmp_path / "params", tiny.params)
    save_params(tmp_path / "params", initialised[0])  # replaces
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        _, abstract = build.abstract(tiny.cfg, tiny.image_token, mesh)
        loaded = load_params(tmp_path / "params", abstract)
    equal(loaded, initialised[0])
    jax.tree.map(
        lambda a, x: x.sharding.is_equivalent_to(a.sharding, x.ndim) or pytest.fail(str(x.shape)), abstract, loaded
    )


def test_missing_weights(tmp_path):
    with pytest.raises(UserError, match="no weights there"):
        load_params(tmp_path / "params", {})


def test_impossible_mesh():
    devices = jax.devices()[:1]
    assert make_mesh({"data": -1}, devices=devices).shape == {"data": 1, "fsdp": 1, "tensor": 1}
    for shape in ({"data": 3}, {"data": -1, "fsdp": 2}, {"data": -1, "fsdp": -1}):
        with pytest.raises(UserError, match="mesh"):
            make_mesh(shape, devices=devices)


@pytest.mark.parametrize(
    ("shape", "found"),
    [((-1, 1, 1), (8, 1, 1)), ((-1, 16, 2), (1, 4, 2)), ((2, 4, 4), (1, 2, 4)), ((4, -1, 2), (1, 4, 2)),
     ((1, 12, 1), (2, 4, 1)), ((1, 1, -1), (1, 1, 8))],
)  # fmt: skip
def test_the_mesh_of_one_process(shape, found):
    axes = ("data", "fsdp", "tensor")
    assert make_own_mesh(dict(zip(axes, shape, strict=True))).shape == dict(zip(axes, found, strict=True))
    with pytest.raises(UserError, match="tensor=16 does not divide the 8 devices"):
        make_own_mesh({"data": 1, "fsdp": 1, "tensor": 16})
