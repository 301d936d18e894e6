"""The files of an annotation: what interruptions leave, damage, other problems, texts that are hard to file."""

import builtins
import dataclasses
import json
import os
import re
import zlib

import pytest
from etils import epath
from toy_annotation import Interrupted, files, problems, seeded_rollouts

from mmprm_jax import annotation, records
from mmprm_jax.records import Failure, Grading, Node, Problem, Request, Rollout, Tree, UserError
from mmprm_jax.search import store as store_module
from mmprm_jax.search.store import CachedSampler, Store, checked_line, missing, read_checked, read_trees

PROBLEMS = problems(7)
SHARD = 3


def open_store(folder, index=0, count=1, seconds=0.0, writes=True, todo=PROBLEMS):
    store = Store(epath.Path(folder), todo, SHARD, index, count, seconds, writes)
    store.repair()
    return store


def requests_of(problem):
    return [Request(problem, ("<step>1</step>",) * i, 3, repeat=i % 2) for i in range(3)]


def tree_of(problem, answers):
    """Any tree will do, if it comes from its answers."""
    answers = answers or [seeded_rollouts(requests_of(problem)[0])]
    nodes = [
        Node(i - 1, ("<step>1</step>",) * (i > 0), sum(r.correct for r in rollouts), len(rollouts), i, rollouts)
        for i, rollouts in enumerate(answers)
    ]
    return Tree(problem, tuple(nodes), ((0, 1),))


def annotated(folder, order=lambda todo: todo[::-1], sampled=None, todo=PROBLEMS, **options):
    """Goes on with an annotation; all first answers come before all second ones, as in an engine. Returns the store."""
    store = open_store(folder, todo=todo, **options)
    growing = {i: [] for i in order(store.todo)}
    for number in range(3):
        for i, answers in growing.items():
            request = requests_of(todo[i])[number]
            found = store.recall(request)
            if found is None:
                found = seeded_rollouts(request)
                if sampled is not None:
                    sampled.append(request)
                store.keep(request, found)
            answers.append(found)
    for i, answers in growing.items():
        store.add(i, tree_of(todo[i], answers))
    return store


def finish(folder, todo=PROBLEMS, skip=False):
    return annotation.finish(epath.Path(folder), todo, {}, skip)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "sums"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def whole(tmp_path):
    """The files of an annotation that nothing interrupted."""
    annotated(tmp_path / "whole")
    finish(tmp_path / "whole")
    return content(tmp_path / "whole")


def test_the_files_of_an_annotation(whole, tmp_path):
    assert sorted(whole) == ["failed.jsonl", "trees-000000.jsonl", "trees-000003.jsonl", "trees-000006.jsonl"]
    trees = [tree_of(p, [seeded_rollouts(r) for r in requests_of(p)]) for p in PROBLEMS]
    assert read_trees(epath.Path(tmp_path / "whole")) == trees
    lines = b"".join(whole[name] for name in sorted(whole)).decode().split("\n")
    assert lines == [*map(records.to_json, trees), ""]


@pytest.mark.parametrize("order", [lambda x: x, lambda x: x[::-1], lambda x: x[1::2] + x[::2]])
def test_the_order_in_which_trees_finish_does_not_show(whole, tmp_path, order):
    annotated(tmp_path / "w", order)
    finish(tmp_path / "w")
    assert content(tmp_path / "w") == whole


def test_a_finished_tree_is_on_disk_at_once(tmp_path, monkeypatch):
    store, synced = open_store(tmp_path), []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    answers = [seeded_rollouts(r) for r in requests_of(PROBLEMS[1])]
    assert store.add(1, tree_of(PROBLEMS[1], answers)) is False
    (line,) = (tmp_path / "trees-000000.part").read_bytes().splitlines()
    assert synced == [len(line) + 1]
    assert line[:9] == b"%08x " % zlib.crc32(line[9:])
    assert json.loads(line[9:])[0] == 1


def test_a_shard_is_on_disk_before_it_has_its_name_and_its_parts_go(tmp_path, monkeypatch):
    store, done = open_store(tmp_path), []
    for i in (0, 1):
        store.add(i, tree_of(PROBLEMS[i], []))
    replace, unlink = os.replace, os.unlink
    monkeypatch.setattr(os, "fsync", lambda file: done.append(("sync", os.fstat(file).st_size)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(("replace", os.stat(a).st_size)), replace(a, b)))
    for name in ("unlink", "remove"):
        monkeypatch.setattr(os, name, lambda path: (done.append(("unlink", 0)), unlink(path)))
    assert store.add(2, tree_of(PROBLEMS[2], [])) is True
    (_, line), (_, size), (_, note), *rest = done
    assert line > 0 and rest == [("replace", note), ("replace", size), ("unlink", 0)]
    assert size == (tmp_path / "trees-000000.jsonl").stat().st_size


@pytest.mark.parametrize(
    "change", [lambda x: b"", lambda x: x.split(b"\n")[0] + b"\n", lambda x: x.replace(b"1", b"2")]
)
def test_a_shard_that_is_no_longer_what_was_written_is_refused(tmp_path, change):
    store = open_store(tmp_path)
    for i in range(3):
        store.add(i, tree_of(PROBLEMS[i], []))
    path = tmp_path / "trees-000000.jsonl"
    whole = path.read_bytes()
    path.write_bytes(change(whole))
    assert path.read_bytes() != whole
    with pytest.raises(UserError, match="trees-000000.jsonl: damaged, .*; delete it, the same command makes it again"):
        open_store(tmp_path)
    path.unlink()
    assert open_store(tmp_path).todo[:3] == [0, 1, 2]


# Interruptions


class Killer:
    """Interrupts at the nth operation on files: before it, after it or, if it writes, when half is written."""

    def __init__(self, monkeypatch, nth, when):
        self.nth, self.when, self.count = nth, when, 0
        monkeypatch.setattr(os, "fsync", self.wrapped(lambda file: None))  # it takes its time
        for name in ("replace", "unlink", "remove", "makedirs"):
            monkeypatch.setattr(os, name, self.wrapped(getattr(os, name)))
        monkeypatch.setattr(builtins, "open", self.opener(builtins.open))

    def wrapped(self, operation, half=None):
        def call(*args, **kwargs):
            self.count += half is not None or self.when != "half"
            last = self.count == self.nth
            if last and self.when == "half":
                half(*args)
            if last and self.when != "after":
                raise Interrupted
            result = operation(*args, **kwargs)
            if last:
                raise Interrupted
            return result

        return call

    def opener(self, operation):
        def call(path, mode="r", *args, **kwargs):
            file = operation(path, mode, *args, **kwargs)
            if not set(mode) & set("wa"):
                return file

            def write(data, size=None):
                file.write(data[:size])
                file.flush()

            self.wrapped(lambda: None)()  # there is an empty file now
            return Writing(file, self.wrapped(write, lambda data: write(data, len(data) // 2)))

        return call


class Writing:
    """A file whose ``write`` is another function."""

    def __init__(self, file, write):
        self.file, self.write = file, write

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def all_of_it(folder):
    annotated(folder, todo=PROBLEMS[:5])
    finish(folder, PROBLEMS[:5])
    return content(folder)


@pytest.mark.parametrize("appends", [True, False], ids=["files", "objects"])
@pytest.mark.parametrize("when", ["before", "half", "after"])
def test_interrupted_at_every_operation_the_files_stay_the_same(tmp_path, monkeypatch, when, appends):
    if not appends:
        monkeypatch.setattr(store_module.io, "is_remote", lambda path: True)
    whole, killed = all_of_it(tmp_path / "whole"), 0
    while True:
        folder = tmp_path / f"{killed}"
        with monkeypatch.context() as patch:
            killer = Killer(patch, killed + 1, when)
            try:
                all_of_it(folder)
            except Interrupted:
                killed += 1
            else:
                break
        assert all_of_it(folder) == whole, killed
    assert killed == killer.count >= (22 if when == "half" else 70)


@pytest.mark.parametrize("nth", [11, 13, 20])
def test_interrupted_again_and_again_the_files_stay_the_same(tmp_path, monkeypatch, nth):
    """At the nth operation of each attempt, until one comes through."""
    attempts, done = 0, False
    while not done:
        with monkeypatch.context() as patch:
            Killer(patch, *((nth, "before"), (nth // 3, "half"), (nth, "after"))[attempts % 3])
            try:
                all_of_it(tmp_path / "w")
                done = True
            except Interrupted:
                attempts += 1
        assert attempts < 100
    assert content(tmp_path / "w") == all_of_it(tmp_path / "whole")
    assert attempts > 3


def test_what_was_answered_is_not_sampled_again(tmp_path):
    store = open_store(tmp_path)
    for problem in PROBLEMS[2:5]:
        for request in requests_of(problem)[:2]:
            store.keep(request, seeded_rollouts(request))
    sampled = []
    annotated(tmp_path, sampled=sampled)
    assert len(sampled) == 21 - 6
    assert not {(r.problem.id, r.prefix) for r in sampled} & {
        (p.id, r.prefix) for p in PROBLEMS[2:5] for r in requests_of(p)[:2]
    }


def test_a_finished_tree_is_not_kept_twice(tmp_path):
    store = open_store(tmp_path)
    requests = requests_of(PROBLEMS[0])
    for request in requests:
        store.keep(request, seeded_rollouts(request))
    store.keep(requests_of(PROBLEMS[1])[0], seeded_rollouts(requests[0]))
    store.add(0, tree_of(PROBLEMS[0], [seeded_rollouts(r) for r in requests]))
    store.save()
    texts, intact = read_checked(epath.Path(tmp_path) / "in_flight-000.part")
    assert intact and [json.loads(text)[0] for text in texts] == ["p1"]
    assert store.recall(requests[0]) is None


def test_answers_in_flight_are_saved_when_it_is_time(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(store_module.time, "monotonic", lambda: now[0])
    store, saved = open_store(tmp_path, seconds=30.0), []
    monkeypatch.setattr(store, "save", lambda: (saved.append(now[0]), Store.save(store)))
    for request in [r for p in PROBLEMS for r in requests_of(p)]:
        store.keep(request, seeded_rollouts(request))
        now[0] += 7.0
    assert saved == [135.0, 170.0, 205.0, 240.0]
    assert len((tmp_path / "in_flight-000.part").read_bytes().splitlines()) == 21


# Damage


def part_of(folder, count=2, **options):
    """An annotation of which the first trees of the first shard are there."""
    store = open_store(folder, **options)
    for i in range(count):
        store.add(i, tree_of(PROBLEMS[i], [seeded_rollouts(r) for r in requests_of(PROBLEMS[i])]))
    return folder / "trees-000000.part"


@pytest.mark.parametrize("cut", [1, 2, 50, -20])
def test_a_torn_last_line_is_made_again(whole, tmp_path, cut, caplog):
    path = part_of(tmp_path / "w")
    first, second, _ = path.read_bytes().split(b"\n")
    path.write_bytes(first + b"\n" + second[:cut])
    store = open_store(tmp_path / "w")
    assert store.todo == [1, 2, 3, 4, 5, 6] and store.done == 1
    assert path.read_bytes() == first + b"\n"  # what comes next is a line of its own
    annotated(tmp_path / "w")
    finish(tmp_path / "w")
    assert content(tmp_path / "w") == whole


def test_a_last_line_without_its_end_is_made_again(whole, tmp_path):
    path = part_of(tmp_path / "w")
    path.write_bytes(path.read_bytes()[:-1])
    assert open_store(tmp_path / "w").todo == [1, 2, 3, 4, 5, 6]
    annotated(tmp_path / "w")
    finish(tmp_path / "w")
    assert content(tmp_path / "w") == whole


@pytest.mark.parametrize("where", ["checksum", "space", "number", "text", "end"])
def test_a_changed_byte_costs_its_tree_only(whole, tmp_path, where):
    path = part_of(tmp_path / "w")
    data = bytearray(path.read_bytes())
    first = data.index(b"\n")
    at = {"checksum": 3, "space": 8, "number": 10, "text": first // 2, "end": first}[where]
    data[at] ^= 1
    path.write_bytes(data)
    store = open_store(tmp_path / "w")
    assert store.todo == ([0, 1] if where == "end" else [0]) + [2, 3, 4, 5, 6]
    annotated(tmp_path / "w")
    finish(tmp_path / "w")
    assert content(tmp_path / "w") == whole


@pytest.mark.parametrize("damage", ["torn", "changed", "empty", "not text"])
def test_damaged_answers_in_flight_cost_themselves_only(whole, tmp_path, damage):
    store, kept = open_store(tmp_path / "w"), requests_of(PROBLEMS[0]) + requests_of(PROBLEMS[5])
    for request in kept:
        store.keep(request, seeded_rollouts(request))
    path = tmp_path / "w" / "in_flight-000.part"
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    damaged = {"torn": path.read_bytes()[:-5], "changed": data, "empty": b"", "not text": b"\xff\x00\n\n" * 9}[damage]
    path.write_bytes(damaged)
    sampled = []
    annotated(tmp_path / "w", sampled=sampled)
    finish(tmp_path / "w")
    assert content(tmp_path / "w") == whole
    left = {"torn": kept[-1:], "changed": kept[:1], "empty": kept, "not text": kept}[damage]
    assert [r for r in kept if r in sampled] == left


def test_a_finished_shard_hides_what_is_left_of_its_parts(whole, tmp_path):
    part = part_of(tmp_path / "w").read_bytes()
    annotated(tmp_path / "w")
    (tmp_path / "w" / "trees-000000.part").write_bytes(part)  # killed between the two steps
    store = open_store(tmp_path / "w")
    assert (store.done, store.todo) == (7, [])
    finish(tmp_path / "w")
    assert content(tmp_path / "w") == whole


def test_a_full_part_becomes_its_shard_when_it_is_opened(tmp_path):
    annotated(tmp_path)
    shard = (tmp_path / "trees-000000.jsonl").read_bytes()
    lines = [checked_line(f"[{i},{line}]") for i, line in enumerate(shard.decode().split("\n")[:-1])]
    (tmp_path / "trees-000000.jsonl").unlink()
    (tmp_path / "trees-000000.part").write_text("".join(lines[::-1]))
    store = open_store(tmp_path)
    assert (store.done, store.todo) == (7, [])
    assert (tmp_path / "trees-000000.jsonl").read_bytes() == shard
    assert not (tmp_path / "trees-000000.part").exists()


# Other problems


@pytest.mark.parametrize(
    "change",
    [{"answer": "2"}, {"images": ("j.png",)}, {"id": "q"}, {"source": "s"}, {"grading": Grading(unit="m")}],
)
def test_parts_of_other_problems_are_refused(tmp_path, change):
    path = part_of(tmp_path)
    before = content(tmp_path)
    changed = [dataclasses.replace(p, **change) if p.id == "p1" else p for p in PROBLEMS]
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}: holds trees of other problems; use another --workdir")):
        open_store(tmp_path, todo=changed)
    with pytest.raises(UserError, match="other problems"):
        path.rename(tmp_path / "trees-000003.part")
        open_store(tmp_path)
    (tmp_path / "trees-000003.part").rename(path)
    assert content(tmp_path) == before


def test_answers_of_other_problems_are_not_taken(tmp_path):
    store = open_store(tmp_path)
    for request in requests_of(PROBLEMS[0]):
        store.keep(request, seeded_rollouts(request))
    other = [Problem(f"x{i}", "?", "1") for i in range(2)]
    store = open_store(tmp_path, todo=other)
    assert store.recall(requests_of(PROBLEMS[0])[0]) is None
    store.save()
    assert (tmp_path / "in_flight-000.part").read_bytes() == b""


def test_an_answer_is_that_to_the_whole_request(tmp_path):
    request = Request(PROBLEMS[0], ("a", "b"), 4, repeat=1)
    open_store(tmp_path).keep(request, seeded_rollouts(request))
    store = open_store(tmp_path)
    assert store.recall(request) == seeded_rollouts(request)
    for other in (
        Request(PROBLEMS[1], ("a", "b"), 4, 1), Request(PROBLEMS[0], ("ab",), 4, 1), Request(PROBLEMS[0], ("a",), 4, 1),
        Request(PROBLEMS[0], ("a", "b"), 4, 0), Request(PROBLEMS[0], ("a", "b"), 5, 1),
    ):  # fmt: skip
        assert store.recall(other) is None


def test_missing():
    trees = [tree_of(p, []) for p in PROBLEMS]
    assert list(missing(PROBLEMS, trees)) == []
    assert list(missing(PROBLEMS, iter(trees[1:3] + trees[5:6]))) == [PROBLEMS[i] for i in (0, 3, 4, 6)]
    assert list(missing(PROBLEMS, [])) == PROBLEMS
    for wrong in (trees[::-1], trees + trees[-1:], trees[:2] + trees[1:], [tree_of(Problem("p0", "?", "1"), [])]):
        with pytest.raises(UserError, match=f"such as {wrong[-1].problem.id if len(wrong) == 1 else 'p'}"):
            list(missing(PROBLEMS, wrong))


def test_no_trees(tmp_path):
    with pytest.raises(UserError, match="mmprm annotate"):
        read_trees(epath.Path(tmp_path))


# Several processes


def test_workers_share_the_shards(whole, tmp_path):
    stores = [annotated(tmp_path / "w", index=i, count=2) for i in (0, 1)]
    assert [store.done for store in stores] == [4, 3]
    finish(tmp_path / "w")
    assert content(tmp_path / "w") == whole


def test_more_workers_than_shards(whole, tmp_path):
    assert [annotated(tmp_path / "w", index=i, count=8).done for i in range(8)] == [3, 3, 1, 0, 0, 0, 0, 0]
    finish(tmp_path / "w")
    assert content(tmp_path / "w") == whole


@pytest.mark.parametrize("before, after", [(1, 3), (3, 1), (2, 3)])
def test_another_number_of_workers_goes_on(whole, tmp_path, before, after):
    folder, kept = tmp_path / "w", []
    for index in range(before):
        store = open_store(folder, index=index, count=before)
        for i in store.todo[:3:2]:
            for request in requests_of(PROBLEMS[i])[:2]:
                store.keep(request, seeded_rollouts(request))
                kept.append(request)
        if len(store.todo) > 1:
            i = store.todo[1]
            store.add(i, tree_of(PROBLEMS[i], [seeded_rollouts(r) for r in requests_of(PROBLEMS[i])]))
    assert len(list(folder.glob("in_flight-*"))) == before
    sampled = []
    stores = [open_store(folder, index=index, count=after) for index in range(after)]
    assert sum(len(store.todo) for store in stores) < 7
    for request in kept:
        assert any(store.recall(request) == seeded_rollouts(request) for store in stores)
    for index in range(after):
        annotated(folder, index=index, count=after, sampled=sampled)
    finish(folder)
    assert content(folder) == whole


def test_a_store_that_only_reads(tmp_path):
    path = part_of(tmp_path / "w", count=1)
    store = open_store(tmp_path / "w")
    for request in requests_of(PROBLEMS[4]):
        store.keep(request, seeded_rollouts(request))
    path.write_bytes(path.read_bytes() + b"torn")
    full = checked_line(f"[6,{records.to_json(tree_of(PROBLEMS[6], []))}]")
    (tmp_path / "w" / "trees-000006.part").write_text(full)
    before = content(tmp_path / "w")
    store = annotated(tmp_path / "w", writes=False)
    assert content(tmp_path / "w") == before
    assert store.done == 7 and store.todo == [1, 2, 3, 4, 5]
    assert store.recall(requests_of(PROBLEMS[4])[0]) is None  # its tree is finished
    annotated(tmp_path / "not there", writes=False)
    assert not (tmp_path / "not there").exists()


def test_creating_a_store_writes_nothing(tmp_path):
    """Other processes of the same worker have to see what it saw."""
    path = part_of(tmp_path, count=1)
    path.write_bytes(path.read_bytes() + b"torn")
    (tmp_path / "trees-000006.part").write_text(checked_line(f"[6,{records.to_json(tree_of(PROBLEMS[6], []))}]"))
    before = content(tmp_path)
    store = Store(epath.Path(tmp_path), PROBLEMS, SHARD, 0, 1, 0.0)
    assert content(tmp_path) == before
    store.repair()
    assert not path.read_bytes().endswith(b"torn") and (tmp_path / "trees-000006.jsonl").exists()


# Failures


def test_failures_are_noted_and_given_up_on_demand(tmp_path):
    store = open_store(tmp_path)
    for i in range(7):
        store.add(i, Failure("no such image") if i in (1, 6) else tree_of(PROBLEMS[i], []))
    assert store.failed == {1: "no such image", 6: "no such image"} and store.done == 5
    assert sorted(files(tmp_path)) == ["trees-000000.part", "trees-000003.jsonl"]
    again = open_store(tmp_path)
    assert again.todo == [1, 6] and again.done == 5 and not again.failed
    store.complete_without_failed()
    assert sorted(files(tmp_path)) == ["trees-000000.jsonl", "trees-000003.jsonl", "trees-000006.jsonl"]
    assert (tmp_path / "trees-000006.jsonl").read_bytes() == b""
    assert finish(tmp_path)["failed"] == 2
    assert list(records.read(tmp_path / "failed.jsonl", Problem)) == [PROBLEMS[1], PROBLEMS[6]]


def test_only_shards_without_open_problems_are_given_up(tmp_path):
    store = open_store(tmp_path)
    store.add(0, Failure("no"))
    store.add(1, tree_of(PROBLEMS[1], []))
    store.complete_without_failed()
    assert sorted(files(tmp_path)) == ["trees-000000.part"]


# Texts


TEXTS = [
    "",
    "\n",
    "\r\n",
    "\u2028\u2029\x85\x0b\x0c",
    "\x00\x1f\x7f",
    '"\\/',
    "é✓😀\U0010ffff",
    "\ufeff",
    "\\ud800",
    "[1,{}]",
]
LONE = ["\ud800", "a\udfffb", "\udc80\ud800"]  # no tokenizer should decode to it; JSON files may hold it


@pytest.mark.parametrize("text", TEXTS + LONE, ids=ascii)
def test_any_text_survives(tmp_path, text):
    problem = Problem(f"p{text}", text, text, (), text)
    rollouts = (Rollout((text, f"<step>{text}</step>"), True, 1), Rollout((), False, 2))
    tree, request = tree_of(problem, [rollouts]), Request(problem, (text, "x"), 2)
    store = open_store(tmp_path, todo=[problem, PROBLEMS[0]])
    store.keep(request, rollouts)
    assert store.recall(request) == rollouts
    again = open_store(tmp_path, todo=[problem, PROBLEMS[0]])
    assert again.recall(request) == rollouts
    again.add(0, tree)
    again = open_store(tmp_path, todo=[problem, PROBLEMS[0]])
    assert again.todo == [1]
    again.add(1, tree_of(PROBLEMS[0], []))
    found, _ = read_trees(epath.Path(tmp_path))
    assert found == tree
    whole, resumed = tmp_path / "whole", files(tmp_path)
    store = open_store(whole, todo=[problem, PROBLEMS[0]])
    store.add(0, tree)
    store.add(1, tree_of(PROBLEMS[0], []))
    assert files(whole) == resumed


def test_surrogates_that_make_a_pair_are_the_same_bytes_after_an_interruption(tmp_path):
    """JSON cannot tell them from the character."""
    tree = tree_of(PROBLEMS[0], [(Rollout(("\ud83d\ude00",), True, 1),)])
    for name in ("whole", "resumed"):
        store = open_store(tmp_path / name, todo=PROBLEMS[:2])
        store.add(0, tree)
        if name == "resumed":
            store = open_store(tmp_path / name, todo=PROBLEMS[:2])
        store.add(1, tree_of(PROBLEMS[1], []))
    assert files(tmp_path / "whole") == files(tmp_path / "resumed")


# The sampler


def test_a_recalling_sampler_asks_for_what_is_not_known_only(tmp_path):
    asked, ready = [], []

    class Sampler:
        def submit(self, requests):
            assert requests
            asked.extend(requests)
            ready.extend((r, Failure("no") if r.prefix else seeded_rollouts(r)) for r in requests)

        def collect(self):
            return [ready.pop()] if ready else []

        def release(self, problem_id):
            asked.append(problem_id)

    first, second, third = requests_of(PROBLEMS[0])
    store = open_store(tmp_path)
    store.keep(first, seeded_rollouts(first))
    sampler = CachedSampler(Sampler(), store)
    sampler.submit([first])
    assert asked == []
    assert sampler.collect() == [(first, seeded_rollouts(first))]
    other = requests_of(PROBLEMS[1])[0]
    sampler.submit([first, second, other])
    assert asked == [second, other]
    assert sampler.collect() == [(first, seeded_rollouts(first))]
    assert sampler.collect() == [(other, seeded_rollouts(other))]
    assert sampler.collect() == [(second, Failure("no"))]
    assert sampler.collect() == []
    assert store.recall(other) == seeded_rollouts(other) and store.recall(second) is None
    sampler.release("p0")
    assert asked[-1] == "p0"
