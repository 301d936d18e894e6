"""``mmprm launch tpu`` with a stand-in for gcloud, and the real script on two "workers"."""

import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import time

import pytest

from mmprm_jax import cli
from mmprm_jax.interruption import Interrupted
from mmprm_jax.launch.job import CLONE
from mmprm_jax.launch.tpu import BUSY, UNPACK, Slice
from mmprm_jax.records import UserError

OPTIONS = ["--name=pod", "--zone=ZONE", "--type=v5litepod-8", "--runtime=RUNTIME"]
COMMAND = ["annotate", "--config=configs/digits.py:smoke", "--workdir=gs://BUCKET/run"]
HOSTILE = ["--config.a=it's", '--config.b="two  words"', "--config.c=$HOME`id`$(id)", "--config.d=\\;&|*?#!~\nline"]
HOSTILE += ["--config.e", ""]
RUN = "20[0-9]{6}-[0-9]{6}-"

DRY_RUN = """\
# the state, every 30 s; no such resource: create it; SUSPENDED, FAILED, PREEMPTED: delete it
gcloud compute tpus queued-resources describe pod --zone=ZONE --project=PROJECT '--format=value(state.state)'
gcloud compute tpus queued-resources create pod --zone=ZONE --project=PROJECT --node-id=pod --accelerator-type=v5litepod-8 --runtime-version=RUNTIME --spot --network=N
# ACTIVE: this clone (mmprm_jax, configs, launch, setup.py, pyproject.toml, MANIFEST.in, README.md, LICENSE) to every worker
mkdir -p logs/pod/install logs/pod/RUN-0
tar --create --gzip --file=logs/pod/mmprm_jax.tar.gz --directory=CLONE mmprm_jax configs launch setup.py pyproject.toml MANIFEST.in README.md LICENSE
gcloud compute tpus tpu-vm scp logs/pod/mmprm_jax.tar.gz pod:mmprm_jax.tar.gz --zone=ZONE --project=PROJECT --worker=all
gcloud compute tpus tpu-vm ssh pod --zone=ZONE --project=PROJECT --worker=all '--command=flock --nonblock ~/mmprm.lock true || exit 0; rm -rf mmprm_jax && mkdir mmprm_jax && tar --extract --gzip --file=mmprm_jax.tar.gz --directory=mmprm_jax && bash mmprm_jax/launch/tpu_worker.sh install' --output-directory=logs/pod/install
# the command; the same again follows it where the connection was lost
gcloud compute tpus tpu-vm ssh pod --zone=ZONE --project=PROJECT --worker=all '--command=bash mmprm_jax/launch/tpu_worker.sh run RUN-0 mmprm annotate --config=configs/digits.py:smoke --workdir=gs://BUCKET/run --distributed' --output-directory=logs/pod/RUN-0
# at the end
gcloud compute tpus queued-resources delete pod --zone=ZONE --project=PROJECT --force --quiet
"""  # noqa: E501


def tpu(*more, command=COMMAND):
    cli.run(["launch", "tpu", *OPTIONS, "--poll=0.01", *more, "--", *command])


def verbs(scenario):
    """What gcloud was asked for, in short, without repetitions of the same."""
    found = []
    for call in scenario.calls("gcloud"):
        text = " ".join(call)
        verb = "install" if "worker.sh install" in text else "run" if "worker.sh run" in text else call[3]
        if found[-1:] != [verb]:
            found.append(verb)
    return found


def at_work(scenario):
    """What arrived at mmprm on both workers."""
    return scenario.calls("mmprm")


def test_the_dry_run(dry_run):
    text = dry_run("tpu", *OPTIONS, "--spot", "--project=PROJECT", "--create=--network=N", "--", *COMMAND)
    assert re.sub(RUN, "RUN-", text).replace(str(CLONE), "CLONE") == DRY_RUN


def test_what_the_dry_run_prints_is_what_is_run(scenario, dry_run, tmp_path):
    text = dry_run("tpu", *OPTIONS, "--", *COMMAND, *HOSTILE)
    assert scenario.calls() == []
    tpu(command=[*COMMAND, *HOSTILE])
    run = [json.loads(re.sub(RUN, "RUN-", json.dumps(call))) for call in scenario.calls("gcloud")]
    lines = [line for line in shlex.split(re.sub(RUN, "RUN-", text), comments=True)]
    shown, name = [], None
    for word in lines:  # the words of all commands, one after the other
        if word in ("gcloud", "tar", "mkdir"):
            shown.append(name := [])
        name.append(word)
    shown = [words[1:] for words in shown if words[0] == "gcloud"]
    assert [call for i, call in enumerate(run) if call not in run[:i]] == shown


def test_hostile_arguments_arrive_as_they_were(scenario):
    tpu("--env=A=it's $HOME", command=[*COMMAND, *HOSTILE])
    assert at_work(scenario) == [[*COMMAND, *HOSTILE, "--distributed"]] * 2
    for worker in "01":
        environment = json.loads((scenario.folder / f"environment.{worker}").read_text())
        assert environment["A"] == "it's $HOME"
        assert environment["PATH"].startswith(str(scenario.folder / f"home{worker}" / "mmprm_jax" / ".venv" / "bin"))


def test_a_run_from_creation_to_deletion(scenario, tmp_path):
    tpu()
    assert verbs(scenario) == ["describe", "create", "describe", "scp", "install", "run", "delete"]
    installed = scenario.folder / "home1" / "mmprm_jax"
    assert (installed / "mmprm_jax" / "main.py").read_bytes() == (CLONE / "mmprm_jax" / "main.py").read_bytes()
    assert (installed / "configs" / "digits.py").exists() and not list(installed.rglob("__pycache__"))
    pip = [call for call in scenario.calls("python3") if "jax[tpu]" in call]
    assert len(pip) == 2 and f"{scenario.folder}/home0/mmprm_jax[gcs]" in pip[0]
    for worker in "01":
        [log] = tmp_path.glob(f"logs/pod/2*-0/{worker}.log")
        assert log.read_text().splitlines()[0] == f"mmprm {' '.join(COMMAND)} --distributed"
        assert log.read_text().splitlines()[-1] == "mmprm launch: exit status 0"


def test_a_slice_that_is_there_is_used_and_kept(scenario):
    scenario.put("states", "ACTIVE")
    tpu("--keep")
    assert verbs(scenario) == ["describe", "scp", "install", "run"]


@pytest.mark.parametrize("state", ["PREEMPTED", "SUSPENDED", "FAILED"])
def test_a_lost_slice_is_replaced(scenario, monkeypatch, state):
    scenario.put("states", state)
    monkeypatch.setattr(Slice, "install", lambda self: True)
    monkeypatch.setattr(Slice, "attempt", lambda self: True)
    tpu("--keep")
    assert verbs(scenario) == ["describe", "delete", "describe", "create", "describe"]
    scenario.put("states", state)
    with pytest.raises(UserError, match=f"pod is {state}, after 0 restarts"):
        tpu("--restarts=0")


def test_after_preemption_the_same_command_runs_on_a_new_slice(scenario):
    scenario.put("states", "ACTIVE")
    scenario.put("breaks", "PREEMPTED")
    tpu()
    work = ["scp", "install", "run"]
    assert verbs(scenario) == [
        "describe",
        *work,
        "describe",
        "delete",
        "describe",
        "create",
        "describe",
        *work,
        "delete",
    ]
    assert at_work(scenario) == [[*COMMAND, "--distributed"]] * 3  # worker 0 alone, then both


def test_a_lost_connection_is_taken_up_again(scenario):
    """The command that goes on without it is not started twice, nor its end missed."""
    scenario.put("states", "ACTIVE")
    scenario.put("breaks", "")
    scenario.put("status.0", "3")
    with pytest.raises(UserError, match=r"logs/pod/.*/0.log \(exit status 3\)"):
        tpu()
    assert verbs(scenario) == ["describe", "scp", "install", "run", "describe", "run", "delete"]
    assert len(at_work(scenario)) == 2  # one for each worker


def test_a_failing_worker_is_named_and_the_slice_deleted(scenario):
    scenario.put("status.1", "1")
    with pytest.raises(UserError, match=r"the command failed; see logs/pod/2[-0-9]*/1.log \(exit status 1\)$"):
        tpu()
    assert verbs(scenario)[-2:] == ["run", "delete"]


def test_a_killed_process_is_started_again(scenario):
    scenario.put("status.1", f"-{signal.SIGKILL}", "0")
    tpu()
    assert verbs(scenario)[-4:] == ["run", "describe", "run", "delete"]
    assert len(at_work(scenario)) == 4
    scenario.put("status.1", f"-{signal.SIGKILL}")
    with pytest.raises(UserError, match=r"1.log \(exit status 137\), after 0 restarts"):
        tpu("--restarts=0")


def test_what_is_refused_and_what_cannot_be_reached(scenario):
    scenario.put("refused")
    with pytest.raises(UserError, match="PERMISSION_DENIED: no quota"):
        tpu()
    assert verbs(scenario) == ["describe", "create"]
    scenario.put("states", "unreachable")
    with pytest.raises(UserError, match=r"network is unreachable \(5 times\).*left alone"):
        tpu()
    assert verbs(scenario)[-1] == "describe"
    scenario.put("states", *["unreachable"] * 3, "ACTIVE")
    tpu()
    assert verbs(scenario)[-1] == "delete"


def test_a_slice_with_another_command_is_left_alone(scenario):
    scenario.put("states", "ACTIVE")
    scenario.put("status.1", str(BUSY))  # as tpu_worker.sh ends then
    with pytest.raises(UserError, match=r"another command is running on pod; see .*/1.log"):
        tpu()
    assert verbs(scenario)[-1] == "run"


def test_the_deletion_is_insisted_on(scenario, monkeypatch):
    scenario.put("states", "ACTIVE")
    monkeypatch.setattr(Slice, "install", lambda self: True)
    monkeypatch.setattr(Slice, "attempt", lambda self: True)
    scenario.put("undeletable", "1", "1", "0")
    tpu()
    assert [call[3] for call in scenario.calls("gcloud")] == ["describe", "delete", "delete", "delete"]
    scenario.put("states", "ACTIVE")
    scenario.put("undeletable", "1")
    with pytest.raises(UserError, match=r"pod was not deleted: .*UNAVAILABLE \(5 times\)"):
        tpu()


def test_an_interrupted_launcher_leaves_the_slice_alone(scenario, monkeypatch):
    scenario.put("states", "ACTIVE")

    def interrupted(self):
        raise Interrupted

    monkeypatch.setattr(Slice, "attempt", interrupted)
    with pytest.raises(Interrupted) as ended:
        tpu()
    assert re.search("pod, which goes on .* queued-resources delete pod --zone=ZONE --force", ended.value.message)
    assert verbs(scenario) == ["describe", "scp", "install"]


def test_nothing_is_unpacked_under_a_running_command(scenario, tmp_path, monkeypatch):
    """It is what the launch before, which was interrupted, has started."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mmprm_jax").mkdir()
    with open(tmp_path / "mmprm.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert subprocess.run(["bash", "-c", UNPACK], cwd=tmp_path).returncode == 0
        assert (tmp_path / "mmprm_jax").exists()
    assert subprocess.run(["bash", "-c", UNPACK], cwd=tmp_path, capture_output=True).returncode != 0  # no archive here


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["sft", "--config=configs/digits.py", "--workdir=runs/x"], "gs://BUCKET"),
        (["sft", "--config=/tmp/other.py", "--workdir=gs://b/x"], "not a file of this clone"),
        (["sft", "--config=configs/none.py", "--workdir=gs://b/x"], "configs/none.py"),
    ],
)
def test_what_the_workers_could_not_see(scenario, command, words):
    with pytest.raises(UserError, match=words):
        tpu(command=command)
    assert scenario.calls() == []


class TestTheWorkersScript:
    """What a new connection finds, while the command is under way and after."""

    @pytest.fixture
    def worker(self, scenario, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        folder = tmp_path / "home" / "mmprm_jax" / "launch"
        folder.mkdir(parents=True)
        script = folder / "tpu_worker.sh"
        script.write_bytes((CLONE / "launch" / "tpu_worker.sh").read_bytes())

        def start(*words):
            argv = ["bash", str(script), *words]
            return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, start_new_session=True)

        return start

    @staticmethod
    def wait_for_start(scenario):
        deadline = time.monotonic() + 60
        while not scenario.calls("mmprm"):
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def test_it_outlives_its_connection(self, scenario, worker):
        scenario.put("seconds", "2")
        scenario.put("status.0", "5")
        first = worker("run", "a", "mmprm", "x y")
        self.wait_for_start(scenario)
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()
        out, _ = (second := worker("run", "a", "mmprm", "x y")).communicate(timeout=60)
        assert second.returncode == 5
        assert out.splitlines()[0] == "mmprm x y" and out.splitlines()[-1] == "mmprm launch: exit status 5"
        out, _ = (third := worker("run", "a", "mmprm", "x y")).communicate(timeout=60)  # it has ended since
        assert third.returncode == 5 and "mmprm x y" in out
        assert len(scenario.calls("mmprm")) == 1
        worker("run", "b", "mmprm", "x y").communicate(timeout=60)
        assert len(scenario.calls("mmprm")) == 2

    def test_another_launch_of_the_same_follows_it_another_command_is_refused(self, scenario, worker):
        scenario.put("seconds", "3")
        first = worker("run", "a", "mmprm", "x")
        self.wait_for_start(scenario)
        other = worker("run", "b", "mmprm", "y")
        assert "another command is running here: mmprm x" in other.communicate(timeout=60)[0]
        assert other.returncode == BUSY
        out, _ = (same := worker("run", "c", "mmprm", "x")).communicate(timeout=60)
        assert same.returncode == 0 and "mmprm x" in out
        assert first.wait(60) == 0 and len(scenario.calls("mmprm")) == 1

    def test_a_restarted_machine_is_no_success(self, scenario, worker, tmp_path):
        (tmp_path / "home" / "mmprm_runs" / "a").mkdir(parents=True)
        (tmp_path / "home" / "mmprm_runs" / "a" / "log").write_text("began\n")
        out, _ = (process := worker("run", "a", "mmprm", "x")).communicate(timeout=60)
        assert process.returncode == 137 and out.splitlines()[0] == "began"
        assert scenario.calls() == []
