"""Servers that are not there, die or say nothing: told once and in time, and nothing that was done is lost."""

import contextlib
import os
import signal
import socket
import threading
import time

import pytest
from etils import epath
from ml_collections import ConfigDict

from mmprm_jax import annotation, servers
from mmprm_jax.interruption import Interrupted, handling
from mmprm_jax.records import Problem, Request, Rollout, UserError
from mmprm_jax.rollout import remote
from mmprm_jax.rollout.remote import RemoteSampler
from mmprm_jax.rollout.sampling import Sampling
from mmprm_jax.search.settings import Settings
from mmprm_jax.servers import check_reachable

ABSENT = "http://127.0.0.1:9/v1"


@pytest.fixture
def silent():
    """Takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


@pytest.fixture
def told(monkeypatch):
    lines = []
    for module in (servers, remote):
        monkeypatch.setattr(module.logging, "warning", lambda text, *args: lines.append(text % args))
    return lines


def test_it_ends_within_half_a_minute():
    assert servers.REACH < 30


@pytest.mark.parametrize("url", [ABSENT, "http://no-such-host.invalid/v1"])
def test_a_server_that_is_not_there_is_named(url, monkeypatch, told):
    monkeypatch.setattr(servers, "REACH", 1.0)
    config = ConfigDict({"servers": (url,)})
    with pytest.raises(UserError, match=f"no server can be reached .{url}: ConnectError") as caught:
        annotation.remote(config, epath.Path("."), 0, Sampling()).__enter__()
    assert "\n" not in str(caught.value) and not told


def test_those_that_are_there_go_on(silent, told):
    check_reachable([ABSENT, silent, ABSENT.replace("9", "8")])
    assert len(told) == 1 and told[0].count("ConnectError") == 2 and silent not in told[0]


def test_no_servers_no_wait(monkeypatch):
    monkeypatch.setattr(servers.time, "monotonic", lambda: 1 / 0)
    check_reachable([])


def make(*urls, **options):
    options = {"pause": 0.05, "backoff": 0.01, "verify": lambda pairs: [True for _ in pairs]} | options
    return RemoteSampler(urls, "m", ".", 0, "annotate", options.pop("verify"), Sampling(), **options)


def test_a_dead_server_is_warned_of_once_a_minute(told):
    requests = [Request(Problem(f"p{i}", "q", "1"), (), 1) for i in range(64)]
    with make(ABSENT) as sampler:
        sampler.submit(requests)
        while sampler.collect():
            pass
    assert (
        sampler.retries > 100 and len(told) == 1 and told[0].startswith(f"{ABSENT} is paused for 0.05 s: ConnectError")
    )


def test_patience_has_an_end(told, monkeypatch):
    """Instead of one tree after the other that fails."""
    monkeypatch.setattr(remote, "PATIENCE", 0.3)
    with make(ABSENT, max_attempts=1000, pause=0.1) as sampler:
        sampler.submit([Request(Problem("p", "q", "1"), (), 1)])
        with pytest.raises(UserError, match=f"no answer from any server for 0.3 s .{ABSENT}: ConnectError"):
            sampler.collect()


class SilentFromNowOn:
    """Answers ``n`` requests, then asks a silent server."""

    def __init__(self, sampler, n):
        self._sampler, self._left, self._waiting = sampler, n, []

    def submit(self, requests):
        known, asked = requests[: self._left], requests[self._left :]
        self._left -= len(known)
        self._waiting += known
        self._sampler.submit(asked)

    def collect(self):
        known, self._waiting = self._waiting, []
        segments = ("<step>a</step>", "<answer>1</answer>")
        rollouts = [tuple(Rollout(segments, i % 2 == 0, 3) for i in range(r.n)) for r in known]
        return list(zip(known, rollouts, strict=True)) or self._sampler.collect()

    def release(self, problem_id):
        self._sampler.release(problem_id)

    def __getattr__(self, name):
        return getattr(self._sampler, name)


@contextlib.contextmanager
def signalled(after):
    timer = threading.Timer(after, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    try:
        yield
    finally:
        timer.join()


CONFIG = {"trees_per_shard": 4, "checkpoint_seconds": 1e9, "mode": "default", "in_flight": 8, "skip_failed": False}


def grow(folder, url, n):
    problems = [Problem(f"p{i}", "q", "1") for i in range(8)]
    with make(url) as sampler:
        answering = SilentFromNowOn(sampler, n)
        annotation.run(epath.Path(folder), problems, answering, Settings(), ConfigDict(CONFIG))


def test_asked_to_end_while_servers_say_nothing(silent, tmp_path):
    """Within 10 s, and what was answered is saved."""
    start = time.monotonic()
    with pytest.raises(Interrupted) as ended, handling(), signalled(after=1.0):
        grow(tmp_path, silent, 5)
    assert ended.value.code == 143 and time.monotonic() - start < 11
    assert len((tmp_path / "in_flight-000.part").read_text().splitlines()) == 5


def test_servers_that_died_lose_nothing(tmp_path, monkeypatch, told):
    monkeypatch.setattr(remote, "PATIENCE", 0.0)
    with pytest.raises(UserError, match="no answer from any server"):
        grow(tmp_path, ABSENT, 5)
    assert len((tmp_path / "in_flight-000.part").read_text().splitlines()) == 5
