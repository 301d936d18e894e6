"""Annotation of made-up problems by a tiny random policy; also a program, for tests that kill it or run several.

The policy's tokens are numbers; three of them make a step, and an answer is right when its last one is small. Nothing
is learned, but its trees branch as real ones do.
"""

import argparse
import hashlib
import re

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

VOCABULARY, STOP = 40, 18
PROBLEMS = 24


class Numbers:
    """A language: steps of three numbers, then an answer. It is its own tokenizer."""

    def __init__(self, cfg, image_token):
        self.tokenizer, self._cfg, self._image_token = self, cfg, image_token

    def prompt(self, question, prefix, tiles):
        ids = [8 + int(n) % 30 for n in question.split()]
        picture = [self._image_token] * (sum(tiles) * self._cfg.tokens_per_tile)
        return [5, *picture, *ids, *(int(n) for step in prefix for n in re.findall(r"\d+", step))]

    def decode(self, tokens):
        tokens = [max(t, 5) for t in tokens if t != STOP]  # 4 would be an image token
        steps = [tokens[i : i + 3] for i in range(0, len(tokens), 3)]
        texts = [f"<step>{' '.join(map(str, step))}</step>" for step in steps[:-1]]
        return "".join(texts) + (f"<answer>{int(tokens[-1] < 22)}</answer>" if tokens else "")


class Interrupted(BaseException):
    """Nothing catches it, as nothing catches kill -9."""


class SeededSampler:
    """A sampler without a model: an answer depends on its request only. One answer at a time, the newest first.

    fails: request -> the reason why it cannot be answered, or None. limit: it interrupts after so many answers.
    """

    def __init__(self, fails=lambda request: None, limit=None):
        self._fails, self._limit, self._open = fails, limit, []
        self.answered, self.released, self.rollouts, self.tokens = [], [], 0, 0

    def submit(self, requests):
        assert requests
        self._open += requests

    def collect(self):
        from mmprm_jax.records import Failure

        if not self._open:
            return []
        if len(self.answered) == self._limit:
            raise Interrupted
        request = self._open.pop()
        self.answered.append(request)
        if reason := self._fails(request):
            return [(request, Failure(reason))]
        self.rollouts += request.n
        rollouts = seeded_rollouts(request)
        self.tokens += sum(rollout.n_tokens for rollout in rollouts)
        return [(request, rollouts)]

    def release(self, problem_id):
        self.released.append(problem_id)


def seeded_rollouts(request):
    """Rollouts of few different steps, in texts that are hard to file."""
    from mmprm_jax.records import Rollout

    text = repr((request.problem.id, request.prefix, request.repeat))
    rng = np.random.default_rng(list(hashlib.sha256(text.encode()).digest()))
    odd = ("é✓", "\u2028\x85\r\n", '"\\', "\x00", "😀", "")
    rollouts, right = [], {"p6": 1.0, "p9": 0.0}.get(request.problem.id, 0.5)
    for _ in range(request.n):
        steps = rng.integers(0, 6, max(0, rng.integers(0, 7) - len(request.prefix)))
        segments = tuple(f"<step>{odd[i]}{i}</step>" for i in steps)
        rollouts.append(Rollout(segments, bool(rng.random() < right), int(rng.integers(1, 30))))
    return tuple(rollouts)


def problems(count=PROBLEMS):
    from mmprm_jax.records import Problem

    return [Problem(f"p{i}", " ".join(map(str, range(i, i + 4 + 5 * (i % 5)))), "1", ("i.png",) if i % 3 else ())
            for i in range(count)]  # fmt: skip


def make_sampler(tiny, mesh, slots, verify, cache_tokens=4000, min_bucket=32):
    from mmprm_jax.rollout.engine import Engine
    from mmprm_jax.rollout.rollouts import LocalSampler
    from mmprm_jax.rollout.sampling import Sampling

    def pixels(problem):
        rng = np.random.default_rng(int(problem.id[1:]))
        return [rng.integers(0, 256, (1 + int(problem.id[1:]) % 2, 8, 8, 3), np.uint8) for _ in problem.images]

    head = 3 * tiny.params["decoder"]["lm_head"]
    params = {**tiny.params, "decoder": {**tiny.params["decoder"], "lm_head": head}}
    engine = Engine(
        tiny.graphdef, tiny.place(mesh, params), tiny.cfg, tiny.image_token, mesh, slots=slots, samples=4, max_new=24,
        cache_tokens=cache_tokens, min_bucket=min_bucket,
    )  # fmt: skip
    engine.strict = True
    sampling = Sampling(temperature=0.8, top_k=30, top_p=0.95, max_new_tokens=24, stop=(STOP,))
    return LocalSampler(engine, Numbers(tiny.cfg, tiny.image_token), pixels, sampling, 0, "annotate", verify)


def config(**changes):
    return ConfigDict(
        {"mode": "default", "in_flight": 8, "trees_per_shard": 5, "checkpoint_seconds": 0.0, "skip_failed": False}
        | changes
    )


def settings():
    from mmprm_jax.search.settings import Settings

    return Settings(num_rollouts=4, max_searches=6, rollout_budget=60, right_solutions=1, length_scale=20.0)


def files(folder):
    """Name and content of every file of trees."""
    return {path.name: path.read_bytes() for path in sorted(epath.Path(folder).glob("trees-*"))}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--mesh", default="data=-1")
    parser.add_argument("--process", nargs=3)
    parser.add_argument("--lockstep", action="store_true")
    parser.add_argument("--mode", default="default")
    parser.add_argument("--problems", type=int, default=PROBLEMS)
    options = parser.parse_args()
    from conftest import Tiny  # it asks for eight devices

    jax.config.update("jax_num_cpu_devices", options.devices)
    if options.process:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        address, index, count = options.process
        jax.distributed.initialize(address, int(count), int(index))
    from mmprm_jax import annotation
    from mmprm_jax.answers.workers import Verifier
    from mmprm_jax.sharding import make_mesh

    alone = options.process and not options.lockstep
    shape = {axis: int(size) for axis, size in (part.split("=") for part in options.mesh.split(","))}
    mesh = make_mesh(shape, jax.local_devices() if alone else None)
    share = {"worker": jax.process_index(), "workers": jax.process_count()} if alone else {}
    with jax.set_mesh(mesh), Verifier(0) as verify:
        verify = annotation.broadcast_verdicts(verify) if options.lockstep else verify
        sampler = make_sampler(Tiny(mesh), mesh, options.slots, verify)
        writes = bool(alone) or jax.process_index() == 0
        folder, todo = epath.Path(options.folder), problems(options.problems)
        print("start", flush=True)
        collect = sampler.collect

        def told():
            sampler.collect = collect
            print("answers", flush=True)  # those of the first call are saved by now
            return collect()

        def first():
            sampler.collect = told
            return collect()

        sampler.collect = first
        failed = annotation.run(folder, todo, sampler, settings(), config(mode=options.mode), writes=writes, **share)
        print("end", annotation.finish(folder, todo, failed, False), flush=True)


if __name__ == "__main__":
    main()
