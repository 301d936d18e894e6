"""LoRA adapters as peft saves them, beside matrices merged by hand; what cannot be merged is refused in one line."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from random_checkpoints import chat_config, random_checkpoint
from safetensors.numpy import load_file, save_file

from mmprm_jax import convert
from mmprm_jax.models import hf, hf_config
from mmprm_jax.models.released import released_config
from mmprm_jax.models.tokenizer import Tokenizer
from mmprm_jax.records import UserError

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 50, "hidden_size": 24,
    "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rope_theta": 1e4, "attention_bias": True,
}  # fmt: skip
CHAT = chat_config(released_config("tiny-internlm2"), "InternLM2ForCausalLM")


def base_of(folder, config=LLAMA, dtype=np.float32):
    return random_checkpoint(folder, hf_config.from_hf_config(config), config, dtype)


def adapter_of(folder, base, tensors, **settings):
    folder.mkdir()
    config = {
        "peft_type": "LORA", "base_model_name_or_path": str(base), "r": 3, "lora_alpha": 6, "revision": None,
        "use_rslora": False, "use_dora": False, "fan_in_fan_out": False, "init_lora_weights": True, "bias": "none",
        "alpha_pattern": {}, "rank_pattern": {}, "modules_to_save": None, "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def pair(base, modules, rank=3, name="base_model.model.{}.lora_{}.weight"):
    """A and B of some matrices of the base, by peft's names."""
    weights, rng, found = load_file(base / "model.safetensors"), np.random.default_rng(1), {}
    for module in modules:
        out, size = weights[f"{module}.weight"].shape
        found[name.format(module, "A")] = rng.standard_normal((rank, size), np.float32)
        found[name.format(module, "B")] = rng.standard_normal((out, rank), np.float32)
    return found


def merged(folder):
    checkpoint = hf.open_checkpoint(folder)
    return {key: hf.read_tensor(checkpoint, key) for key in checkpoint.where}


def assert_merged(folder, base, wanted):
    """Exactly the tensors of ``wanted`` differ from the base's, and are these."""
    before, found = load_file(base / "model.safetensors"), merged(folder)
    assert found.keys() == before.keys()
    for key, value in found.items():
        assert value.dtype == before[key].dtype, key
        if key in wanted:
            np.testing.assert_allclose(value.astype(np.float32), wanted[key], rtol=1e-5, atol=1e-5, err_msg=key)
        else:
            np.testing.assert_array_equal(value, before[key], err_msg=key)


MODULES = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.k_proj"]
SCALES = {
    "alpha / r": ({}, [2.0, 2.0, 2.0]),
    "rslora": ({"use_rslora": True}, [6 / 3**0.5] * 3),
    "alphas of their own": ({"alpha_pattern": {"down_proj": 12, "layers.1.self_attn.k_proj": 1.5}}, [2.0, 4.0, 0.5]),
    "gaussian at first": ({"init_lora_weights": "gaussian", "lora_alpha": 1.5}, [0.5, 0.5, 0.5]),
}


@pytest.mark.parametrize("name", ["base_model.model.{}.lora_{}.weight", "base_model.model.{}.lora_{}.default.weight"])
@pytest.mark.parametrize("case", SCALES)
def test_matrices(case, name, tmp_path):
    settings, scales = SCALES[case]
    base = base_of(tmp_path / "base")
    tensors = pair(base, MODULES, name=name)
    folder = adapter_of(tmp_path / "adapter", base, tensors, **settings)
    before, wanted = load_file(base / "model.safetensors"), {}
    for module, scale in zip(MODULES, scales, strict=True):
        a, b = (tensors[name.format(module, c)] for c in "AB")
        wanted[f"{module}.weight"] = before[f"{module}.weight"] + scale * np.einsum("or,ri->oi", b, a)
    assert_merged(folder, base, wanted)


def test_bfloat16_stays_bfloat16_and_parts_are_those_of_the_whole(tmp_path):
    base = base_of(tmp_path / "base", dtype=ml_dtypes.bfloat16)
    folder = adapter_of(tmp_path / "adapter", base, pair(base, MODULES[:1], rank=2), lora_alpha=2)
    checkpoint, key = hf.open_checkpoint(folder), f"{MODULES[0]}.weight"
    assert str(checkpoint.model.dtype.dtype) == "bfloat16"
    whole = hf.read_tensor(checkpoint, key)
    assert whole.dtype == ml_dtypes.bfloat16
    part = (slice(4, 9), slice(None))
    np.testing.assert_array_equal(hf.read_tensor(checkpoint, key, part), whole[part])


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_that_has_grown_with_its_tokenizer(tied, golden, tmp_path):
    """As a PRM is trained with peft: one more token, embedding and head saved whole, a tied head twice."""
    tokenizer = Tokenizer.load(golden / "tokenizer" / "qwen2")
    config = LLAMA | {"vocab_size": len(tokenizer), "tie_word_embeddings": tied}
    base = base_of(tmp_path / "base", config)
    tokenizer.save(base)
    rng = np.random.default_rng(2)
    embed = rng.standard_normal((len(tokenizer) + 1, 24), np.float32)
    head = embed if tied else rng.standard_normal(embed.shape, np.float32)
    tensors = {
        f"{EMBED}.weight": embed,
        f"{EMBED}.modules_to_save.weight": embed,
        f"{EMBED}.original_module.weight": 0 * embed,
        "base_model.model.lm_head.modules_to_save.weight" if not tied else "base_model.model.lm_head.weight": head,
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias": np.ones(24, np.float32),
    }
    folder = adapter_of(tmp_path / "adapter", base, tensors)
    tokenizer.with_token("<score>").save(folder)
    found = merged(folder)
    np.testing.assert_array_equal(found["model.embed_tokens.weight"], embed)
    np.testing.assert_array_equal(found["model.layers.0.self_attn.q_proj.bias"], 1)
    assert tied or np.array_equal(found["lm_head.weight"], head)
    files, model = convert.inspect(folder)
    assert model.cfg.decoder.vocab_size == len(tokenizer) + 1 == len(Tokenizer.load(files))
    assert json.loads((files / "config.json").read_text())["vocab_size"] == len(tokenizer) + 1
    assert not (files / "adapter_config.json").exists()


def test_lora_of_an_embedding(tmp_path):
    base, rng = base_of(tmp_path / "base"), np.random.default_rng(3)
    a, b = rng.standard_normal((3, 50), np.float32), rng.standard_normal((24, 3), np.float32)
    at = "base_model.model.model.embed_tokens.lora_embedding_"
    folder = adapter_of(tmp_path / "adapter", base, {f"{at}A": a, f"{at}B": b})
    before = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    assert_merged(folder, base, {"model.embed_tokens.weight": before + 2 * (b @ a).T})


@pytest.mark.parametrize("saved_by", ["the old names", "the new names"])
def test_names_of_both_versions_of_transformers(saved_by, golden, tmp_path):
    name = next(p.parent for p in (golden / "models").glob("hf_qwen2/config.json"))
    base = shutil.copytree(name, tmp_path / "base")
    module = "language_model.model.layers.0.self_attn.v_proj"
    tensors = pair(base, [module])
    if saved_by == "the new names":
        tensors = {k.replace("language_model.model", "model.language_model"): x for k, x in tensors.items()}
    folder = adapter_of(tmp_path / "adapter", base, tensors)
    a, b = tensors.values()
    before = load_file(base / "model.safetensors")[f"{module}.weight"]
    assert_merged(folder, base, {f"{module}.weight": before + 2 * b @ a})


def test_convert_merges(golden, tmp_path, mesh):
    tokenizer = Tokenizer.load(golden / "tokenizer" / "internlm2_nodummy_prm")
    config = {**CHAT, "llm_config": {**CHAT["llm_config"], "vocab_size": len(tokenizer)}}
    base = base_of(tmp_path / "base", config)
    tokenizer.save(base)
    modules = ["language_model.model.layers.1.attention.wqkv", "mlp1.1"]
    folder = adapter_of(tmp_path / "adapter", base, pair(base, modules))
    convert.convert(str(folder), str(tmp_path / "ours"), mesh, verify=True)
    convert.convert(str(tmp_path / "ours"), str(tmp_path / "back"), mesh, verify=True)
    wanted, found = merged(folder), load_file(tmp_path / "back" / "model.safetensors")
    assert wanted.keys() == found.keys() and all(np.array_equal(found[key], wanted[key]) for key in wanted)
    differ = {k for k, x in load_file(base / "model.safetensors").items() if not np.array_equal(x, found[k])}
    assert differ == {f"{module}.weight" for module in modules}
    files = {p.name for p in (tmp_path / "back").iterdir()}
    assert "tokenizer.model" in files and not any(name.startswith("adapter") for name in files)


REFUSED = {
    "another method": ({"peft_type": "IA3"}, "peft_type 'IA3' is not read"),
    "prompt tuning": ({"peft_type": "PROMPT_TUNING"}, "peft_type 'PROMPT_TUNING'"),
    "dora": ({"use_dora": True}, "use_dora is not read"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "changed the base as well"),
    "olora": ({"init_lora_weights": "olora"}, "changed the base as well"),
    "tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices is not read"),
    "layers twice": ({"layer_replication": [[0, 1]]}, "layer_replication is not read"),
    "no base": ({"base_model_name_or_path": None}, "no base_model_name_or_path"),
    "no such base": ({"base_model_name_or_path": "/nowhere"}, "the base of the adapters: /nowhere: neither"),
    "kasa": ({"kasa_config": {"beta": 1}}, "kasa_config is not read"),
    "patterns": ({"alpha_pattern": {"(a+)+": 3}}, "regular expressions"),
    "alpha no number": ({"lora_alpha": "many"}, "lora_alpha 'many'"),
    "alpha infinite": ({"lora_alpha": float("inf")}, "lora_alpha inf"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged(case, tmp_path):
    settings, words = REFUSED[case]
    base = base_of(tmp_path / "base")
    folder = adapter_of(tmp_path / "adapter", base, pair(base, MODULES), **settings)
    with pytest.raises(UserError) as told:
        hf.open_checkpoint(folder)
    assert words in str(told.value) and str(folder) in str(told.value) and "\n" not in str(told.value)


def damaged(change):
    def apply(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return apply


EMBED = "base_model.model.model.embed_tokens"
OWN_HEAD = {f"{EMBED}.weight": np.ones((50, 24)), "base_model.model.lm_head.weight": np.zeros((50, 24))}
TWICE = {f"{EMBED}.weight": np.ones((50, 24)), f"{EMBED}.modules_to_save.weight": np.zeros((50, 24))}
FIRST = f"base_model.model.{MODULES[0]}.lora_"
DAMAGED = {
    "of another model": (damaged(lambda t: t.update({"base_model.model.h.0.lora_A.weight": np.ones(4)})), "1 of 7"),
    "half a pair": (damaged(lambda t: t.pop(f"{FIRST}B.weight")), "1 of 5 tensors belong to nothing"),
    "magnitudes": (damaged(lambda t: t.update({f"{FIRST}magnitude_vector": np.ones(24)})), "1 of 7 tensors"),
    "a bias of B": (damaged(lambda t: t.update({f"{FIRST}B.bias": np.ones(24)})), "1 of 7 tensors"),
    "other sizes": (damaged(lambda t: t.update({f"{FIRST}A.weight": np.ones((3, 7))})), "do not fit the base's"),
    "other ranks": (damaged(lambda t: t.update({f"{FIRST}A.weight": np.ones((2, 24))})), "do not fit the base's"),
    "a head of its own": (damaged(lambda t: t.update(OWN_HEAD)), "its head is not its embedding"),
    "one tensor twice": (damaged(lambda t: t.update(TWICE)), "are one tensor and differ"),
    "nothing in it": (damaged(lambda t: t.clear()), "holds no tensors"),
    "cut": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x00" * 5), "damaged or truncated"),
    "pickled": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "only adapter_model.bin, which can"
    ),
    "a whole model beside it": (lambda f: (f / "model.safetensors").write_bytes(b""), "move away what is not meant"),
    "settings no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "not readable as JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_adapters(case, tmp_path):
    change, words = DAMAGED[case]
    base = base_of(tmp_path / "base", LLAMA | {"tie_word_embeddings": case == "a head of its own"})
    folder = adapter_of(tmp_path / "adapter", base, pair(base, MODULES))
    change(folder)
    with pytest.raises(UserError) as told:
        hf.open_checkpoint(folder)
    assert words in str(told.value) and str(folder) in str(told.value) and "\n" not in str(told.value)


def test_adapters_of_adapters(tmp_path):
    base = base_of(tmp_path / "base")
    first = adapter_of(tmp_path / "first", base, pair(base, MODULES))
    second = adapter_of(tmp_path / "second", first, pair(base, MODULES))
    with pytest.raises(UserError, match="adapters again"):
        hf.open_checkpoint(second)
