"""The files of an annotation: what is finished stays, whenever the process is killed.

    trees-000000.jsonl       the trees of the first shard of problems, in the order of the problems; it is complete
    trees-000050.part        the trees of a shard that are finished so far, a checksummed line each, as they finish
    in_flight-000.part       answers to requests of unfinished trees, a checksummed line each, rewritten at an interval

A tree is a pure function of its answers, so the answers are all there is to save of a tree in flight: asked again after
an interruption, they come from the file. What was being sampled is sampled again, with the same random numbers.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from absl import logging
from etils import epath

from mmprm_jax import io, records
from mmprm_jax.io import checked_line, read_checked
from mmprm_jax.records import Failure, Problem, Request, Rollout, Sampler, Tree, UserError

Key = tuple[str, tuple[str, ...], int, int]  # problem id, prefix, repeat, n


def _append(path: epath.Path, text: str) -> None:
    """It is on disk when this returns."""
    with open(path, "ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def shard_path(folder: epath.Path, shard: range) -> epath.Path:
    """The file of the trees of the problems ``shard``."""
    return folder / f"trees-{shard.start:06d}.jsonl"


def part_path(folder: epath.Path, shard: range) -> epath.Path:
    """The file of those trees of a shard that are finished, until all are."""
    return folder / f"trees-{shard.start:06d}.part"


def iter_trees(folder: epath.Path) -> Iterator[Tree]:
    """All trees of the complete shards of an annotation, in the order of the problems. Raises UserError if none."""
    shards = sorted(folder.glob("trees-*.jsonl"))
    if not shards:
        raise UserError(f"{folder}: no trees there; run `mmprm annotate` first")
    for shard in shards:
        yield from records.read(shard, Tree)


def read_trees(folder: epath.Path) -> list[Tree]:
    """As ``iter_trees``, all of them at once."""
    return list(iter_trees(folder))


class Store:
    """The trees of ``problems``, of which this worker (``index`` of ``count``) grows every count-th shard.

    ``writes``: False reads only, for further processes of the same worker. Creating a store writes nothing yet: all
    processes of a worker must have read the same before one of them goes on with ``repair``.
    """

    def __init__(
        self, folder: epath.Path, problems: Sequence[Problem], per_shard: int, index: int, count: int,
        seconds: float, writes: bool = True,
    ):  # fmt: skip
        """seconds: between two saves of the answers in flight.

        Raises UserError for trees of other problems and for a shard that is no longer what was written.
        """
        self._folder, self._problems, self._seconds, self._writes = folder, problems, seconds, writes
        shards = [range(i, min(i + per_shard, len(problems))) for i in range(0, len(problems), per_shard)]
        self.shards = shards[index::count]
        self.failed: dict[int, str] = {}
        self._trees: dict[int, dict[int, str]] = {}  # first problem -> index -> JSON, of incomplete shards
        self._damaged: list[range] = []
        self._shard_of = {i: shard for shard in self.shards for i in shard}
        self.done = 0
        self.todo: list[int] = []
        for shard in self.shards:
            self._read(shard)
        self._flight = folder / f"in_flight-{index:03d}.part"
        self._answers: dict[str, dict[Key, str]] = {}  # problem id -> what was asked -> line of the file
        wanted = {problems[i].id for i in self.todo}
        for path in sorted(folder.glob("in_flight-*.part")):
            for text in read_checked(path)[0]:
                problem, prefix, repeat, n, _ = json.loads(text)
                if problem in wanted:
                    self._answers.setdefault(problem, {})[problem, tuple(prefix), repeat, n] = checked_line(text)
        self._saved = time.monotonic()

    def _read(self, shard: range) -> None:
        if shard_path(self._folder, shard).exists():
            io.check(shard_path(self._folder, shard))
            self.done += len(shard)
            return
        path, trees = part_path(self._folder, shard), {}
        texts, intact = read_checked(path)
        if not intact:
            logging.warning("%s: a damaged line, as an interruption leaves; what it held is made again", path)
            self._damaged.append(shard)
        for text in texts:
            number, tree = text[1:-1].split(",", 1)
            index, problem = int(number), json.loads(tree)["problem"]
            if index not in shard or problem != json.loads(records.to_json(self._problems[index])):
                raise UserError(f"{self._folder}: holds trees of other problems; use another --workdir")
            trees[index] = tree
        self._trees[shard.start] = trees
        self.done += len(trees)
        self.todo += [i for i in shard if i not in trees]

    def repair(self) -> None:
        """Does what an interruption left undone. Call it before anything is added."""
        if self._writes:
            self._folder.mkdir(parents=True, exist_ok=True)
            for shard in self._damaged:
                self._rewrite(shard)
            for shard in [shard for shard in self.shards if shard.start in self._trees]:
                self._complete(shard)

    def add(self, index: int, result: Tree | Failure) -> bool:
        """Keeps a finished tree, or notes that there is none. Returns whether its shard is complete now."""
        shard = self._shard_of[index]
        if isinstance(result, Failure):
            self.failed[index] = result.reason
            return False
        tree = self._trees[shard.start][index] = records.to_json(result)
        path = part_path(self._folder, shard)
        if self._writes and not io.is_remote(path):
            _append(path, checked_line(f"[{index},{tree}]"))
        elif self._writes:
            self._rewrite(shard)
        self._answers.pop(result.problem.id, None)
        self.done += 1
        return self._complete(shard)

    def _rewrite(self, shard: range) -> None:
        lines = [checked_line(f"[{i},{tree}]") for i, tree in self._trees[shard.start].items()]
        io.write(part_path(self._folder, shard), "".join(lines), lasting=True)

    def _complete(self, shard: range, without: frozenset[int] = frozenset()) -> bool:
        """Writes the file of a shard that has all its trees but those ``without``."""
        trees = self._trees[shard.start]
        if len(trees) + sum(i in without for i in shard) < len(shard):
            return False
        if self._writes:
            text = "".join(f"{trees[i]}\n" for i in sorted(trees))
            io.write(shard_path(self._folder, shard), text, noted=True, lasting=True)
            part_path(self._folder, shard).unlink(missing_ok=True)
        del self._trees[shard.start]
        return True

    def complete_without_failed(self) -> None:
        """Completes the shards without the trees that failed."""
        for shard in [shard for shard in self.shards if shard.start in self._trees]:
            self._complete(shard, frozenset(self.failed))

    def recall(self, request: Request) -> tuple[Rollout, ...] | None:
        """The answer that an earlier run got, if it is known."""
        line = self._answers.get(request.problem.id, {}).get(_key(request))
        if line is None:
            return None
        return tuple(Rollout(tuple(segments), correct, n) for segments, correct, n in json.loads(line[9:])[-1])

    def keep(self, request: Request, rollouts: Sequence[Rollout]) -> None:
        """Remembers an answer until its tree is finished; saves all of them when it is time."""
        key, rows = _key(request), [[r.segments, r.correct, r.n_tokens] for r in rollouts]
        text = json.dumps([*key, rows], ensure_ascii=False, separators=(",", ":"))
        line = checked_line(text.encode(errors="backslashreplace").decode())
        self._answers.setdefault(request.problem.id, {})[key] = line
        if time.monotonic() - self._saved >= self._seconds:
            self.save()

    def save(self) -> None:
        """Writes the answers in flight."""
        if not self._writes:
            return
        lines = (line for answers in self._answers.values() for line in answers.values())
        io.write(self._flight, "".join(lines))
        self._saved = time.monotonic()


def _key(request: Request) -> Key:
    return request.problem.id, request.prefix, request.repeat, request.n


class CachedSampler:
    """A sampler that answers from the store what an earlier run was answered, and remembers the rest there.

    ``poll`` is called whenever new answers were remembered; it may end the process.
    """

    def __init__(self, sampler: Sampler, store: Store, poll: Callable[[], None] = lambda: None):
        self._sampler, self._store, self._poll = sampler, store, poll
        self._ready: list[tuple[Request, tuple[Rollout, ...] | Failure]] = []

    def submit(self, requests: Sequence[Request]) -> None:
        known = [(request, self._store.recall(request)) for request in requests]
        self._ready += [(request, rollouts) for request, rollouts in known if rollouts is not None]
        unknown = [request for request, rollouts in known if rollouts is None]
        if unknown:
            self._sampler.submit(unknown)

    def collect(self) -> list[tuple[Request, tuple[Rollout, ...] | Failure]]:
        if self._ready:
            ready, self._ready = self._ready, []
            return ready
        answers = self._sampler.collect()
        for request, rollouts in answers:
            if not isinstance(rollouts, Failure):
                self._store.keep(request, rollouts)
        self._poll()
        return answers

    def release(self, problem_id: str) -> None:
        self._sampler.release(problem_id)


def missing(problems: Iterable[Problem], trees: Iterable[Tree]) -> Iterator[Problem]:
    """The problems without a tree. Raises UserError if the trees are not those of ``problems``, in their order."""
    left = iter(trees)
    tree = next(left, None)
    for problem in problems:
        if tree is not None and tree.problem == problem:
            tree = next(left, None)
        else:
            yield problem
    if tree is not None:
        raise UserError(f"trees of other problems, such as {tree.problem.id}; use another --workdir")
