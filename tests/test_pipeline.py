"""The command line from end to end: bad input, interruptions, meshes, and (slow) the claims of the default run."""

import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from mmprm_jax import config as configs
from mmprm_jax import open_run

ROOT = pathlib.Path(__file__).parent.parent
DEFAULT = f"--config={ROOT / 'configs' / 'digits.py'}"
SMOKE = f"{DEFAULT}:smoke"


@pytest.fixture(scope="session")
def environment():
    """With the compilation cache of all tests: every run after the first one is quick."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return {**env, "JAX_PLATFORMS": "cpu"}


def start(environment, command, workdir, *more, config=SMOKE, devices=1):
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-m", "mmprm_jax.main", command, config, f"--workdir={workdir}", *more],
        env={**environment, "XLA_FLAGS": flags}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run(environment, command, workdir, *more, **options):
    process = start(environment, command, workdir, *more, **options)
    out, err = process.communicate(timeout=1700)
    return process.returncode, out, err


def failure(environment, command, workdir, *more, code=1):
    """The one line a failing command leaves behind its progress."""
    found, _, err = run(environment, command, workdir, *more)
    assert found == code, err
    assert "Traceback" not in err
    line = err.strip().splitlines()[-1]
    assert line.startswith("mmprm: ")
    return line


@pytest.fixture
def failure_here(mmprm_here):
    """The same, for what is found out before the first stage: in this process."""

    def failing(command, workdir, *more, code=1):
        done = mmprm_here(command, SMOKE, f"--workdir={workdir}", *more)
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
        line = done.stderr.strip().splitlines()[-1]
        assert line.startswith("mmprm: ")
        return line

    return failing


def metrics_of(workdir):
    found = json.loads((workdir / "report" / "metrics.json").read_text())
    found.pop("seconds")
    return found


def losses_of(workdir, stage):
    rows = [json.loads(line) for line in (workdir / stage / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows]


@pytest.fixture(scope="session")
def finished(smoke_run, tmp_path_factory):
    """An uninterrupted smoke run in a folder of this file's own: a work directory knows no path of its own."""
    workdir = tmp_path_factory.mktemp("runs") / "smoke"
    shutil.copytree(smoke_run[0], workdir)
    return workdir, smoke_run[1]


@pytest.mark.slow
def test_the_pipeline_ends_with_the_table_and_the_report(finished):
    workdir, out = finished
    metrics = json.loads((workdir / "report" / "metrics.json").read_text())
    assert metrics["n_problems"] == 32
    assert set(metrics["best_of_n"]) == {"1", "2", "4", "8", "16"}
    for selector in ("random", "unique", "greedy", "majority", "policy_logprob", "oracle"):
        assert set(metrics["best_of_n"]["16"][selector]) == {"accuracy", "stderr", "ci95"}
    aggregators = {"min", "mean", "product", "last", "max", "sum_log_odds", "mean_odds"}
    assert set(metrics["best_of_n"]["16"]["prm"]) == aggregators
    assert metrics["prm_selected"] in aggregators
    assert set(metrics["controls"]) == {"blank_image", "shuffled_image", "policy_shuffled_image"}
    assert set(metrics["seconds"]) == {"data", "sft", "annotate", "train_prm", "evaluate", "total"}
    assert metrics["labels"]["steps"] > 0 and metrics["rollouts"]["annotate"] > 0
    assert {"random", "greedy", "prm.last", "prm_weighted_majority.min"} <= set(metrics["against_majority"])
    assert sum(group["n_problems"] for group in metrics["by_length"].values()) == 32
    calibration = metrics["calibration"]
    assert calibration["rollouts"] == 8 * calibration["steps"] == 8 * sum(b["steps"] for b in calibration["diagram"])
    for stage in metrics["seconds"].keys() - {"total"}:
        noted = json.loads((workdir / stage / "done.json").read_text())["environment"]
        assert noted["backend"] == "cpu" and noted["cores"] >= 1 and noted["cpu"] and noted["jax"]
    assert "environment" not in metrics
    assert "oracle" in out and "PRM" in out and "minus majority" in out
    page = (workdir / "report" / "index.html").read_text()
    assert page.count("data:image/png") >= 3


@pytest.mark.slow
def test_what_was_trained_is_a_model_folder(finished, tmp_path):
    """The README's own run: its PRM scores as the evaluation did, from its folder and exported."""
    from mmprm_jax import convert, records
    from mmprm_jax.prm import PRM
    from mmprm_jax.records import Problem, ScoredCandidate
    from mmprm_jax.sharding import make_mesh

    workdir, mesh = finished[0], make_mesh({"data": 1}, jax.devices()[:1])
    problems = {p.id: p for p in records.read(workdir / "data" / "test.jsonl", Problem)}
    scored = records.read_all(workdir / "evaluate" / "test_scored.jsonl", ScoredCandidate)[:48]
    wanted = [score for x in scored for score in x.scores]
    assert len(wanted) > 100 and np.std(wanted) > 1e-3
    convert.convert(str(workdir / "train_prm"), str(tmp_path / "native"), mesh, layout="hf")
    for model in (workdir / "train_prm", tmp_path / "native"):
        prm, found = PRM.from_pretrained(model, mesh=mesh), []
        for name, group in itertools.groupby(scored, lambda x: x.candidate.problem_id):
            problem, solutions = problems[name], [x.candidate.segments for x in group]
            images = [workdir / "data" / name for name in problem.images]
            for scores in prm.score_candidates(problem.question, solutions, images=images):
                found += scores
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
    policy, model = convert.inspect(workdir / "sft")
    assert model.config["mmprm_templates"] == {"policy": "own", "prm": "own"} and (policy / "tokenizer.json").exists()


@pytest.mark.slow
def test_a_finished_run_is_not_run_again(environment, finished):
    workdir, _ = finished
    before = {p: p.stat().st_mtime_ns for p in workdir.glob("*/done.json") if p.parent.name != "report"}
    assert run(environment, "pipeline", workdir)[0] == 0
    assert before == {p: p.stat().st_mtime_ns for p in before}


@pytest.mark.slow
def test_no_truth_reaches_policy_or_prm(finished):
    """The stages that train read neither the truth file nor any problem of dev and test."""
    workdir, _ = finished
    held_out = [json.loads(line) for s in ("dev", "test") for line in (workdir / "data" / f"{s}.jsonl").open()]
    trained = (workdir / "data" / "sft.jsonl").read_text() + (workdir / "train_prm" / "examples.jsonl").read_text()
    assert held_out and not any(problem["id"] in trained or problem["image"] in trained for problem in held_out)


@pytest.mark.parametrize(
    ("overrides", "words", "code"),
    [
        (["--config.sft.stepz=3"], ["sft.stepz", "sft.steps"], 2),
        (["--config.sft.steps=many"], ["sft.steps", "int"], 2),
        (["--config.annotate.mode=papr"], ["annotate.mode", "'papr'", "default, paper"], 2),
        (["--config.train_prm.mode=papr"], ["train_prm.mode", "'papr'", "default, paper"], 2),
        (["--config.mesh=3,1,1"], ["mesh", "devices"], 1),  # told when there are devices
    ],
)
def test_bad_settings_are_one_line_and_bind_no_directory(failure_here, tmp_path, overrides, words, code):
    line = failure_here("data", tmp_path / "w", *overrides, code=code)
    assert all(word in line for word in words), line
    assert not list(tmp_path.glob("w/*/*"))
    configs.guard_workdir(tmp_path / "w", configs.load(SMOKE.removeprefix("--config=")))


@pytest.fixture(scope="module")
def begun(environment, tmp_path_factory):
    """The work directory of a smoke run that has its data."""
    workdir = tmp_path_factory.mktemp("runs") / "begun"
    code, _, err = run(environment, "data", workdir)
    assert code == 0, err
    return workdir


def test_a_work_directory_of_another_configuration(failure_here, begun):
    line = failure_here("pipeline", begun, "--config.seed=5")
    assert "seed" in line and "--workdir" in line


def test_a_work_directory_that_cannot_be_written(failure_here, tmp_path):
    (tmp_path / "file").write_text("")
    line = failure_here("pipeline", tmp_path / "file" / "w")
    assert str(tmp_path / "file") in line


def copy_data(begun, folder):
    shutil.copytree(begun / "data", folder)
    return folder


def test_an_unreadable_image_is_named(environment, begun, tmp_path):
    folder = copy_data(begun, tmp_path / "set")
    (folder / "images" / "demonstration-00003.png").write_bytes(b"\x89PNG broken")
    assert run(environment, "data", tmp_path / "w", f"--config.data.folder={folder}")[0] == 0
    line = failure(environment, "sft", tmp_path / "w", f"--config.data.folder={folder}")
    assert "demonstration-00003.png" in line


def test_a_bomb_of_an_image_is_refused(environment, begun, tmp_path):
    folder = copy_data(begun, tmp_path / "set")
    Image.new("1", (20000, 20000)).save(folder / "images" / "demonstration-00001.png")
    run(environment, "data", tmp_path / "w", f"--config.data.folder={folder}")
    line = failure(environment, "sft", tmp_path / "w", f"--config.data.folder={folder}")
    assert "demonstration-00001.png" in line


def test_an_empty_data_set_is_named(failure_here, begun, tmp_path):
    folder = copy_data(begun, tmp_path / "set")
    (folder / "train.jsonl").write_text("\n")
    line = failure_here("data", tmp_path / "w", f"--config.data.folder={folder}")
    assert "train.jsonl" in line
    assert "data.test" in failure_here("data", tmp_path / "v", "--config.data.test=0", code=2)


def test_a_stage_before_its_turn(failure_here, tmp_path):
    assert "mmprm data" in failure_here("sft", tmp_path / "w")


# What tells that a stage is under way, and where to cut it off.
CUTS = {
    "data": "data/dev.jsonl",
    "sft": "sft/checkpoints/20",
    "annotate": "annotate/trees-*",
    "train_prm": "train_prm/checkpoints/20",
    "evaluate": "evaluate/dev_candidates.jsonl",
}


@pytest.mark.slow
def test_a_benchmark_on_a_finished_run(environment, finished, tmp_path):
    """Eight of the test problems as if they were MathVista's: its rule for whole numbers agrees with the verifier."""
    workdir, folder, found = finished[0], tmp_path / "vista", tmp_path / "a.json"
    problems = [json.loads(line) for line in (workdir / "data" / "test.jsonl").open()][:8]
    (folder / "prepare" / "testmini").mkdir(parents=True)
    (folder / "testmini.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    (folder / "images").symlink_to(workdir / "data" / "images")
    row = {"mode": "mathvista", "answer_type": "integer", "question_type": "free_form"}
    lines = [json.dumps({"id": p["id"], **row, "category": f"c{i % 2}"}) for i, p in enumerate(problems)]
    (folder / "prepare" / "testmini" / "benchmark.jsonl").write_text("\n".join(lines))
    code, out, err = run(environment, "benchmark", workdir, str(folder / "testmini.jsonl"), f"--json={found}")
    assert code == 0, err
    figures = json.loads(found.read_text())
    assert figures["n_problems"] == 8 and sum(figures["scoring"].values()) == 8 * 17 and "official verdicts" in out
    assert set(figures["by_category"]) == {"c0", "c1"}

    def candidates(path):
        rows = [json.loads(line)["candidate"] for line in path.open()]
        ids = {p["id"] for p in problems}
        return [(r["problem_id"], r["segments"], r["correct"]) for r in rows if r["problem_id"] in ids]

    same = candidates(workdir / "benchmarks" / "vista-testmini" / "test_scored.jsonl")
    assert same == candidates(workdir / "evaluate" / "test_scored.jsonl")


@pytest.mark.slow
def test_guided_search_of_a_finished_run(environment, finished, tmp_path):
    workdir, found = finished[0], tmp_path / "a.json"
    assert "run `mmprm evaluate` there first" in failure(environment, "guide", tmp_path / "w")
    code, out, err = run(environment, "guide", workdir, f"--json={found}")
    assert code == 0, err
    figures = json.loads(found.read_text())
    assert set(figures) == {"beam", "dvts", "lookahead"} and "| dvts |" in out
    for x in figures.values():
        assert 0 <= x["accuracy"] <= 1 and x["tokens"] > 0 and x["best_of_n"]["n"] >= 1
    assert open_run(workdir).guided() == figures
    before = {p: p.read_bytes() for p in (workdir / "guided").rglob("*.json*")}
    assert len(before) >= 3
    assert run(environment, "guide", workdir, "--search=beam")[0] == 0  # nothing is searched again
    assert before == {p: p.read_bytes() for p in (workdir / "guided").rglob("*.json*")}
    assert "no such search" in failure(environment, "guide", workdir, "--search=bfs", code=2)


@pytest.mark.slow
def test_paper_mode(environment, finished, tmp_path):
    """The original's search and labels on our sampler: other trees from the same policy, nodes of several steps."""
    workdir = tmp_path / "paper"
    modes = ("--config.annotate.mode=paper", "--config.train_prm.mode=paper")
    code, _, err = run(environment, "pipeline", workdir, *modes)
    assert code == 0, err
    assert losses_of(workdir, "sft") == losses_of(finished[0], "sft")
    trees = [json.loads(line) for path in sorted(workdir.glob("annotate/trees-*.jsonl")) for line in path.open()]
    assert any(len(node["segments"]) > 1 for tree in trees for node in tree["nodes"])
    examples = [json.loads(line) for line in (workdir / "train_prm" / "examples.jsonl").open()]
    assert examples and all(min(example["n"]) > 0 for example in examples)  # every node has a label


@pytest.mark.slow
def test_killed_in_every_stage_the_figures_stay_the_same(environment, finished, tmp_path):
    workdir = tmp_path / "killed"
    for stage, mark in CUTS.items():
        process = start(environment, "pipeline", workdir)
        deadline = time.monotonic() + 900
        while not list(workdir.glob(mark)):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (workdir / stage / "done.json").exists(), f"{stage} was too quick to be cut off"
    code, _, err = run(environment, "pipeline", workdir)
    assert code == 0, err
    assert metrics_of(workdir) == metrics_of(finished[0])
    for stage in ("sft", "train_prm"):
        assert losses_of(workdir, stage) == losses_of(finished[0], stage)


@pytest.mark.slow
def test_eight_devices(environment, finished, tmp_path):
    here, there = finished[0], tmp_path / "w"
    shutil.copytree(here / "data", there / "data")
    assert run(environment, "sft", there, "--config.mesh=2,2,2", devices=8)[0] == 0
    assert losses_of(there, "sft") == pytest.approx(losses_of(here, "sft"), rel=1e-5)


@pytest.fixture(scope="session")
def default_run(environment, tmp_path_factory):
    """The README's first command."""
    workdir = tmp_path_factory.mktemp("runs") / "digits"
    code, out, err = run(environment, "pipeline", workdir, config=DEFAULT)
    assert code == 0, err
    print(out)
    return workdir


@pytest.mark.slow
def test_the_default_run_keeps_its_promises(default_run):
    metrics = metrics_of(default_run)
    assert metrics["n_problems"] >= 500
    policy = metrics["controls"].pop("policy_shuffled_image")
    assert abs(policy["accuracy"] - policy["chance"]) <= 3 * policy["stderr"]
    assert metrics["best_of_n"]["16"]["random"]["accuracy"] > 5 * policy["chance"]
    for name, control in metrics["controls"].items():
        assert abs(control["difference_to_random"]) <= 2 * control["difference_stderr"], name
    assert metrics["paired"]["random"]["difference"] >= 0.12
    for baseline in ("majority", "policy_logprob"):
        assert metrics["paired"][baseline]["ci95"][0] > 0, baseline


# Samples prefixes of finished trees again, many times and with other random numbers: {"k", "n", "more_k", "more_n"}.
BRUTE_FORCE = """
import json, sys
import jax
from etils import epath
from mmprm_jax import config
from mmprm_jax.answers.workers import Verifier
from mmprm_jax.records import Request
from mmprm_jax.search.store import read_trees
from mmprm_jax.stages import Run, run_mesh, models
run = Run(config.load(sys.argv[1]), epath.Path(sys.argv[2]))
trees, mesh, c = read_trees(run.folder("annotate"))[:60], run_mesh(run.config), run.config
chosen = [(t, i) for t in trees for i in range(len(t.nodes)) if (i < 3)]
with jax.set_mesh(mesh):
    policy = models.load_policy(run, c.annotate, mesh)
    sampler = policy.sampler(c.annotate, run.data, 16, c.seed, "brute force", Verifier(0))
    answers = sampler.solve([Request(t.problem, t.prefix(i), 96) for t, i in chosen])
print(json.dumps([[t.nodes[i].k, t.nodes[i].n, sum(r.correct for r, _ in a), len(a)]
                  for (t, i), a in zip(chosen, answers)]))
"""


@pytest.mark.slow
def test_brute_force_agrees_with_the_annotated_values(environment, default_run):
    """Chi-square over prefixes: k of n in the tree against many fresh rollouts of the same prefix."""
    command = [sys.executable, "-c", BRUTE_FORCE, DEFAULT.removeprefix("--config="), str(default_run)]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert out.returncode == 0, out.stderr
    k, n, more_k, more_n = np.array(json.loads(out.stdout.strip().splitlines()[-1])).T
    # The many decide which prefixes count, so that the choice cannot bias the few.
    kept = np.abs(more_k / more_n - 0.5) < 0.4
    k, n, more_k, more_n = (x[kept] for x in (k, n, more_k, more_n))
    p = (k + more_k) / (n + more_n)
    z = (k / n - more_k / more_n) / np.sqrt(p * (1 - p) * (1 / n + 1 / more_n))
    assert len(z) > 60
    assert stats.chi2.sf((z**2).sum(), len(z)) > 1e-3
    assert abs(z.sum()) / np.sqrt(len(z)) < 3.3
