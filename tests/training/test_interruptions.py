"""Runs that are killed, asked to stop or find damaged checkpoints end as if nothing had happened."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from toy_training import Source, curve, train

from mmprm_jax.interruption import Interrupted, handling
from mmprm_jax.processes import stop_requested
from mmprm_jax.records import UserError
from mmprm_jax.training.checkpoints import Checkpoints

ONE = {"data": 1}
SAVING = {"steps": 12, "checkpoint_every": 3}


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def steps(folder):
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its folder and its parameters."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, jax.device_get(train(folder, ONE, **SAVING))


@pytest.fixture
def half(whole, tmp_path):
    """A folder as a run leaves it that was killed after step 9, with the checkpoints of steps 6 and 9."""

    class Stop(Exception):
        pass

    class Stopping(Source):
        def __next__(self):
            if self.step == 10:
                raise Stop
            return super().__next__()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["toy_training"], "Source", Stopping)
        with pytest.raises(Stop):
            train(tmp_path, ONE, **SAVING)
    assert steps(tmp_path) == [6, 9]
    return tmp_path


def damage(step, how):
    files = [p for p in step.rglob("*") if p.is_file()]
    if how == "truncated":
        largest = max(files, key=lambda p: p.stat().st_size)
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    elif how == "missing":
        shutil.rmtree(step / "state")
    else:
        shutil.rmtree(step / "data")


@pytest.mark.parametrize("how", ["truncated", "missing", "without position"])
def test_a_damaged_checkpoint_falls_back_and_says_so(whole, half, how, caplog):
    damage(half / "checkpoints" / "9", how)
    equal(train(half, ONE, **SAVING), whole[1])
    said = caplog.text
    assert "the checkpoint of step 9 cannot be read" in said and "going back to the checkpoint of step 6" in said
    assert steps(half) == [9, 12]  # saved once more
    assert (half / "checkpoints_damaged" / "9").is_dir()
    assert curve(half) == curve(whole[0])


def test_no_checkpoint_can_be_read(half):
    for step in steps(half):
        damage(half / "checkpoints" / str(step), "missing")
    with pytest.raises(UserError, match=r"none of the checkpoints \[9, 6\] can be read"):
        train(half, ONE, **SAVING)
    assert steps(half) == [6, 9]  # nothing is taken away


@pytest.mark.slow
def test_resumed_on_another_mesh(whole, half):
    got = jax.tree.map(np.array, train(half, {"data": 2, "fsdp": 2, "tensor": 2}, **SAVING))
    np.testing.assert_allclose(curve(half), curve(whole[0]), rtol=1e-6)
    want = jax.tree.map(np.copy, whole[1])
    for params in (got, want):  # a bias of all keys changes nothing: its gradient is rounding only
        params["vision"]["layers"]["attention"]["qkv_bias"][:, 1] = 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-5), got, want)


def test_asked_to_stop(whole, tmp_path):
    class Asked(Source):
        def __next__(self):
            if self.step == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__next__()

    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["toy_training"], "Source", Asked)
        with handling(), pytest.raises(Interrupted) as caught:
            train(tmp_path, ONE, **SAVING)
    assert caught.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    assert "stopped at step 5 as asked" in caught.value.message and steps(tmp_path) == [3, 5]
    equal(train(tmp_path, ONE, **SAVING), whole[1])


def test_pods_are_asked_for_every_step(monkeypatch):
    asked = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    module = sys.modules["mmprm_jax.processes"].multihost_utils
    monkeypatch.setattr(module, "reached_preemption_sync_point", lambda step: asked.append(step) or step == 3)
    with handling():
        assert [stop_requested(step) for step in (1, 2, 3)] == [False, False, True] and asked == [1, 2, 3]


def test_newest_and_best_are_kept(tmp_path):
    state = {"x": jax.numpy.arange(3.0)}
    with Checkpoints(tmp_path / "checkpoints", keep=2, best=1) as checkpoints:
        for step, loss in [(1, 3.0), (2, 1.0), (3, 2.0), (4, 4.0), (5, 5.0)]:
            checkpoints.save(step, state, {"at": step}, {"loss": loss})
    assert steps(tmp_path) == [2, 4, 5]
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        step, found, position = checkpoints.restore(state)
    assert (step, position) == (5, {"at": 5}) and np.array_equal(found["x"], state["x"])


KILLS = int(os.environ.get("MMPRM_KILLS", "6"))
LONG = {"steps": 15 + 7 * KILLS, "checkpoint_every": 1, "keep": 2}


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    """SIGKILL, mostly in the middle of a save: there is one after every step."""
    script = str(Path(__file__).with_name("toy_training.py"))
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}

    def start(name):
        (tmp_path / name).mkdir(exist_ok=True)
        return subprocess.Popen(
            [sys.executable, script, str(tmp_path / name), json.dumps(ONE), json.dumps(LONG)], env=env,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip

    assert start("whole").wait(timeout=1200) == 0
    rng, kills, torn, metrics = random.Random(0), 0, 0, tmp_path / "killed" / "metrics.jsonl"
    while True:
        worker = start("killed")
        if kills < KILLS:
            # From the first step of this process on.
            size = metrics.stat().st_size if metrics.exists() else 0
            while worker.poll() is None and (not metrics.exists() or metrics.stat().st_size <= size):
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.6))
            worker.kill()
        error = worker.communicate(timeout=1200)[1].decode()
        torn += bool(list((tmp_path / "killed" / "checkpoints").glob("*tmp*")))
        if worker.returncode != -signal.SIGKILL:
            break
        kills += 1
    assert worker.returncode == 0, error[-3000:]
    assert kills == KILLS and torn > 0
    with np.load(tmp_path / "whole" / "final.npz") as want, np.load(tmp_path / "killed" / "final.npz") as got:
        assert set(want) == set(got) and all(np.array_equal(want[name], got[name]) for name in want)
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
