"""``mmprm launch slurm`` and ``launch/slurm.sh`` with stand-ins for Slurm's programs."""

import os
import signal
import time

import pytest

from mmprm_jax import cli
from mmprm_jax.launch.job import CLONE
from mmprm_jax.records import UserError

OPTIONS = ["--nodes=2", "--gpus=8", "--time=1:00:00"]
COMMAND = ["sft", "--config=configs/digits.py", "--workdir=run"]
HOSTILE = ["--config.a=it's", '--config.b="two  words"', "--config.c=$HOME`id`", "--config.d=\\;&|*?#!~\nline"]
HOSTILE += ["--config.e", ""]

DRY_RUN = """\
mkdir -p run/logs
env 'A=b c' sbatch --job-name=mmprm --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --time=1:00:00 --signal=B:USR1@120 --output=run/logs/%j.log --partition=P CLONE/launch/slurm.sh run/logs sft --config=configs/digits.py --workdir=run --distributed
"""  # noqa: E501


def slurm(*more, command=COMMAND):
    cli.run(["launch", "slurm", *OPTIONS, *more, "--", *command])


def test_the_dry_run(dry_run):
    text = dry_run("slurm", *OPTIONS, "--sbatch=--partition=P", "--env=A=b c", "--", *COMMAND)
    assert text.replace(str(CLONE), "CLONE") == DRY_RUN


def test_hostile_arguments_arrive_as_they_were(scenario):
    slurm(command=[*COMMAND, *HOSTILE])
    assert scenario.calls("mmprm") == [[*COMMAND, *HOSTILE, "--distributed"]] * 2
    [srun] = scenario.calls("srun")
    assert srun[:4] == ["--kill-on-bad-exit=1", "--open-mode=append", "--output=run/logs/%j.%t.log", "mmprm"]
    assert "scontrol" not in [call[0] for call in scenario.calls()]


def test_a_failing_process_is_named(scenario):
    """By the batch script: its exit status is the job's, its output the job's log."""
    scenario.put("status.1", "1")
    slurm()
    out = (scenario.folder / "out").read_text().splitlines()
    assert out[0].startswith("mmprm launch: exit status 1")
    assert "run/logs/7.1.log: mmprm: it went wrong" in out
    assert "scontrol" not in [call[0] for call in scenario.calls()]


def test_shortly_before_the_limit_it_stops_and_queues_again(scenario):
    scenario.put("seconds", "60")
    scenario.put("background")
    slurm()
    deadline = time.monotonic() + 60
    while not scenario.calls("mmprm"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(int((scenario.folder / "script.pid").read_text()), signal.SIGUSR1)
    while not (stopped := [call for call in scenario.calls() if call[0] in ("scancel", "scontrol")])[1:]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert stopped == [["scancel", "--signal=TERM", "7"], ["scontrol", "requeue", "7"]]


def test_what_is_not_accepted(scenario):
    (scenario.folder / "bin" / "sbatch").write_text("#!/bin/sh\necho 'invalid partition' >&2\nexit 1\n")
    with pytest.raises(UserError, match="sbatch: invalid partition"):
        slurm()
    with pytest.raises(UserError, match="--nodes: 0 is not allowed"):
        slurm("--nodes=0")
