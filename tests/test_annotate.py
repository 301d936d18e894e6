"""``mmprm annotate``: the trees depend on nothing but the problems and the policy. (slow) Killed, on many processes."""

import base64
import collections
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax
import numpy as np
import pytest
import toy_annotation as toy
from conftest import release
from etils import epath
from PIL import Image

from mmprm_jax import annotation, cli, records
from mmprm_jax.interruption import Interrupted, handling
from mmprm_jax.metrics import read as read_metrics
from mmprm_jax.models.tokenizer import Tokenizer
from mmprm_jax.records import Problem, UserError
from mmprm_jax.search.store import read_trees

HERE = pathlib.Path(__file__).parent
SMOKE = f"--config={HERE.parent / 'configs' / 'digits.py'}:smoke"
PROBLEMS = toy.problems(12)


def grown(folder, sampler, problems=PROBLEMS, worker=0, workers=1, writes=True, **changes):
    """Grows the trees into ``folder``, up to 32 at a time; returns the failures."""
    return annotation.run(
        epath.Path(folder), problems, sampler, toy.settings(), toy.config(**{"in_flight": 32} | changes),
        worker=worker, workers=workers, writes=writes,
    )  # fmt: skip


def finished(folder, failed=None, problems=PROBLEMS, skip=False):
    """The figures; and the files are what they should be at the end, with nothing left over."""
    figures = annotation.finish(epath.Path(folder), problems, failed or {}, skip)
    names = {path.name for path in epath.Path(folder).iterdir() if not path.name.startswith("events.")} - {"sums"}
    assert names == {*toy.files(folder), "failed.jsonl", "metrics.jsonl"}
    return figures


class Watched:
    """A sampler that tells what was asked, and what its engine drew: random key of a request -> token ids."""

    def __init__(self, sampler, limit=None):
        self.sampler, self.engine, self.limit = sampler, sampler.engine, limit
        self.requested, self.answered, self.drawn, keys = [], [], {}, {}
        submit, step = self.engine.submit, self.engine.step

        def watched_submit(group):
            submit(group)
            keys[group.id] = tuple(group.key.tolist())

        def watched_step():
            found = step()
            self.drawn |= {keys[number]: [sample.tokens for sample in samples] for number, samples in found}
            return found

        self.engine.submit, self.engine.step = watched_submit, watched_step

    def submit(self, requests):
        self.requested += requests
        self.sampler.submit(requests)

    def collect(self):
        if self.limit is not None and len(self.answered) >= self.limit:
            raise toy.Interrupted
        answers = self.sampler.collect()
        self.answered += [request for request, _ in answers]
        return answers

    def release(self, problem_id):
        self.sampler.release(problem_id)


@pytest.fixture(scope="module")
def sampler_of(tiny, mesh_of):
    """``sampler_of(slots, …)``; programs are shared as all prefixes have the same width."""

    def make(slots=64, mesh=None, cache_tokens=4000, limit=None):
        mesh = mesh or mesh_of(data=1)
        with jax.set_mesh(mesh):
            return Watched(toy.make_sampler(tiny, mesh, slots, toy_verify, cache_tokens, min_bucket=128), limit)

    return make


def toy_verify(pairs):
    from mmprm_jax import answers

    return [bool(answers.equal(gold, answer)) for answer, gold, _ in pairs]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, sampler_of, mesh_of):
    """64 slots, 32 trees in flight, one device: the folder, its files, its sampler, its figures."""
    folder, sampler = tmp_path_factory.mktemp("annotation"), sampler_of()
    with jax.set_mesh(mesh_of(data=1)):
        grown(folder, sampler)
    return folder, toy.files(folder), sampler, finished(folder)


def test_the_trees_are_not_trivial(whole):
    folder, files, sampler, figures = whole
    assert sorted(files) == ["trees-000000.jsonl", "trees-000005.jsonl", "trees-000010.jsonl"]
    trees = read_trees(epath.Path(folder))
    assert [tree.problem for tree in trees] == PROBLEMS
    searched = [tree for tree in trees if tree.searches]
    assert len(searched) >= 8
    assert sum(len(tree.nodes) for tree in searched) > 15 * len(searched)
    assert all(sum(node.visits for node in tree.nodes) == len(tree.searches) for tree in trees)
    assert sum(len(tree.searches) for tree in trees) > 30
    assert any(node.visits > 1 for tree in trees for node in tree.nodes)
    assert any(len(tree.prefix(i)) > 8 for tree in trees for i in range(len(tree.nodes)))
    assert 0.2 < np.mean([r.correct for tree in trees for node in tree.nodes for r in node.rollouts]) < 0.9
    assert figures == {
        "trees": 12, "failed": 0,
        "rollouts": sum(len(node.rollouts) for tree in trees for node in tree.nodes),
        "all_right": sum(all(r.correct for r in tree.nodes[0].rollouts) for tree in trees),
        "all_wrong": sum(not any(r.correct for r in tree.nodes[0].rollouts) for tree in trees),
    }  # fmt: skip
    assert figures["rollouts"] == sampler.engine.counts.samples and figures["all_right"]
    assert sum(map(len, sampler.drawn.values())) == figures["rollouts"]


def test_trees_in_flight_do_not_show(whole, tmp_path, sampler_of, mesh):
    sampler = sampler_of()
    grown(tmp_path, sampler, PROBLEMS[:3], in_flight=1)  # not 32
    assert sampler.drawn.items() < whole[2].drawn.items()
    finished(tmp_path, problems=PROBLEMS[:3])
    (trees,) = toy.files(tmp_path).values()
    assert trees.count(b"\n") == 3 and whole[1]["trees-000000.jsonl"].startswith(trees)


def test_slots_and_a_small_cache_do_not_show(whole, tmp_path, sampler_of, mesh):
    sampler = sampler_of(slots=100, cache_tokens=180)
    grown(tmp_path, sampler)
    counts, expected = sampler.engine.counts, whole[2].engine.counts
    assert counts.slot_steps == 100 * counts.steps and expected.slot_steps == 64 * expected.steps
    assert sampler.engine.counts.prefix_tokens > 1.2 * whole[2].engine.counts.prefix_tokens  # some were forgotten
    assert sampler.drawn == whole[2].drawn
    assert toy.files(tmp_path) == whole[1]


@pytest.mark.slow
def test_devices_do_not_show(whole, tmp_path, sampler_of, mesh_of):
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    sampler = sampler_of(16, mesh)
    with jax.set_mesh(mesh):
        grown(tmp_path, sampler, in_flight=8)
    assert sampler.drawn == whole[2].drawn
    assert toy.files(tmp_path) == whole[1]
    assert finished(tmp_path) == whole[3]


@pytest.mark.parametrize("mode", ["paper", "flat"])
def test_other_modes(whole, tmp_path, sampler_of, mesh, mode):
    found = {}
    for in_flight in (2, 32):
        grown(tmp_path / f"{in_flight}", sampler_of(), PROBLEMS[:4], mode=mode, in_flight=in_flight)
        assert finished(tmp_path / f"{in_flight}", problems=PROBLEMS[:4])["trees"] == 4
        found[in_flight] = toy.files(tmp_path / f"{in_flight}")
    assert found[2] == found[32]
    assert found[2]["trees-000000.jsonl"] != whole[1]["trees-000000.jsonl"]
    trees = read_trees(epath.Path(tmp_path / "2"))
    assert sum(len(tree.nodes) for tree in trees) > 15
    assert any(tree.searches for tree in trees) == (mode == "paper")


@pytest.mark.slow
def test_two_workers_give_the_files_of_one(whole, tmp_path, sampler_of, mesh):
    shares = []
    for worker in (0, 1):
        sampler = sampler_of()
        grown(tmp_path, sampler, worker=worker, workers=2)
        shares.append({request.problem.id for request in sampler.requested})
    assert shares == [{"p0", "p1", "p2", "p3", "p4", "p10", "p11"}, {"p5", "p6", "p7", "p8", "p9"}]
    assert toy.files(tmp_path) == whole[1]
    assert finished(tmp_path) == whole[3]


def test_interrupted_the_trees_stay_the_same(whole, tmp_path, sampler_of, mesh):
    first, second = sampler_of(limit=100), sampler_of()
    with pytest.raises(toy.Interrupted):
        grown(tmp_path, first)
    grown(tmp_path, second)
    assert toy.files(tmp_path) == whole[1]
    assert finished(tmp_path) == whole[3]
    assert first.answered and not set(first.answered) & set(second.requested)
    assert len(first.answered) + len(second.requested) == len(whole[2].requested)


# Without a model


@pytest.fixture(scope="module")
def reference_run(tmp_path_factory):
    folder, sampler = tmp_path_factory.mktemp("reference_run"), toy.SeededSampler()
    grown(folder, sampler)
    return folder, toy.files(folder), sampler, finished(folder)


def test_made_up_trees_are_not_trivial(reference_run):
    folder, _, sampler, figures = reference_run
    assert sum(len(tree.searches) for tree in read_trees(epath.Path(folder))) > 12
    assert len(set(sampler.answered)) == len(sampler.answered) > 60
    assert sorted(sampler.released) == sorted(p.id for p in PROBLEMS)
    assert figures == {"trees": 12, "rollouts": sampler.rollouts, "all_right": 1, "all_wrong": 1, "failed": 0}


@pytest.mark.parametrize("mode", ["default", "paper", "flat"])
def test_interrupted_after_any_number_of_answers(tmp_path, mode):
    sampler = toy.SeededSampler()
    grown(tmp_path / "whole", sampler, mode=mode)
    finished(tmp_path / "whole")
    count = len(sampler.answered)
    for limit in range(0, count, max(1, count // 12)):
        folder, first, second = tmp_path / f"{limit}", toy.SeededSampler(limit=limit), toy.SeededSampler()
        with pytest.raises(toy.Interrupted):
            grown(folder, first, mode=mode)
        grown(folder, second, mode=mode, in_flight=(1, 8, 32)[limit % 3])
        finished(folder)
        assert toy.files(folder) == toy.files(tmp_path / "whole")
        assert len(first.answered) == limit
        assert collections.Counter(first.answered + second.answered) == collections.Counter(sampler.answered)


def test_interrupted_every_few_answers(reference_run, tmp_path):
    answered = []
    for attempt in range(1000):
        sampler = toy.SeededSampler(limit=3 + attempt % 4)
        try:
            grown(tmp_path, sampler, worker=attempt % 2, workers=2)
        except toy.Interrupted:
            assert len(sampler.answered) == sampler._limit
        answered += sampler.answered
        if len(answered) == len(reference_run[2].answered):
            break
    for worker in (0, 1):
        assert not grown(tmp_path, toy.SeededSampler(limit=0), worker=worker, workers=2)
    finished(tmp_path)
    assert toy.files(tmp_path) == reference_run[1]
    assert collections.Counter(answered) == collections.Counter(reference_run[2].answered) and attempt > 20


@pytest.mark.parametrize("limit", [0, 1, 30])
def test_asked_to_end_it_loses_no_answer(reference_run, tmp_path, limit, capfd):
    """SIGTERM, long before answers in flight are saved anyway."""

    class Asked(toy.SeededSampler):
        def collect(self):
            if len(self.answered) == limit:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().collect()

    first, second = Asked(), toy.SeededSampler()
    with pytest.raises(Interrupted) as ended, handling():
        grown(tmp_path, first, checkpoint_seconds=1e9)
    assert ended.value.code == 143 and len(first.answered) == limit + 1
    assert "annotate: stopped as asked" in capfd.readouterr().err
    grown(tmp_path, second, checkpoint_seconds=1e9)
    finished(tmp_path)
    assert toy.files(tmp_path) == reference_run[1]
    assert collections.Counter(first.answered + second.answered) == collections.Counter(reference_run[2].answered)


def test_without_checkpoints_only_finished_trees_stay(reference_run, tmp_path):
    first, second = toy.SeededSampler(limit=54), toy.SeededSampler()
    with pytest.raises(toy.Interrupted):
        grown(tmp_path, first, checkpoint_seconds=1e9, in_flight=8)
    grown(tmp_path, second)
    assert toy.files(tmp_path) == reference_run[1]
    again, before = set(first.answered) & set(second.answered), {request.problem.id for request in first.answered}
    unfinished = {request.problem.id for request in again}
    assert 0 < len(unfinished) < len(before)
    assert again == {request for request in first.answered if request.problem.id in unfinished}


def test_interrupted_between_the_last_tree_of_a_shard_and_its_file(reference_run, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise toy.Interrupted

    with monkeypatch.context() as patch, pytest.raises(toy.Interrupted):
        patch.setattr("mmprm_jax.search.store.io.write", interrupt)
        grown(tmp_path, toy.SeededSampler(), checkpoint_seconds=1e9)
    assert not list(tmp_path.glob("trees-*.jsonl"))
    grown(tmp_path, toy.SeededSampler())
    finished(tmp_path)
    assert toy.files(tmp_path) == reference_run[1]


def test_a_second_run_does_nothing(reference_run, tmp_path):
    grown(tmp_path, toy.SeededSampler())
    finished(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file() and not p.name.startswith("events.")}
    sampler = toy.SeededSampler(limit=0)
    assert grown(tmp_path, sampler) == {}
    assert finished(tmp_path) == reference_run[3]
    assert not sampler.answered
    assert {n: (tmp_path / n).read_bytes() for n in before} == before


def test_processes_that_only_read_grow_the_same_trees_and_write_nothing(reference_run, tmp_path):
    with pytest.raises(toy.Interrupted):
        grown(tmp_path, toy.SeededSampler(limit=40))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    writer, reader = toy.SeededSampler(), toy.SeededSampler()
    grown(tmp_path, reader, writes=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    grown(tmp_path, writer)
    assert writer.answered == reader.answered
    assert toy.files(tmp_path) == reference_run[1]


def test_all_processes_of_a_worker_read_before_one_writes(tmp_path, monkeypatch):
    """Otherwise what the first one mends, or finishes from saved answers, makes the others do something else."""
    with pytest.raises(toy.Interrupted):
        grown(tmp_path, toy.SeededSampler(limit=40))
    (part, *_) = tmp_path.glob("trees-*.part")
    part.write_bytes(part.read_bytes() + b"torn")
    before, seen = toy.files(tmp_path), []
    monkeypatch.setattr(annotation, "wait_for_all", lambda name: seen.append(toy.files(tmp_path) == before))
    grown(tmp_path, toy.SeededSampler())
    assert seen == [True]
    grown(tmp_path, toy.SeededSampler(), worker=1, workers=2)
    assert seen == [True]  # shares have nothing to do with each other


def test_processes_wait_for_each_other_before_they_exchange_figures(reference_run, monkeypatch):
    """Shares take hours, and not the same; a collective operation gives up after half a minute."""
    calls, gather = [], annotation.multihost_utils.process_allgather
    monkeypatch.setattr(annotation, "wait_for_all", lambda name: calls.append("wait"))
    monkeypatch.setattr(
        annotation.multihost_utils, "process_allgather", lambda x: (calls.append("gather"), gather(x))[1]
    )
    finished(reference_run[0])
    assert calls == ["wait", "gather"]


# Failures


def fails_of(*ids, depth=1):
    return lambda r: f"{r.problem.id}.png: no such file" if r.problem.id in ids and len(r.prefix) >= depth else None


def without(files, *ids):
    """The same files without the trees of some problems."""
    return {
        name: b"".join(line for line in data.splitlines(True) if json.loads(line)["problem"]["id"] not in ids)
        for name, data in files.items()
    }


def test_a_failing_tree_costs_itself_only(reference_run, tmp_path):
    sampler = toy.SeededSampler(fails_of("p3", "p11"))
    failed = grown(tmp_path, sampler, checkpoint_seconds=1e9)
    assert failed == {3: "p3.png: no such file", 11: "p11.png: no such file"}
    assert sorted(sampler.released) == sorted(p.id for p in PROBLEMS)
    with pytest.raises(UserError) as caught:
        annotation.finish(epath.Path(tmp_path), PROBLEMS, failed, False)
    message = str(caught.value)
    assert "2 of 12 trees failed" in message and "p3" in message and "p3.png: no such file" in message
    assert "the same command tries these again" in message and "--config.annotate.skip_failed=true" in message
    kept = toy.files(tmp_path)
    assert sorted(kept) == ["trees-000000.part", "trees-000005.jsonl", "trees-000010.part"]
    assert kept["trees-000005.jsonl"] == reference_run[1]["trees-000005.jsonl"]

    again = toy.SeededSampler()  # now it works
    assert grown(tmp_path, again) == {}
    assert {request.problem.id for request in again.answered} == {"p3", "p11"}
    assert not set(again.answered) & {r for r in sampler.answered if len(r.prefix) == 0}  # what was answered stays
    assert finished(tmp_path) == reference_run[3]
    assert toy.files(tmp_path) == reference_run[1]
    assert (tmp_path / "failed.jsonl").read_bytes() == b""


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "in a second run"])
@pytest.mark.parametrize("ids", [("p3",), ("p11", "p3"), ("p10", "p11")])
def test_problems_that_failed_are_skipped_on_demand(reference_run, tmp_path, ids, at_once):
    if not at_once:
        assert len(grown(tmp_path, toy.SeededSampler(fails_of(*ids)))) == len(ids)
    failed = grown(tmp_path, toy.SeededSampler(fails_of(*ids, depth=0)), skip_failed=True)
    figures = finished(tmp_path, failed, skip=True)
    assert figures["failed"] == len(ids) and figures["trees"] == 12 - len(ids)
    assert toy.files(tmp_path) == without(reference_run[1], *ids)
    assert [p.id for p in records.read(tmp_path / "failed.jsonl", Problem)] == sorted(ids, key=lambda x: int(x[1:]))
    sampler = toy.SeededSampler(limit=0)
    assert grown(tmp_path, sampler, skip_failed=True) == {}  # for good
    assert finished(tmp_path, skip=True) == figures


def test_of_several_processes_of_a_worker_one_reports_a_failure(tmp_path):
    """finish adds up the failures of all processes."""
    assert grown(tmp_path, toy.SeededSampler(fails_of("p3")), writes=False) == {}


def test_trees_of_other_problems_are_refused(reference_run):
    folder = epath.Path(reference_run[0])
    other = [Problem("other", "?", "1"), *PROBLEMS[1:]]
    with pytest.raises(UserError, match="p0; use another --workdir"):
        annotation.finish(folder, other, {}, False)


# Figures


def test_metrics_and_progress_of_an_engine(whole):
    rows = read_metrics(whole[0])
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows}) and rows[-1]["step"] == 12
    names = {"rollouts", "tokens", "rollouts_per_second", "tokens_per_second", "slot_occupancy"}
    assert all(row.keys() == names | {"step"} for row in rows)
    counts = whole[2].engine.counts
    assert (rows[-1]["rollouts"], rows[-1]["tokens"]) == (counts.samples, counts.tokens)
    assert all(0 < row["slot_occupancy"] <= 1 and row["rollouts_per_second"] > 0 for row in rows)


def test_progress_and_metrics(tmp_path, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(annotation.time, "monotonic", lambda: now[0])
    sampler = toy.SeededSampler(fails_of("p11"))
    collect = sampler.collect

    def slow():
        now[0] += 0.5
        return collect()

    sampler.collect = slow
    grown(tmp_path, sampler, in_flight=1)
    rows = read_metrics(tmp_path)
    assert len(rows) >= 4 and rows[-1]["step"] == 11  # the last one failed
    assert rows[-1]["rollouts"] == sampler.rollouts and rows[-1]["tokens"] == sampler.tokens
    assert all(row["rollouts_per_second"] == pytest.approx(8.0, abs=0.5) for row in rows)  # 4 in half a second
    assert "slot_occupancy" not in rows[0]
    error = capsys.readouterr().err
    assert "11/12" in error and "rollouts_per_second" in error and "tokens_per_second" in error
    now[0] = 0.0
    grown(tmp_path, toy.SeededSampler())
    assert [row["step"] for row in read_metrics(tmp_path)] == [row["step"] for row in rows] + [12]


# The command line


def environment(cache=None):
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "OPENAI_API_KEY")}
    env |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    if cache:
        env |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return env


def mmprm(workdir, *more, config=SMOKE):
    """``mmprm annotate``: exit code, error output, seconds."""
    start = time.monotonic()
    command = [sys.executable, "-m", "mmprm_jax.main", "annotate", config, f"--workdir={workdir}", *more]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=900)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr, time.monotonic() - start


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    """A folder with problems and images, and nothing else."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    found = [Problem(f"q{i}", f"What is {i} + 1?", str(i % 3), (f"images/{i}.png",) if i % 2 else ()) for i in range(6)]
    for problem in found:
        for name in problem.images:
            pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name)
    records.write(folder / "train.jsonl", found)
    return folder


@pytest.fixture(scope="module")
def released(tmp_path_factory, golden):
    """A tiny checkpoint in the released format, random weights, sizes of the golden set."""
    folder = tmp_path_factory.mktemp("released") / "policy"
    tokenizers = [p.parent for p in sorted((golden / "tokenizer").glob("*/tokenizer_config.json"))]
    (tokenizer,) = [t for t in map(Tokenizer.load, tokenizers[:1])]
    return release(folder, golden, tokenizer)


def test_a_released_policy_annotates_any_problems(data_set, released, tmp_path, mmprm_here):
    """No stage before, no tokenizer.json, no other split."""
    options = (
        f"--config.data.folder={data_set}", f"--config.annotate.policy={released}",
        "--config.annotate.max_new_tokens=8", "--config.annotate.cache_tokens=4000",
        "--config.annotate.max_unread=1",  # its weights are random
    )  # fmt: skip
    code, error, _ = mmprm(tmp_path / "w", *options, "--config.annotate.slots=8")
    assert code == 0, error
    assert "6/6" in error and "rollouts_per_second" in error and "slot_occupancy" in error
    folder = tmp_path / "w" / "annotate"
    trees = read_trees(epath.Path(folder))
    assert [tree.problem for tree in trees] == records.read_all(data_set / "train.jsonl", Problem)
    assert all(rollout.n_tokens > 0 for tree in trees for rollout in tree.nodes[0].rollouts)
    figures = json.loads((folder / "done.json").read_text())
    assert figures["trees"] == 6 and figures["failed"] == 0 and figures["rollouts"] >= 24
    names = {"step", "rollouts", "tokens", "rollouts_per_second", "tokens_per_second", "slot_occupancy"}
    assert read_metrics(folder)[-1].keys() == names
    assert {path.name for path in (tmp_path / "w").iterdir()} <= {"annotate", "config.json", "compilation_cache"}

    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    code, error, seconds = mmprm(tmp_path / "w", *options, "--config.annotate.slots=9", "--config.mesh=1,1,-1")
    assert code == 0, error
    assert "rollouts" not in error and before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    done = mmprm_here("annotate", SMOKE, f"--workdir={tmp_path / 'w'}", *options, "--config.seed=5")
    assert done.returncode == 1 and "seed was 0, is 5" in done.stderr.splitlines()[-1]


class Server(ThreadingHTTPServer):
    """Answers by prompt and seed, one of ``answers``, as far as ``refuses`` lets it."""

    daemon_threads, block_on_close, request_queue_size = True, False, 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies, self.refuses, self.answers = [], lambda body: False, "012"
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):  # noqa: N802
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        seed = zlib.crc32(json.dumps([body["messages"], body["seed"]]).encode())
        steps = "".join(f"<step>{seed >> 3 * i & 3}</step>" for i in range(2 + seed % 3))
        message = {"role": "assistant", "content": f"{steps}<answer>{self.server.answers[seed // 7 % 3]}</answer>"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        data = json.dumps({"choices": [choice], "usage": {"completion_tokens": 9}}).encode()
        refused = self.server.refuses(body)
        self.send_response(400 if refused else 200)
        data = b"too long" if refused else data
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def servers():
    found = [Server(), Server()]
    yield found
    for server in found:
        server.shutdown()
        server.server_close()


def asked(body):
    """The question, the image's bytes."""
    content = body["messages"][0]["content"]
    if isinstance(content, str):
        return content, None
    image, text = content
    return text["text"], base64.b64decode(image["image_url"]["url"].split(",")[1])


def test_servers_annotate_any_problems(data_set, servers, tmp_path):
    """One of the problems is refused first; the same command with other servers tries it again."""
    first, second = servers
    options = (f"--config.data.folder={data_set}", "--config.annotate.policy=a-model")
    first.refuses = lambda body: "3 + 1" in asked(body)[0]
    code, error, _ = mmprm(tmp_path / "w", *options, f"--config.annotate.servers={first.url}")
    last = error.splitlines()[-1]
    assert code == 1 and "1 of 6 trees failed" in last and "q3" in last and "too long" in last
    assert "the same command" in last and "--config.annotate.skip_failed=true" in last
    folder = tmp_path / "w" / "annotate"
    assert not (folder / "done.json").exists()
    assert first.bodies[0]["model"] == "a-model"
    pictures = {question: image for question, image in map(asked, first.bodies)}
    assert pictures["What is 0 + 1?"] is None
    assert pictures["What is 1 + 1?"] == (data_set / "images" / "1.png").read_bytes()

    code, error, _ = mmprm(
        tmp_path / "w", *options, f"--config.annotate.servers={first.url},{second.url}",
        "--config.annotate.concurrency=3", "--config.annotate.in_flight=2", "--config.annotate.checkpoint_seconds=0",
        "--config.annotate.skip_failed=true",
    )  # fmt: skip
    assert code == 0, error
    figures = json.loads((folder / "done.json").read_text())
    assert figures["trees"] == 5 + (figures["failed"] == 0)
    assert {asked(body)[0] for body in second.bodies} <= {"What is 3 + 1?"}
    trees = read_trees(epath.Path(folder))
    assert [tree.problem.id for tree in trees if tree.problem.id != "q3"] == ["q0", "q1", "q2", "q4", "q5"]
    assert sum(len(tree.nodes) for tree in trees) > 12
    row = read_metrics(folder)[-1]
    assert row.keys() == {"step", "rollouts", "tokens", "rollouts_per_second", "tokens_per_second"}


def test_choices_and_images_of_prepared_rows_reach_prompt_and_verdict(servers, tmp_path):
    """Rollouts say a letter, the gold answer is the text of a choice: they are right by their choices alone."""
    for name in ("red", "blue"):
        Image.new("RGB", (8, 6), name).save(tmp_path / f"{name}.png")
    row = {"id": "0", "question": "Which of <image1> and <image2> is longer?", "answer": "the second",
           "images": ["red.png", "blue.png"], "options": ["the first", "the second", "neither"]}  # fmt: skip
    rows = [row, row | {"id": "1", "answer": "3.4", "question": "How long?", "options": None, "precision": 0}]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    cli.run(["prepare", "mm_k12", str(tmp_path), f"--output={tmp_path / 'data'}"])
    servers[0].answers = ("A", "B", "3.1")
    options = (f"--config.data.folder={tmp_path / 'data'}", "--config.annotate.policy=a-model",
               f"--config.annotate.servers={servers[0].url}")  # fmt: skip
    code, error, _ = mmprm(tmp_path / "w", *options)
    assert code == 0, error
    first, second = read_trees(epath.Path(tmp_path / "w" / "annotate"))
    assert first.problem.grading == records.Grading.of(row["options"], kind="choice") and len(first.problem.images) == 2
    said = {(rollout.segments[-1], rollout.correct) for node in first.nodes for rollout in node.rollouts}
    assert said == {("<answer>A</answer>", False), ("<answer>B</answer>", True), ("<answer>3.1</answer>", False)}
    assert 0 < first.nodes[0].k < first.nodes[0].n and second.nodes[0].k > 0  # 3.1 is 3 as well
    shown = [body["messages"][0]["content"] for body in servers[0].bodies]
    (content,) = {json.dumps(parts) for parts in shown if "Which of" in parts[0].get("text", "")}
    kinds = [part.get("text", part["type"]) for part in json.loads(content)]
    assert kinds[::2] == ["Which of ", " and ", " is longer?\nChoices:\n(A) the first\n(B) the second\n(C) neither"]
    sent = [base64.b64decode(part["image_url"]["url"].split(",")[1]) for part in json.loads(content)[1::2]]
    assert sent == [(tmp_path / f"{name}.png").read_bytes() for name in ("red", "blue")]


# Slow: the program toy_annotation.py


def program(folder, cache, *options):
    command = [sys.executable, str(HERE / "toy_annotation.py"), str(folder), *options]
    return subprocess.Popen(command, env=environment(cache), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(*processes):
    for process in processes:
        out, error = process.communicate(timeout=900)
        assert process.returncode == 0 and "end {'trees':" in out, error


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compilation_cache")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("uninterrupted")
    ended(program(folder, cache))
    assert len(toy.files(folder)) == 5
    return toy.files(folder)


def wait_for(process, word):
    for line in process.stdout:
        if line.startswith(word):
            return time.monotonic()
    pytest.fail(f"ended before {word!r}: {process.communicate()[1]}")


KILLS = int(os.environ.get("MMPRM_KILLS", "7"))


@pytest.mark.slow
def test_random_kills(uninterrupted, tmp_path, cache):
    process = program(tmp_path / "timed", cache)  # everything is compiled
    start, answers, end = (wait_for(process, word) for word in ("start", "answers", "end"))
    ended_well = process.wait() == 0 and toy.files(tmp_path / "timed") == uninterrupted
    assert ended_well
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}, {answers - start:.1f} s until the first answers, {end - answers:.1f} s from there")
    rng, folder, states, processes = random.Random(seed), tmp_path / "killed", collections.Counter(), []
    for kill in range(KILLS):
        process = program(folder, cache)
        processes.append(process)
        shards = len(list(folder.glob("trees-*.jsonl")))
        if shards < 3 and kill % 4:  # the end must not come before the last kill
            wait_for(process, "answers")
            delay = rng.uniform(0, (end - answers) / 3)
        else:
            wait_for(process, "start")
            delay = rng.uniform(0, (answers - start) / 2)
        time.sleep(delay)
        assert process.poll() is None, "too quick to be killed"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        names = {path.name for path in folder.glob("*") if not path.name.startswith("events.")}
        states["trees"] += any(name.startswith("trees-") and name.endswith(".part") for name in names)
        states["in flight"] += any(name.startswith("in_flight-") for name in names)
        states["shards"] += any(name.endswith(".jsonl") and name.startswith("trees-") for name in names)
        print(f"kill {kill}: after {delay:.2f} s, {sorted(names)}")
    assert states["trees"] > KILLS // 8 and states["in flight"] > KILLS // 2, states
    ended(program(folder, cache))
    assert toy.files(folder) == uninterrupted
    assert not [path for path in folder.glob("*") if path.suffix in (".part", ".tmp")]


def free_port():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


def two(folder, cache, *options):
    where = f"localhost:{free_port()}"
    return [program(folder, cache, "--process", where, f"{i}", "2", *options) for i in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("together", [False, True], ids=["shares", "lockstep"])
def test_two_processes(uninterrupted, tmp_path, cache, together):
    """Killed once; then one of them is done long before the other, if it can be."""
    options = ("--lockstep", "--devices=2", "--mesh=data=2,tensor=2", "--slots=64") if together else ()
    processes = two(tmp_path, cache, *options)
    for process in processes:
        wait_for(process, "answers")
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert list(tmp_path.glob("in_flight-*")) and toy.files(tmp_path) != uninterrupted
    processes = two(tmp_path, cache, *options)
    for process in processes:
        wait_for(process, "start")
    if not together:
        processes[1].send_signal(signal.SIGSTOP)
        while not all((tmp_path / f"trees-0000{i}.jsonl").exists() for i in ("00", "10", "20")):
            assert processes[0].poll() is None
            time.sleep(0.1)
        time.sleep(35)
        assert processes[0].poll() is None and toy.files(tmp_path) != uninterrupted
        processes[1].send_signal(signal.SIGCONT)
    ended(*processes)
    assert toy.files(tmp_path) == uninterrupted


@pytest.mark.slow
def test_eight_devices_and_another_number_of_slots(uninterrupted, tmp_path, cache):
    ended(program(tmp_path, cache, "--slots=64", "--devices=8", "--mesh=data=2,fsdp=2,tensor=2"))
    assert toy.files(tmp_path) == uninterrupted
