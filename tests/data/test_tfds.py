"""TFDS builders: data_source and Grain give back the records, without TensorFlow."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mmprm_jax import cli, records
from mmprm_jax.records import Problem, StepExample, UserError

K12 = Path(__file__).parent.parent / "golden" / "mm_k12" / "mm_k12_test_24.json"
STEPS = [
    StepExample("a/1", "a", "q ü", ("<step>x</step>", "<answer>1</answer>"), (1, 0), (4, 0), ()),
    StepExample("a/2", "a", "q", (), (), ()),
]

# In a process of its own: other tests may have imported TensorFlow, if it is installed.
READ = """
import json, sys
import grain
import tensorflow_datasets as tfds
from mmprm_jax.data.tfds import MmK12, StepLabels, image
folder, data = sys.argv[1:]
MmK12(folder=folder, data_dir=data).download_and_prepare()
StepLabels(folder=folder, examples=f"{folder}/examples.jsonl", data_dir=data).download_and_prepare()
problems = tfds.data_source("mm_k12", split="test", data_dir=data)
steps = tfds.data_source("step_labels", split="train", data_dir=data)
found = {p["id"].decode(): [p["question"].decode(), p["answer"].decode(), image(p) and image(p).size] for p in problems}
labels = {s["id"].decode(): [[t.decode() for t in s["segments"]], s["k"].tolist(), s["n"].tolist(),
                             s["problem_id"].decode(), s["question"].decode(), image(s)] for s in steps}
batches = grain.MapDataset.source(problems).shuffle(seed=1).map(lambda p: p["id"]).batch(8)
ids = [i.decode() for batch in batches for i in batch]
loader = grain.MapDataset.source(steps).map(lambda s: int(s["k"].sum())).to_iter_dataset()
print(json.dumps([found, labels, ids, list(loader), "tensorflow" in sys.modules]))
"""


def test_data_source_and_grain_read_what_was_written(tmp_path):
    folder = tmp_path / "in"
    cli.run(["prepare", "mm_k12", str(K12), "--split=test", f"--output={folder}"])
    records.write(folder / "examples.jsonl", STEPS)
    done = subprocess.run([sys.executable, "-c", READ, str(folder), str(tmp_path / "tfds")], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    found, labels, ids, sums, tensorflow = json.loads(done.stdout.splitlines()[-1])
    problems = list(records.read(folder / "test.jsonl", Problem))
    assert {p.id: [p.question, p.answer] for p in problems} == {i: v[:2] for i, v in found.items()}
    assert all(size for *_, size in found.values()) and sorted(ids) == sorted(found) and ids != sorted(ids)
    assert labels == {e.id: [list(e.segments), list(e.k), list(e.n), e.problem_id, e.question, None] for e in STEPS}
    assert sorted(sums) == [0, 1] and not tensorflow
    assert list((tmp_path / "tfds" / "mm_k12").rglob("*.array_record-*"))


def test_labels_that_are_no_counts_are_refused(tmp_path):
    from mmprm_jax.data.tfds import StepLabels

    records.write(tmp_path / "labels.jsonl", [STEPS[0], StepExample("b", "p", "q", ("s",), (0.3,), (1,))])
    builder = StepLabels(folder=tmp_path, examples=tmp_path / "labels.jsonl", data_dir=tmp_path / "tfds")
    with pytest.raises(UserError, match="labels.jsonl: b has a label that is no count"):
        builder.download_and_prepare()


def test_a_folder_without_records_is_reported(tmp_path):
    from mmprm_jax.data.tfds import MmK12

    with pytest.raises(UserError, match="mmprm prepare mm_k12 writes them"):
        MmK12(folder=tmp_path, data_dir=tmp_path / "tfds").download_and_prepare()
