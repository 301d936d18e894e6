"""Problems with real figures go through all stages by commands alone (slow), and so does a released policy."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from conftest import release
from safetensors.numpy import load_file

from mmprm_jax import records
from mmprm_jax.data.prompts import step_text
from mmprm_jax.models.tokenizer import Tokenizer
from mmprm_jax.records import Problem, ScoredCandidate, SFTExample

ROOT = pathlib.Path(__file__).parent.parent
SMALL = f"--config={ROOT / 'configs' / 'small.py'}:smoke"
# Little of everything
SHORT = (
    "--config.sft.checkpoint_every=1000", "--config.train_prm.checkpoint_every=1000", "--config.evaluate.n=4",
    "--config.evaluate.calibration_problems=2", "--config.evaluate.calibration_rollouts=4",
    "--config.annotate.max_searches=2", "--config.annotate.num_rollouts=4",
)  # fmt: skip


@pytest.fixture(scope="module")
def environment():
    """With the compilation cache of all tests."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return {**env, "JAX_PLATFORMS": "cpu"}


def mmprm(environment, *words):
    """A command; its output."""
    command = [sys.executable, "-m", "mmprm_jax.main", *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr
    return done.stdout


def demonstrations(folder, answers=None):
    """For every problem one that ends right and one with another problem's answer, or one for each of ``answers``."""
    problems = [p for name in ("train", "dev", "test") for p in records.read(folder / f"{name}.jsonl", Problem)]
    found = []
    for i, p in enumerate(problems):
        for j, answer in enumerate(answers or (p.answer, problems[i - 1].answer)):
            response = f"<step>Look at it.</step><step>It comes to {answer}.</step><answer>{answer}</answer>"
            found.append(SFTExample(f"{p.id}-{j}", p.question, response, p.images))
    records.write(folder / "sft.jsonl", found)


@pytest.fixture(scope="module")
def problems(environment, golden, tmp_path_factory):
    """24 problems of MM-K12, prepared and split."""
    folder = tmp_path_factory.mktemp("problems")
    mmprm(environment, "prepare", "mm_k12", golden / "mm_k12", "--split=test", "--name=all", f"--output={folder}")
    mmprm(environment, "split", folder / "all.jsonl", "--dev=4", "--test=6")
    return folder


@pytest.mark.slow
def test_real_problems_from_nothing(environment, problems, tmp_path):
    """Several tiles for an image, a tokenizer of the folder's text, and what was learned is used by all stages."""
    demonstrations(problems)
    workdir = tmp_path / "run"
    out = mmprm(
        environment, "pipeline", SMALL, f"--workdir={workdir}", f"--config.data.folder={problems}", *SHORT,
        "--config.sft.steps=200", "--config.train_prm.steps=30", "--config.data.vocab=1024",
    )  # fmt: skip
    assert "oracle" in out and (workdir / "report" / "index.html").exists()
    made = json.loads((workdir / "sft" / "input" / "0-sft.json").read_text())
    assert made["most_tiles"] == 5 and made["tiles"] > made["count"] and not any(made["left_out"].values())
    metrics = json.loads((workdir / "report" / "metrics.json").read_text())
    assert metrics["n_problems"] == 6 and metrics["labels"]["steps"] > 0
    assert {"blank_image", "shuffled_image", "policy_shuffled_image"} == set(metrics["controls"])
    tokenizer = Tokenizer.load(workdir / "data" / "tokenizer.json")
    questions = [p.question for p in records.read(problems / "all.jsonl", Problem)]
    assert all(tokenizer.decode(tokenizer.encode_literal(q)) == q for q in questions)


@pytest.fixture(scope="module")
def released(tmp_path_factory, golden):
    """A tiny policy in the released format, random weights, with the InternLM2 tokenizer of the golden set."""
    folder = tmp_path_factory.mktemp("released") / "policy"
    files = sorted((golden / "tokenizer").glob("*/tokenizer_config.json"))
    tokenizer = next(t for t in (Tokenizer.load(f.parent) for f in files) if t.bos)
    return release(folder, golden, tokenizer)


@pytest.fixture(scope="module")
def simple(problems, tmp_path_factory):
    """The same figures with short questions, whose answer is 1 or 2."""
    folder = tmp_path_factory.mktemp("simple")
    (folder / "images").symlink_to(problems / "images")
    for name in ("train", "dev", "test"):
        rows = records.read_all(problems / f"{name}.jsonl", Problem)
        records.write(
            folder / f"{name}.jsonl",
            (Problem(p.id, f"What is x in figure {i}?", str(1 + i % 2), p.images) for i, p in enumerate(rows)),
        )
    demonstrations(folder, ("1", "2"))
    return folder


@pytest.mark.slow
def test_a_released_policy_from_sft_to_the_exported_prm(environment, simple, released, tmp_path):
    """``config.policy`` in every stage; the run's scores are those of ``PRM`` on the files that come out."""
    from mmprm_jax.prm import PRM

    workdir = tmp_path / "run"
    mmprm(
        environment, "pipeline", SMALL, f"--workdir={workdir}", f"--config.data.folder={simple}",
        f"--config.policy={released}", "--config.max_tiles=3", *SHORT, "--config.sft.steps=150",
        "--config.sft.freeze=vision,", "--config.train_prm.steps=20", "--config.train_prm.freeze=vision,",
        "--config.train_prm.lora_rank=4", "--config.annotate.max_new_tokens=64", "--config.evaluate.max_new_tokens=64",
    )  # fmt: skip
    for stage, name in (("sft", "policy"), ("train_prm", "exported")):
        mmprm(environment, "convert", workdir / stage, tmp_path / name, "--verify")
    folders = (released, tmp_path / "policy", tmp_path / "exported")
    before, policy, prm = (load_file(folder / "model.safetensors") for folder in folders)
    for key, value in prm.items():
        if key.startswith("vision_model."):  # frozen in both stages
            assert (value == before[key]).all(), key
        elif key.startswith("language_model."):  # adapters were added to the layers' matrices, all else stayed
            same = (value[: len(policy[key])] == policy[key]).all()
            assert same == (policy[key].ndim < 2 or ".layers." not in key), key
            assert (policy[key] != before[key]).any()
    scored = records.read_all(workdir / "evaluate" / "test_scored.jsonl", ScoredCandidate)
    by_id = {p.id: p for p in records.read(simple / "test.jsonl", Problem)}
    assert any(x.candidate.correct for x in scored)
    found, wanted = [], []
    for model in (workdir / "train_prm", tmp_path / "exported"):
        prm = PRM.from_pretrained(model)
        assert prm.settings["max_tiles"] == 3
        for x in scored:
            problem = by_id[x.candidate.problem_id]
            steps = [step_text(s) for s in x.candidate.segments]
            found += prm.score(problem.question, steps, images=[simple / name for name in problem.images])
            wanted += x.scores
    assert len(wanted) > 20 and np.std(wanted) > 1e-4
    np.testing.assert_allclose(found, wanted, atol=2e-5)
