"""Text on both sides of the engine: search requests in, verified rollouts out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from mmprm_jax.answers.verify import is_correct
from mmprm_jax.data.encode import prompt_ids
from mmprm_jax.data.prompts import final_answer, split_segments
from mmprm_jax.models.config import VLMConfig
from mmprm_jax.models.tokenizer import Tokenizer
from mmprm_jax.records import Request, Rollout
from mmprm_jax.rollout.engine import Engine


def request_key(seed: int, purpose: str, request: Request) -> np.ndarray:
    """The random key of a request, uint32 [2]: a hash of what it is for, whenever and wherever it is sampled."""
    text = "\x1f".join((str(seed), purpose, request.problem.id, *request.prefix))
    if request.repeat:
        text += f"\x1e{request.repeat}"
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8).digest(), np.uint32)


class Sampler:
    """Samples search requests with a policy and verifies the final answers."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        cfg: VLMConfig,
        pixels: Mapping[str, np.ndarray],
        seed: int,
        purpose: str,
    ):
        """``pixels``: uint8 [tiles, H, W, 3] by problem id."""
        self._engine, self._tokenizer, self._cfg, self._pixels = engine, tokenizer, cfg, pixels
        self._seed, self._purpose = seed, purpose
        self.rollouts = self.tokens = 0

    def __call__(self, requests: Sequence[Request]) -> list[tuple[Rollout, ...]]:
        """The rollouts of each request; all requests ask for the same number."""
        prefixes = []
        for request in requests:
            ids = prompt_ids(self._tokenizer, self._cfg, request.problem.question, request.problem.image is not None)
            prefixes.append(ids + [i for segment in request.prefix for i in self._tokenizer.encode(segment)])
        pixels = np.stack([self._pixels[r.problem.id] for r in requests])
        keys = np.stack([request_key(self._seed, self._purpose, r) for r in requests])
        samples = self._engine.sample(prefixes, pixels, keys, requests[0].n)
        self.rollouts += sum(len(group) for group in samples)
        self.tokens += sum(len(sample.tokens) for group in samples for sample in group)
        return [
            tuple(self._rollout(request, sample.tokens, sample.logprob) for sample in group)
            for request, group in zip(requests, samples, strict=True)
        ]

    def _rollout(self, request: Request, tokens: tuple[int, ...], logprob: float) -> Rollout:
        segments = split_segments(self._tokenizer.decode(tokens))
        correct = is_correct(final_answer(segments), request.problem.answer)
        return Rollout(segments, correct, logprob, len(tokens))
