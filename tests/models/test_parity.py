"""Import, export, scores and generation against ``transformers`` itself, on small random models made on the fly.

Needs torch: ``pip install '.[parity]'``, then ``pytest -m parity tests/models/test_parity.py``. Everything is float32.
"""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers
from conftest import GOLDEN, generate_greedily
from flax import nnx
from safetensors.numpy import load_file, save_file

from mmprm_jax import convert
from mmprm_jax.evaluation.score import Scorer, Solutions
from mmprm_jax.models import build, hf
from mmprm_jax.sharding import put_batch
from mmprm_jax.training.checkpoints import save_params

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity

TOLERANCE = 1e-4
PAD, IMAGE, FIRST = 0, 3, 5  # padding, image-context token, first id of ordinary text
TEXT = dict(
    vocab_size=96, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, rms_norm_eps=1e-3, max_position_embeddings=256, tie_word_embeddings=False,
    pad_token_id=PAD, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
VISION = dict(
    image_size=28, patch_size=7, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=56,
    layer_norm_eps=1e-3, attention_bias=True,
)  # fmt: skip
VIT_6B = dict(norm_type="rms_norm", use_qk_norm=True, attention_bias=False)
QWEN3 = dict(model_type="qwen3", head_dim=16, num_attention_heads=6)


def rope(kind="default", **more):
    return {"rope_type": kind, "rope_theta": 100.0, **more}


def case(model_type="qwen2", vision=(), top=(), shard="1GB", features=1.0, **text):
    """``shard``: the largest weight file; ``features``: how large what the vision tower puts out is."""
    sections = {"text": {"model_type": model_type, **text}, "vision": dict(vision), "top": dict(top)}
    return {"sections": sections, "shard": shard, "features": features}


SHARD = "30KB"
CASES = {
    "qwen2": case(),
    "qwen2, sharded": case(shard=SHARD),
    "qwen2, tied": case(tie_word_embeddings=True, top={"tie_word_embeddings": True}),
    "qwen2, tied by the whole model's config only": case(top={"tie_word_embeddings": True}),
    "qwen2, tied by the language model's config only": case(tie_word_embeddings=True),
    "qwen2, one key/value head each": case(num_key_value_heads=4),
    "qwen2, one key/value head": case(num_key_value_heads=1),
    "qwen2, dynamic scaling, 3 queries to a key": case(
        num_attention_heads=6,
        hidden_size=36,
        rope_parameters=rope("dynamic", factor=2.0, original_max_position_embeddings=8),
        max_position_embeddings=16,
    ),
    "qwen3": case(**QWEN3),
    "qwen3, tied, sharded": case(
        **QWEN3, tie_word_embeddings=True, top={"tie_word_embeddings": True}, vision=VIT_6B, shard=SHARD
    ),
    "qwen3, biased": case(**QWEN3, attention_bias=True),
    "llama, biased": case("llama", attention_bias=True, mlp_bias=True, head_dim=8),
    "llama, linear scaling": case("llama", rope_parameters=rope("linear", factor=4.0)),
    "llama, dynamic scaling": case(
        "llama", rope_parameters=rope("dynamic", factor=3.0), max_position_embeddings=16, vision=VIT_6B
    ),
    "vision: rms_norm, qk_norm, no bias": case(vision=VIT_6B),
    "vision: layer_norm, no bias": case(vision={"attention_bias": False}),
    "vision: rms_norm, bias": case(vision={"norm_type": "rms_norm"}),
    "vision: small features, where the projector's epsilon counts": case(vision=VIT_6B, features=0.01),
    "vision: one token per tile": case(top={"downsample_ratio": 0.25}),
}
PADDED = [name for name in CASES if "dynamic" not in name]  # transformers scales by the longest row, padding included
DYNAMIC = [name for name in CASES if "dynamic" in name]


def randomise(model, seed=0):
    """Every parameter off its initial value: norms off one, biases, class token and positions off zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(p + 0.3 * noise if p.ndim == 1 else noise * max(1, p[0].numel()) ** -0.5)
    return model.eval()


def make(text, vision, top, features=1.0):
    """A random InternVLForConditionalGeneration."""
    side = (vision.get("image_size", 28) // 7 * top.get("downsample_ratio", 0.5)) ** 2
    config = transformers.InternVLConfig(
        text_config={**TEXT, "rope_parameters": rope(), **text}, vision_config={**VISION, **vision},
        image_token_id=IMAGE, image_seq_length=int(side), **{"tie_word_embeddings": False, **top},
    )  # fmt: skip
    model = randomise(transformers.InternVLForConditionalGeneration(config))
    with torch.no_grad():
        for key, p in model.model.vision_tower.named_parameters():
            if key.startswith("embeddings.") or ".lambda_" in key:
                p.mul_(features)
    return model


def reload(folder):
    """The model that transformers reads from a folder, with nothing missing, left over or mis-shaped."""
    model, told = transformers.InternVLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(told.values()), told
    return model.eval()


def batch_of(cfg, rows, seed=0):
    """rows: (width, padding on the left, on the right, tiles) of each -> tokens, valid and pixels, as we take them."""
    rng = np.random.default_rng(seed)
    width, most, tile = rows[0][0], max(1, *(row[3] for row in rows)), cfg.tile
    tokens = rng.integers(FIRST, cfg.decoder.vocab_size, (len(rows), width), np.int32)
    valid = np.ones((len(rows), width), bool)
    for r, (_, left, right, tiles) in enumerate(rows):
        valid[r, :left] = valid[r, width - right :] = False
        at = left + 1
        for _ in range(tiles):  # text between any two tiles
            tokens[r, at : at + cfg.tokens_per_tile] = IMAGE
            at += cfg.tokens_per_tile + 1
        assert at <= width - right
    pixels = rng.standard_normal((len(rows), most, tile, tile, 3), np.float32)
    return {"tokens": np.where(valid, tokens, PAD), "valid": valid, "pixels": pixels}


def as_torch(batch, tokens_per_tile):
    """The batch as transformers takes it: the tiles of all rows in one list."""
    counts = (batch["tokens"] == IMAGE).sum(1) // tokens_per_tile
    tiles = np.concatenate([row[:count] for row, count in zip(batch["pixels"], counts, strict=True)])
    return {
        "input_ids": torch.tensor(batch["tokens"], dtype=torch.long),
        "attention_mask": torch.tensor(batch["valid"], dtype=torch.long),
        **({"pixel_values": torch.tensor(tiles.transpose(0, 3, 1, 2))} if len(tiles) else {}),
    }


def torch_logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits.numpy()


class Port:
    """A checkpoint, imported by us."""

    def __init__(self, folder, mesh):
        self.mesh, loaded = mesh, convert.load(folder, mesh, jnp.float32)
        self.cfg, self.params = loaded.model.cfg, loaded.params
        self.graphdef, _ = build.abstract(self.cfg, IMAGE, mesh)
        self._logits = jax.jit(
            lambda params, b: (m := nnx.merge(self.graphdef, params)).decoder.logits(
                m(b["tokens"], b["valid"], b["pixels"])[0]
            )
        )

    def logits(self, batch, params=None):
        with jax.set_mesh(self.mesh):
            return np.asarray(self._logits(self.params if params is None else params, put_batch(batch, self.mesh)))


class Pair:
    """A random model of transformers, saved in ``folder``, our import of it, and a batch."""

    def __init__(self, name, folder, mesh):
        self.name, self.folder, settings = name, folder, CASES[name]
        self.model = make(**settings["sections"], features=settings["features"])
        self.model.save_pretrained(folder, max_shard_size=settings["shard"])
        self.port = Port(folder, mesh)
        # Left and right padding, several tiles in a row, none in another.
        rows = [(24, 5, 0, 2), (24, 0, 7, 1), (24, 0, 0, 3), (24, 3, 0, 0)]
        self.batch = batch_of(self.port.cfg, rows)
        self.inputs = as_torch(self.batch, self.port.cfg.tokens_per_tile)

    @functools.cached_property
    def want(self):
        return torch_logits(self.model, self.inputs)[self.batch["valid"]]

    @functools.cached_property
    def got(self):
        return self.port.logits(self.batch)[self.batch["valid"]]


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory, mesh_of):
    return functools.cache(lambda name: Pair(name, tmp_path_factory.mktemp("native"), mesh_of(data=1)))


def close(got, want, tolerance=TOLERANCE):
    assert got.shape == want.shape and np.std(want) > 0.3  # logits of a model in which nothing vanishes
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)


def differ(a, b):
    """By far more than the tolerance: what is compared does depend on what the test is about."""
    assert np.abs(a - b).max() > 100 * TOLERANCE


def weight_files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".safetensors" or p.name == hf.INDEX}


@pytest.mark.parametrize("name", PADDED)
def test_logits(pair_of, name):
    pair = pair_of(name)
    close(pair.got, pair.want)
    other = {**pair.inputs, "pixel_values": pair.inputs["pixel_values"].flip(0)}
    differ(torch_logits(pair.model, other)[pair.batch["valid"]], pair.want)
    files = [p.name for p in pair.folder.glob("*.safetensors")]
    assert len(files) == 1 if "sharded" not in name else len(files) > 2


@pytest.mark.parametrize("name", DYNAMIC)
def test_sequence_longer_than_trained(pair_of, name):
    """One row at a time there, where the longest of a batch counts; rows of several lengths at once here."""
    pair = pair_of(name)
    longest = pair.port.cfg.decoder.rope_scaling.max_position
    rows = [
        (3 * longest, left, 3 * longest - left - n, 2) for n, left in zip((16, 17, 40, 48), (3, 0, 8, 0), strict=True)
    ]
    assert longest == 16
    batch = batch_of(pair.port.cfg, rows, seed=1)
    got = pair.port.logits(batch)
    sections = CASES[name]["sections"]
    unscaled = make(**{**sections, "text": {**sections["text"], "rope_parameters": rope()}})
    unscaled.load_state_dict(pair.model.state_dict())
    for r, valid in enumerate(batch["valid"]):
        row = {key: value[r : r + 1] for key, value in batch.items()}
        row = {**row, "tokens": row["tokens"][:, valid], "valid": row["valid"][:, valid]}
        inputs = as_torch(row, pair.port.cfg.tokens_per_tile)
        want = torch_logits(pair.model, inputs)
        close(got[r : r + 1, valid], want)
        without = torch_logits(unscaled, inputs)
        if valid.sum() > longest + 1:
            differ(without, want)
        elif valid.sum() <= longest:
            np.testing.assert_array_equal(without, want)


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_config_of_an_older_transformers(tmp_path, mesh, pair_of, kind):
    """Version 4 wrote rope_theta and rope_scaling apart, and left out what its classes have by default."""
    pair = pair_of(f"llama, {kind} scaling")
    shutil.copytree(pair.folder, tmp_path / "old")
    config = hf.read_json(tmp_path / "old/config.json")
    del config["tie_word_embeddings"]
    text = config["text_config"]
    scaling = text.pop("rope_parameters")
    text["rope_theta"] = scaling.pop("rope_theta")
    text["rope_scaling"] = {"type": scaling["rope_type"], "factor": scaling["factor"]}
    del text["tie_word_embeddings"]
    (tmp_path / "old/config.json").write_text(json.dumps(config))
    old = Port(tmp_path / "old", mesh)
    assert old.cfg == pair.port.cfg
    row = {key: value[2:3] for key, value in pair.batch.items()}  # the one without padding
    close(old.logits(row), torch_logits(reload(tmp_path / "old"), as_torch(row, old.cfg.tokens_per_tile)))


def there_and_back(folder, target, mesh, other=None):
    """Released -> ours -> released; ``other``: the mesh for the way back."""
    convert.convert(str(folder), str(target / "ours"), mesh, verify=True)
    convert.convert(str(target / "ours"), str(target / "back"), other or mesh, verify=True)
    return target / "back"


@pytest.mark.parametrize(
    "name", ["qwen2", "qwen2, sharded", "qwen3, tied, sharded", "llama, biased", "vision: rms_norm, qk_norm, no bias"]
)
def test_exported_model_loads(tmp_path, mesh, pair_of, name):
    pair = pair_of(name)
    back = there_and_back(pair.folder, tmp_path, mesh)
    assert weight_files(back) == weight_files(pair.folder)
    if "sharded" in name:
        for file in pair.folder.glob("*.safetensors"):
            file_back = load_file(back / file.name)
            assert {k: v.tobytes() for k, v in load_file(file).items()} == {
                k: v.tobytes() for k, v in file_back.items()
            }
    model = reload(back)
    for key, value in pair.model.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    close(torch_logits(model, pair.inputs)[pair.batch["valid"]], pair.want, 1e-5)


@pytest.mark.parametrize("name", sorted(p.name for p in (GOLDEN / "models").glob("hf_*")))
def test_exported_golden_model_loads(golden, tmp_path, mesh, name):
    source = golden / "models" / name
    back = there_and_back(source, tmp_path, mesh)
    assert weight_files(back) == weight_files(source)
    reference = np.load(source / "reference.npz")
    mask = reference["attention_mask"].astype(bool)
    inputs = {key: torch.tensor(reference[key]) for key in ("input_ids", "attention_mask", "pixel_values")}
    close(torch_logits(reload(back), inputs)[mask], reference["logits"][mask])


def module_names(pair, folder, drop=()):
    """The checkpoint under the names of the model's modules, which newer files may have."""
    folder.mkdir()
    shutil.copyfile(pair.folder / "config.json", folder / "config.json")
    tensors = {k: v.numpy().copy() for k, v in pair.model.state_dict().items() if k not in drop}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("name", ["qwen2, sharded", "qwen3", "qwen2, tied"])
def test_names_of_modules(tmp_path, mesh, pair_of, name):
    pair = pair_of(name)
    source = module_names(pair, tmp_path / "source", {"lm_head.weight"} if "tied" in name else ())
    keys = hf.open_checkpoint(source).where
    roots = {"model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head.weight"}
    assert {".".join(key.split(".")[:2]) for key in keys} == roots - ({"lm_head.weight"} if "tied" in name else set())
    jax.tree.map(np.testing.assert_array_equal, convert.load(source, mesh).params, pair.port.params)
    back = there_and_back(source, tmp_path, mesh)
    assert weight_files(back) == weight_files(source)
    close(torch_logits(reload(back), pair.inputs)[pair.batch["valid"]], pair.want, 1e-5)


def trained(params, seed=0):
    """The parameters after one step of AdamW on random gradients."""
    rng = np.random.default_rng(seed)
    gradients = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)), params)
    optimiser = optax.adamw(1e-2, weight_decay=0.1)
    updates, _ = optimiser.update(gradients, optimiser.init(params), params)
    return optax.apply_updates(params, updates)


@pytest.mark.parametrize(
    "name", ["qwen2, sharded", "qwen3, biased", "qwen3, tied, sharded", "llama, biased", "qwen2, tied"]
)
def test_trained_model_is_exported(tmp_path, mesh, mesh_of, pair_of, name):
    """What we trained, transformers computes. "qwen2, tied" has its head in the file all the same: they part."""
    pair = pair_of(name)
    whole = name == "qwen2, tied"
    source = module_names(pair, tmp_path / "source") if whole else pair.folder
    there_and_back(source, tmp_path, mesh)
    shutil.rmtree(tmp_path / "back")
    port = Port(source, mesh) if whole else pair.port
    with jax.set_mesh(mesh):
        params = trained(port.params)
    save_params(tmp_path / "ours/params", params)
    convert.convert(str(tmp_path / "ours"), str(tmp_path / "back"), mesh_of(data=2, fsdp=2, tensor=2), verify=True)
    got = port.logits(pair.batch, params)[pair.batch["valid"]]
    differ(got, pair.want)
    close(got, torch_logits(reload(tmp_path / "back"), pair.inputs)[pair.batch["valid"]])


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_text_only_prm(tmp_path, mesh, head, kv_heads):
    """The layout of Qwen2.5-Math-PRM, whose class is no part of transformers: its body and a head of two layers."""
    text = {**TEXT, "num_key_value_heads": kv_heads}
    body = randomise(transformers.Qwen2Model(transformers.Qwen2Config(**text, rope_parameters=rope())))
    size = TEXT["hidden_size"]
    torch.manual_seed(0)  # torch's own biases do not start at zero
    score = torch.nn.Sequential(torch.nn.Linear(size, size), torch.nn.ReLU(), torch.nn.Linear(size, 2))
    randomise(score, seed=1)
    tensors = {f"model.{k}": v for k, v in body.state_dict().items()}
    tensors |= {f"score.{k}": v for k, v in score.state_dict().items()}
    if head:
        tensors["lm_head.weight"] = torch.ones(TEXT["vocab_size"], size)
    source = tmp_path / "source"
    source.mkdir()
    save_file({k: v.numpy() for k, v in tensors.items()}, source / "model.safetensors", {"format": "pt"})
    config = {"architectures": ["Qwen2ForProcessRewardModel"], "model_type": "qwen2", "rope_theta": 100.0, **text}
    (source / "config.json").write_text(json.dumps(config))

    rng = np.random.default_rng(0)
    question = rng.integers(FIRST, TEXT["vocab_size"], 9).tolist()
    rows = [question + rng.integers(FIRST, TEXT["vocab_size"], n).tolist() for n in (12, 5, 20)]
    marks = [[12, 15, 20], [13], [9, 17, 22, 28]]
    port = Port(source, mesh)
    with jax.set_mesh(mesh):
        scorer = Scorer(port.graphdef, port.params, mesh, None, problems=1, solutions=3)
        found = scorer.score([Solutions(list(zip(rows, marks, strict=True)), None)])[0]
    with torch.no_grad():
        for ids, places, got in zip(rows, marks, found, strict=True):
            hidden = body(input_ids=torch.tensor([ids])).last_hidden_state
            want = torch.softmax(score(hidden), dim=-1)[0, places, 1].numpy()
            np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)
    every = np.concatenate(found)
    assert len(every) == 8 and np.ptp(every) > 0.1

    assert ("lm_head" in port.params["decoder"]) == head
    back = there_and_back(source, tmp_path, mesh)
    assert weight_files(back) == weight_files(source)


@pytest.mark.parametrize("name", ["qwen2", "qwen3, tied, sharded", "llama, linear scaling"])
def test_greedy_generation(pair_of, name):
    """Left-padded prompts with images. With dynamic scaling the engine takes nothing beyond the trained length."""
    pair, new = pair_of(name), 8
    rows = [(20, 2, 0, 1), (20, 0, 0, 3), (20, 6, 0, 2), (20, 9, 0, 0)]
    batch = batch_of(pair.port.cfg, rows, seed=3)
    inputs = as_torch(batch, pair.port.cfg.tokens_per_tile)
    told = pair.model.generate(
        **inputs, do_sample=False, max_new_tokens=new, return_dict_in_generate=True, output_logits=True
    )
    want = told.sequences[:, len(batch["tokens"][0]) :].numpy()
    best = torch.stack(told.logits).topk(2).values
    assert (best[..., 0] - best[..., 1]).min() > 2 * TOLERANCE  # no ties
    assert want.shape == (len(rows), new) and len(np.unique(want)) > 3
    port = pair.port
    got = generate_greedily(port.graphdef, port.params, port.cfg, IMAGE, port.mesh, batch, new)
    np.testing.assert_array_equal(got, want)
