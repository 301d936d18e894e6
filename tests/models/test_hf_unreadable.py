"""Folders as trainings and quantisers leave them: one line says what they are and what to do."""

import json

import numpy as np
import pytest
from random_checkpoints import chat_config, random_checkpoint
from safetensors.numpy import load_file, save_file

from mmprm_jax import convert
from mmprm_jax.models import hf, hf_config
from mmprm_jax.models.released import released_config
from mmprm_jax.records import UserError

CONFIG = chat_config(released_config("tiny-qwen2"), "Qwen2ForCausalLM")
LAYER = "language_model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path):
    return random_checkpoint(tmp_path / "source", hf_config.from_hf_config(CONFIG), CONFIG)


def rewrite(change):
    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return apply


def quantised(method, section=None, **added):
    def apply(folder):
        config = json.loads((folder / "config.json").read_text())
        place = config[section] if section else config
        if method:
            place["quantization_config"] = {"quant_method": method, "bits": 4}
        (folder / "config.json").write_text(json.dumps(config))

        def change(tensors):
            tensors.pop(f"{LAYER}.weight")
            tensors |= {f"{LAYER}.{name}": value for name, value in added.items()}

        rewrite(change)(folder)

    return apply


def left(*names, config=True):
    """Only these files and folders, and config.json, are in the folder."""

    def apply(folder):
        (folder / "model.safetensors").unlink()
        if not config:
            (folder / "config.json").unlink()
        for name in names:
            path = folder / name
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_bytes(b"x")

    return apply


def rename(pattern, new):
    def change(tensors):
        for key in [k for k in tensors if pattern in k]:
            tensors[key.replace(pattern, new)] = tensors.pop(key)

    return rewrite(change)


def with_lora(tensors):
    weight = tensors.pop(f"{LAYER}.weight")
    tensors[f"{LAYER}.base_layer.weight"] = weight
    tensors[f"{LAYER}.lora_A.default.weight"] = np.ones((2, weight.shape[1]), np.float32)


def emptied(folder):
    (folder / "global_step12").mkdir()
    rewrite(lambda t: t.update({key: np.zeros(0, np.float32) for key in t}))(folder)


INT = np.ones((2, 2), np.int32)
CASES = {
    "unmerged adapters": (rewrite(with_lora), "LoRA adapters that are not merged.*merge_and_unload"),
    "unmerged adapters of the whole": (
        rename("language_model.model.", "language_model.base_model.model.model.base_layer."),
        "not merged",
    ),
    "awq": (quantised("awq", qweight=INT, qzeros=INT, scales=INT), "quantised weights .awq, such as .*release"),
    "gptq without settings": (quantised(None, qweight=INT, g_idx=INT), "quantised weights .such as .*g_idx"),
    "bitsandbytes": (quantised("bitsandbytes", "llm_config", absmax=INT, quant_map=INT), "bitsandbytes, such as"),
    "fp8": (quantised("fp8", weight_scale_inv=INT), "quantised weights .fp8"),
    "compressed-tensors": (quantised("compressed-tensors", weight_packed=INT), "compressed-tensors"),
    "deepspeed": (left("global_step500/zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_to_fp32.py"), "zero_to_fp32"),
    "inside of deepspeed's": (left("bf16_zero_pp_rank_0_mp_rank_00_model_states.pt", config=False), "folder above"),
    "deepspeed's empty tensors": (emptied, "tensors are empty.*zero_to_fp32"),
    "megatron": (left("mp_rank_00/model_optim_rng.pt", config=False), "Megatron"),
    "fsdp": (left("pytorch_model_fsdp_0/__0_0.distcp"), "accelerate merge-weights"),
    "distcp": (left("__0_0.distcp", ".metadata", config=False), "torch.distributed"),
    "gguf": (left("model-Q4_K_M.gguf", config=False), "llama.cpp"),
    "meta's": (left("consolidated.00.pth", "params.json", config=False), "author's own layout"),
    "tensorflow": (left("tf_model.h5"), "TensorFlow"),
    "pickle of torch": (left("model.pt"), "only pickled weights .model.pt"),
    "a folder too high": (left("snapshot/config.json", config=False), "did you mean .*snapshot"),
    "checkpoints": (left("checkpoint-900/a", "checkpoint-1000/a", "checkpoint-best/a"), "such as .*checkpoint-1000$"),
    "checkpoints alone": (left("checkpoint-5/config.json", "runs/events", config=False), "1 checkpoints.*checkpoint-5"),
    "our own folder": (left("hf/config.json", "params/x", config=False), "mmprm convert .* --layout=hf"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_says_what_it_is(case, folder):
    change, words = CASES[case]
    change(folder)
    with pytest.raises(UserError, match=words) as told:
        hf.open_checkpoint(folder)
    assert str(folder) in str(told.value) and "\n" not in str(told.value)


def frequencies(theta, size):
    return (theta ** -(np.arange(0, size, 2) / size)).astype(np.float32)


BUFFERS = {
    "frequencies": {"rotary_emb.inv_freq": lambda d: frequencies(d.rope_theta, d.head_dim)},
    "tables": {"rotary_emb.cos_cached": lambda d: INT, "rotary_emb.sin_cached": lambda d: INT},
}


@pytest.mark.parametrize("case", [*BUFFERS, "in a file of their own"])
def test_buffers_of_older_versions_are_left_out(case, folder):
    d = hf_config.from_hf_config(CONFIG).decoder
    before = load_file(folder / "model.safetensors")
    made = BUFFERS.get(case, BUFFERS["frequencies"])
    added = {f"{LAYER[:-7]}.{name}": make(d) for name, make in made.items()}
    if case in BUFFERS:
        rewrite(lambda t: t.update(added))(folder)
    else:
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        save_file(added, folder / "b.safetensors")
        weights = dict.fromkeys(before, "a.safetensors") | dict.fromkeys(added, "b.safetensors")
        (folder / hf.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    checkpoint = hf.open_checkpoint(folder)
    assert checkpoint.where.keys() == before.keys()
    for key in before:
        np.testing.assert_array_equal(hf.read_tensor(checkpoint, key), before[key])


def test_frequencies_of_another_base_are_refused(folder):
    d = hf_config.from_hf_config(CONFIG).decoder
    key = f"{LAYER[:-7]}.rotary_emb.inv_freq"
    rewrite(lambda t: t.update({key: frequencies(2 * d.rope_theta, d.head_dim)}))(folder)
    with pytest.raises(UserError, match="rotary frequencies .* are not those of config.json's rope_theta"):
        hf.open_checkpoint(folder)


LLAMA, QWEN = b'{"tokenizer_class": "LlamaTokenizer"}', b'{"tokenizer_class": "Qwen2Tokenizer"}'
BROKEN = {  # tokenizers that nothing can load, or that do not fit: a conversion must not end well
    "sentencepiece": ({"tokenizer.model": b"x", "tokenizer_config.json": LLAMA}, "'LlamaTokenizer'"),
    "damaged": ({"tokenizer.json": b"{}"}, "not a tokenizer.json"),
    "configuration alone": ({"tokenizer_config.json": QWEN}, "vocab.json is missing"),
    "tiktoken": ({"qwen.tiktoken": b"x", "tokenizer_config.json": b"{}"}, "tiktoken's ranks"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_convert_refuses_a_tokenizer_that_nothing_can_load(case, folder, tmp_path):
    files, words = BROKEN[case]
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as told:
        convert.convert(str(folder), str(tmp_path / "new"), None)
    assert "\n" not in str(told.value) and not (tmp_path / "new").exists()


def test_convert_refuses_a_tokenizer_of_another_model(golden, folder, tmp_path):
    for path in (golden / "tokenizer" / "qwen2").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="1207 tokens, and the model .* embeddings only"):
        convert.convert(str(folder), str(tmp_path / "new"), None)


def test_convert_says_that_there_is_no_tokenizer(folder, tmp_path, mesh):
    assert "there is no tokenizer in it" in convert.convert(str(folder), str(tmp_path / "new"), mesh)
