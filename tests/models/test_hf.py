"""Files in, files out: byte-identical round trips, bad folders, growing by a token, and how much memory it takes."""

import copy
import json
import shutil
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import GOLDEN, MODELS, some_models
from random_checkpoints import chat_config, random_checkpoint
from safetensors.numpy import load_file, save_file

from mmprm_jax import convert
from mmprm_jax.models import hf, hf_config
from mmprm_jax.models.hf_layout import get
from mmprm_jax.models.released import RELEASED, released_config
from mmprm_jax.models.tokenizer import Tokenizer
from mmprm_jax.records import UserError

SLOW = pytest.mark.slow
NATIVE_MODELS = [
    m
    for m in MODELS
    if hf_config.checkpoint_kind(hf.read_json(GOLDEN / "models" / m / "config.json")) == hf_config.NATIVE
]
POLICY_TOKENIZERS = sorted(
    path.parent.name
    for path in (GOLDEN / "tokenizer").glob("*/tokenizer.model")
    if "<prm>" not in (path.parent / "added_tokens.json").read_text()
)


@pytest.fixture
def mesh8(mesh_of):
    return mesh_of(data=2, fsdp=2, tensor=2)


def copied(golden, name, target):
    """The checkpoint's own files."""
    target.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copyfile(golden / "models" / name / file, target / file)
    return target


def split(folder, parts):
    """Files the tensors of a folder's model.safetensors in ``parts`` shards with an index, as the hub does."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weights = {}
    for i in range(parts):
        name = f"model-{i + 1:05d}-of-{parts:05d}.safetensors"
        chosen = {key: tensors[key] for key in sorted(tensors)[i::parts]}
        save_file(chosen, folder / name, {"format": "pt"})
        weights |= dict.fromkeys(chosen, name)
    index = {
        "metadata": {"total_size": sum(x.nbytes for x in tensors.values())},
        "weight_map": dict(sorted(weights.items())),
    }
    (folder / hf.INDEX).write_text(json.dumps(index, indent=2) + "\n")


def weight_files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".safetensors" or p.name == hf.INDEX}


@pytest.mark.parametrize("name", some_models())
@pytest.mark.parametrize("kind", ["single", pytest.param("sharded", marks=SLOW), pytest.param("bfloat16", marks=SLOW)])
def test_round_trip_is_byte_identical(golden, tmp_path, mesh_of, mesh8, name, kind):
    """To Orbax on one mesh and back from another: every tensor, and indeed every file."""
    source = copied(golden, name, tmp_path / "source")
    if kind == "bfloat16":
        tensors = {k: x.astype(ml_dtypes.bfloat16) for k, x in load_file(source / "model.safetensors").items()}
        save_file(tensors, source / "model.safetensors", {"format": "pt"})
    if kind == "sharded":
        split(source, 3)
    (source / "generation_config.json").write_text('{"eos_token_id": 2}')
    convert.convert(str(source), str(tmp_path / "orbax"), mesh8, verify=True)
    stored = jax.tree.leaves(convert.load(tmp_path / "orbax", mesh_of(data=1)).params)
    assert {x.dtype for x in stored} == {jnp.dtype("bfloat16" if kind == "bfloat16" else "float32")}
    convert.convert(str(tmp_path / "orbax"), str(tmp_path / "back"), mesh_of(data=1), verify=True)
    assert weight_files(tmp_path / "back") == weight_files(source) and weight_files(source)
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes()


@pytest.mark.parametrize("name", NATIVE_MODELS)
def test_both_ways_of_naming_the_native_keys(golden, tmp_path, mesh, name):
    """``model.language_model.*`` and ``lm_head.*`` hold the same as ``language_model.model.*``."""
    source = copied(golden, name, tmp_path / "source")
    old = hf.open_checkpoint(source)
    names = ("language_model.lm_head.", "lm_head."), ("language_model.model.", "model.language_model.")
    renamed = {}
    for key, value in load_file(source / "model.safetensors").items():
        new = next((key.replace(a, b) for a, b in names if key.startswith(a)), f"model.{key}")
        renamed[new] = value
    want = hf.load_params(old, mesh)
    save_file(renamed, source / "model.safetensors", {"format": "pt"})
    new = hf.open_checkpoint(source)
    jax.tree.map(np.testing.assert_array_equal, hf.load_params(new, mesh), want)
    convert.convert(str(source), str(tmp_path / "orbax"), mesh)
    convert.convert(str(tmp_path / "orbax"), str(tmp_path / "back"), mesh)
    assert weight_files(tmp_path / "back") == weight_files(source)


@pytest.mark.parametrize(
    "name, decoder, text, extra",
    [
        ("tiny-internlm2", "InternLM2ForCausalLM", {"bias": True}, ("q_bias", "k_bias", "v_bias", "o_bias")),
        ("tiny-qwen2", "Qwen2ForCausalLM", {"tie_word_embeddings": True}, ("q_bias",)),
        ("tiny-qwen3", "Qwen3ForCausalLM", {"attention_bias": True}, ("q_bias", "o_bias", "q_norm/scale")),
        ("tiny-internlm2", "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}, ("k_bias", "o_bias")),
    ],
)
def test_every_kind_of_bias_goes_through(tmp_path, mesh, mesh8, name, decoder, text, extra):
    config = chat_config(released_config(name), decoder, **text)
    cfg = hf_config.from_hf_config(config)
    source = random_checkpoint(tmp_path / "source", cfg, config)
    params = hf.load_params(hf.open_checkpoint(source), mesh8)
    for leaf in extra:
        assert get(params, f"decoder/layers/attention/{leaf}") is not None
    assert ("lm_head" in params["decoder"]) != bool(text.get("tie_word_embeddings"))
    assert ("gate_bias" in params["decoder"]["layers"]["mlp"]) == bool(text.get("mlp_bias"))
    convert.convert(str(source), str(tmp_path / "orbax"), mesh8, verify=True)
    convert.convert(str(tmp_path / "orbax"), str(tmp_path / "back"), mesh, verify=True)
    assert weight_files(tmp_path / "back") == weight_files(source)


def test_named_models_are_what_their_config_json_says():
    for name in RELEASED:
        cfg = released_config(name)
        qwen = "Qwen3ForCausalLM" if cfg.decoder.qk_norm else "Qwen2ForCausalLM"
        decoder = qwen if cfg.decoder.qkv_bias or cfg.decoder.qk_norm else "InternLM2ForCausalLM"
        got = hf_config.from_hf_config(chat_config(cfg, decoder))
        assert (got.vision, got.decoder, got.tokens_per_tile) == (cfg.vision, cfg.decoder, cfg.tokens_per_tile)


def test_wqkv_rows_are_grouped_by_key_value_head(mesh, tmp_path):
    """[queries of the group, key, value] for each key/value head, written out by hand."""
    cfg = released_config("tiny-internlm2")
    config = chat_config(cfg, "InternLM2ForCausalLM")
    source = random_checkpoint(tmp_path / "source", cfg, config)
    d = cfg.decoder
    params = jax.device_get(hf.load_params(hf.open_checkpoint(source), mesh))["decoder"]["layers"]["attention"]
    for layer in range(d.num_layers):
        w = load_file(source / "model.safetensors")[f"language_model.model.layers.{layer}.attention.wqkv.weight"]
        row = 0
        for group in range(d.num_kv_heads):
            for head in range(d.num_heads // d.num_kv_heads):
                np.testing.assert_array_equal(params["q"][layer, :, group, head].T, w[row : row + d.head_dim])
                row += d.head_dim
            for c in "kv":
                np.testing.assert_array_equal(params[c][layer, :, group].T, w[row : row + d.head_dim])
                row += d.head_dim
        assert row == len(w)


@pytest.mark.parametrize("padded", [0, 5])
@pytest.mark.parametrize("name", POLICY_TOKENIZERS)
def test_a_policy_becomes_a_prm(golden, tmp_path, mesh, mesh8, name, padded):
    """The new row is the mean of the old ones; it goes to the tokenizer's next id, also in a padded vocabulary."""
    old = Tokenizer.load(golden / "tokenizer" / name)
    size = len(old)
    cfg = released_config("tiny-internlm2")
    config = chat_config(cfg, "InternLM2ForCausalLM", vocab_size=size + padded)
    source = random_checkpoint(tmp_path / "source", hf_config.from_hf_config(config), config)
    for file in (golden / "tokenizer" / name).iterdir():
        shutil.copyfile(file, source / file.name)
    convert.convert(str(source), str(tmp_path / "prm"), mesh8, prm=True, verify=True)
    convert.convert(str(tmp_path / "prm"), str(tmp_path / "back"), mesh, verify=True)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    for key in before:
        if "tok_embeddings" in key or "output" in key:
            assert len(after[key]) == max(size + 1, size + padded)
            np.testing.assert_allclose(after[key][size], before[key][:size].mean(0), atol=1e-6)
            np.testing.assert_array_equal(
                np.delete(after[key], size, 0), np.delete(before[key], size, 0) if padded else before[key]
            )
        else:
            np.testing.assert_array_equal(after[key], before[key])
    tokenizer = Tokenizer.load(tmp_path / "back")
    assert tokenizer.id("<prm>") == size
    assert json.loads((tmp_path / "back/config.json").read_text())["llm_config"]["vocab_size"] == max(
        size + 1, size + padded
    )
    with pytest.raises(UserError, match="has <prm> already"):
        convert.convert(str(tmp_path / "back"), str(tmp_path / "again"), mesh, prm=True)


def test_import_to_another_dtype(golden, mesh):
    checkpoint = hf.open_checkpoint(golden / "models" / MODELS[0])
    exact, rounded = hf.load_params(checkpoint, mesh), hf.load_params(checkpoint, mesh, jnp.bfloat16)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(jnp.bfloat16), b), exact, rounded)


def test_an_export_has_the_dtypes_that_came_in(golden, tmp_path, mesh):
    convert.convert(str(golden / "models" / MODELS[0]), str(tmp_path / "orbax"), mesh)
    with pytest.raises(UserError, match="--dtype is for the way to Orbax"):
        convert.convert(str(tmp_path / "orbax"), str(tmp_path / "back"), mesh, dtype=jnp.bfloat16)


def test_verify_tells_of_a_difference(golden, tmp_path, mesh, monkeypatch):
    source = copied(golden, MODELS[0], tmp_path / "source")
    original = convert.save_params

    def damaged(path, params):
        params = copy.deepcopy(params)
        params["decoder"]["norm"]["scale"] = params["decoder"]["norm"]["scale"].at[0].add(1e-6)
        original(path, params)

    monkeypatch.setattr(convert, "save_params", damaged)
    with pytest.raises(UserError, match=r"1 of \d+ tensors differ: .*norm.weight"):
        convert.convert(str(source), str(tmp_path / "orbax"), mesh, verify=True)
    assert not (tmp_path / "orbax").exists()


# Bad folders: each makes one change to a good one, and expects one error that says these things.


def edit_tensors(change):
    def edit(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return edit


def edit_config(**values):
    def edit(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return edit


def edit_text(**values):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        config["llm_config"] |= values
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def lose_a_shard(folder):
    split(folder, 3)
    (folder / "model-00002-of-00003.safetensors").unlink()


def lose_a_tensor_of_the_index(folder):
    split(folder, 2)
    tensors = load_file(folder / "model-00001-of-00002.safetensors")
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, folder / "model-00001-of-00002.safetensors")


def misfile(folder):
    split(folder, 2)
    index = json.loads((folder / hf.INDEX).read_text())
    key = sorted(index["weight_map"])[0]
    index["weight_map"][key] = "model-00002-of-00002.safetensors"
    (folder / hf.INDEX).write_text(json.dumps(index))


def truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) * 2 // 3])


def huge_header(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")


def three_at_once(tensors):
    keys = sorted(tensors)
    tensors.pop(keys[0])
    tensors["surprise.weight"] = np.zeros(3, np.float32)
    tensors[keys[1]] = np.zeros(7, np.float32)


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def retype(dtype):
    def change(tensors):
        key = sorted(tensors)[3]
        tensors[key] = tensors[key].astype(dtype)

    return edit_tensors(change)


BAD = {
    "missing shard": (lose_a_shard, ["1 of 3 weight files are missing", "model-00002-of-00003"]),
    "missing from its shard": (lose_a_tensor_of_the_index, ["1 missing", "the index says"]),
    "in another shard": (misfile, ["1 misfiled", "is not in model-00002-of-00002"]),
    "truncated": (truncate, ["model.safetensors", "truncated"]),
    "header": (huge_header, ["model.safetensors", "damaged"]),
    "integers": (retype(np.int32), ["1 dtype", "I32", "F32, F16 and BF16"]),
    "doubles": (retype(np.float64), ["1 dtype", "F64"]),
    "three things": (edit_tensors(three_at_once), ["1 missing", "1 unexpected", "1 shape", "surprise.weight", r"[7]"]),
    "pickle": (pickled, ["pickled weights", "pytorch_model.bin", "convert them"]),
    "nothing": (lambda folder: (folder / "model.safetensors").unlink(), ["no model.safetensors"]),
    "no config": (lambda folder: (folder / "config.json").unlink(), ["config.json", "no such file"]),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), ["config.json", "JSON"]),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), ["config.json", "JSON object"]),
    "architecture": (edit_config(architectures=["LlavaForConditionalGeneration"]), ["unknown architecture 'Llava"]),
    "no architecture": (edit_config(architectures=None), ["unknown architecture None"]),
    "language model": (edit_text(architectures=["Phi3ForCausalLM"]), ["unknown language model 'Phi3"]),
    "no vision": (edit_config(vision_config=None), ["no vision_config section"]),
    "pixel shuffle": (edit_config(ps_version="v1"), ["ps_version = 'v1' is not supported"]),
    "layer": (edit_config(select_layer=-2), ["select_layer = -2"]),
    "size": (edit_text(hidden_size="48"), ["hidden_size must be a positive integer"]),
    "heads": (edit_text(num_key_value_heads=101), ["over 101 key/value heads"]),
    "yarn": (edit_text(rope_scaling={"type": "yarn", "factor": 2}), ["rope scaling 'yarn'"]),
    "activation": (edit_text(hidden_act="gelu"), ["hidden_act = 'gelu'"]),
    "other sizes": (edit_text(intermediate_size=7), ["shape:", "config.json makes it"]),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_folder(tmp_path, what):
    change, expected = BAD[what]
    cfg = released_config("tiny-internlm2")
    folder = random_checkpoint(tmp_path / "source", cfg, chat_config(cfg, "InternLM2ForCausalLM"))
    change(folder)
    with pytest.raises(UserError) as error:
        hf.open_checkpoint(folder)
    assert str(folder) in str(error.value) and all(text in str(error.value) for text in expected)


def test_a_target_that_exists_is_kept(golden, tmp_path, mesh):
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        convert.convert(str(golden / "models" / MODELS[0]), str(tmp_path / "there"), mesh)


def test_neither_folder_nor_hub_id():
    for name in ("/nowhere/at/all", "gs://bucket/model", "just-a-name"):
        with pytest.raises(UserError, match="neither a folder nor a hub id"):
            hf.find(name)
