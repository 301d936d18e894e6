"""Files that changed under a run: every file of a small run is damaged, and nothing goes on with it unseen."""

import contextlib
import json
import shutil
from pathlib import Path

import damage
import jax
import orbax.checkpoint as ocp
import pytest
import toy_annotation as toy

from mmprm_jax import annotation, config, manifest, stages
from mmprm_jax.evaluation.pieces import Pieces
from mmprm_jax.records import Rollout, UserError
from mmprm_jax.report import report as report_page
from mmprm_jax.search.settings import Settings
from mmprm_jax.sharding import make_mesh

ROOT = Path(__file__).parents[1]
ALL = ["data", "sft", "annotate", "train_prm", "evaluate", "report"]


def tiny_config(**data):
    """The smoke configuration with a few problems and steps: the same path, no sense in its figures."""
    few = {
        "data": dict(train=5, dev=2, test=3, demonstrations=12, transcriptions=4, text_only=4, **data),
        "model.decoder": dict(num_layers=1),
        "model.vision": dict(num_layers=1),
        "sft": dict(steps=4, batch_size=4, checkpoint_every=2),
        "train_prm": dict(steps=4, batch_size=4, checkpoint_every=2),
        "annotate": dict(trees_per_shard=2, in_flight=2, checkpoint_seconds=0.0),
        "evaluate": dict(
            n=2, slots=8, max_new_tokens=8, cache_tokens=2000, verify_workers=0, score_rows=8, calibration_problems=2,
            calibration_rollouts=2,
        ),
    }  # fmt: skip
    overrides = [f"--config.{group}.{key}={value}" for group, values in few.items() for key, value in values.items()]
    return config.load(f"{ROOT / 'configs' / 'digits.py'}:smoke", ["--config.mesh=1,1,1", *overrides])


class SeededSampler(toy.SeededSampler):
    """Answers that the run's tokenizer knows: right or wrong by chance, whatever the policy can do."""

    def collect(self):
        steps = ("<step> 1 + 1 = 2 </step>", "<step> 2 + 3 = 5 </step>")
        return [
            (request, tuple(Rollout(steps[len(request.prefix):] + ("<answer> 5 </answer>",), x.correct, x.n_tokens)
                            for x in rollouts))
            for request, rollouts in super().collect()
        ]  # fmt: skip


def made_up_annotation(limit=None):
    def stage(run):
        c, folder, problems = run.config.annotate, run.folder("annotate"), run.problems("train")
        settings = Settings(num_rollouts=4, max_searches=2, rollout_budget=12)
        failed = annotation.run(folder, problems, SeededSampler(limit=limit), settings, c)
        return annotation.finish(folder, problems, failed, False)

    return stage


@pytest.fixture(scope="module")
def quick():
    """The annotation is made up, the page of the report is left out, and one device is enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.run, "make_mesh", lambda shape: make_mesh(shape, jax.devices()[:1]))
        patch.setitem(stages.STAGES, "annotate", made_up_annotation())
        patch.setattr(report_page, "write_report", lambda path, *_: path.write_text("page"))
        patch.setattr(report_page, "format_table", lambda metrics: "table")
        yield patch


@contextlib.contextmanager
def opened(workdir, settings=None):
    """The run, as the command line opens it."""
    settings = settings or tiny_config()
    with jax.set_mesh(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])):  # behind this the run's is not in use
        folder = config.guard_workdir(workdir, settings)
        yield stages.Run(settings, folder, config.to_text(settings))


def go_on(workdir, command="pipeline", settings=None):
    """Runs the stages. Returns the figures, as text."""
    with opened(workdir, settings) as run:
        if command == "pipeline":
            stages.pipeline(run)
        else:
            stages.run_stage(run, command)
    return figures(workdir)


def figures(workdir):
    path = workdir / "report" / "metrics.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    found.pop("seconds", None)
    return json.dumps(found)


Interrupted = toy.Interrupted


def interrupt(*_, **__):
    raise Interrupted


def interrupted(workdir, where, name, stop):
    """Goes on with the run until ``where.name`` is called, which is replaced by ``stop``."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        (patch.setitem if isinstance(where, dict) else patch.setattr)(where, name, stop)
        go_on(workdir)


def stop_at(stage, finish=manifest.finish):
    return lambda run, name, found: interrupt() if name == stage else finish(run, name, found)


def stop_at_pieces(pieces, rows):
    """The pieces of the scores of test are saved, and no more."""
    if pieces.path.name.startswith("test_scored"):
        pieces._save()
        interrupt()
    FINISH(pieces, rows)


FINISH = Pieces.finish


@pytest.fixture(scope="module")
def states(quick, tmp_path_factory):
    """One run, and copies of it from where it was interrupted: {name: folder}."""
    folder = tmp_path_factory.mktemp("states")
    workdir = folder / "run"
    found = {}

    def keep(name):
        found[name] = folder / name
        shutil.copytree(workdir, found[name])

    interrupted(workdir, manifest, "finish", stop_at("sft"))
    keep("sft")
    interrupted(workdir, stages.STAGES, "annotate", made_up_annotation(limit=12))
    keep("annotate")
    interrupted(workdir, manifest, "finish", stop_at("train_prm"))
    keep("train_prm")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Pieces, "finish", stop_at_pieces)
        go_on(workdir)
    keep("scoring")
    go_on(workdir)
    keep("finished")
    return found


def outcome(workdir, command, whole):
    """What becomes of a damaged run: "told" with the line, "same" figures, or "other"."""
    try:
        found = go_on(workdir, command)
    except UserError as error:
        return "told", str(error)
    return ("same" if found == whole else "other"), ""


# ------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.slow
def test_a_finished_run_is_reported_or_the_same(states, tmp_path):
    """`mmprm pipeline` on a finished run reads all but the weights; everything that it has is compared before."""
    whole, table = figures(states["finished"]), []
    for path, name in damage.each(states["finished"], tmp_path / "w", lambda p: p.parts[1:2] != ("checkpoints",)):
        inside = path.relative_to(tmp_path / "w")
        end, line = outcome(tmp_path / "w", "pipeline", whole)
        table.append((str(inside), name, end, line))
        assert end != "other", (inside, name)
        assert end == "same" or is_line(line, path), (inside, name, line)
        if inside.parts[0] in ALL[:5] and inside.parts[1] not in ("input", "sums", "metrics.jsonl", "images"):
            # weights are not read, so they are only compared by size; what follows from no other stage is made again
            may_be_same = name not in ("half", "empty", "gone") or (inside.name == "done.json" and name == "gone")
            assert end == "told" or may_be_same, (inside, name)
    show(table)
    assert len(table) > 96


@pytest.mark.slow
@pytest.mark.parametrize("state", ["sft", "annotate", "train_prm", "scoring"])
def test_an_unfinished_run_is_reported_or_goes_on_to_the_same(states, tmp_path, state):
    """What the stage has so far, and what it is made from. Weights that are trained again are compared as numbers."""
    stage = "evaluate" if state == "scoring" else state
    kept = {stage, "config.json"} | ({"data"} if stage in ("sft", "evaluate") else set())
    whole, table = result(states["finished"], stage), []

    def wanted(inside):
        # of the checkpoints one, and one file of its arrays
        parts = inside.parts
        return parts[0] in kept and ("checkpoints" not in parts or (parts[2] == "4" and parts[-1] < "3"))

    names = ("flip", "gone") if stage in ("sft", "train_prm") else ("line", "empty", "flip", "gone")  # trains
    for path, name in damage.each(states[state], tmp_path / "w", wanted, names):
        inside = path.relative_to(tmp_path / "w")
        try:
            go_on(tmp_path / "w", stage)
            end, line = ("same" if result(tmp_path / "w", stage) == whole else "other"), ""
        except UserError as error:
            end, line = "told", str(error)
        table.append((str(inside), name, end, line))
        assert end != "other", (inside, name)
        assert end == "same" or is_line(line, path), (inside, name, line)
    show(table)


def result(workdir, stage):
    """What a stage hands on: its figures, its files, and the numbers of its weights."""
    folder = workdir / stage
    done = json.loads((folder / "done.json").read_text())
    files = {p.name: p.read_bytes() for p in sorted(folder.glob("*.jsonl")) if p.name != "metrics.jsonl"}
    weights = b""
    if (folder / "params").exists():
        with ocp.StandardCheckpointer() as checkpointer:
            weights = [x.tobytes() for x in jax.tree.leaves(jax.device_get(checkpointer.restore(folder / "params")))]
    return {k: v for k, v in done.items() if k not in ("seconds", "manifest", "seal")}, files, weights


def is_line(line, path):
    """Whether it names the file, or else what is another in the configuration, or the stage that is not done."""
    others = {"config.json": "was made with another", "done.json": f"the stage {path.parent.name} has not finished"}
    return "\n" not in line and (path.name in line or others.get(path.name, path.name) in line)


def show(table):
    for row in table:
        print(*row, sep=" | ")
