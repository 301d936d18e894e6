"""What all targets of ``mmprm launch`` share: the command line, and scripts that shellcheck accepts."""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

from mmprm_jax import cli
from mmprm_jax.errors import UsageError, UserError
from mmprm_jax.launch import job, local

ROOT = pathlib.Path(__file__).parents[2]
COMMAND = ["sft", "--config=configs/digits.py", "--workdir=gs://BUCKET/run", "--config.x=it's $HOME"]
OPTIONS = {
    "tpu": ["--zone=Z", "--type=T", "--runtime=R"],
    "gke": ["--image=I", "--accelerator=A", "--topology=4x8"],
    "slurm": ["--gpus=2", "--time=1:00:00"],
    "local": ["--processes=2"],
}


def shellcheck(*argv, **options):
    program = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert program, "shellcheck is not installed: pip install -e '.[test]'"
    return subprocess.run([program, *argv], capture_output=True, text=True, **options)


def test_every_script_passes_shellcheck():
    scripts = [ROOT / name for name in subprocess.check_output(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.sh", ".ci/run"], cwd=ROOT, text=True
    ).split()]  # fmt: skip
    assert {"tpu_worker.sh", "slurm.sh", "run"} <= {script.name for script in scripts}
    checked = shellcheck("--exclude=SC1091", *map(str, scripts))  # .venv/bin/activate is not there yet
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("target", OPTIONS)
def test_what_a_dry_run_prints_passes_shellcheck(target, dry_run):
    text = dry_run(target, *OPTIONS[target], "--", *COMMAND)
    # Literal $ and ~ are for the other machine.
    checked = shellcheck("--shell=bash", "--exclude=SC2016,SC2088", "-", input=text)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("target", OPTIONS)
def test_a_dry_run_needs_no_program_and_runs_none(target, dry_run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "--distributed" in dry_run(target, *OPTIONS[target], "--", *COMMAND)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["tpu", "gke", "slurm", "local"])
def test_a_missing_program_is_named(target, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    program = {"tpu": "gcloud", "gke": "kubectl", "slurm": "sbatch", "local": "mmprm"}[target]
    with pytest.raises(UserError, match=f"^{program}: not"):
        cli.run(["launch", target, *OPTIONS[target], "--", *COMMAND])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "mmprm launch tpu or mmprm launch gke or"),
        (["cloud"], "did you mean launch"),
        (["tpu", "--zone=Z", "--", *COMMAND], "required: --type, --runtime"),
        (["local", "--processes=many"], "expected a whole number, got 'many'"),
        (["local", "--processes=2", "--nodes=3", "--", *COMMAND], "no option --nodes, which is one of launch slurm"),
        (["local", "--processes=0", "--", *COMMAND], "--processes: 0 is not allowed"),
        (["local", "--processes=2"], "command is missing"),
        (["local", "--processes=2", "--", "report", *COMMAND[1:]], "report: not a command that can be launched"),
        (["local", "--processes=2", "--", "sft", "--config=c"], "required: --workdir"),
        (["local", "--processes=2", "--", "sft", "--workdir=c", "--config.sft=x"], "required: --config"),
        (["local", "--processes=2", "--", "sft", *COMMAND[1:], "--max-tiles=2"], "sft: no option --max-tiles"),
        (["local", "--processes=2", "--name=A_b", "--", *COMMAND], "--name=A_b"),
        (["local", "--processes=2", "--env=1A=b", "--", *COMMAND], "--env=1A=b"),
        (["local", "--processes=2", "--restarts=-1", "--", *COMMAND], "--restarts: -1 is not allowed"),
        (["slurm", *OPTIONS["slurm"], "--restarts=2", "--", *COMMAND], "no option --restarts"),
    ],
)
def test_a_wrong_command_line_is_one_line(argv, words):
    with pytest.raises(UsageError) as error:
        cli.run(["launch", *argv])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_the_command_line_from_outside():
    argv = [sys.executable, "-m", "mmprm_jax.main", "launch", "tpu", "--config.x=1", "--", "sft"]
    run = subprocess.run(argv, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("mmprm: launch tpu: ") and len(run.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "logs", "folder"),
    [
        (["sft", "--config=c", "--workdir=a", "--workdir", "b"], [], "b/logs"),  # the last one counts
        (COMMAND, [], "logs/n"),
        (COMMAND, ["--logs=here"], "here"),
    ],
)
def test_where_the_logs_go(words, logs, folder, monkeypatch):
    launched = []
    monkeypatch.setattr(local, "launch", lambda options, job: launched.append(job))
    cli.run(["launch", "local", "--processes=2", "--name=n", *logs, "--", *words, "--distributed"])
    (job,) = launched
    assert job.words.count("--distributed") == 1 and job.logs == pathlib.Path(folder)


@pytest.mark.parametrize("target", ["tpu", "gke", "slurm"])
def test_a_package_without_its_clone_says_so(target, monkeypatch, tmp_path):
    monkeypatch.setattr(job, "CLONE", tmp_path)
    with pytest.raises(UserError, match="needs a clone"):
        cli.run(["launch", target, *OPTIONS[target], "--dry-run", "--", *COMMAND])


def test_the_commands_of_the_readme(dry_run, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    block = (ROOT / "launch" / "README.md").read_text().split("```bash\n")[1].split("```")[0]
    commands = [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]
    commands = [words for words in commands if words]
    assert sorted(words[2] for words in commands) == sorted(OPTIONS)
    for words in commands:
        assert words[:2] == ["mmprm", "launch"]
        assert "--distributed" in dry_run(*words[2:])
