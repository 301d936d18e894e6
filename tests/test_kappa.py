"""The concentration kappa of a Beta-Binomial PRM: trained, kept by every conversion, and told with the scores."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from mmprm_jax import convert, train_prm
from mmprm_jax.data.encode import Language
from mmprm_jax.models import build, hf, hf_config
from mmprm_jax.models.config import DecoderConfig, VLMConfig
from mmprm_jax.models.tokenizer import Tokenizer
from mmprm_jax.prm import PRM, score_file
from mmprm_jax.records import Node, Problem, Rollout, Tree, UserError

QUESTION = "What is 3 + 4 - 1?"
STEPS = ("<step> 3 + 4 = 7 </step>", "<step> 7 - 1 = 6 </step>", "<answer> 6 </answer>")
WRONG = (STEPS[0], "<answer> 8 </answer>")
TOKENIZER = Tokenizer.train_bpe([QUESTION, *STEPS], 400)
SIZES = DecoderConfig(
    vocab_size=len(TOKENIZER), hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6,
    intermediate_size=24, rope_theta=100.0,
)  # fmt: skip


def tree(name, right):
    rollouts = (Rollout(STEPS, True, 9), Rollout(WRONG, False, 7))
    later = (Rollout(STEPS[1:], True, 6), Rollout(WRONG[1:], False, 4))
    nodes = (Node(-1, (), 1, 2, 1, rollouts), Node(0, STEPS[:1], right, 2, 0, later))
    return Tree(Problem(name, QUESTION, "6"), nodes, ((0, 1),))


@pytest.fixture
def prm(tmp_path, mesh):
    """Trained on Beta-Binomial labels from a policy of ours."""
    cfg = VLMConfig(None, SIZES, remat="none")
    language = Language.own(TOKENIZER, cfg)
    _, params = build.initialise(cfg, -1, 0, mesh)
    loaded = convert.from_scratch(cfg, TOKENIZER, params, mesh)
    named = {hf_config.TEMPLATES: dict(zip(("policy", "prm"), language.templates, strict=True))}
    model = dataclasses.replace(loaded.model, config={**loaded.model.config, **named})
    convert.write_folder(tmp_path / "policy", dataclasses.replace(loaded, model=model), TOKENIZER)
    settings = dict(steps=2, batch_size=2, max_length=120, label="beta_binomial", checkpoint_every=2)
    train_prm(tmp_path / "policy", [tree(f"p{i}", i % 3) for i in range(4)], tmp_path / "prm", mesh=mesh, **settings)
    return PRM.from_pretrained(tmp_path / "prm", mesh=mesh)


def wanted(prm):
    """kappa from hidden states of a plain forward pass, and the head written out."""
    ids, marks = prm.language.solution(QUESTION, STEPS, [])
    model = nnx.merge(build.abstract(prm.language.cfg, -1, prm.mesh)[0], prm.params)
    hidden, _ = model(jnp.array([ids]), jnp.ones((1, len(ids)), bool), None)
    head = jax.device_get(prm.params["kappa"])
    return np.log1p(np.exp(np.asarray(hidden)[0, marks] @ head["kernel"][:, 0] + head["bias"])) + 1e-3


def test_kappa_is_kept_by_training_conversions_and_scores(prm, tmp_path, mesh):
    assert np.abs(jax.device_get(prm.params["kappa"]["kernel"])).max() > 0  # it was trained
    with jax.set_mesh(mesh):
        kappa = wanted(prm)
        scores, found = prm.scores_and_kappas(QUESTION, [STEPS, STEPS[:1], STEPS])
    np.testing.assert_allclose(found[0], kappa, rtol=1e-5)
    assert (
        found[2] == found[0]
        and len(found[1]) == 1
        and scores == prm.score_candidates(QUESTION, [STEPS, STEPS[:1], STEPS])
    )

    convert.convert(str(tmp_path / "prm"), str(tmp_path / "hf"), mesh, layout="hf", verify=True)
    assert set(load_file(tmp_path / "hf/kappa/model.safetensors")) == {"kappa.weight", "kappa.bias"}
    assert not any("kappa" in key for key in load_file(tmp_path / "hf/model.safetensors"))
    convert.convert(str(tmp_path / "hf"), str(tmp_path / "ours"), mesh, verify=True)
    convert.convert(str(tmp_path / "ours"), str(tmp_path / "back"), mesh, verify=True)
    for folder in ("hf", "ours", "back"):
        again = PRM.from_pretrained(tmp_path / folder, mesh=mesh)
        np.testing.assert_allclose(again.scores_and_kappas(QUESTION, [STEPS])[1], [kappa], rtol=1e-5, err_msg=folder)
    half = PRM.from_pretrained(tmp_path / "hf", mesh=mesh, dtype="bfloat16")
    np.testing.assert_allclose(half.scores_and_kappas(QUESTION, [STEPS])[1], [kappa], rtol=0.05)

    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"id": "a", "question": QUESTION, "candidates": [STEPS, WRONG]}) + "\n")
    score_file(again, "back", rows, tmp_path / "scores.jsonl")
    row = json.loads((tmp_path / "scores.jsonl").read_text())
    np.testing.assert_allclose(row["kappa"][0], kappa, rtol=1e-5)
    assert [len(x) for x in row["kappa"]] == [len(x) for x in row["scores"]] == [3, 2]
    assert list(row) == ["id", "scores", "kappa", "model", "template"]


def test_a_training_goes_on_from_kappa_or_without_it(prm, tmp_path, mesh):
    start = convert.warm_start(tmp_path / "prm", mesh, prm=True, kappa=True)
    np.testing.assert_array_equal(start.params["kappa"]["kernel"], prm.params["kappa"]["kernel"])
    plain = convert.warm_start(tmp_path / "prm", mesh, prm=True)
    assert "kappa" not in plain.params and not plain.cfg.kappa
    model = hf.with_kappa(plain.loaded.model, False)
    assert hf_config.KAPPA not in model.config and not model.cfg.kappa and hf.KAPPA_FILE not in model.manifest.files
    assert hf.with_kappa(model, True).config == start.loaded.model.config


def lost(folder):
    (folder / "kappa/model.safetensors").unlink()


def reshaped(folder):
    save_file({"kappa.weight": np.ones((1, 3)), "kappa.bias": np.ones(1)}, folder / "kappa/model.safetensors")


def misspelt(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {hf_config.KAPPA: "yes"}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [(lost, "1 of 2 weight files are missing: kappa"), (reshaped, "kappa.weight is"), (misspelt, "true or false")],
)
def test_a_damaged_head_is_not_left_out_in_silence(damage, words, tmp_path, mesh):
    cfg = VLMConfig(None, SIZES, remat="none", kappa=True)
    _, params = build.initialise(cfg, -1, 0, mesh)
    loaded = convert.from_scratch(cfg, TOKENIZER, params, mesh)
    hf.save(tmp_path / "hf", params, mesh, hf.with_kappa(loaded.model, True))
    assert hf.open_checkpoint(tmp_path / "hf").model.cfg.kappa
    damage(tmp_path / "hf")
    with pytest.raises(UserError, match=words):
        hf.open_checkpoint(tmp_path / "hf")
