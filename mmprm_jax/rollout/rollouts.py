"""Text on both sides of the engine: search requests in, verified rollouts out."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import numpy as np

from mmprm_jax import interruption
from mmprm_jax.data import encode
from mmprm_jax.data.encode import Language, Pixels
from mmprm_jax.records import Failure, Grading, Request, Rollout, UserError
from mmprm_jax.rollout.engine import Engine, Group, Sample
from mmprm_jax.rollout.reading import Reader
from mmprm_jax.rollout.sampling import Sampling

Answered = tuple[str | None, str, Grading]  # the final answer of a solution, the gold answer, how they are compared
Verify = Callable[[Sequence[Answered]], Sequence[bool]]
BEHIND = 8  # tokens of a prompt that a sample is decoded behind


def request_key(seed: int, purpose: str, request: Request) -> np.ndarray:
    """The random key of a request, uint32 [2]: a hash of what it is for, whenever and wherever it is sampled."""
    text = "\x1f".join((str(seed), purpose, request.problem.id, *request.prefix))
    if request.repeat:
        text += f"\x1e{request.repeat}"
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8).digest(), np.uint32)


def continuation(decode: Callable[[Sequence[int]], str], behind: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of tokens behind others, with the space that some tokenizers leave out in front of a first word."""
    before, whole = decode(behind), decode([*behind, *tokens])
    return whole[len(before) :] if whole.startswith(before) else decode(tokens)


class LocalSampler:
    """Samples requests with an engine and verifies the final answers while the device goes on: a ``records.Sampler``.

    language: asks. pixels: opens a problem's images. seed, purpose: name the random numbers. reader: reads the answers;
    default: by their tags.
    """

    def __init__(
        self, engine: Engine, language: Language, pixels: Pixels, sampling: Sampling, seed: int, purpose: str,
        verify: Verify, reader: Reader | None = None,
    ):  # fmt: skip
        self.engine, self.language, self.verify, self.reader = engine, language, verify, reader or Reader()
        self.pixels, self.sampling, self._seed, self._purpose = pixels, sampling, seed, purpose
        self._requests: dict[Hashable, tuple[Request, list[int]]] = {}  # with the last tokens of its prompt
        self._tiles: dict[str, tuple[list[int], np.ndarray | None]] = {}  # of each image their number; all of them
        self._failed: list[Any] = []
        self._numbers = itertools.count()

    def variant(
        self, purpose: str, pixels: Pixels | None = None, reader: Reader | None = None, **sampling: Any
    ) -> LocalSampler:
        """Another sampler on the same engine: other random numbers, images (None: the same) and ways to draw.

        reader: default one that reads alike, and stops nothing.
        """
        changed, reader = dataclasses.replace(self.sampling, **sampling), reader or Reader(self.reader.steps)
        pixels = pixels or self.pixels
        return LocalSampler(self.engine, self.language, pixels, changed, self._seed, purpose, self.verify, reader)

    def submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            number = next(self._numbers)
            try:
                group = self._group(number, request)
                self.engine.submit(group)
            except (UserError, ValueError) as error:
                self._failed.append((request, Failure(str(error))))
            else:
                self._requests[number] = request, list(group.prefix[-BEHIND:])

    def collect(self) -> list[tuple[Request, tuple[Rollout, ...] | Failure]]:
        return [
            (request, found if isinstance(found, Failure) else tuple(rollout for rollout, _ in found))
            for request, found in self._collect()
        ]

    def release(self, problem_id: str) -> None:
        self.engine.release(problem_id)
        self._tiles.pop(problem_id, None)

    def solve(
        self, requests: Sequence[Request], update: Callable[[int], Any] = lambda n: None
    ) -> list[list[tuple[Rollout, float]]]:
        """The rollouts of each request and their log-probabilities (nats), in order. Raises UserError on a failure.

        update: called with the number of requests that were answered since the last call.
        """
        found: dict[Request, list[tuple[Rollout, float]]] = {}
        for request, rollouts in self.answers(requests):
            found[request] = rollouts
            update(1)
        return [found[request] for request in requests]

    def answers(self, requests: Sequence[Request]) -> Iterator[tuple[Request, list[tuple[Rollout, float]]]]:
        """As ``solve``: each request with its rollouts as soon as they are there, in any order."""
        self.submit(requests)
        left = Counter(request.problem.id for request in requests)
        while answers := self._collect():
            for request, rollouts in answers:
                if isinstance(rollouts, Failure):
                    raise UserError(f"problem {request.problem.id}: {rollouts.reason}")
                left[request.problem.id] -= 1
                if not left[request.problem.id]:
                    self.release(request.problem.id)
                yield request, rollouts

    def _group(self, number: int, request: Request) -> Group:
        problem = request.problem
        if problem.id not in self._tiles:
            tiles = self.pixels(problem)
            self._tiles[problem.id] = [len(t) for t in tiles], encode.joined(tiles)
        counts, pixels = self._tiles[problem.id]
        prefix = self.language.prompt(problem.question, request.prefix, counts)
        key = request_key(self._seed, self._purpose, request)
        return Group(number, problem.id, tuple(prefix), pixels, key, request.n, self.sampling)

    def _collect(self) -> list[tuple[Request, list[tuple[Rollout, float]] | Failure]]:
        """As ``collect``, with log-probabilities. Raises Interrupted."""
        answers, self._failed = self._failed, []
        while not answers and self.engine.busy:
            interruption.check()
            finished = [(*self._requests.pop(number), samples) for number, samples in self.engine.step()]
            answers = [(request, Failure(str(e))) for request, _, e in finished if isinstance(e, UserError)]
            answers += self._verified([(r, b, s) for r, b, s in finished if not isinstance(s, UserError)])
        return answers

    def _verified(
        self, finished: list[tuple[Request, list[int], list[Sample]]]
    ) -> list[tuple[Request, list[tuple[Rollout, float]]]]:
        read = [
            [self.reader.read(request, self._text(behind, sample)) for sample in samples]
            for request, behind, samples in finished
        ]
        pairs = [
            (answer, request.problem.answer, request.problem.grading)
            for (request, _, _), group in zip(finished, read, strict=True)
            for _, answer in group
        ]
        verdicts = iter(self.verify(pairs)) if pairs else iter(())
        return [
            (
                request,
                [
                    (Rollout(segments, bool(next(verdicts)), len(sample.tokens)), sample.logprob)
                    for (segments, _), sample in zip(group, samples, strict=True)
                ],
            )
            for (request, _, samples), group in zip(finished, read, strict=True)
        ]

    def _text(self, behind: list[int], sample: Sample) -> str:
        """What was sampled. Without tags it is continued to the letter, so that the space between words counts, too."""
        decode, tokens = self.language.tokenizer.decode, list(sample.tokens)
        if self.reader.steps == "tags":
            return decode(sample.tokens)
        if tokens and tokens[-1] in self.sampling.stop:
            tokens.pop()
        return continuation(decode, behind, tokens)
