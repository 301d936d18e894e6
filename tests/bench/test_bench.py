"""The benchmarks' formulas, files and processes at tiny sizes. What they measure is no matter of a test."""

import dataclasses
import importlib.util
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from flax import nnx

from mmprm_jax.bench import accelerator, common, rollout, train
from mmprm_jax.fit import cost
from mmprm_jax.models import build, hf_config
from mmprm_jax.records import UserError
from mmprm_jax.spawn import Child

WIDE = dict(hidden_size=128, num_heads=4, intermediate_size=192)  # matrix products dominate


def one_layer(vision=False):
    """XLA counts the body of a scan over layers once."""
    decoder = dataclasses.replace(TINY.decoder, **WIDE, num_kv_heads=2, head_dim=32, num_layers=1, vocab_size=256)
    tower = dataclasses.replace(TINY.vision, **WIDE, num_layers=1, image_size=32) if vision else None
    return dataclasses.replace(TINY, vision=tower, decoder=decoder)


def xla_flops(f, *args):
    return jax.jit(f).lower(*args).compile().cost_analysis()["flops"]


def test_decoder_flops(mesh):
    cfg, rows, length = one_layer(), 2, 64
    graphdef, params = build.abstract(cfg, 0, mesh)
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def forward(params, tokens):
        model = nnx.merge(graphdef, params)
        return model.decoder.logits(model(tokens, tokens >= 0, None)[0])

    # The reference computes whole squares of scores, masked above the diagonal.
    want = cost.decoder_flops(cfg.decoder, rows * length, rows * length**2, rows * length)
    assert xla_flops(forward, params, tokens) == pytest.approx(want, rel=0.04)


def test_vision_flops(mesh):
    cfg = one_layer(vision=True)
    graphdef, params = build.abstract(cfg, 0, mesh)
    pixels = jax.ShapeDtypeStruct((1, 3, cfg.tile, cfg.tile, 3), jnp.float32)
    found = xla_flops(lambda params, pixels: nnx.merge(graphdef, params).embed_images(pixels), params, pixels)
    assert found == pytest.approx(cost.vision_flops(cfg, 3), rel=0.08)
    assert cost.vision_flops(one_layer(), 3) == cost.vision_flops(cfg, 0) == 0


def test_rollout_flops():
    cfg, prefix, new = one_layer(), 5, 4
    # By hand: 5 tokens of the prefix, 3 of each of 7 samples; the fourth is drawn and not computed on.
    pairs = 1 + 2 + 3 + 4 + 5 + 7 * (6 + 7 + 8)
    want = 2 * cost.decoder_flops(cfg.decoder, 5 + 7 * 3, pairs, 1 + 7 * 3)
    assert cost.rollout_flops(cfg, 2, 7, prefix, new) == want


def test_train_flops():
    cfg, logits = one_layer(vision=True), 3
    pairs = 8 * 9 // 2
    decoder = 2 * cost.decoder_flops(cfg.decoder, 8, pairs, logits)
    # the projector goes backwards, too: towards its weights and towards its inputs
    projector = 5 * 2 * cfg.tokens_per_tile * 128 * (128 * 4 + 128)
    want = 3 * decoder + cost.vision_flops(cfg, 5) + 2 * projector
    assert cost.train_flops(cfg, 2, 8, 5, logits) == want
    assert cost.train_flops(one_layer(), 2, 8, 0, 0) == 3 * 2 * cost.decoder_flops(cfg.decoder, 8, pairs, 0)


def test_local_bytes(mesh_of):
    mesh = mesh_of(data=2, tensor=2)
    _, params = build.abstract(one_layer(), 0, mesh, jnp.bfloat16)
    d = params["decoder"]
    assert cost.local_bytes(d["layers"]["mlp"]["gate"]) == 128 * 192 * 2 / 2
    assert cost.local_bytes([d["norm"], d["norm"]]) == 2 * 128 * 2


def count(first):
    """What a child does."""
    yield first
    yield first + 1
    raise ValueError("three")


def test_child():
    with Child(count, 1) as child:
        assert (next(child), next(child)) == (1, 2)
        with pytest.raises(UserError, match="three"):
            next(child)


def test_machine(tmp_path):
    found = common.machine()
    assert found["cores"] >= 1 and found["load"] >= 0 and found["versions"]["jax"] == jax.__version__
    assert common.peak_flops(64, repeats=1) > 0 and common.copy_bandwidth(1 << 16, repeats=1) > 0
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("name", ["qwen2", "tiny_vlm"])
def test_config_of_transformers(name):
    cfg = rollout.MODELS[name]
    config = rollout.hf_config(cfg, 64)
    if cfg.vision is None:  # not a kind that is imported
        config = {**config, "architectures": ["Qwen2ForProcessRewardModel"]}
        assert hf_config.from_hf_config(config).decoder == dataclasses.replace(cfg.decoder, tied=True)
    else:
        read = hf_config.from_hf_config(config)
        assert read == dataclasses.replace(
            cfg, tile_size=cfg.tile, vision=dataclasses.replace(cfg.vision, layer_scale_init=0.1)
        )


def test_prompts():
    case = rollout.Case("", "tiny_vlm", 3, 2, 20, 4)
    tokens, pixels = rollout.prompts(case, 1)
    assert tokens.shape == (3, 20) and pixels.shape == (3, 24, 24, 3)
    assert (tokens == rollout.IMAGE).sum() == 3 * case.cfg.tokens_per_tile
    assert not np.array_equal(tokens, rollout.prompts(case, 2)[0])
    assert rollout.prompts(dataclasses.replace(case, model="qwen2"), 1)[1] is None


def test_names_of_cases():
    with pytest.raises(UserError, match="no case is called mistral; there are: qwen2, 300; "):
        rollout.run(["mistral"])


def test_decode():
    found = accelerator.decode(
        "tiny-internlm2", groups=2, samples=2, prefix=8, new=13, steps=3, layers=1, copied=1 << 16
    )
    assert found["steps"] == 6 and found["tokens_per_s"] > 0 and found["settings"]["layers"] == 1
    key_and_value = 2 * 2 * 8 * 2  # heads, their size, bytes
    assert found["fewest_bytes"]["prefix"] == 2 * 8 * key_and_value
    assert found["fewest_bytes"]["own"] == 4 * 13 * key_and_value
    json.dumps(found)


@pytest.mark.parity
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
@pytest.mark.parametrize("model", ["qwen2", "tiny_vlm"])
def test_rollout(model, monkeypatch, tmp_path):
    monkeypatch.setattr(rollout, "CASES", (rollout.Case("small", model, 2, 3, 16, 4),))
    found = rollout.run(pairs=1, topologies=())
    json.dumps(found)
    assert set(found) == {"benchmark", "machine", "sampling", "pairs", "cases", "tpu"}
    (case,) = found["cases"]
    assert case["agreement"]["greedy_tokens"] == 4 and case["agreement"]["logprob_difference"] < 1e-4
    assert case["ratio"] > 0 and 0 < case["fraction_of_peak"] < 1.5
    assert set(case["transformers"]["seconds_by_groups_per_call"]) == {"1", "2"}
    assert {"engine", "transformers", "ratio", "ratio_of_best", "flops", "peak_flops_per_s", "load"} <= set(case)


def test_training_batches():
    """Both sides get the same examples."""
    case = train.Case(rows=3, tokens=100, examples=3)
    for batch, examples in itertools.islice(train.batches(case, 0), 3):
        flat, number = [], 0
        for tokens, segment, response, pixels in zip(
            *(batch[name] for name in ("tokens", "segment", "response", "pixels")), strict=True
        ):
            for i in range(1, segment.max() + 1):
                example, at = examples[number], segment == i
                assert tokens[at].tolist() == example.tokens.tolist() and response[at].any()
                assert response[at].tolist() == example.response.tolist()
                np.testing.assert_array_equal(pixels[i - 1], example.tile)
                number += 1
            flat.append(int(segment.max()))
        assert number == len(examples) and max(flat) > 1


@pytest.mark.parity
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
def test_train():
    found = train.run(1, train.Case(rows=2, tokens=60, examples=2, median=30, steps=1))
    assert found["agreement"] < 1e-4 and found["ratio"] > 0 and found["ratio_by_length"] > 0
    assert "ratio" in train.describe(found)
    json.dumps(found)


def test_names_of_training_cases():
    with pytest.raises(UserError, match="no case is called big_vlm; there are: tiny_vlm, small_vlm"):
        train.find_case("big_vlm")
    assert all(case.cfg.decoder.head_dim == size for case, size in zip(train.CASES.values(), (16, 64), strict=True))


def test_trainings_that_differ():
    assert train._agreement({"loss": 1.0}, {"loss": 1.0}) == 0
    with pytest.raises(UserError, match="differ in their first step"):
        train._agreement({"loss": 1.0, "grad_norm": 2.0}, {"loss": 1.0, "grad_norm": 2.1})


def test_models_that_differ():
    same = rollout.Sample((1, 2), (-1.0, -2.0))
    assert rollout._agreement(same, same) == {"greedy_tokens": 2, "logprob_difference": 0.0}
    for other in (rollout.Sample((1, 3), (-1.0, -2.0)), rollout.Sample((1, 2), (-1.0, -2.1))):
        with pytest.raises(UserError, match="the models differ"):
            rollout._agreement(same, other)
