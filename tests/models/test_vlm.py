"""The whole model against a plain numpy one, and what padding, causality and the mesh must not change."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from scipy.special import erf

from mmprm_jax.models import build
from mmprm_jax.models.attention import segment_positions
from mmprm_jax.sharding import put_batch
from mmprm_jax.training.losses import policy_loss

ROWS, WIDTH, TILES = 8, 20, 2


@pytest.fixture(scope="module")
def forward(tiny, mesh_of):
    """``forward(batch) -> logits`` on one device."""

    @jax.jit
    def run(params, batch):
        model = nnx.merge(tiny.graphdef, params)
        return model.decoder.logits(model(batch["tokens"], batch["valid"], batch["pixels"])[0])

    mesh = mesh_of(data=1)
    params = tiny.place(mesh)

    def call(batch):
        with jax.set_mesh(mesh):
            return np.asarray(run(params, put_batch(batch, mesh)))

    return call


@pytest.fixture(scope="module")
def batch(tiny):
    return tiny.batch(ROWS, WIDTH, TILES, seed=1)


@pytest.fixture(scope="module")
def logits(forward, batch):
    return forward(batch)


def layer_norm(x, scale, bias, eps):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * scale + bias


def rms_norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def gelu(x):
    return x * (1 + erf(x / np.sqrt(2))) / 2


def head(q, k, v, causal):
    """One attention head: q, k, v [S, D]."""
    scores = q @ k.T / np.sqrt(q.shape[1])
    if causal:
        scores[np.triu_indices(len(q), 1)] = -np.inf
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True) @ v


def numpy_visual_tokens(p, cfg, tile):
    """One tile [H, W, 3] to its visual tokens, for a downsampling of 2."""
    size, side = cfg.vision.patch_size, cfg.vision.image_size // cfg.vision.patch_size
    v, eps = p["vision"], cfg.vision.layer_norm_eps
    x = [v["class_token"][0, 0]]
    for r, c in np.ndindex(side, side):
        patch = tile[r * size : (r + 1) * size, c * size : (c + 1) * size]
        x.append(np.tensordot(patch, v["patch"], 3) + v["patch_bias"])
    x = np.stack(x) + v["positions"][0]
    for i in range(cfg.vision.num_layers):
        w = jax.tree.map(lambda a, i=i: a[i], v["layers"])
        y = layer_norm(x, w["norm1"]["scale"], w["norm1"]["bias"], eps)
        a = w["attention"]
        out = a["proj_bias"].copy()
        for h in range(cfg.vision.num_heads):
            q, k, value = (y @ a["qkv"][:, j, h] + a["qkv_bias"][j, h] for j in range(3))
            out = out + head(q, k, value, causal=False) @ a["proj"][h]
        x = x + out * w["ls1"]
        y = layer_norm(x, w["norm2"]["scale"], w["norm2"]["bias"], eps)
        m = w["mlp"]
        x = x + (gelu(y @ m["fc1"] + m["fc1_bias"]) @ m["fc2"] + m["fc2_bias"]) * w["ls2"]
    grid = x[1:].reshape(side, side, -1)
    x = np.stack(
        [
            np.concatenate([grid[r, c], grid[r, c + 1], grid[r + 1, c], grid[r + 1, c + 1]])
            for r in range(0, side, 2)
            for c in range(0, side, 2)
        ]
    )
    w = p["projector"]
    x = layer_norm(x, w["norm"]["scale"], w["norm"]["bias"], 1e-5)
    return gelu(x @ w["fc1"] + w["fc1_bias"]) @ w["fc2"] + w["fc2_bias"]


def numpy_logits(p, cfg, image_token, tokens, pixels):
    """One unpadded row: tokens [S], pixels [tiles, H, W, 3] -> [S, V]."""
    d, p = cfg.decoder, jax.tree.map(lambda a: np.asarray(a, np.float64), p)
    visual = iter([token for tile in pixels for token in numpy_visual_tokens(p, cfg, tile)])
    p = p["decoder"]
    x = np.stack([next(visual) if t == image_token else p["embed"][t] for t in tokens])
    half = d.head_dim // 2
    turn = np.exp(1j * np.arange(len(tokens))[:, None] * d.rope_theta ** (-np.arange(half) / half))

    def rotate(y):
        z = (y[:, :half] + 1j * y[:, half:]) * turn
        return np.concatenate([z.real, z.imag], 1)

    for i in range(d.num_layers):
        w = jax.tree.map(lambda a, i=i: a[i], p["layers"])
        y = rms_norm(x, w["norm1"]["scale"], d.rms_norm_eps)
        a, out = w["attention"], 0
        for g, r in np.ndindex(d.num_kv_heads, d.num_heads // d.num_kv_heads):
            out = (
                out + head(rotate(y @ a["q"][:, g, r]), rotate(y @ a["k"][:, g]), y @ a["v"][:, g], True) @ a["o"][g, r]
            )
        x = x + out
        y = rms_norm(x, w["norm2"]["scale"], d.rms_norm_eps)
        gate = y @ w["mlp"]["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["mlp"]["up"])) @ w["mlp"]["down"]
    return rms_norm(x, p["norm"]["scale"], d.rms_norm_eps) @ p["lm_head"]


def test_forward_against_numpy(tiny, batch, logits):
    for row in range(ROWS):
        valid = batch["valid"][row]
        expected = numpy_logits(
            tiny.params, tiny.cfg, tiny.image_token, batch["tokens"][row][valid], batch["pixels"][row]
        )
        np.testing.assert_allclose(logits[row][valid], expected, atol=1e-4, rtol=1e-4)
    assert logits.std() > 0.3  # the agreement is not one of zeros


def test_padding_changes_nothing(forward, tiny, batch):
    length = 15
    rng = np.random.default_rng(2)
    rows = batch["tokens"][:, :length]
    plain = forward({"tokens": rows, "valid": np.ones_like(rows, bool), "pixels": batch["pixels"]})
    for where in (slice(0, length), slice(WIDTH - length, WIDTH)):
        tokens = rng.integers(5, 40, (ROWS, WIDTH), np.int32)  # whatever stands in the padding
        valid = np.zeros((ROWS, WIDTH), bool)
        tokens[:, where], valid[:, where] = rows, True
        got = forward({"tokens": tokens, "valid": valid, "pixels": batch["pixels"]})
        assert np.all(np.isfinite(got))
        np.testing.assert_allclose(got[:, where], plain, atol=2e-5)


def test_positions_and_lengths_of_packed_rows():
    positions, lengths = segment_positions(jnp.array([[0, 0, 1, 1, 1, 2], [1, 2, 2, 3, 0, 0]]))
    np.testing.assert_array_equal(positions, [[0, 1, 0, 1, 2, 0], [0, 0, 1, 0, 0, 1]])
    np.testing.assert_array_equal(lengths, [[2, 2, 3, 3, 3, 1], [1, 2, 2, 1, 2, 2]])


def test_causal(forward, batch, logits):
    tokens = batch["tokens"].copy()
    tokens[:, 12] = (tokens[:, 12] - 5 + 1) % 35 + 5
    got = forward({**batch, "tokens": tokens})
    np.testing.assert_array_equal(got[:, :12], logits[:, :12])
    assert np.all(np.abs(got[:, 12] - logits[:, 12]).max(-1) > 1e-3)


def test_visual_tokens_replace_image_tokens_in_order(mesh, tiny, batch):
    tokens = batch["tokens"][:3].copy()
    tokens[2, 1:9] = 7
    where = [0, 3, 4, 19]  # scattered, and fewer than there are visual tokens
    tokens[2, where] = tiny.image_token

    @jax.jit
    def run(params, tokens, pixels):
        model = nnx.merge(tiny.graphdef, params)
        return model.embed_images(pixels), model.embed(tokens, pixels)

    visual, got = jax.device_get(run(tiny.place(mesh), tokens, batch["pixels"][:3]))
    assert visual.shape == (3, TILES * tiny.cfg.tokens_per_tile, 16)
    np.testing.assert_array_equal(got[0, 1:9], visual[0])
    np.testing.assert_array_equal(got[2, where], visual[2, :4])
    text = tokens != tiny.image_token
    np.testing.assert_array_equal(got[text], tiny.params["decoder"]["embed"][tokens[text]])


def test_pixels_count_only_in_their_row_and_only_with_image_tokens(forward, batch, logits):
    got = forward(
        {**batch, "pixels": batch["pixels"] + np.float32(0.5) * (np.arange(ROWS) < 3)[:, None, None, None, None]}
    )
    changed = np.abs(got - logits).max((1, 2))
    assert changed[0] > 1e-3 and changed[2] > 1e-3 and changed[1] == 0 and np.all(changed[3:] == 0)


def test_logits_of_a_few_tokens(mesh, tiny):
    model = nnx.merge(tiny.graphdef, tiny.place(mesh))
    hidden = jnp.array(np.random.default_rng(0).standard_normal((2, 3, 16), np.float32))
    got = model.decoder.logits_of(hidden, (9, 6))
    np.testing.assert_allclose(got, np.asarray(model.decoder.logits(hidden))[..., [9, 6]], atol=1e-5)


@pytest.fixture(scope="module")
def loss_and_grads(tiny):
    """``run(mesh, remat) -> (loss, logits), gradients`` on host, for a sharded batch and sharded parameters."""
    batch = tiny.batch(ROWS, 12, 1, seed=3)

    @functools.cache
    def call(mesh, remat):
        graphdef, _ = build.abstract(dataclasses.replace(tiny.cfg, remat=remat), tiny.image_token, mesh)

        @jax.jit
        def run(params, batch):
            def loss(params):
                model = nnx.merge(graphdef, params)
                logits = model.decoder.logits(model(batch["tokens"], batch["valid"], batch["pixels"])[0])
                target = jnp.where(jnp.arange(40) == 7, logits, 0).sum(-1)
                return jnp.sum((jax.nn.logsumexp(logits, axis=-1) - target)[:, 6:]), logits

            return jax.value_and_grad(loss, has_aux=True)(params)

        with jax.set_mesh(mesh):
            return jax.device_get(run(tiny.place(mesh), put_batch(batch, mesh)))

    return call


@pytest.mark.parametrize(
    "shape, remat",
    [
        pytest.param((8, 1, 1), "none", marks=pytest.mark.slow),
        ((2, 2, 2), "full"),
        pytest.param((1, 4, 2), "attention", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_same_on_every_mesh(mesh_of, loss_and_grads, shape, remat):
    (loss, logits), grads = loss_and_grads(mesh_of(data=1), "none")
    mesh = mesh_of(**dict(zip(("data", "fsdp", "tensor"), shape, strict=True)))
    (got_loss, got_logits), got_grads = loss_and_grads(mesh, remat)
    assert got_loss == pytest.approx(loss, rel=1e-5)
    np.testing.assert_allclose(got_logits, logits, atol=1e-5 * np.abs(logits).max())
    scale = max(np.abs(g).max() for g in jax.tree.leaves(grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * scale), got_grads, grads)


def test_parameters_are_sharded(mesh_of, tiny):
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    params = tiny.place(mesh)
    decoder, vision = params["decoder"], params["vision"]
    assert decoder["embed"].sharding.spec == P("tensor", "fsdp")
    assert decoder["lm_head"].sharding.spec == P("fsdp", "tensor")
    assert decoder["layers"]["attention"]["q"].sharding.spec[:3] == (None, "fsdp", "tensor")
    assert vision["layers"]["attention"]["qkv"].sharding.spec == P(None, "fsdp", None, "tensor", None)
    local = sum(x.addressable_shards[0].data.size for x in jax.tree.leaves(params))
    total = sum(x.size for x in jax.tree.leaves(params))
    assert local < 0.4 * total  # a quarter, but for norms, biases and what fits no rule
    _, abstract = build.abstract(tiny.cfg, tiny.image_token, mesh)
    jax.tree.map(
        lambda a, x: x.sharding.is_equivalent_to(a.sharding, x.ndim) or pytest.fail(str(x.shape)), abstract, params
    )


@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_program_does_not_grow_with_depth(mesh, tiny, remat):
    def size(layers):
        cfg = dataclasses.replace(
            tiny.cfg,
            vision=dataclasses.replace(tiny.cfg.vision, num_layers=layers),
            decoder=dataclasses.replace(tiny.cfg.decoder, num_layers=layers),
            remat=remat,
        )
        graphdef, params = build.abstract(cfg, tiny.image_token, mesh)
        shape = jax.ShapeDtypeStruct
        batch = {
            "tokens": shape((2, 8), jnp.int32),
            "segment": shape((2, 8), jnp.int32),
            "response": shape((2, 8), bool),
            "pixels": shape((2, 1, 8, 8, 3), jnp.float32),
        }
        grad = jax.jit(jax.grad(lambda p, b: policy_loss(nnx.merge(graphdef, p), b)[0]))
        return len(grad.lower(params, batch).as_text())

    assert size(8) < 1.1 * size(2)
