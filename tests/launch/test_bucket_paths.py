"""What a pod does with gs:// paths, in an object store in memory: no directories, no appending, renames are copies.

Orbax reaches buckets by tensorstore, not by ``etils.epath``; only the paths that it is given are tested here.
"""

import os
import pathlib

import numpy as np
import pytest
import toy_annotation as toy
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from mmprm_jax import annotation, config, convert, records
from mmprm_jax.data import digits, images
from mmprm_jax.metrics import Metrics
from mmprm_jax.metrics import read as read_metrics
from mmprm_jax.models import hf
from mmprm_jax.models.tokenizer import Tokenizer
from mmprm_jax.records import Problem, UserError
from mmprm_jax.report import report
from mmprm_jax.search.store import read_trees
from mmprm_jax.settings import Config
from mmprm_jax.training.checkpoints import absolute

DATA = digits.Settings(
    train=4, dev=2, test=2, demonstrations=3, transcriptions=2, text_only=2, habit=0.5, bracket=0.7, seed=0
)


class Bucket(MemoryFileSystem):
    """As strict as a bucket."""

    store, pseudo_dirs = {}, [""]
    protocol = ("gcs", "gs")

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(os.fspath(path).removeprefix("gs://").removeprefix("gcs://"))

    def mkdir(self, path, create_parents=True, **options):
        pass

    def makedirs(self, path, exist_ok=False):
        pass

    def glob(self, path, **options):
        return [found.lstrip("/") for found in super().glob(path, **options)]

    def _open(self, path, mode="rb", **options):
        if "a" in mode or "+" in mode:
            raise NotImplementedError("objects cannot be changed")
        return super()._open(path, mode, **options)


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(type(backend.fsspec_backend), "fs", lambda self, path: Bucket())
    monkeypatch.setattr("mmprm_jax.metrics._board", lambda *_: None)  # it has a way of its own to buckets
    yield epath.Path("gs://bucket/run")
    assert list(tmp_path.rglob("*bucket*")) == []  # nothing went to the local disk instead


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.is_dir()}


def test_the_bucket_is_one(bucket):
    bucket.mkdir(parents=True)
    assert not bucket.exists()
    (bucket / "a.tmp").write_text("x")
    (bucket / "a.tmp").replace(bucket / "a")
    assert bucket.exists() and files(bucket) == {"a": b"x"} and list(Bucket.store) == ["/bucket/run/a"]
    with pytest.raises(NotImplementedError):
        (bucket / "a").open("a")


def test_a_model_folder(bucket, golden, monkeypatch):
    """What a stage with ``config.policy`` writes beside the weights, and what the next one reads."""
    source = next(p.parent for p in sorted((golden / "models").glob("*/config.json")))
    model = hf.open_checkpoint(source).model
    written = []
    monkeypatch.setattr(convert, "save_params", lambda path, params: written.append((str(path), params)))
    params = {"w": np.zeros(2, np.float32)}
    assert not convert.is_model_folder(bucket / "sft")
    convert.write_folder(bucket / "sft", convert.Loaded(source, model, params, None))
    assert written == [("gs://bucket/run/sft/params", params)] and convert.is_model_folder("gs://bucket/run/sft")
    folder, again = convert.inspect("gs://bucket/run/sft")
    assert again == model and (folder / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_the_embedded_problem_set(bucket, tmp_path):
    digits.generate(bucket / "data", DATA)
    digits.generate(tmp_path / "data", DATA)
    assert files(bucket / "data") == files(tmp_path / "data")
    assert files(bucket / "data" / "images") == files(tmp_path / "data" / "images")
    problems = records.read_all(bucket / "data" / "train.jsonl", Problem)
    assert images.open_image(bucket / "data" / problems[0].images[0]).size == (24, 24)
    assert len(Tokenizer.load(bucket / "data" / "tokenizer.json")) > 10
    with pytest.raises(UserError, match=r"gs://bucket/run/data/none.png: image not found"):
        images.open_image(bucket / "data" / "none.png")
    with pytest.raises(UserError, match=r"gs://bucket/run/none.jsonl: no such file"):
        records.read_all(bucket / "none.jsonl", Problem)


def grow(folder, sampler, worker=0, workers=1):
    return annotation.run(
        folder, toy.problems(12), sampler, toy.settings(), toy.config(in_flight=4, checkpoint_seconds=0.0),
        worker=worker, workers=workers,
    )  # fmt: skip


def test_an_interrupted_annotation_of_two_processes_goes_on(bucket, tmp_path):
    local = epath.Path(tmp_path / "annotate")
    grow(local, toy.SeededSampler())
    folder, answered = bucket / "annotate", 0
    for worker in range(2):
        with pytest.raises(toy.Interrupted):
            grow(folder, toy.SeededSampler(limit=20), worker, 2)
    assert [path for path in folder.glob("in_flight-*.part")]
    for worker in range(2):
        sampler = toy.SeededSampler()
        assert grow(folder, sampler, worker, 2) == {}
        answered += len(sampler.answered)
    whole = toy.SeededSampler()
    grow(epath.Path(tmp_path / "again"), whole)
    assert answered < len(whole.answered)  # what was answered before was not asked again
    assert toy.files(folder) == toy.files(local)
    assert annotation.finish(folder, toy.problems(12), {}, False)["trees"] == len(read_trees(folder)) == 12
    assert not [path for path in folder.glob("*.part*")]


def test_metrics_go_on(bucket):
    for start in (0, 2):
        with Metrics(bucket / "sft", resume_step=start) as metrics:
            for step in range(start, start + 3):
                metrics.write(step, loss=np.float32(step))
    assert [row["step"] for row in read_metrics(bucket / "sft")] == [0, 1, 2, 3, 4]


def test_the_work_directory_is_tied_to_its_config(bucket):
    for _ in range(2):
        assert config.guard_workdir("gs://bucket/run", Config(seed=1)) == bucket
    (bucket / "data" / "train.jsonl").write_text("{}")
    with pytest.raises(UserError, match="seed was 1, is 2"):
        config.guard_workdir(bucket, Config(seed=2))


def test_orbax_is_given_the_bucket_and_absolute_local_paths(bucket, tmp_path):
    assert os.fspath(absolute("gs://bucket/run/sft")) == "gs://bucket/run/sft"
    assert absolute(pathlib.Path("runs/x")) == epath.Path(tmp_path / "runs" / "x")


def test_the_report(bucket):
    report.write_report(bucket / "report" / "index.html", {}, [], bucket / "data", "{}")
    assert b"</html>" in (bucket / "report" / "index.html").read_bytes()
