"""What training writes, from scratch or from a release: one kind of model folder, for us and for transformers.

Scores of our own models are compared with the pipeline's own (``Language``, ``Scorer``), exports with ``transformers``
itself (``pytest -m parity``).
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from mmprm_jax import convert
from mmprm_jax.data import digits, images
from mmprm_jax.data.encode import Language
from mmprm_jax.evaluation.score import Scorer, Solutions
from mmprm_jax.models import build, hf, hf_config, hf_native
from mmprm_jax.models.config import DecoderConfig, VisionConfig, VLMConfig
from mmprm_jax.models.tokenizer import Tokenizer
from mmprm_jax.prm import PRM, score_file
from mmprm_jax.records import UserError

QUESTION = digits.QUESTION
SEGMENTS = ("<step> 3 + 4 = 7 </step>", "<step> 7 - 1 = 6 </step>", "<answer> 6 </answer>")
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 40, 3), np.uint8))
MAX_TILES = 3
VISION = VisionConfig(
    image_size=8, patch_size=2, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24, layer_scale_init=0.5
)
DECODER = DecoderConfig(
    hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, intermediate_size=24, rope_theta=100.0
)
BPE = Tokenizer.train_bpe([QUESTION, *SEGMENTS], 400)


def language_of(tokenizer, vision=VISION, **decoder):
    """A PRM's, with a vocabulary as large as the tokenizer, as runs have it."""
    cfg = VLMConfig(vision, dataclasses.replace(DECODER, vocab_size=len(tokenizer), **decoder), remat="none")
    return Language.own(tokenizer, cfg).with_prm()


def params_of(cfg, image_token, mesh):
    """Random ones; norms and biases off one and zero."""
    _, params = build.initialise(cfg, image_token, 0, mesh)
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    noisy = [x + 0.1 * rng.standard_normal(x.shape, np.float32) for x in leaves]
    return jax.tree.unflatten(tree, noisy)


def trained(folder, language, mesh):
    """The folder that a training stage leaves (``stages.training.train``), with random weights. Returns these."""
    params = params_of(language.cfg, language.image_token, mesh)
    loaded = convert.from_scratch(language.cfg, language.tokenizer, params, mesh)
    named = dict(zip(("policy", "prm"), language.templates, strict=True))
    config = {**loaded.model.config, hf_config.TEMPLATES: named, "max_dynamic_patch": MAX_TILES}
    loaded = dataclasses.replace(loaded, model=dataclasses.replace(loaded.model, config=config))
    convert.write_folder(folder, loaded, language.tokenizer)
    return params


def pipeline_scores(language, params, mesh, pixels):
    """As the stage ``evaluate`` computes them."""
    graphdef, _ = build.abstract(language.cfg, language.image_token, mesh)
    scorer = Scorer(graphdef, params, mesh, language.classes, problems=1, solutions=4)
    tiles = 0 if pixels is None else len(pixels)
    return scorer.score([Solutions([language.solution(QUESTION, SEGMENTS, tiles)], pixels)])[0][0]


def exported(folder, mesh):
    """The folder, its files as transformers has them, and Orbax again."""
    out = [folder, *(folder.with_name(f"{folder.name}_{name}") for name in ("files", "hf", "again"))]
    convert.convert(str(folder), str(out[1]), mesh, verify=True)
    convert.convert(str(folder), str(out[2]), mesh, verify=True, layout="hf")
    convert.convert(str(out[2]), str(out[3]), mesh, verify=True)
    return out


OWN = {
    "word-level, as digits.py": (digits.tokenizer(), {}),
    "byte-level": (BPE, {}),
    "text only": (BPE, {"vision": None}),
    "qwen2's biases, tied": (BPE, {"qkv_bias": True, "tied": True}),
}


@pytest.mark.parametrize("name", OWN)
def test_a_model_of_our_own_scores_the_same_through_every_path(name, tmp_path, mesh):
    tokenizer, sizes = OWN[name]
    language = language_of(tokenizer, **sizes)
    params = trained(tmp_path / "prm", language, mesh)
    pictures = [PICTURE] if language.cfg.vision else []
    pixels = images.tiles(PICTURE, MAX_TILES, language.cfg.tile) if pictures else None
    assert pixels is None or len(pixels) == 4  # with the thumbnail
    wanted = pipeline_scores(language, params, mesh, pixels)
    assert np.std(wanted) > 1e-3
    for folder in exported(tmp_path / "prm", mesh):
        prm = PRM.from_pretrained(folder, mesh=mesh)
        assert prm.template == "own" and (not pictures or prm.settings["max_tiles"] == MAX_TILES)
        np.testing.assert_allclose(prm.score(QUESTION, SEGMENTS, images=pictures), wanted, rtol=0, atol=1e-6)
        bare = [" 3 + 4 = 7 ", " 7 - 1 = 6 ", SEGMENTS[2]]  # a step without tags is a step
        np.testing.assert_allclose(prm.score(QUESTION, bare, images=pictures), wanted, rtol=0, atol=1e-6)
    row = {"id": "a", "question": QUESTION, "images": ["a.png"] if pictures else [], "candidates": [SEGMENTS]}
    PICTURE.save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    score_file(prm, "prm", tmp_path / "rows.jsonl", tmp_path / "out.jsonl")
    found = json.loads((tmp_path / "out.jsonl").read_text())
    assert found["template"] == "own"
    np.testing.assert_allclose(found["scores"][0], wanted, rtol=0, atol=1e-6)


def test_no_text_brings_in_a_score(tmp_path, mesh):
    """Of a word-level tokenizer every special token in a step is one, but for ``<prm>``."""
    trained(tmp_path / "prm", language_of(digits.tokenizer()), mesh)
    prm = PRM.from_pretrained(tmp_path / "prm", mesh=mesh)
    with pytest.raises(UserError, match="cannot tokenise"):
        prm.score(QUESTION, ["<step> <prm> 3 + 4 = 7 </step>"], images=[])


def test_the_next_run_takes_a_policy_of_our_own(tmp_path, mesh):
    """``config.policy`` and ``annotate.policy``: the prompts of its training, and ``<prm>`` where it is missing."""
    policy = Language.own(BPE, VLMConfig(VISION, dataclasses.replace(DECODER, vocab_size=len(BPE)), remat="none"))
    params = trained(tmp_path / "sft", policy, mesh)
    folder, model = convert.inspect(tmp_path / "sft")
    again = Language.stored(Tokenizer.load(folder), model.cfg, model.config)
    assert again.templates == ("own", "own")
    assert again.prompt(QUESTION, SEGMENTS[:1], 4) == policy.prompt(QUESTION, SEGMENTS[:1], 4)
    start = convert.warm_start(tmp_path / "sft", mesh, prm=True, remat="none")
    grown = build.add_token(params, mesh)
    jax.tree.map(np.testing.assert_array_equal, start.params, grown)
    wanted = policy.with_prm()
    assert start.cfg.decoder.vocab_size == wanted.cfg.decoder.vocab_size == len(BPE) + 1
    found = Language.stored(start.tokenizer, start.cfg, start.loaded.model.config)
    assert found.solution(QUESTION, SEGMENTS, 4) == wanted.solution(QUESTION, SEGMENTS, 4)


@pytest.mark.parametrize(
    ("flags", "family"),
    [
        ((), "LlamaForCausalLM"),
        (("qkv_bias", "out_bias"), "LlamaForCausalLM"),
        (("qkv_bias", "out_bias", "mlp_bias"), "LlamaForCausalLM"),
        (("mlp_bias",), "LlamaForCausalLM"),
        (("qkv_bias",), "Qwen2ForCausalLM"),
        (("qk_norm",), "Qwen3ForCausalLM"),
        (("qk_norm", "qkv_bias", "out_bias"), "Qwen3ForCausalLM"),
        (("out_bias",), None),
        (("qkv_bias", "mlp_bias"), None),
        (("qk_norm", "mlp_bias"), None),
        (("qk_norm", "qkv_bias"), None),
    ],
)
def test_every_decoder_is_one_of_transformers_or_refused(flags, family):
    cfg = language_of(BPE, vision=None, **dict.fromkeys(flags, True)).cfg
    if family is None:
        with pytest.raises(UserError, match=f"no language model of transformers has just .*{flags[0]}"):
            hf_native.describe(cfg, BPE, jnp.float32)
        return
    model = hf_native.describe(cfg, BPE, jnp.float32)
    assert model.config["architectures"] == [family]
    assert dataclasses.replace(model.cfg, remat="none") == cfg


def test_what_transformers_cannot_compute_is_refused():
    cfg = language_of(BPE).cfg
    norms = dataclasses.replace(cfg.vision, norm="rms_norm", qk_norm=True, qk_norm_eps=1e-5)
    for wrong, words in (
        (dataclasses.replace(cfg, vision=norms), "epsilon 1e-6, not 1e-05"),
        (dataclasses.replace(cfg, num_labels=2), "score head"),
    ):
        with pytest.raises(UserError, match=words) as told:
            hf_native.describe(wrong, BPE, jnp.float32)
        assert "\n" not in str(told.value)
    with pytest.raises(UserError, match="model.tile_size is 16"):
        convert.from_scratch(dataclasses.replace(cfg, tile_size=16), BPE, {}, None)


def test_large_weights_are_filed_in_several(monkeypatch, tmp_path, mesh):
    monkeypatch.setattr(hf_native, "SHARD_BYTES", 20_000)
    trained(tmp_path / "prm", language_of(BPE), mesh)
    _, _, native, _ = exported(tmp_path / "prm", mesh)
    files = sorted(native.glob("model-*.safetensors"))
    assert (
        len(files) > 2
        and (native / hf.INDEX).exists()
        and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    )
    sizes = [sum(x.nbytes for x in load_file(f).values()) for f in files]
    assert all(size <= 20_000 or len(load_file(f)) == 1 for f, size in zip(files, sizes, strict=True))


def test_weights_that_an_earlier_version_left(tmp_path, mesh):
    trained(tmp_path / "train_prm", language_of(BPE), mesh)
    for path in (tmp_path / "train_prm/hf").iterdir():
        path.unlink()
    (tmp_path / "train_prm/tokenizer.json").write_text("{}")
    for read in (PRM.from_pretrained, convert.inspect):
        with pytest.raises(UserError, match="without a description.*run the stage again") as told:
            read(tmp_path / "train_prm")
        assert "\n" not in str(told.value)


@pytest.mark.parametrize("named", ["own", {"prm": 3}, ["own", "own"], None])
def test_a_config_that_names_no_templates(named):
    config = {"architectures": ["InternVLForConditionalGeneration"], hf_config.TEMPLATES: named}
    with pytest.raises(UserError, match="must hold the names of two templates"):
        hf_config.templates(config)


# ------------------------------------------------------------------------------------------ transformers itself


@pytest.fixture(scope="module")
def transformers_model():
    """Loads a folder with transformers; nothing may be missing or left over."""
    pytest.importorskip("torch")
    import torch
    import transformers

    def load(folder):
        config = hf.read_json(folder / "config.json")
        assert not list(folder.glob("*.py")) and "auto_map" not in config
        kind = getattr(transformers, config["architectures"][0])
        model, told = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not any(told.values()), told
        return model.eval()

    return load


def transformers_scores(model, language, pixels):
    """Scores by transformers' logits at the positions of the steps."""
    import torch

    ids, marks = language.solution(QUESTION, SEGMENTS, 0 if pixels is None else len(pixels))
    inputs = {"input_ids": torch.tensor([ids])}
    if pixels is not None:
        inputs["pixel_values"] = torch.tensor(images.normalise(pixels).transpose(0, 3, 1, 2))
    with torch.no_grad():
        logits = model(**inputs).logits[0, marks].numpy()
    yes, no = language.classes
    return 1 / (1 + np.exp(logits[:, no] - logits[:, yes]))


@pytest.mark.parity
@pytest.mark.parametrize("name", OWN)
def test_transformers_scores_a_model_of_our_own(name, tmp_path, mesh, transformers_model):
    import transformers
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    tokenizer, sizes = OWN[name]
    language = language_of(tokenizer, **sizes)
    params = trained(tmp_path / "prm", language, mesh)
    folder = exported(tmp_path / "prm", mesh)[2]
    pixels = images.tiles(PICTURE, MAX_TILES, language.cfg.tile) if language.cfg.vision else None
    wanted = pipeline_scores(language, params, mesh, pixels)
    np.testing.assert_allclose(transformers_scores(transformers_model(folder), language, pixels), wanted, rtol=1e-4)
    if pixels is not None:  # AutoProcessor itself needs torchvision, for videos
        processor = GotOcr2ImageProcessorPil.from_pretrained(folder)
        found = processor(PICTURE, return_tensors="np")["pixel_values"]
        np.testing.assert_allclose(found, images.normalise(pixels).transpose(0, 3, 1, 2), atol=1e-5)
    ids, _ = language.solution(QUESTION, SEGMENTS, 0 if pixels is None else len(pixels))
    same = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(same) == len(language.tokenizer) and same.pad_token_id == language.tokenizer.pad
    assert same.encode(language.tokenizer.decode(ids), add_special_tokens=False) == ids


def chat(internlm2, tokenizer, **vision):
    """config.json of InternVLChatModel; 12 tokens are the trained length."""
    text = {
        "architectures": ["InternLM2ForCausalLM" if internlm2 else "Qwen2ForCausalLM"], "vocab_size": len(tokenizer),
        "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 6, "num_hidden_layers": 2,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 12,
        "rope_scaling": {"type": "dynamic", "factor": 2.0}, "tie_word_embeddings": False,
    }  # fmt: skip
    tower = dict(
        hidden_size=32, image_size=28, intermediate_size=80, norm_type="layer_norm", num_attention_heads=4,
        num_hidden_layers=2, patch_size=7, qk_normalization=False, qkv_bias=True,
    ) | vision  # fmt: skip
    return {
        "architectures": ["InternVLChatModel"], "downsample_ratio": 0.5, "force_image_size": 28, "auto_map": {"x": "y"},
        "dynamic_image_size": True, "use_thumbnail": True, "max_dynamic_patch": MAX_TILES,
        "vision_config": tower, "llm_config": text,
    }  # fmt: skip


@pytest.mark.parity
@pytest.mark.parametrize(
    ("kind", "vision"),
    [
        ("internlm2_nodummy_prm", {}),
        ("qwen2", {}),
        ("qwen2", {"image_size": 42}),  # positions of 6 x 6 patches, tiles of 4 x 4
        ("internlm2_dummy_prm", {"norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False}),
    ],
)
def test_transformers_scores_an_exported_release(kind, vision, golden, tmp_path, mesh, transformers_model):
    """Also beyond the trained length, where rotary positions scale."""
    import transformers

    tokenizer = Tokenizer.load(golden / "tokenizer" / kind)
    config = chat(kind.startswith("internlm2"), tokenizer, **vision)
    source = tmp_path / "source"
    empty = hf.Manifest({"model.safetensors": {"metadata": None, "tensors": {}}}, None)
    keys = [key for group in hf.describe(config, empty).groups for key, _, _ in group.tensors()]
    files = {"model.safetensors": {"metadata": {"format": "pt"}, "tensors": dict.fromkeys(keys, "F32")}}
    model = hf.describe(config, hf.Manifest(files, None))
    hf.save(source, params_of(model.cfg, tokenizer.id("<IMG_CONTEXT>"), mesh), mesh, model)
    tokenizer.save(source)
    (source / "modeling_x.py").write_text("raise SystemExit")
    told = convert.convert(str(source), str(tmp_path / "hf"), mesh, verify=True, layout="hf")
    convert.convert(str(source), str(tmp_path / "ours"), mesh)
    convert.convert(str(tmp_path / "ours"), str(tmp_path / "hf2"), mesh, layout="hf")
    assert load_file(tmp_path / "hf/model.safetensors").keys() == load_file(tmp_path / "hf2/model.safetensors").keys()
    language = Language.stored(tokenizer, model.cfg, config)
    pixels = images.tiles(PICTURE, MAX_TILES, language.cfg.tile)
    before = PRM.from_pretrained(source, mesh=mesh).score(QUESTION, SEGMENTS, images=[PICTURE])
    assert np.std(before) > 1e-3
    np.testing.assert_allclose(
        transformers_scores(transformers_model(tmp_path / "hf"), language, pixels), before, rtol=1e-4
    )
    after = PRM.from_pretrained(tmp_path / "hf", mesh=mesh)
    assert after.template == "mm_prm" and after.settings["max_tiles"] == MAX_TILES
    np.testing.assert_allclose(after.score(QUESTION, SEGMENTS, images=[PICTURE]), before, rtol=0, atol=1e-6)
    if kind == "qwen2":
        ids, _ = language.solution(QUESTION, SEGMENTS, len(pixels))
        same = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
        assert same.encode(tokenizer.decode(ids), add_special_tokens=False) == ids
    else:
        assert "remote code only" in told
