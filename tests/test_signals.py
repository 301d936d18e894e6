"""Random signals to real commands: each ends in time, with its code and one line, and its results stay the same."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAGES = ("data", "sft", "annotate", "train_prm", "evaluate", "report")
REPEATS = int(os.environ.get("MMPRM_SIGNALS", "0"))  # of each kind and stage; 0: half of the kinds, once
LIMIT = 10.0  # seconds to end in, on an idle machine
BOOT = 2.5  # seconds until the interpreter has installed the handlers
KINDS = [(n, group, ignored) for n in (signal.SIGINT, signal.SIGTERM) for group in (0, 1) for ignored in (0, 1)]
IGNORE = "import signal, sys; signal.signal(2, signal.SIG_IGN); "


def limit():
    """Other work on the machine makes everything slower."""
    return LIMIT * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def start(workdir, stage, ignored):
    code = f"{IGNORE * ignored}from mmprm_jax.main import run; run()"
    config = f"--config={ROOT / 'configs' / 'digits.py'}:smoke"
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-c", code, stage, config, f"--workdir={workdir}"], env=env, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def finish(workdir, stage):
    process = start(workdir, stage, False)
    _, err = process.communicate(timeout=1800)
    assert process.returncode == 0, err


@pytest.fixture(scope="module")
def whole(request):
    """A finished run, whose compiled programs serve all others; MMPRM_RUN may name one."""
    return Path(os.environ.get("MMPRM_RUN") or request.getfixturevalue("smoke_run")[0])


def results(workdir, stage):
    """What the stage has made: figures, and texts by name."""
    figures = json.loads((workdir / stage / "done.json").read_text())
    for name in ("seconds", "manifest", "seal"):  # files of weights have random names
        figures.pop(name)
    files = sorted((workdir / stage).glob("*.jsonl"))
    return figures, {path.name: path.read_text() for path in files if path.name != "metrics.jsonl"}


def ended_within(process, seconds):
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES[1:-1])
def test_random_signals(whole, tmp_path, stage):
    workdir, rng = tmp_path / "run", random.Random(stage)
    later = STAGES[STAGES.index(stage) :]
    shutil.copytree(whole, workdir, ignore=shutil.ignore_patterns(*later))
    seconds = json.loads((whole / stage / "done.json").read_text())["seconds"] + 8
    kinds = KINDS * REPEATS or [kind for i, kind in enumerate(KINDS) if (i + i // 2 + STAGES.index(stage)) % 2]
    for number, group, ignored in rng.sample(kinds, len(kinds)):
        process = start(workdir, stage, ignored)
        while ended_within(process, BOOT + rng.uniform(0, seconds)):  # it was too late: from the beginning
            assert process.returncode == 0, process.stderr.read()
            shutil.rmtree(workdir / stage)
            seconds *= 0.7  # what was compiled before is there
            process = start(workdir, stage, ignored)
        os.killpg(process.pid, number) if group else process.send_signal(number)
        sent, allowed = time.monotonic(), limit()
        _, err = process.communicate(timeout=600)
        took = time.monotonic() - sent
        print(stage, number.name, "group" if group else "process", ignored, process.returncode, f"{took:.1f} s")
        if process.returncode == 0 and (workdir / stage / "done.json").exists():  # it was done by then
            shutil.rmtree(workdir / stage)
            continue
        assert process.returncode == 128 + number, err
        told = [line for line in err.splitlines() if "the same command goes on from here" in line]
        assert len(told) == 1 and "Traceback" not in err and took < allowed, err
    finish(workdir, stage)
    assert results(workdir, stage) == results(whole, stage)
