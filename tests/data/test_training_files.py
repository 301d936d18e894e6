"""Files of training examples: what goes in comes out; what is damaged, incomplete or something else is told."""

import json
import weakref

import numpy as np
import pytest
from absl import logging

from mmprm_jax import io
from mmprm_jax.data import training_files
from mmprm_jax.data.training_files import Encoded, TrainingSet
from mmprm_jax.records import UserError

MADE = {"tokenizer": "abc", "max_tiles": 6, "labels": [1, 2]}


def make(i, kind, length=None):
    rng = np.random.default_rng(i)
    length = rng.integers(1, 60) if length is None else length
    tokens = rng.integers(0, 2**31 - 1, length, np.int32)
    if kind == "policy":
        labels = {"response": rng.integers(0, 2, length).astype(bool)}
    else:
        labels = {"n": rng.integers(0, 16, length, np.int32), "k": rng.integers(0, 16, length, np.int32)}
        if kind == "labels":
            labels["k"] = rng.random(length, np.float32)
    names = (f"images/ä {i}.png", "b\nc\ud800.jpg", "d.png")
    return Encoded(f"Beispiel {i}\n", tokens, labels, tuple((n, t + 1) for t, n in enumerate(names[: i % 4])))


def write(folder, kind="policy", count=50, max_tokens=60, max_tiles=6):
    return training_files.write(
        folder / "set", kind, (make(i, kind) for i in range(count)), max_tokens, max_tiles, MADE
    )


def same(a, b):
    assert (a.id, a.images) == (b.id, b.images) and a.labels.keys() == b.labels.keys()
    for x, y in [(a.tokens, b.tokens), *((a.labels[name], b.labels[name]) for name in a.labels)]:
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("kind", ["policy", "prm", "labels"])
def test_round_trip(tmp_path, kind):
    summary = write(tmp_path, kind)
    found = TrainingSet(tmp_path / "set", kind, tmp_path, MADE)
    assert found.summary == summary == io.read_sealed(tmp_path / "set.json", "")
    assert len(found) == summary["count"] == 50
    lengths = [len(make(i, kind).tokens) for i in range(50)]
    assert (summary["tokens"], summary["longest"]) == (sum(lengths), max(lengths))
    assert (summary["tiles"], summary["most_tiles"]) == (sum((0, 1, 3, 6)[i % 4] for i in range(50)), 6)
    width = summary["lengths"]["bin"]
    assert summary["lengths"]["counts"] == np.histogram(lengths, 0.5 + width * np.arange(33))[0].tolist()
    for i in np.random.default_rng(0).permutation(50):
        same(found[int(i)], make(int(i), kind))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set.array_record", "set.json"]


def test_too_large_examples_are_left_out_and_counted(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: said.append(text % values))
    summary = write(tmp_path, max_tokens=40, max_tiles=3)
    examples = [make(i, "policy") for i in range(50)]
    kept = [e for e in examples if len(e.tokens) <= 40 and e.tiles <= 3]
    long = [e for e in examples if len(e.tokens) > 40]
    assert summary["left_out"] == {"too_long": len(long), "too_many_tiles": 50 - len(kept) - len(long)}
    assert len(said) == 1 and f"{len(long)} with more than 40 tokens (the first is {long[0].id})" in said[0]
    found = TrainingSet(tmp_path / "set", "policy", "")
    assert [found[i].id for i in range(len(found))] == [e.id for e in kept]
    with pytest.raises(UserError, match=r"set.array_record: no example to train on; .*50 with more than 0 tokens"):
        write(tmp_path, max_tokens=0)
    with pytest.raises(UserError, match="no example to train on"):
        write(tmp_path, count=0)


def test_examples_are_not_held_in_memory(tmp_path):
    made = []

    def examples():
        for i in range(200):
            example = make(i, "policy")
            made.append(weakref.ref(example))
            yield example
            del example
            assert sum(ref() is not None for ref in made) < 3

    training_files.write(tmp_path / "set", "policy", examples(), 60, 6, {})


def test_an_interrupted_writer_leaves_no_set(tmp_path):
    def breaks():
        yield make(0, "policy")
        assert not (tmp_path / "set.json").exists()  # from here on a kill leaves nothing that looks whole
        raise KeyboardInterrupt

    write(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        training_files.write(tmp_path / "set", "policy", breaks(), 60, 6, MADE)
    assert not training_files.is_current(tmp_path / "set", MADE)
    with pytest.raises(UserError, match=r"set.json: no such file; .* was interrupted"):
        TrainingSet(tmp_path / "set", "policy", "")
    write(tmp_path)
    assert training_files.is_current(tmp_path / "set", MADE)
    assert not training_files.is_current(tmp_path / "set", MADE | {"tokenizer": "x"})


def read_all(folder):
    found = TrainingSet(folder / "set", "policy", "")
    return [found[i] for i in range(len(found))]


def test_damage_is_never_read_as_data(tmp_path):
    write(tmp_path)
    file = tmp_path / "set.array_record"
    whole, before, told = file.read_bytes(), read_all(tmp_path), 0
    for cut in (0, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=rf"set.array_record: {cut} bytes where set.json says {len(whole)} bytes"):
            read_all(tmp_path)
    used = np.flatnonzero(np.frombuffer(whole, np.uint8))  # the rest is padding
    for at in used[:: len(used) // 60]:
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            for a, b in zip(before, read_all(tmp_path), strict=True):
                same(a, b)
        except UserError as error:
            told += 1
            assert str(error).startswith(str(file)) and "run the stage again" in str(error)
    assert told > 30
    file.unlink()
    with pytest.raises(UserError, match="set.array_record: no file where set.json says"):
        read_all(tmp_path)


def test_a_damaged_record_is_named(tmp_path):
    write(tmp_path)
    found = TrainingSet(tmp_path / "set", "policy", "")
    for record in (b"", b"no JSON\n1234", b'{"id": "a", "images": []}\n123', b'{"id": "a"}\n12345', b"[]\n12345"):

        class Reader:
            def read(self, rows, record=record):
                return [record]

        found._reader = Reader()
        with pytest.raises(UserError, match=r"set.array_record, row 7: damaged \("):
            found[7]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[:-20], "set.json: damaged"),
        (lambda text: text.replace('"longest"', '"longer"'), "set.json: damaged .*without longest"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "set.json: format 2, this version reads 1"),
        (
            lambda text: text.replace('"count": 50', '"count": 49'),
            "array_record: damaged, 50 records instead of 49",
        ),
        (lambda text: text.replace('"kind": "policy"', '"kind": "prm"'), "examples of the kind 'prm'; 'policy' is"),
        (lambda text: text.replace('"abc"', '"xyz"'), "made with tokenizer 'xyz', not 'abc'; delete it"),
        (lambda text: "[]", "set.json: damaged"),
        (lambda text: text.replace('"seal": "', '"seal": "0'), "set.json: damaged, its content does not fit its seal"),
    ],
)
def test_a_json_of_something_else(tmp_path, change, words):
    write(tmp_path)
    path = tmp_path / "set.json"
    changed = change(path.read_text())
    assert changed != path.read_text()
    if "seal" not in words and changed.endswith("}\n"):  # of something else, but whole
        io.write_sealed(path, {key: value for key, value in json.loads(changed).items() if key != "seal"})
    else:
        path.write_text(changed)
    with pytest.raises(UserError, match=words):
        TrainingSet(tmp_path / "set", "policy", "", MADE)


def test_where_files_cannot_be_opened_in_place(tmp_path, monkeypatch):
    """As on gs://: written and read by way of a local copy."""
    monkeypatch.setattr(training_files, "_remote", lambda path: True)
    write(tmp_path)
    found = TrainingSet(tmp_path / "set", "policy", "")
    (tmp_path / "set.array_record").unlink()
    same(found[3], make(3, "policy"))


def test_checksum(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"x" * 3_000_000), b.write_bytes(b"y")
    before = training_files.checksum([a, b])
    assert before == training_files.checksum([a, b]) != training_files.checksum([b, a])
    with pytest.raises(UserError, match="c.jsonl: no such file; put it there"):
        training_files.checksum([a, tmp_path / "c.jsonl"])
    a.write_bytes(b"x" * 2_999_999 + b"z")
    assert training_files.checksum([a, b]) != before
