"""Import of small checkpoints, and everything they compute, against the original implementation in float32.

The arrays were made with the original MM-PRM code and with ``transformers``: see golden/README.md. Nothing here knows a
size or an id: MMPRM_GOLDEN may name another set.
"""

import functools
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, MODELS, generate_greedily, some_models
from flax import nnx
from jax.sharding import PartitionSpec as P

from mmprm_jax.models import build, hf
from mmprm_jax.models.attention import segment_positions
from mmprm_jax.models.hf_config import checkpoint_kind, decoder_kind
from mmprm_jax.models.hf_layout import layout
from mmprm_jax.models.layers import attention, scan_layers
from mmprm_jax.models.vision import pixel_shuffle
from mmprm_jax.sharding import put_batch
from mmprm_jax.training.losses import prm_loss

TOLERANCE = 1e-4
pytestmark = pytest.mark.golden


class Case:
    """A checkpoint, imported onto a mesh, its reference arrays and its inputs in our form."""

    def __init__(self, name, mesh):
        self.folder, self.mesh = GOLDEN / "models" / name, mesh
        self.checkpoint = hf.open_checkpoint(self.folder)
        self.config, self.cfg = self.checkpoint.model.config, self.checkpoint.model.cfg
        self.params = hf.load_params(self.checkpoint, mesh, jnp.float32)
        self.reference = dict(np.load(self.folder / "reference.npz"))
        self.meta = json.loads((self.folder / "meta.json").read_text())
        self.ids = self.meta.get("special_ids") or self.ids_by_scores()
        self.image = self.config.get("image_token_id", self.ids.get("<IMG_CONTEXT>"))
        self.graphdef, _ = build.abstract(self.cfg, self.image, mesh)

    def ids_by_scores(self):
        """Yes and No where meta.json does not tell: the reference's scores come from the reference's logits of both."""
        logits = self.reference["logits"][tuple(self.reference["prm_positions"].T)].astype(np.float64)
        scores = 1 / (1 + np.exp(logits[:, None, :] - logits[:, :, None]))
        error = np.abs(scores - self.reference["prm_scores"][:, None, None]).max(axis=0)
        assert error.min() < 1e-6
        return dict(zip(("Yes", "No"), map(int, np.unravel_index(error.argmin(), error.shape)), strict=True))

    def tiles(self, prefix=""):
        """The tiles [tiles, H, W, 3] of all rows; the original flags one that only stands for "no image" with 0."""
        tiles = self.reference["pixel_values"].transpose(0, 2, 3, 1)
        flags = self.reference.get(f"{prefix}image_flags", self.reference.get("image_flags"))
        return tiles if flags is None else tiles[flags.reshape(-1) == 1]

    def batch(self, prefix="", tokens=None, mask=None):
        """tokens, valid and pixels; the flat tiles of the reference are dealt out to the rows in order."""
        tokens = self.reference[f"{prefix}input_ids"] if tokens is None else tokens
        mask = self.reference[f"{prefix}attention_mask"] if mask is None else mask
        per_row = (tokens == self.image).sum(1) // self.cfg.tokens_per_tile
        tiles = self.tiles(prefix)
        assert per_row.sum() == len(tiles)
        pixels = np.zeros((len(tokens), per_row.max(), *tiles.shape[1:]), np.float32)
        for row, (count, end) in enumerate(zip(per_row, np.cumsum(per_row), strict=True)):
            pixels[row, :count] = tiles[end - count : end]
        return {"tokens": tokens, "valid": mask.astype(bool), "pixels": pixels}

    def run(self, function, batch, params=None):
        """``function(model, batch)``, compiled, as host arrays."""
        compiled = jax.jit(lambda params, batch: function(nnx.merge(self.graphdef, params), batch))
        with jax.set_mesh(self.mesh):
            return jax.device_get(compiled(self.params if params is None else params, put_batch(batch, self.mesh)))


@pytest.fixture(scope="module")
def case_of(mesh_of):
    return functools.cache(lambda name: Case(name, mesh_of(data=1)))


@pytest.fixture(params=some_models())
def case(request, case_of):
    return case_of(request.param)


def logits(model, batch):
    return model.decoder.logits(model(batch["tokens"], batch["valid"], batch["pixels"])[0])


def close(got, want, tolerance=TOLERANCE):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)


def test_vision_tower(case):
    def states(tower, pixels):
        first = tower.embed(pixels)
        _, later = scan_layers(tower.layers, lambda layer, x, _: (layer(x),) * 2, first)
        return jnp.concatenate([first[None], later])

    want = case.reference["vit_hidden_states"]
    pixels = {"x": case.reference["pixel_values"].transpose(0, 2, 3, 1)}
    close(case.run(lambda model, batch: states(model.vision, batch["x"]), pixels), want)
    close(want[-1], case.reference["vit_last_hidden_state"])
    tokens = case.run(
        lambda model, batch: model.projector(pixel_shuffle(model.vision(batch["x"]), model.cfg.downsample)), pixels
    )
    close(tokens, case.reference["image_embeds"])
    close(
        case.run(lambda model, batch: model.embed_images(batch["x"][:, None]), pixels), case.reference["image_embeds"]
    )


def test_position_embeddings_of_other_image_sizes(case):
    sizes = [int(m[1]) for key in case.reference if (m := re.fullmatch(r"pos_embed_resized_(\d+)", key))]
    if case.config["architectures"] == ["InternVLChatModel"]:
        assert sizes
    for size in sizes:
        side = size // case.cfg.vision.patch_size
        close(
            case.run(lambda model, _, side=side: model.vision.resized_positions(side, side), {}),
            case.reference[f"pos_embed_resized_{size}"],
        )
        pixels = {"x": case.reference[f"pixel_values_{size}"].transpose(0, 2, 3, 1)}
        got = case.run(lambda model, batch: model.vision(batch["x"]), pixels)
        want = case.reference[f"vit_last_hidden_state_{size}"][:, 1:]
        close(got.reshape(want.shape), want)


def test_language_model(case):
    def states(model, batch):
        first = model.embed(batch["tokens"], batch["pixels"])
        valid = batch["valid"]
        rope = model.decoder.rope(segment_positions(valid)[0], valid.sum(axis=1))
        mask = jnp.tril(jnp.ones((valid.shape[1],) * 2, bool)) & valid[:, None, :]

        def body(layer, x, _):
            x, _ = layer(x, rope, lambda q, k, v, _: (attention(q, k, v, mask), None), None)
            return x, x

        last, later = scan_layers(model.decoder.layers, body, first)
        return jnp.concatenate([first[None], later[:-1], model.decoder.norm(last)[None]])

    batch, want = case.batch(), case.reference["lm_hidden_states"]
    valid = batch["valid"]
    got = case.run(states, batch)
    close(got[:, valid], want[:, valid])
    if "inputs_embeds" in case.reference:
        close(got[0][valid], case.reference["inputs_embeds"][valid])
    hidden = case.run(lambda model, b: model(b["tokens"], b["valid"], b["pixels"])[0], batch)
    close(hidden[valid], want[-1][valid])


def test_logits_and_scores(case):
    batch = case.batch()
    got = case.run(logits, batch)
    close(got[batch["valid"]], case.reference["logits"][batch["valid"]])
    yes, no = case.ids["Yes"], case.ids["No"]
    two = case.run(
        lambda model, b: model.decoder.logits_of(model(b["tokens"], b["valid"], b["pixels"])[0], (yes, no)), batch
    )
    rows, columns = case.reference["prm_positions"].T
    scores = 1 / (1 + np.exp(two[rows, columns, 1] - two[rows, columns, 0]))
    close(scores, case.reference["prm_scores"])
    if "prm_scores_single" in case.reference:
        close(scores, case.reference["prm_scores_single"])


def gradients(case, prefix):
    labels = case.reference[f"{prefix}labels"]
    known = (labels >= 0).astype(np.float32)
    batch = case.batch(prefix)
    batch |= {"segment": batch["valid"], "k": np.where(known, labels, 0).astype(np.float32), "n": known}
    loss = prm_loss("soft", 0.0, case.ids["Yes"], case.ids["No"])

    def mean(params, batch):
        total, weight = loss(nnx.merge(case.graphdef, params), batch)
        return total / weight

    with jax.set_mesh(case.mesh):
        value, grads = jax.jit(jax.value_and_grad(mean))(case.params, put_batch(batch, case.mesh))
        config = case.config
        groups = layout(case.cfg, checkpoint_kind(config), decoder_kind(config), prefixed=True)  # names of modules
        names = {key: jnp.float32 for group in groups for key, _, _ in group.tensors()}
        return float(value), dict(hf.tensors(groups, grads, names))


@pytest.mark.parametrize("prefix", ["", "train_"])
def test_loss_and_gradients(case, prefix):
    if f"{prefix}labels" not in case.reference:
        assert prefix and case.config["architectures"] != ["InternVLChatModel"]
        return
    loss, grads = gradients(case, prefix)
    close(loss, case.reference[f"{prefix}loss"])
    norms = case.meta[f"{prefix}grad_norms"]
    assert set(norms) == set(grads)
    for name, norm in norms.items():
        assert np.linalg.norm(grads[name].astype(np.float64)) == pytest.approx(norm, rel=1e-3, abs=1e-6), name
    whole = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads.values()))
    assert whole == pytest.approx(float(case.reference[f"{prefix}grad_norm"]), rel=1e-3)
    frozen = [g for name, g in grads.items() if "vision_model" not in name and "vision_tower" not in name]
    part = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in frozen))
    assert part == pytest.approx(float(case.reference[f"{prefix}grad_norm_without_vision_model"]), rel=1e-3)
    given = [key for key in case.reference if key.startswith("grad.")] if not prefix else []
    assert given or prefix
    for key in given:
        want = case.reference[key]
        close(grads[key.removeprefix("grad.")], want, 1e-3 * np.abs(want).max())


def test_sequence_longer_than_trained(case):
    scaling = case.cfg.decoder.rope_scaling
    if "long_input_ids" not in case.reference:
        assert decoder_kind(case.config) != "internlm2"
        return
    tokens = case.reference["long_input_ids"]
    assert tokens.shape[1] > scaling.max_position
    for length, name in ((tokens.shape[1], "long_inv_freq"), (scaling.max_position, "short_inv_freq")):
        cos, sin = case.run(lambda model, _, n=length: model.decoder.rope(jnp.ones((1, 1)), jnp.array([n])), {})
        np.testing.assert_allclose(np.arctan2(sin, cos)[0, 0], case.reference[name], rtol=1e-5)
    images = (tokens == case.image).sum() // case.cfg.tokens_per_tile
    batch = {"tokens": tokens, "valid": np.ones_like(tokens, bool), "pixels": case.tiles()[None, : max(images, 1)]}
    got = case.run(logits, batch)[0]
    close(got[case.reference["long_positions"]], case.reference["long_logits"])
    marks = np.flatnonzero(tokens[0] == case.ids["<prm>"])
    scores = 1 / (1 + np.exp(got[marks, case.ids["No"]] - got[marks, case.ids["Yes"]]))
    close(scores, case.reference["long_prm_scores"])


def test_greedy_generation(case):
    want = case.reference["gen_tokens"]
    batch = case.batch("gen_")
    model = case.graphdef, case.params, case.cfg, case.image, case.mesh
    np.testing.assert_array_equal(generate_greedily(*model, batch, want.shape[1]), want)
    ids = np.concatenate([batch["tokens"], want], axis=1)
    mask = np.concatenate([batch["valid"], np.ones_like(want, bool)], axis=1)
    got = case.run(logits, case.batch(tokens=ids, mask=mask))
    width = batch["tokens"].shape[1]
    close(got[:, width - 1], case.reference["gen_first_logits"])
    close(got[:, -2], case.reference["gen_last_logits"])


@pytest.mark.parametrize(
    "name, shape",
    [
        pytest.param(name, shape, marks=pytest.mark.slow if number else ())  # the first of them is quick
        for number, (name, shape) in enumerate(
            itertools.product(
                dict.fromkeys(MODELS[-2:] + MODELS[:1]),
                [dict(data=1, fsdp=2, tensor=4), dict(data=2, fsdp=4, tensor=1), dict(data=8)],
            )
        )
    ],
    ids=str,
)
def test_sharded_import_computes_the_same(case_of, mesh_of, name, shape):
    """To 1e-5 of the largest logit: the original's own logits move by 2e-5 when all positions shift by one."""
    one, eight = case_of(name), Case(name, mesh_of(**shape))
    batch = one.batch()
    want = one.run(logits, batch)
    close(eight.run(logits, batch), want, 1e-5 * np.abs(want).max())
    split = {axis for axis, size in shape.items() if size > 1} - {"data"}
    used = {
        axis
        for x in jax.tree.leaves(eight.params)
        for part in x.sharding.spec
        for axis in (part or ())
        for axis in ((part,) if isinstance(part, str) else part)
    }
    divides = all(size % 8 == 0 for size in (one.cfg.decoder.hidden_size, one.cfg.decoder.intermediate_size))
    assert (used >= split or not divides) and all(
        len(x.sharding.device_set) == 8 for x in jax.tree.leaves(eight.params)
    )


def test_activations_are_sharded(case_of, mesh_of):
    """Rows over data and fsdp; heads, and the vocabulary of the logits, over the tensor axis, where they divide."""

    def divided(name):
        decoder = hf.open_checkpoint(GOLDEN / "models" / name).model.cfg.decoder
        return sum(size % 2 == 0 for size in (decoder.num_kv_heads, decoder.vocab_size))

    case, seen = Case(max(MODELS, key=divided), mesh_of(data=2, fsdp=1, tensor=2)), {}

    def forward(model, batch):
        hidden, (keys, _) = model(batch["tokens"], batch["valid"], batch["pixels"], caches=True)
        arrays = {
            "embeddings": model.embed(batch["tokens"], batch["pixels"]),
            "visual": model.embed_images(batch["pixels"]),
            "hidden": hidden,
            "keys": keys,
            "logits": model.decoder.logits(hidden),
        }
        seen.update({name: jax.typeof(x).sharding.spec for name, x in arrays.items()})
        return hidden

    batch = {key: np.concatenate([value, value]) for key, value in case.batch().items()}  # an even number of rows
    case.run(forward, batch)
    rows, decoder = ("data", "fsdp"), case.cfg.decoder
    heads, vocabulary = (None if size % 2 else "tensor" for size in (decoder.num_kv_heads, decoder.vocab_size))
    assert seen == {
        "embeddings": P(rows, None, None),
        "visual": P(rows, None, None),
        "hidden": P(rows, None, None),
        "keys": P(None, rows, None, heads, None),
        "logits": P(rows, None, vocabulary),
    }
