"""``mmprm annotate``: a search tree for every training problem, on any number of processes, durable.

Processes share the problems shard by shard, each with an engine on its own devices; in ``lockstep`` all of them run one
engine whose mesh spans their devices: then every process does the same with the same numbers, only the first one
verifies answers (and tells the others) and writes.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from mmprm_jax import interruption, records, schema
from mmprm_jax.answers.workers import Verifier
from mmprm_jax.interruption import Interrupted
from mmprm_jax.metrics import Metrics, progress
from mmprm_jax.policy import Policy
from mmprm_jax.processes import is_first, stop_requested, wait_for_all
from mmprm_jax.records import Failure, Problem, Sampler, Tree, UserError
from mmprm_jax.rollout.reading import Reader
from mmprm_jax.rollout.remote import RemoteSampler
from mmprm_jax.rollout.rollouts import Answered, LocalSampler, Verify
from mmprm_jax.search.omegaprm import SEARCHES, grow
from mmprm_jax.search.settings import Settings
from mmprm_jax.search.store import CachedSampler, Store, iter_trees, missing
from mmprm_jax.servers import check_reachable
from mmprm_jax.settings import Annotate, Engine

_SECONDS = 10.0  # between two rows of metrics


def broadcast_verdicts(verify: Verify) -> Verify:
    """Verdicts of the first process, for all of them: a time-out could differ."""

    def verdicts(answers: Sequence[Answered]) -> list[bool]:
        mine = verify(answers) if is_first() else [False] * len(answers)
        return multihost_utils.broadcast_one_to_all(np.array(mine, np.int32)).astype(bool).tolist()

    return verdicts


class _ThroughputMeter:
    """What the progress bar and the metrics show of a sampler."""

    def __init__(self, sampler: Sampler):
        self._sampler = sampler
        self._start = self._last = (time.monotonic(), 0, 0, 0, 0)

    def read(self, last: bool) -> dict[str, float]:
        """Totals of this run; rates and slot occupancy since the reading before. The last one: of the whole run."""
        now, engine = time.monotonic(), getattr(self._sampler, "engine", None)
        counts = engine.counts if engine else None
        source: Any = self._sampler
        rollouts, tokens = (counts.samples, counts.tokens) if counts else (source.rollouts, source.tokens)
        live, all_ = (counts.live_steps, counts.slot_steps) if counts else (0, 0)
        then, rollouts_then, tokens_then, live_then, all_then = self._start if last else self._last
        self._last = (now, rollouts, tokens, live, all_)
        seconds = max(now - then, 1e-9)
        values = {
            "rollouts": rollouts, "tokens": tokens, "rollouts_per_second": (rollouts - rollouts_then) / seconds,
            "tokens_per_second": (tokens - tokens_then) / seconds,
        }  # fmt: skip
        if all_ > all_then:
            values["slot_occupancy"] = (live - live_then) / (all_ - all_then)
        return values


@contextlib.contextmanager
def _save_on_exit(store: Store) -> Iterator[None]:
    """Saves what is in flight when the process is interrupted or fails."""
    try:
        yield
    except (Interrupted, UserError) as error:
        with interruption.saving():
            store.save()
        if isinstance(error, Interrupted):
            error.message = f"annotate: stopped as asked, {store.done} trees and the answers to others are saved"
        raise


def run(
    folder: epath.Path, problems: Sequence[Problem], sampler: Sampler, settings: Settings, config: Annotate,
    *, worker: int = 0, workers: int = 1, writes: bool = True,
) -> dict[int, str]:  # fmt: skip
    """Grows the trees of this worker's share that are not there yet.

    Returns the reasons of those that failed; of several processes of one worker, only that which writes does. Raises
    Interrupted, with everything saved, when the process has been asked to end.
    """
    store = Store(folder, problems, config.trees_per_shard, worker, workers, config.checkpoint_seconds, writes)
    if workers == 1:  # of several processes in lockstep, the first one must not go on before all have read
        wait_for_all("annotate: read")
    store.repair()
    share, shown = store.done + len(store.todo), writes and worker == 0
    forest = SEARCHES[config.mode](settings, config.in_flight)
    meter, due = _ThroughputMeter(sampler), time.monotonic() + _SECONDS
    metrics = Metrics(folder, resume_step=store.done + 1, enabled=shown)
    polls = itertools.count()
    with metrics, _save_on_exit(store), progress(share, "annotate", "tree", store.done, enabled=shown) as bar:

        def poll() -> None:
            if reader := getattr(sampler, "reader", None):
                reader.check()  # now that all answers are kept
            # Workers poll at steps of their own, which processes that ask together cannot.
            if workers > 1:
                interruption.check(own=True)
            elif stop_requested(next(polls)):
                raise Interrupted

        todo = ((i, problems[i]) for i in store.todo)
        for index, result in grow(todo, forest, CachedSampler(sampler, store, poll)):
            store.add(index, result)
            if isinstance(result, Failure):
                logging.error("problem %s: %s", problems[index].id, result.reason)
            else:
                bar.update()
            last = store.done + len(store.failed) == share
            if last or time.monotonic() >= due:
                values, due = meter.read(last), time.monotonic() + _SECONDS
                metrics.write(store.done, **values)
                bar.set_postfix_str(", ".join(f"{name} {value:.3g}" for name, value in values.items()), refresh=False)
    if store.failed and writes:
        store.save()
        if config.skip_failed:
            store.complete_without_failed()
    return store.failed if writes else {}


def finish(
    folder: epath.Path, problems: Sequence[Problem], failed: dict[int, str], skip: bool, reader: Reader | None = None
) -> dict[str, Any]:
    """The figures of an annotation, when all processes are done. reader: what read the rollouts, and their limits.

    Raises UserError, in every process, when trees failed and are not to be skipped, or the rollouts say too little.
    """
    wait_for_all("annotate: grown")
    count = int(np.sum(multihost_utils.process_allgather(np.int32(len(failed)))))
    if count and not skip:
        first = next((f", such as that of {problems[i].id}: {reason}" for i, reason in sorted(failed.items())), "")
        raise UserError(
            f"{count} of {len(problems)} trees failed{first}. All others are kept; the same command tries these again,"
            " --config.annotate.skip_failed=true goes on without them"
        )
    if reader and any(folder.glob("trees-*.jsonl")):
        reader.check_all(_rollouts(iter_trees(folder)))
    figures = dict.fromkeys(("trees", "rollouts", "all_right", "all_wrong"), 0)

    def counted() -> Iterator[Tree]:
        for tree in iter_trees(folder):
            root = tree.nodes[0]
            figures["trees"] += 1
            figures["rollouts"] += sum(node.n for node in tree.nodes)
            figures["all_right"] += root.k == root.n  # not searched: too easy
            figures["all_wrong"] += root.k == 0  # not searched: too hard
            yield tree

    left_out = list(missing(problems, counted()))
    if is_first():
        records.write(folder / "failed.jsonl", left_out)
        for path in folder.glob("*.part*"):
            path.unlink(missing_ok=True)
    return figures | {"failed": len(left_out)}


def _rollouts(trees: Iterable[Tree]) -> Iterator[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """Each rollout: its problem's id, its prefix, its segments."""
    for tree in trees:
        for i, node in enumerate(tree.nodes):
            prefix = tree.prefix(i)
            yield from ((tree.problem.id, prefix, rollout.segments) for rollout in node.rollouts)


def annotate(
    policy: Policy, problems: Sequence[Problem], /, *, images: epath.PathLike = "", seed: int = 0,
    verify: Verify | None = None, **settings: Any,
) -> list[Tree]:  # fmt: skip
    """A search tree for each problem, in memory; ``mmprm annotate`` keeps those of many problems safe on disk.

    images: the folder that the problems' images are relative to. verify: says which answers are right of (answer, gold,
    grading), such as a ``Verifier``; default: one in this process. settings: those of ``settings.Annotate``, such as
    num_rollouts, max_searches, rollout_budget, max_new_tokens, temperature, mode. Raises UserError, also when a tree
    fails.
    """
    config = schema.given(Annotate, {"verify_workers": 0, **settings})
    if config.servers or config.policy or config.lockstep:
        raise UserError("annotate: servers, policy and lockstep are for `mmprm annotate`; give it another Policy")
    forest = SEARCHES[config.mode](schema.from_config(Settings, config), config.in_flight)
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(policy.mesh))
        verify = verify or stack.enter_context(verifier(config))
        sampler = policy.sampler(config, images, config.num_rollouts, seed, "annotate", verify)
        found = dict(grow(enumerate(problems), forest, sampler))
    trees = []
    for problem, (_, result) in zip(problems, sorted(found.items()), strict=True):
        if isinstance(result, Failure):
            raise UserError(f"problem {problem.id}: {result.reason}")
        trees.append(result)
    try:
        sampler.reader.check_all(_rollouts(trees))
    except UserError as error:
        logging.warning("%s", error)
    return trees


@contextlib.contextmanager
def verifier(config: Engine) -> Iterator[Verifier]:
    """Verifies in worker processes; tells at the end how many answers nothing is known of: they counted as wrong."""
    with Verifier(config.verify_workers) as verify:
        yield verify
    if verify.unknown:
        logging.warning("%d of %d answers could not be decided: counted as wrong", verify.unknown, verify.verified)


@contextlib.contextmanager
def remote(
    config: Annotate, folder: epath.Path, seed: int, sampling: Any, max_tiles: int = 0
) -> Iterator[RemoteSampler]:
    """A sampler of the servers that ``config`` names. Raises UserError when none of them can be reached.

    max_tiles: of an image, for servers that can be told; 0: there are no images. Tells at the end of answers that were
    no rollouts.
    """
    check_reachable(config.servers)
    with (
        verifier(config) as verify,
        RemoteSampler(
            config.servers, config.policy, folder, seed, "annotate", verify, sampling, config.template or "continue",
            concurrency=config.concurrency, max_tiles=max_tiles, reader=Reader.of(config, "annotate"),
        ) as sampler,
    ):  # fmt: skip
        yield sampler
    if sampler.unusable:
        logging.warning("%d rollouts are answers that could not be used: counted as wrong", sampler.unusable)


@contextlib.contextmanager
def local(make: Any, config: Annotate) -> Iterator[LocalSampler]:
    """A sampler of our own engine; ``make(verify)`` builds it."""
    with verifier(config) as verify:
        yield make(broadcast_verdicts(verify) if config.lockstep else verify)
