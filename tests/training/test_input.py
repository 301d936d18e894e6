"""Batches for training: right pixels, exact resumption, and the same whoever makes them."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from etils import epath
from PIL import Image

from mmprm_jax import config as configs
from mmprm_jax import convert, records, settings, stages
from mmprm_jax.data import digits, images, training_files
from mmprm_jax.data.packing import Sizes
from mmprm_jax.data.training_files import Encoded, TrainingSet
from mmprm_jax.models import build
from mmprm_jax.records import UserError
from mmprm_jax.schema import from_config
from mmprm_jax.training import trainer
from mmprm_jax.training.input import Batches, Tiles

TILE, MAX_TILES = 8, 4
PICTURES = {"a.png": (8, 8), "b.png": (20, 9), "c.png": (9, 21), "d.png": (17, 16)}
SIZES = Sizes(rows=8, tokens=64, tiles=16, examples=4)
UNPACKED = Sizes(rows=8, tokens=30, tiles=14)


def count(name):
    return images.count_tiles(*PICTURES[name], MAX_TILES, TILE)


def make(number, size, seed):
    """Examples of up to three images."""
    for i in range(size):
        rng = np.random.default_rng((seed, i))
        names = rng.choice(list(PICTURES), rng.integers(0, 4))
        tokens = rng.integers(1, 100, rng.integers(5, 31), np.int32)
        labels = {"response": np.arange(len(tokens)) > 3}
        example = Encoded(f"{number}/{i}", tokens, labels, tuple((str(n), count(n)) for n in names))
        if example.tiles <= UNPACKED.tiles:
            yield example


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    rng = np.random.default_rng(0)
    for name, (width, height) in PICTURES.items():
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / name)
    for number, size in enumerate((60, 25)):
        training_files.write(folder / f"{number}", "policy", make(number, size, number), 30, 14, {})
    return folder


@pytest.fixture(scope="module")
def sets(folder):
    return [TrainingSet(folder / f"{number}", "policy", folder) for number in range(2)]


def batches(sets, sizes=SIZES, seed=0, shift=0, noise=0.0, **more):
    return Batches(sets, sizes, seed, Tiles(TILE, MAX_TILES, shift, noise), **more)


def take(source, number):
    with source:
        return list(itertools.islice(source, number))


def equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("sizes", [SIZES, UNPACKED], ids=["packed", "one a row"])
def test_rows_have_the_tokens_and_pixels_of_their_examples(folder, sets, sizes):
    for batch in take(batches(sets, sizes), 12):
        assert batch["example"].shape == (8, sizes.examples) and batch["example"].dtype == np.int32
        assert batch["pixels"].shape == (8, sizes.tiles, TILE, TILE, 3) and batch["pixels"].dtype == np.float32
        for row in range(8):
            at = tile = 0
            inside = batch["example"][row][batch["example"][row] >= 0]
            assert batch["segment"][row].max() == len(inside) > 0
            for index in inside:
                data, i = (sets[0], index) if index < len(sets[0]) else (sets[1], index - len(sets[0]))
                example = data[int(i)]
                part = slice(at, at + len(example.tokens))
                np.testing.assert_array_equal(batch["tokens"][row, part], example.tokens)
                np.testing.assert_array_equal(batch["response"][row, part], example.labels["response"])
                for name, _ in example.images:
                    found = images.tiles(Image.open(folder / name), MAX_TILES, TILE)
                    wanted = (found / 255.0 - images.MEAN) / images.STD
                    np.testing.assert_allclose(batch["pixels"][row, tile : tile + len(found)], wanted, atol=1e-5)
                    tile += len(found)
                at += len(example.tokens)
            assert not batch["pixels"][row, tile:].any() and not batch["segment"][row, at:].any()


def test_images_by_absolute_paths(folder, sets, tmp_path, monkeypatch):
    """As problems of ``open_run`` name them, whatever folder others would be relative to."""
    some = list(make(0, 8, 0))
    absolute = [dataclasses.replace(x, images=tuple((str(folder / name), n) for name, n in x.images)) for x in some]
    monkeypatch.chdir(tmp_path)
    for name, examples in (("some", some), ("absolute", absolute)):
        training_files.write(tmp_path / name, "policy", examples, 30, 14, {})
    wanted = take(batches([TrainingSet(tmp_path / "some", "policy", folder)]), 2)
    for elsewhere in ("", tmp_path):
        found = take(batches([TrainingSet(tmp_path / "absolute", "policy", elsewhere)]), 2)
        for a, b in zip(found, wanted, strict=True):
            equal(a, b)


@pytest.mark.parametrize("sizes", [SIZES, UNPACKED], ids=["packed", "one a row"])
def test_shares_together_are_the_whole(sets, sizes):
    whole = take(batches(sets, sizes, shift=1, noise=8.0), 3)
    for n in (2, 8):
        parts = [take(batches(sets, sizes, shift=1, noise=8.0, share=(i, n)), 3) for i in range(n)]
        for batch, *shares in zip(whole, *parts, strict=True):
            assert all(len(share["tokens"]) == 8 // n for share in shares)
            equal(batch, {name: np.concatenate([share[name] for share in shares]) for name in batch})
    with pytest.raises(UserError, match="8 rows cannot be shared by 3 processes"):
        batches(sets, sizes, share=(0, 3))


def test_resumed_behind_any_batch_by_any_number_of_processes(sets):
    options = dict(shift=1, noise=8.0, weights=(1.0, 2.0))
    with batches(sets, **options) as source, batches(sets, share=(1, 4), **options) as other:
        found, states = [], []
        for _ in range(26):
            found.append(next(source))
            states.append(json.dumps(source.get_state()))
            next(other)
            assert json.dumps(other.get_state()) == states[-1]  # one process may save it for all
    for at in (0, 15, 20):
        for i, n in ((0, 1), (1, 2)):
            with batches(sets, share=(i, n), **options) as again:
                next(again)
                again.set_state(json.loads(states[at]))
                for batch in found[at + 1 : at + 5]:
                    mine = slice(i * 8 // n, (i + 1) * 8 // n)
                    equal(next(again), {name: x[mine] for name, x in batch.items()})


def test_the_order_depends_on_the_seed(sets):
    def order(seed):
        return [batch["example"].tolist() for batch in take(batches(sets, seed=seed), 5)]

    assert order(1) == order(1) != order(2)


def tiles_shown(sets, sizes, number, seed=0, shift=1, noise=8.0):
    """Of each example with images, its tiles [T, H, W, 3] each time that it comes in so many batches."""
    out = {}
    for batch in take(batches(sets, sizes, seed, shift, noise), number):
        for inside, pixels in zip(batch["example"], batch["pixels"], strict=True):
            at = 0
            for index in inside[inside >= 0].tolist():
                count = sets[0][index].tiles
                if count:
                    out.setdefault(index, []).append(pixels[at : at + count].tolist())
                at += count
    return out


def test_augmentation_belongs_to_the_example_and_its_epoch(sets):
    data = sets[:1]
    wide = tiles_shown(data, UNPACKED, 30)
    narrow = tiles_shown(data, Sizes(2, 30, 14), 30)
    packed = tiles_shown(data, Sizes(4, 64, 28, 6), 8)  # its rows are not in the order of epochs
    plain = tiles_shown(data, UNPACKED, 16, shift=0, noise=0.0)
    other = tiles_shown(data, UNPACKED, 8, seed=1)
    assert len(wide) > 30 and packed.keys() <= wide.keys()
    for i, shown in wide.items():
        assert all(a != b for a, b in itertools.combinations(shown, 2))  # a new one each epoch
        assert plain[i][0] == plain[i][1] != shown[0] != other[i][0]
    assert all(shown[0] == wide[i][0] for i, shown in narrow.items())
    assert sum(tiles in wide[i] for i, shown in packed.items() for tiles in shown) > 20


def test_an_image_that_is_lost_or_changed_after_encoding(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    example = Encoded("e", np.ones(5, np.int32), {"response": np.ones(5, bool)}, (("x.png", 1),))
    training_files.write(tmp_path / "set", "policy", [example], 8, 2, {})
    data = [TrainingSet(tmp_path / "set", "policy", tmp_path)]
    Image.new("RGB", (16, 8)).save(tmp_path / "x.png")
    with pytest.raises(UserError, match=r"x.png: 3 tiles, but 1 in .*set.array_record, row 0 \(e\); the image has ch"):
        take(batches(data, Sizes(1, 8, 2)), 1)
    (tmp_path / "x.png").unlink()
    with pytest.raises(UserError, match="x.png: image not found"):
        take(batches(data, Sizes(1, 8, 2)), 1)


def test_a_record_that_is_damaged_is_reported_by_the_batch(sets, monkeypatch):
    data = sets[0]

    class Reader:
        def read(self, rows, reader=data._reader):
            return [b"nothing"] if rows == [17] else reader.read(rows)

    monkeypatch.setattr(data, "_reader", Reader())
    with pytest.raises(UserError, match=r"0.array_record, row 17: damaged"):
        take(batches([data]), 30)


def test_text_only(tmp_path):
    examples = (Encoded(f"{i}", np.full(5, i, np.int32), {k: np.full(5, i, np.int32) for k in "kn"}) for i in range(9))
    training_files.write(tmp_path / "set", "prm", examples, 8, 0, {})
    with Batches([TrainingSet(tmp_path / "set", "prm", "")], Sizes(3, 16, 0, 3), 0) as source:
        batch = next(source)
    assert batch.keys() == {"tokens", "segment", "k", "n", "example"}
    np.testing.assert_array_equal(batch["k"], batch["tokens"])


def test_labels_of_trees_and_of_files_in_one_batch(tmp_path):
    """Whole counts and numbers in [0, 1] stay what they are; counts alone are whole numbers, as ever."""
    shares = np.linspace(0, 1, 9, dtype=np.float32)
    for kind, first, ks in (("prm", 100, np.arange(9, dtype=np.int32)), ("labels", 200, shares)):
        examples = (
            Encoded(
                f"{i}", np.full(5, first + i, np.int32), {"k": np.full(5, k), "n": np.full(5, 8 if first == 100 else 1)}
            )
            for i, k in enumerate(ks)
        )
        training_files.write(tmp_path / kind, kind, examples, 8, 0, {})
    trees, files = (TrainingSet(tmp_path / kind, kind, "") for kind in ("prm", "labels"))
    for sets in ([trees, files], [files, trees], [files]):
        seen = set()
        for batch in take(Batches(sets, Sizes(3, 16, 0, 3), 0), 8):
            assert batch["k"].dtype == np.float32 and batch["n"].dtype == np.int32
            seen |= set(zip(batch["tokens"].ravel().tolist(), batch["k"].ravel().tolist(), strict=True))
        wanted = {(200 + i, float(x)) for i, x in enumerate(shares)}
        wanted |= {(100 + i, float(i)) for i in range(9)} if trees in sets else set()
        assert seen - {(0, 0.0)} == wanted
    assert take(Batches([trees], Sizes(3, 16, 0, 3), 0), 1)[0]["k"].dtype == np.int32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(seed=1), "seed was 0 and is 1"),
        (dict(sizes=Sizes(16, 64, 16, 4)), r"sizes was \[8, 64, 16, 4\] and is \[16, 64, 16, 4\]"),
        (dict(weights=(1.0, 3.0)), "weights was"),
        (dict(swap=True), "sets was"),
    ],
)
def test_a_position_in_other_batches(sets, change, words):
    with batches(sets) as source:
        state = json.loads(json.dumps(source.get_state()))
    change = dict(change)
    other = sets[::-1] if change.pop("swap", False) else sets
    with batches(other, **change) as source, pytest.raises(UserError, match=words):
        source.set_state(state)


@pytest.fixture
def run(tmp_path, mesh, monkeypatch):
    """A run of the smoke configuration with few data, before its training."""
    few = dict(train=2, dev=1, test=1, demonstrations=12, transcriptions=4, text_only=4)
    config = configs.load("configs/digits.py:smoke", [f"--config.data.{k}={n}" for k, n in few.items()])
    monkeypatch.setattr(stages.run, "make_mesh", lambda _: mesh)
    run = stages.Run(config, epath.Path(tmp_path))
    digits.generate(run.data, from_config(digits.Settings, config.data, seed=0))
    return run


def test_missing_demonstrations_are_reported_by_the_first_stage(run, tmp_path):
    folder = dataclasses.replace(run.config.data, folder=str(run.data))
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, data=folder))
    assert stages.STAGES["data"](run)["problems"]["train"] == 2
    (run.data / "sft.jsonl").unlink()
    with pytest.raises(UserError, match="sft.jsonl: no such file; sft.files names it"):
        stages.STAGES["data"](run)
    labels = dataclasses.replace(run.config.train_prm, files=("no.jsonl",))
    config = dataclasses.replace(run.config, train_prm=labels, sft=dataclasses.replace(run.config.sft, steps=0))
    with pytest.raises(UserError, match="no.jsonl: no such file; train_prm.files names it"):
        stages.STAGES["data"](dataclasses.replace(run, config=config))


def test_rows_that_processes_cannot_share(mesh_of, monkeypatch):
    config = settings.Config(sft=settings.SFT(batch_size=12), train_prm=settings.TrainPRM(batch_size=20))
    mesh = mesh_of(data=4, fsdp=2)
    stages.check_rows(config, mesh, stages.TRAINING)  # one process puts all rows wherever it likes
    monkeypatch.setattr(stages, "row_share", lambda _: (0, 2))
    stages.check_rows(config, mesh, ())
    with pytest.raises(UserError, match="sft.batch_size: 12 rows(.|\n)*train_prm.batch_size: 20 rows"):
        stages.check_rows(config, mesh, stages.TRAINING)


def test_a_stage_encodes_again_only_what_has_changed(run, monkeypatch):
    seen = []
    monkeypatch.setattr(trainer, "fit", lambda *a: seen.append(next(a[5])["example"]) or a[3])
    monkeypatch.setattr(build, "initialise", lambda *a: (None, {}))
    monkeypatch.setattr(convert, "write_folder", lambda *a: None)
    times = []
    write = training_files.write
    monkeypatch.setattr(training_files, "write", lambda *a: times.append(1) or write(*a))
    assert stages.STAGES["sft"](run)["examples"] == 20
    stages.STAGES["sft"](run)
    assert len(times) == 1
    np.testing.assert_array_equal(*seen)
    path = run.data / "sft.jsonl"
    examples = records.read_all(path, records.SFTExample)
    records.write(path, examples[1:])
    assert stages.STAGES["sft"](run)["examples"] == 19 and len(times) == 2
    shorter = dataclasses.replace(run.config.sft, max_length=40)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, sft=shorter))
    assert stages.STAGES["sft"](run)["examples"] < 19 and len(times) == 3
