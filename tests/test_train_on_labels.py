"""A PRM trained on step labels that others made: of files alone, and beside trees. Models are tiny and random."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image
from test_manifest import opened, tiny_config
from test_policy import QUESTION, STEPS, VISION, tree, write

from mmprm_jax import PRM, cli, convert, open_run, records, schema, stages, train_prm
from mmprm_jax.records import StepExample, UserError
from mmprm_jax.settings import Config, TrainPRM
from mmprm_jax.sharding import make_mesh

SETTINGS = dict(steps=4, batch_size=4, max_length=80, row_tiles=4, checkpoint_every=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, mesh_of):
    return write(tmp_path_factory.mktemp("policy") / "model", VISION, mesh_of(data=1))


@pytest.fixture
def data(tmp_path):
    """A folder with trl.jsonl, raw.jsonl and bad ones, as `mmprm prepare` makes them of others' rows."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    trl = [{"prompt": QUESTION, "completions": ["3 + 4 = 7", f"So {i}"], "labels": [True, 0.1 * i]} for i in range(6)]
    raw = [
        {"image": "VisualPRM400K-v1.1-Raw/a.png", "question": f"<image>\nWhat is 3 + {i}?", "steps_with_score": [
            {"step": "3 + 4 = 7", "score": i / 16, "num_mc_correct": i, "num_mc_total": 16},
            {"step": "So 7.", "score": 0.0, "num_mc_correct": 0, "num_mc_total": 0},
            {"step": "7", "score": 0.5, "num_mc_correct": 8, "num_mc_total": 16}]}
        for i in range(6)
    ]  # fmt: skip
    for name, source, rows in (("trl", "trl_stepwise", trl), ("raw", "visualprm400k_raw", raw)):
        path = tmp_path / f"{name}_rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        cli.run(["prepare", source, str(path), f"--output={tmp_path}", f"--name={name}"])
    return tmp_path


def loads_and_converts(folder, prm, mesh):
    """The scores of the PRM, through every way that it is loaded again."""
    pictures = [Image.new("RGB", (8, 8), "blue")]
    wanted = prm.score(QUESTION, STEPS, images=pictures)
    assert all(0 < score < 1 for score in wanted)
    files = folder.with_name(f"{folder.name}_files")
    convert.convert(str(folder), str(files), mesh, verify=True)
    for path in (folder, files):
        found = PRM.from_pretrained(path, mesh=mesh).score(QUESTION, STEPS, images=pictures)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


def exported_and_read_again(source, images, out):
    """For every format, the number of labels that came back."""
    counts = []
    for form, name in (("trl", "trl_stepwise"), ("mm_prm", "mm_prm"), ("visualprm", "visualprm400k_raw")):
        rows = out / form / "rows.jsonl"
        cli.run(["export", str(source), str(rows), f"--format={form}", f"--images={images}"])
        cli.run(["prepare", name, str(rows), f"--output={out / form}"])
        found = records.read_all(out / form / "labels.jsonl", StepExample)
        counts.append(sum(n > 0 for example in found for n in example.n))
    return counts


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(stages.run, "make_mesh", lambda shape: make_mesh(shape, jax.devices()[:1]))


@pytest.mark.slow
def test_on_rows_of_trl_alone(folder, data, mesh, tmp_path, one_device):
    """With a policy that is there, no problems and no other stage are needed."""
    labelled = schema.given(TrainPRM, dict(trees=False, files=("trl.jsonl",), **SETTINGS))
    config = dataclasses.replace(Config(policy=str(folder), max_tiles=2), train_prm=labelled)
    config = dataclasses.replace(
        config, sft=dataclasses.replace(config.sft, steps=0), data=dataclasses.replace(config.data, folder=str(data))
    )
    with opened(tmp_path / "run", config) as run:
        stages.run_stage(run, "train_prm")
    trained = tmp_path / "run/train_prm"
    loads_and_converts(trained, open_run(tmp_path / "run").prm, mesh)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json", "train_prm", "train_prm_files"]
    assert not (trained / "examples.jsonl").exists()
    assert exported_and_read_again(data / "trl.jsonl", data, tmp_path / "out") == [12] * 3
    losses = [json.loads(line)["loss"] for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert np.all(np.isfinite(losses))


@pytest.mark.slow
@pytest.mark.parametrize("label", ["soft", "beta_binomial"])
def test_half_on_trees_and_half_on_rows_of_visualprm(folder, data, mesh, tmp_path, label):
    trees = [tree(f"p{i}", 1) for i in range(4)]
    settings = dict(files=("raw.jsonl",), weights=(1.0, 1.0), label=label, **SETTINGS)
    prm = train_prm(folder, trees, tmp_path / "prm", images=data, mesh=mesh, **settings)
    loads_and_converts(tmp_path / "prm", prm, mesh)
    examples = records.read_all(tmp_path / "prm/examples.jsonl", StepExample)
    labels = sum(n > 0 for example in examples for n in example.n)
    assert exported_and_read_again(tmp_path / "prm", data, tmp_path / "out") == [labels] * 3
    other = train_prm(folder, trees, tmp_path / "trees", images=data, mesh=mesh, label=label, **SETTINGS)
    assert other.score(QUESTION, STEPS, images=[]) != prm.score(QUESTION, STEPS, images=[])


def test_what_is_wrong_is_said_before_anything_is_trained(folder, data, mesh, tmp_path):
    def message(**settings):
        with pytest.raises(UserError) as error:
            train_prm(
                folder, settings.pop("trees", []), tmp_path / "prm", images=data, mesh=mesh, **SETTINGS | settings
            )
        return str(error.value)

    assert "trees: none, and no files: name a file of step labels" in message()
    assert "weights: 1 for the trees and 1 files" in message(trees=[tree("p", 1)], files=("raw.jsonl",), weights=(1.0,))
    assert "no.jsonl: no such file" in message(files=("no.jsonl",))
    found = message(files=("trl.jsonl",), label="beta_binomial")
    assert (
        f"{data / 'trl.jsonl'}, line 2: " in found and "has a label that is no count, but train_prm.label=beta" in found
    )
    lines = (data / "raw.jsonl").read_text().splitlines()
    (data / "gone.jsonl").write_text(f"{lines[0]}\n\n{lines[1].replace('images/', 'lost/')}\n")
    found = message(files=("gone.jsonl",))
    assert f"{data / 'gone.jsonl'}, line 3: " in found and "image not found" in found
    row = json.loads(lines[0]) | {"k": [1, 2, 3]}
    (data / "bad.jsonl").write_text(f"{lines[0]}\n{json.dumps(row)}\n")
    found = message(files=("raw.jsonl", "bad.jsonl"))
    assert f"{data / 'bad.jsonl'}, line 2: " in found and "needs counts 0 <= k <= n for each of its 3 steps" in found
    (data / "empty.jsonl").write_text("")
    assert "empty.jsonl: no step has a label" in message(files=("empty.jsonl",))
    (data / "none.jsonl").write_text(json.dumps(json.loads(lines[0]) | {"k": [0] * 3, "n": [0] * 3}) + "\n")
    assert "none.jsonl: no step has a label" in message(trees=[tree("p", 1)], files=("none.jsonl",))


@pytest.mark.slow
def test_a_run_without_trees(tmp_path, one_device):
    """No search is made; the report, and what a finished run is read with, do without."""
    rows = [
        {"prompt": "Evaluate the expression .", "completions": ["<step> 3 + 4 = 7 </step>", "<answer> 7 </answer>"],
         "labels": [0.25, i % 2]} for i in range(8)
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row | {"id": i}) + "\n" for i, row in enumerate(rows)))
    cli.run(["prepare", "trl_stepwise", str(tmp_path / "rows.jsonl"), f"--output={tmp_path}"])
    workdir, path = tmp_path / "run", tmp_path / "labels.jsonl"
    config = tiny_config()
    config = dataclasses.replace(
        config, train_prm=dataclasses.replace(config.train_prm, trees=False, files=(str(path),))
    )
    with opened(workdir, config) as run:
        stages.pipeline(run)
    assert not (workdir / "annotate").exists()
    assert "no search tree: step labels of files" in (workdir / "report/index.html").read_text()
    assert [x.k for x in open_run(workdir).examples()][:2] == [(0.25, 0), (0.25, 1)]
    done = json.loads((workdir / "train_prm/done.json").read_text())
    assert done["labels"]["steps"] == 16 and done["files"] == {str(path): 8}
    assert str(path) in done["manifest"]["made_of"]
    path.write_text("")
    with pytest.raises(UserError, match="labels.jsonl: 0 bytes"), opened(workdir, config) as run:
        stages.run_stage(run, "report")
