"""What the evaluation has done survives whatever ends it: pieces, a stub policy, SIGTERM in a real run (slow)."""

import collections
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import pytest
from etils import epath

from mmprm_jax.evaluation import pieces as pieces_module
from mmprm_jax.evaluation.pieces import Pieces
from mmprm_jax.interruption import Interrupted, handling
from mmprm_jax.records import Candidate, Problem, Rollout, UserError
from mmprm_jax.rollout.reading import Reader
from mmprm_jax.stages import evaluate

ROOT = Path(__file__).parents[2]
PROBLEMS = [Problem(f"p{i}", "q", str(i)) for i in range(6)]


class Policy:
    """Answers one request after the other, in an order of its own; ends the process at the k-th one."""

    def __init__(self, end=None, how=None):
        self.requested, self.loaded, self._end, self._how = [], False, end, how

    def load(self):
        self.loaded = True
        return self

    def answers(self, requests):
        for request in sorted(requests, key=lambda r: (r.problem.id[::-1], len(r.prefix)), reverse=True):
            if len(self.requested) == self._end:
                self._how()
            self.requested.append((request.problem.id, len(request.prefix)))
            right = int(request.problem.answer) % 2 == 0
            rollout = Rollout(("a", "b", f"<answer>{request.problem.answer}</answer>"), right, 3)
            yield request, [(rollout, -float(i)) for i in range(request.n)]


def fail():
    raise UserError("a damaged image")


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def candidates(path, policy):
    with handling():
        return evaluate.sample_candidates(Pieces(path), PROBLEMS, 2, policy.load, "sample")


def steps(path, policy):
    groups = {p.id: [Candidate(p.id, ("a", "b", "c"), None, True, 0.0, 3)] for p in PROBLEMS}
    groups["p5"] = [Candidate("p5", (), None, False, 0.0, 1)]
    with handling():
        return evaluate.step_values(Pieces(path), PROBLEMS, groups, 4, policy.load)


@pytest.mark.parametrize("make", [candidates, steps])
@pytest.mark.parametrize(("how", "error", "code"), [(terminate, Interrupted, 143), (fail, UserError, None)])
@pytest.mark.parametrize("end", [0, 1, 4])
def test_nothing_is_asked_twice(tmp_path, make, how, error, code, end, capfd):
    whole = make(epath.Path(tmp_path / "whole.jsonl"), Policy())
    path, first, second = epath.Path(tmp_path / "file.jsonl"), Policy(end, how), Policy()
    with pytest.raises(error) as caught:
        make(path, first)
    assert not path.exists()
    if code:
        assert caught.value.code == code and "the same command goes on" in capfd.readouterr().err
    assert make(path, second) == whole
    assert not set(first.requested) & set(second.requested)
    everything = Policy()
    make(epath.Path(tmp_path / "third.jsonl"), everything)
    assert sorted(first.requested + second.requested) == sorted(everything.requested)
    assert [p.name for p in tmp_path.iterdir()] and not list(tmp_path.glob("*.parts"))
    third = Policy()
    assert make(path, third) == whole and third.requested == [] and not third.loaded


def test_candidates_that_cannot_be_read_stop_the_evaluation(tmp_path):
    """What was sampled until then is kept."""

    class Tagless(Policy):
        def __init__(self):
            super().__init__()
            self.reader = Reader("tags", 0.5, 2, "evaluate")

        def answers(self, requests):
            for request, found in super().answers(requests):
                self.reader.read(request, "**Step 1:** It is 4.")
                yield request, found

    path, first, second = epath.Path(tmp_path / "file.jsonl"), Tagless(), Policy()
    with pytest.raises(UserError, match="evaluate: 2 of the first 2 rollouts .*--config.evaluate.steps=structure"):
        candidates(path, first)
    candidates(path, second)
    assert len(first.requested) == 2 and not set(first.requested) & set(second.requested)


def test_the_steps_of_an_empty_solution_and_the_last_segment_have_no_value(tmp_path):
    found = steps(epath.Path(tmp_path / "s.jsonl"), Policy())
    assert [x.n for x in found] == [(4, 4, 0)] * 5 + [()]
    assert all(len(x.k) == len(x.segments) for x in found)


def test_pieces_are_saved_in_time(tmp_path):
    path = epath.Path(tmp_path / "f.jsonl")
    with Pieces(path, seconds=0) as pieces:
        pieces.add("a", [1])
        pieces.add("b", [2])
        assert Pieces(path).done == {"a": [1], "b": [2]}  # what a kill -9 would leave


def test_pieces_of_several_interrupted_runs(tmp_path):
    path = epath.Path(tmp_path / "f.jsonl")
    for key in ("a", "b", "c"):
        with Pieces(path) as pieces:
            pieces.add(key, 1)
    assert Pieces(path).done == {"a": 1, "b": 1, "c": 1}


def test_pieces_without_checksums_are_made_again(tmp_path):
    (tmp_path / "f.jsonl.parts").mkdir()
    (tmp_path / "f.jsonl.parts" / "000000.jsonl").write_text('{"key": "a", "value": 1}\n{}\n')
    assert Pieces(epath.Path(tmp_path / "f.jsonl")).done == {}


def test_a_candidate_of_an_unknown_problem(tmp_path):
    path = epath.Path(tmp_path / "c.jsonl")
    candidates(path, Policy())
    path.write_text(path.read_text().replace('"p3"', '"other"'))
    with pytest.raises(UserError, match="c.jsonl: damaged, "):
        candidates(path, Policy())
    shutil.rmtree(tmp_path / "sums")  # as of an older version
    with pytest.raises(UserError, match="unknown problem 'other'"):
        candidates(path, Policy())


class Scorer:
    def __init__(self, end=None):
        self.seen, self._end = [], end

    def score(self, chunk):
        if len(self.seen) == self._end:
            terminate()
        self.seen.append(tuple(chunk))
        return [[[i / 10, 0.5]] for i in chunk]


def test_scores_are_kept_chunk_by_chunk(tmp_path):
    """Chunks do not depend on what was interrupted, so neither does a score."""
    groups = [[Candidate(p.id, ("a", "b"), None, True, 0.0, 2)] for p in PROBLEMS]
    path, first, second = epath.Path(tmp_path / "s.jsonl"), Scorer(end=1), Scorer()
    for scorer in (first, second):
        with handling():
            try:
                evaluate._score_file(Pieces(path), groups, lambda i: i, lambda s=scorer: s, 2)
            except Interrupted as ended:
                assert ended.code == 143 and scorer is first
    assert first.seen + second.seen == [(0, 1), (2, 3), (4, 5)]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["candidate"]["problem_id"], row["scores"][0]) for row in rows] == [(f"p{i}", i / 10) for i in range(6)]


class Processes:
    """Two threads as two processes; an error of one leaves the other one waiting in vain."""

    def __init__(self, monkeypatch):
        self._here = threading.local()
        monkeypatch.setattr(jax, "process_index", lambda: self._here.index)
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(pieces_module, "wait_for_all", lambda name: self._barrier.wait(60))

    def run(self, *works):
        """What each of them returned or raised."""
        self._barrier, found = threading.Barrier(2), [None, None]

        def process(index):
            self._here.index = index
            try:
                found[index] = works[index]()
            except (UserError, threading.BrokenBarrierError) as error:
                found[index] = error
                self._barrier.abort()

        threads = [threading.Thread(target=process, args=(index,)) for index in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


@pytest.mark.parametrize("make", [candidates, steps])
def test_processes_share_the_work_and_what_is_left_of_it(tmp_path, make, monkeypatch):
    everything = Policy()
    whole = make(epath.Path(tmp_path / "whole.jsonl"), everything)
    processes, path = Processes(monkeypatch), epath.Path(tmp_path / "file.jsonl")
    policies = [Policy(), Policy(1, fail), Policy(), Policy()]
    waited, failed = processes.run(*(lambda p=p: make(path, p) for p in policies[:2]))
    assert isinstance(waited, threading.BrokenBarrierError) and isinstance(failed, UserError) and not path.exists()
    assert processes.run(*(lambda p=p: make(path, p) for p in policies[2:])) == [whole, whole]
    assert path.read_text() == (tmp_path / "whole.jsonl").read_text() and not list(tmp_path.glob("*.parts"))
    assert sorted(request for p in policies for request in p.requested) == sorted(everything.requested)
    assert policies[0].requested and policies[1].requested and not policies[2].requested
    assert policies[2].loaded and policies[3].loaded  # which several processes can only do together


@pytest.mark.parametrize(("rows", "seen"), [(2, [[(0, 1), (4, 5)], [(2, 3)]]), (6, [[(0, 1, 2, 3, 4, 5)], []])])
def test_processes_score_the_chunks_of_one(tmp_path, monkeypatch, rows, seen):
    groups = [[Candidate(p.id, ("a", "b"), None, True, 0.0, 2)] for p in PROBLEMS]
    path, scorers, loaded = epath.Path(tmp_path / "s.jsonl"), (Scorer(), Scorer()), []

    def score(scorer):
        def load():
            loaded.append(scorer)
            return scorer

        evaluate._score_file(Pieces(path), groups, lambda problem: problem, load, rows)

    Processes(monkeypatch).run(*(lambda s=s: score(s) for s in scorers))
    assert [s.seen for s in scorers] == seen and len(loaded) == 2
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(x["candidate"]["problem_id"], x["scores"][0]) for x in found] == [(f"p{i}", i / 10) for i in range(6)]


# ------------------------------------------------------------------------------------------------- a real run


def start(workdir, command, *more):
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    config = f"--config={ROOT / 'configs' / 'digits.py'}:smoke"
    return subprocess.Popen(
        [sys.executable, "-m", "mmprm_jax.main", command, config, f"--workdir={workdir}", *more],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(workdir, command, *more):
    process = start(workdir, command, *more)
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def trained(smoke_run, tmp_path_factory):
    """A smoke run up to its PRM; what it compiled is there for all."""
    workdir = tmp_path_factory.mktemp("runs") / "smoke"
    shutil.copytree(smoke_run[0], workdir, ignore=shutil.ignore_patterns("evaluate", "report"))
    return workdir


@pytest.mark.slow
def test_asked_to_end_at_any_time_the_figures_stay_the_same(trained, tmp_path):
    """SIGTERM again and again, kill -9 now and then: nothing on disk is made twice, and the files are equal."""
    whole = tmp_path / "whole"
    shutil.copytree(trained, whole)
    finish(whole, "evaluate")
    workdir, rng, codes = tmp_path / "cut", random.Random(0), collections.Counter()
    shutil.copytree(trained, workdir)
    kept = {}
    for i in range(6):
        process = start(workdir, "evaluate")
        if i % 3 < 2:  # until it has begun, or found nothing to do; the others are ended while they start
            next((line for line in process.stderr if re.search(r"\d%", line)), None)
        time.sleep(3 * rng.random() if i else 0)
        process.send_signal(signal.SIGKILL if i % 4 == 3 else signal.SIGTERM)
        _, err = process.communicate(timeout=600)
        codes[process.returncode] += 1
        assert "Traceback" not in err, err
        for path, seen in kept.items():
            assert path.stat().st_mtime_ns == seen, path  # a finished file is not made again
        kept = {p: p.stat().st_mtime_ns for p in (workdir / "evaluate").glob("*.jsonl")}
    assert codes[143] >= 1 and set(codes) <= {0, 143, -signal.SIGTERM, -signal.SIGKILL}
    finish(workdir, "evaluate")
    for path in sorted((whole / "evaluate").glob("*.jsonl")):
        assert (workdir / "evaluate" / path.name).read_bytes() == path.read_bytes(), path.name
    figures = [json.loads((w / "evaluate" / "done.json").read_text()) for w in (whole, workdir)]
    for f in figures:
        for name in ("seconds", "seal"):
            f.pop(name)
    assert figures[0] == figures[1]
    assert figures[0]["calibration"]["steps"] > 10


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_was_killed(trained, tmp_path):
    """Cells share the candidates; a finished cell is left alone; the table has every setting."""
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    grid = ["--grid=train_prm.label=soft,hard", "--grid=seed=0,1"]
    process = start(workdir, "sweep", *grid)
    while not (workdir / "sweep" / "label=soft,seed=1" / "train_prm" / "done.json").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    files = [*workdir.glob("sweep/*/*/done.json"), *workdir.glob("evaluate/*.jsonl"), workdir / "sft" / "done.json"]
    before = {p: p.stat().st_mtime_ns for p in files}
    assert len(files) >= 6
    out = finish(workdir, "sweep", *grid)
    assert before == {p: p.stat().st_mtime_ns for p in before}
    assert "label hard, seed 1" in out and "**Soft or hard labels**" in out and "**Path diversity" in out
    found = json.loads((workdir / "sweep" / "table.json").read_text())
    assert len(found["cells"]) == 4 and [x["value"] for x in found["settings"]["N"]] == ["1", "2", "4", "8", "16"]
    shown = (workdir / "sweep" / "label=soft,seed=0" / "evaluate" / "dev_candidates.jsonl").exists()
    assert not shown and (workdir / "evaluate" / "dev_candidates.jsonl").exists()
    again = start(workdir, "sweep", "--grid=train_prm.label=soft,sofd")
    assert again.communicate()[1].strip().splitlines()[-1].startswith("mmprm: train_prm.label: 'sofd'")
    assert again.returncode == 2


def test_other_images_are_as_many_as_the_prompt_has_places_for():
    """The image of the problem before; two for a problem with two, and none for one without."""
    counts = [1, 0, 2, 1, 2, 1, 3, 0]
    problems = [Problem(f"p{i}", "q", "1", tuple(f"{i}.{j}.png" for j in range(n))) for i, n in enumerate(counts)]
    assert [p.id for p in evaluate.shuffled(problems)] == ["p5", "p1", "p4", "p0", "p2", "p3", "p6", "p7"]
