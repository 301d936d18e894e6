"""Files that changed: noted, sealed, and those of a stage. Whole runs: test_manifest."""

from pathlib import Path
from types import SimpleNamespace

import damage
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from mmprm_jax import config, io, manifest, metrics, records
from mmprm_jax.evaluation import stored
from mmprm_jax.evaluation.pieces import Pieces
from mmprm_jax.manifest import Depth
from mmprm_jax.records import Problem, UserError
from mmprm_jax.report.summary import summarise
from mmprm_jax.settings import Config
from mmprm_jax.training.checkpoints import Checkpoints, load_params, save_params

PROBLEMS = [Problem(f"p{i}", "q", str(i), (f"images/{i}.png",)) for i in range(4)]
WEIGHTS = bytes(range(256)) * 8


@pytest.fixture
def warnings(monkeypatch):
    found = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: found.append(text % values))
    return found


def test_what_is_not_written_whole_is_not_there(tmp_path):
    path = tmp_path / "a" / "x.jsonl"
    assert records.write(path, PROBLEMS) == 4
    with pytest.raises(ZeroDivisionError):
        records.write(path, (1 // 0 for _ in range(3)))
    assert records.read_all(path, Problem) == PROBLEMS


@pytest.mark.parametrize("name", [x for x in damage.DAMAGES if x != "gone"])
def test_a_noted_file_that_changed(tmp_path, name):
    path = tmp_path / "x.jsonl"
    records.write(path, PROBLEMS, noted=True)
    io.check(path)
    assert damage.damage(path, name)
    with pytest.raises(UserError, match=r"x.jsonl: damaged, .*; delete it, the same command makes it again"):
        io.check(path)


def test_a_file_without_a_note_is_taken_with_a_warning(tmp_path, warnings):
    records.write(tmp_path / "x.jsonl", PROBLEMS)
    io.check(tmp_path / "x.jsonl")
    assert len(warnings) == 1 and "x.jsonl" in warnings[0]


def test_every_flipped_bit_of_sealed_json_is_seen(tmp_path):
    path, values = tmp_path / "x.json", {"a": 1, "b": [0.5, None, "é"], "nan": float("nan")}
    io.write_sealed(path, values)
    whole, right = path.read_bytes(), {**values, "nan": None}
    assert io.read_sealed(path, "") == right
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            assert io.read_sealed(path, "do this") == right
        except UserError as error:
            assert str(error).startswith(f"{path}: damaged") and "\n" not in str(error)
    for text in (b"", b"[]", b"null", b"\xff{}", whole[:-9], b"[" * 100_000):
        path.write_bytes(text)
        with pytest.raises(UserError, match="x.json: damaged, .*; do this$"):
            io.read_sealed(path, "do this", unsealed=True)


# ------------------------------------------------------------------------------------------------- stages


class Run:
    """Stages that consist of their files."""

    def __init__(self, workdir, folder=""):
        self.workdir = self.root = epath.Path(workdir)
        sections = {"data": {"folder": folder}, "sft": {"steps": 1}, "annotate": {"policy": "", "servers": ()}}
        self.config = ConfigDict({**sections, "policy": "", "train_prm": {"trees": True}})
        self.data = epath.Path(folder) if folder else self.workdir / "data"

    def folder(self, stage):
        return self.workdir / stage

    def record_files(self):
        return sorted(self.data.glob("*.jsonl")) if self.config.data.folder else []

    def image_files(self):
        return [self.data / p.images[0] for p in PROBLEMS]

    def make(self, *stages, **figures):
        """Runs stages as ``stages.run_stage`` does."""
        for stage in stages:
            manifest.begin(self, stage)
            self.write(stage)
            manifest.finish(self, stage, {"seconds": 1.5, **figures})

    def write(self, stage):
        folder = self.folder(stage)
        if stage == "data" and not self.config.data.folder:
            write_data(self.data)
        if stage in ("sft", "train_prm"):
            for name in ("_METADATA", "d/0123", "ocdbt.process_0/d/4567"):
                io.write(folder / "params" / name, WEIGHTS + name.encode())
            io.write(folder / "checkpoints" / "4" / "state", WEIGHTS)
            io.write(folder / "metrics.jsonl", '{"step": 1}\n')
        if stage in ("annotate", "evaluate"):
            for name in ("trees-000000.jsonl", "trees-000002.jsonl"):
                records.write(folder / name, PROBLEMS[:2])

    def check(self, *stages, depth=Depth.ALL):
        manifest.check(self, stages, depth)


def write_data(folder):
    for name in ("train", "test", "sft"):
        records.write(folder / f"{name}.jsonl", PROBLEMS)
    for problem in PROBLEMS:
        io.write(folder / problem.images[0], problem.id * 20)


STAGES = ("data", "sft", "annotate", "train_prm", "evaluate")


@pytest.fixture
def run(tmp_path):
    found = Run(tmp_path / "w")
    found.make(*STAGES)
    return found


def test_every_damage_of_every_file_is_one_line_that_names_it(run, tmp_path):
    """By the stage itself, and by those that were made from it."""
    run.check(*STAGES)
    whole, count = Path(run.workdir), 0
    unread = ("checkpoints", "metrics.jsonl")
    for path, name in damage.each(whole, tmp_path / "copy", lambda p: not set(p.parts) & set(unread)):
        copy, stage = Run(tmp_path / "copy"), path.relative_to(tmp_path / "copy").parts[0]
        if path.name == manifest.DONE and name == "gone":
            continue  # see below
        with pytest.raises(UserError) as told:
            copy.check(stage)
        line = str(told.value)
        assert path.name in line and "\n" not in line and f"--force-stage={stage}" in line, (path, name)
        if "params" not in path.parts and "images" not in path.parts:  # what the report reads
            with pytest.raises(UserError, match=path.name):
                copy.check(stage, depth=Depth.RECORDS)
        later = {"data": "sft", "sft": "annotate", "annotate": "train_prm", "train_prm": "evaluate"}.get(stage)
        if later:
            (copy.folder(later) / manifest.DONE).unlink()  # it is made again
            with pytest.raises(UserError, match=path.name):
                copy.make(later)
        count += 1
    assert count > 96


def test_sizes_are_looked_at_without_reading(run, monkeypatch):
    monkeypatch.setattr(io, "measure", lambda path: pytest.fail(f"{path} was read"))
    run.check(*STAGES, depth=Depth.SIZES)


def test_files_are_read_once_by_a_process(run, monkeypatch):
    run.check(*STAGES)
    monkeypatch.setattr(io, "_read", lambda path, records: pytest.fail(f"{path} was read again"))
    run.check(*STAGES)


def test_what_a_mismatch_says(run):
    path = run.folder("annotate") / "trees-000000.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    size = f"{len(whole) // 2} bytes \\(1 records\\) where there were {len(whole)} bytes \\(2 records\\)"
    with pytest.raises(UserError, match=f"{size}; put it back, or --force-stage=annotate makes that stage"):
        run.check("annotate")
    path.unlink()
    with pytest.raises(UserError, match="trees-000000.jsonl: gone; "):
        run.check("annotate", depth=Depth.SIZES)


def test_a_users_own_files_are_watched_and_never_moved(tmp_path, capsys):
    folder = epath.Path(tmp_path / "set")
    write_data(folder)
    run = Run(tmp_path / "w", str(folder))
    run.make("data", "sft", "annotate")
    records.write(folder / "test.jsonl", PROBLEMS[:3])
    with pytest.raises(UserError, match=r"test.jsonl: .*3 records.*--force-stage=data"):
        run.make("train_prm")
    manifest.force(run, "data")
    assert (folder / "test.jsonl").exists() and not run.folder("annotate").exists()
    run.make("data", "sft", "annotate", "train_prm")
    (folder / "images" / "1.png").unlink()
    with pytest.raises(UserError, match="images/1.png: gone"):
        run.make("evaluate")


def test_a_users_folder_that_is_the_works_own_stays(tmp_path):
    folder = epath.Path(tmp_path / "w" / "data")
    write_data(folder)
    run = Run(tmp_path / "w", str(folder))
    run.make("data", "sft")
    manifest.force(run, "data")
    assert (folder / "train.jsonl").exists() and not (folder / "done.json").exists() and not run.folder("sft").exists()


def test_an_unfinished_stage_goes_on_with_what_it_began_with_only(run, tmp_path):
    folder = epath.Path(tmp_path / "set")
    write_data(folder)
    other = Run(tmp_path / "o", str(folder))
    other.config.annotate.policy = "another"  # needs no stage before it
    manifest.begin(other, "annotate")
    manifest.begin(other, "annotate")
    records.write(folder / "train.jsonl", PROBLEMS[::-1])
    with pytest.raises(UserError, match="train.jsonl: other content than when annotate began; .*force-stage=annotate"):
        manifest.begin(other, "annotate")


def test_a_stage_is_not_made_again_under_those_made_from_it(run):
    (run.folder("sft") / "done.json").unlink()
    with pytest.raises(UserError, match="sft/done.json: gone, and annotate was made from sft; .*--force-stage=sft"):
        run.make("sft")
    (run.folder("evaluate") / "done.json").unlink()  # nothing was made from it
    run.make("evaluate")


def test_force_moves_a_stage_and_what_follows(run, capsys):
    for name in ("sweep", "guided", "benchmarks", "report"):
        io.write(run.folder(name) / "x", "x")
    manifest.force(run, "train_prm")
    there = {path.name for path in run.workdir.iterdir()}
    assert there == {"data", "sft", "annotate", "sweep", "replaced"}
    moved = {path.name for path in (run.workdir / "replaced" / "1").iterdir()}
    assert moved == {"train_prm", "evaluate", "guided", "benchmarks", "report"}
    assert "mmprm: moved train_prm, evaluate, guided, benchmarks, report to" in capsys.readouterr().err
    run.make("train_prm", "evaluate")
    run.config.annotate.policy = "another"  # these trees are not the run's own policy's
    manifest.force(run, "sft")
    assert (run.workdir / "annotate").exists() and (run.workdir / "replaced" / "2" / "train_prm").exists()


def test_an_older_work_directory_is_read_with_a_warning(tmp_path, warnings):
    run = Run(tmp_path / "w")
    run.make("data", "sft")
    io.write_json(run.folder("sft") / "done.json", {"seconds": 1.0})
    (run.folder("sft") / "params" / "_METADATA").unlink()
    run.make("annotate")
    assert len(warnings) == 1 and "sft/done.json: of an older version, without checksums" in warnings[0]
    assert manifest.read_done(run.folder("sft"), "") == {"seconds": 1.0}


def test_commands_that_are_given_a_file_of_a_run(run):
    run.write("report")
    io.write_json(run.folder("report") / "metrics.json", {})
    manifest.finish(run, "report", {})
    for path, read in (
        (run.folder("evaluate") / "trees-000000.jsonl", lambda path: list(stored.iter_rows(path))),
        (run.folder("report") / "metrics.json", lambda path: summarise([run.workdir])),
    ):
        path.write_text("{}")
        with pytest.raises(UserError, match=path.name):
            read(path)


# ------------------------------------------------------------------------------------------------- unfinished work


def test_damaged_pieces_are_made_again(tmp_path, warnings):
    for name in [x for x in damage.DAMAGES if x not in ("gone", "empty", "line")]:
        path = epath.Path(tmp_path / name / "x.jsonl")
        for key in "ab":
            with Pieces(path) as pieces:
                pieces.add(key, {"score": 0.125})
        assert damage.damage(Path(path.parent) / "x.jsonl.parts" / "000-000000.jsonl", name)
        assert Pieces(path).done == {"b": {"score": 0.125}}
        assert "000-000000.jsonl: damaged" in warnings[-1]


def test_metrics_with_damaged_lines(tmp_path, warnings):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step\xff": 2}\n\xff\xfe\n{"step": 3}\n{"st')
    assert [row["step"] for row in metrics.read(tmp_path)] == [1, 3]
    assert "metrics.jsonl: 2 damaged lines" in warnings[0]


def test_a_configuration_that_is_no_text(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{")
    io.write(tmp_path / "data" / "train.jsonl", "")  # without results the directory is free
    with pytest.raises(UserError, match="config.json: not a config; delete it"):
        config.guard_workdir(tmp_path, Config())


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def test_a_checkpoint_with_a_flipped_bit_is_set_aside(tmp_path, warnings):
    """Orbax itself reads it as another number."""
    state = {"params": {"w": jnp.asarray(np.random.default_rng(0).standard_normal((64, 64)), jnp.float32)}}
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"params": {"w": state["params"]["w"] * step}}, step, {"loss": 0.0})
    arrays = [p for p in (tmp_path / "checkpoints" / "2").rglob("d/*") if p.stat().st_size > 10_000]
    flip(arrays[0])
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        step, found, position = checkpoints.restore(state)
    assert (step, position) == (1, 1) and np.array_equal(found["params"]["w"], state["params"]["w"])
    assert any(arrays[0].name in line for line in warnings)


@pytest.mark.parametrize("finished", [True, False])
def test_damaged_weights_are_one_line(tmp_path, finished):
    folder = epath.Path(tmp_path / "sft")
    weights = {"w": jnp.ones((8, 8))}
    save_params(folder / "params", weights)
    if finished:
        run = SimpleNamespace(folder=lambda stage: folder, root=tmp_path, config=None, record_files=lambda: [])
        io.write_sealed(folder / "begun.json", {})
        manifest.finish(run, "sft", {})
    assert load_params(folder / "params", weights)["w"].sum() == 64
    for path in [folder / "params" / "manifest.ocdbt", folder / "params" / "_METADATA"]:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError) as told:
            load_params(folder / "params", weights)
        assert "\n" not in str(told.value) and (path.name if finished else "params: these weights") in str(told.value)
        path.write_bytes(whole)
    for path in (folder / "params" / "d").iterdir():
        path.unlink()
    with pytest.raises(UserError):
        load_params(folder / "params", weights)
