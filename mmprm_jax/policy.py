"""The policy: what writes solutions.

policy = Policy.from_pretrained("OpenGVLab/InternVL2_5-8B")
for solution in policy.sample(["What is the area?"], n=8, images=[["triangle.png"]])[0]:
    print(solution.text, solution.logprob)
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from mmprm_jax import convert, settings
from mmprm_jax.data import encode
from mmprm_jax.data.encode import Language, Picture, Pixels
from mmprm_jax.data.steps import final_answer, split
from mmprm_jax.models import build, hf_config
from mmprm_jax.models import tokenizer as tok
from mmprm_jax.models.tokenizer import Tokenizer
from mmprm_jax.records import Problem, Request, UserError
from mmprm_jax.rollout import device
from mmprm_jax.rollout.engine import Engine, Group, bucket
from mmprm_jax.rollout.reading import Reader
from mmprm_jax.rollout.rollouts import BEHIND, LocalSampler, Verify, continuation, request_key
from mmprm_jax.rollout.sampling import Sampling
from mmprm_jax.schema import from_config

Messages = Sequence[Mapping[str, str]]  # of a chat: {"role": "user" or "assistant", "content": text}
EngineSettings = settings.Annotate | settings.Evaluate  # what has the engine's settings and those of sampling

_SLOTS = 256  # samples that ``Policy.sample`` decodes at a time
_CACHE = 32_768  # tokens of prompts that it keeps on the devices, if more than one prompt needs them


@dataclasses.dataclass(frozen=True)
class Completion:
    """What was sampled behind a prompt. ``logprobs``: of each token, unfiltered and at temperature 1, in nats."""

    text: str
    tokens: tuple[int, ...]  # the stop token included, if it was reached
    logprobs: tuple[float, ...]
    steps: str = "tags"  # how it is read, as in ``settings.Reading``
    prefix: tuple[str, ...] = ()  # the solution so far that it continues

    @property
    def logprob(self) -> float:
        """Of the whole completion, in nats."""
        return float(np.sum(self.logprobs))

    @property
    def segments(self) -> tuple[str, ...]:
        """Its whole steps and its answer, as a PRM reads them."""
        return split(self.text, self.steps, self.prefix)

    @property
    def answer(self) -> str | None:
        """Its final answer, without the tags; None where it has none."""
        return final_answer(self.prefix + self.segments)


@dataclasses.dataclass(frozen=True, eq=False)
class Policy:
    """A model that writes solutions: weights on a mesh, tokenizer and prompt, and how images are cut.

    max_tiles: of one image, without the thumbnail, which follows several tiles where ``thumbnail`` says so.
    """

    language: Language
    params: Any = dataclasses.field(repr=False)
    mesh: Any
    max_tiles: int
    thumbnail: bool = True

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike,
        *,
        mesh: Any = None,
        dtype: Any = None,
        template: str | None = None,
        max_tiles: int | None = None,
        revision: str | None = None,
    ) -> Policy:
        """A policy from a released checkpoint (folder or hub id, ``org/name@revision``) or a model folder of ours.

        mesh: default all devices, heads over as many as divide them, parameters over the others. dtype: default as
        stored. template: ``internvl``, ``paper`` or ``plain``; default the prompt that it was trained with. max_tiles:
        of one image; default the model's own number. Raises UserError, before weights are read if the names are wrong.
        """
        folder, model = convert.inspect(path_or_id, revision)
        language = Language.stored(Tokenizer.load(folder), model.cfg, model.config)
        if template:
            language = Language.released(language.tokenizer, language.cfg, template)
        default_tiles, thumbnail = hf_config.tiling(model.config)
        loaded = convert.load(path_or_id, mesh or convert.inference_mesh(model.cfg), dtype, revision)
        return cls(language, loaded.params, loaded.mesh, max_tiles or default_tiles, thumbnail)

    @functools.cached_property
    def graphdef(self) -> Any:
        """The structure of the model, which its weights fill."""
        return build.abstract(self.language.cfg, self.language.image_token, self.mesh)[0]

    @property
    def stop(self) -> int:
        """The id of the token that ends a turn."""
        return self.language.tokenizer.id(tok.TURN_END)

    def pixels(self, folder: epath.PathLike) -> Pixels:
        """Opens the tiles of a problem's images, which are relative to ``folder``."""
        return encode.file_pixels(folder, self.language.cfg, self.max_tiles, self.thumbnail)

    def engine(self, *, slots: int, samples: int, max_new_tokens: int, cache_tokens: int) -> Engine:
        """An engine with these weights; its arguments are those of ``Engine``. Call it under ``jax.set_mesh``."""
        return Engine(
            self.graphdef, self.params, self.language.cfg, self.language.image_token, self.mesh,
            slots=slots, samples=samples, max_new=max_new_tokens, cache_tokens=cache_tokens,
        )  # fmt: skip

    def sampler(
        self, config: EngineSettings, images: epath.PathLike, n: int, seed: int, purpose: str, verify: Verify
    ) -> LocalSampler:
        """Answers requests of searches and evaluations: their prefixes are continued, the answers verified.

        images: the folder that problems' images are relative to. n: rollouts of a request, as a rule. seed, purpose:
        name the random numbers.
        """
        engine = self.engine(
            slots=config.slots, samples=n, max_new_tokens=config.max_new_tokens, cache_tokens=config.cache_tokens
        )
        sampling, reader = from_config(Sampling, config, stop=(self.stop,)), Reader.of(config, purpose)
        language = self.language.writing(config.steps)
        return LocalSampler(engine, language, self.pixels(images), sampling, seed, purpose, verify, reader)

    def sample(
        self,
        problems: Sequence[str | Problem | Messages],
        *,
        n: int = 1,
        images: Sequence[Sequence[Picture] | None] | None = None,
        temperature: float = 1.0,
        max_new_tokens: int = 512,
        seed: int = 0,
        steps: str = "tags",
        **sampling: Any,
    ) -> list[list[Completion]]:
        """``n`` completions for each of the ``problems``: questions, records or chats.

        A chat is one message of the user; a message of the assistant behind it is a solution so far, in whole steps,
        that is continued. images: those of each problem, files or PIL images; None: a record's own. steps: how the
        policy writes them, as in ``settings.Reading``. sampling: top_k, top_p, min_p, repetition_penalty. A completion
        depends on the seed, its number, the problem (by the id of a record) and the solution so far, not on the other
        problems. Raises UserError, ValueError.
        """
        if isinstance(problems, str | Problem):
            raise UserError("problems must be a list; put brackets around the one problem")
        draw = Sampling(temperature=temperature, max_new_tokens=max_new_tokens, stop=(self.stop,), **sampling)
        if steps not in settings.STEPS:
            raise UserError(f"steps: {steps!r} is not one of {', '.join(settings.STEPS)}")
        language = self.language.writing(steps)
        pictures = [None] * len(problems) if images is None else images
        if len(pictures) != len(problems):
            raise UserError(f"images for {len(pictures)} problems, but there are {len(problems)}")
        if not problems:
            return []

        groups, begun, repeats = [], [], collections.Counter[Any]()
        for number, (item, own) in enumerate(zip(problems, pictures, strict=True)):
            problem, prefix = _read(item, steps)
            tiles = encode.picture_tiles(
                encode.problem_text(problem, own)[1], self.language.cfg, self.max_tiles, self.thumbnail
            )
            ids = language.prompt(problem.question, prefix, [len(t) for t in tiles])
            begun.append((ids[-BEHIND:], steps, prefix))
            request = Request(problem, prefix, n, repeat=repeats[problem.id, prefix])
            repeats[problem.id, prefix] += 1
            whole, key = encode.joined(tiles), request_key(seed, "sample", request)
            groups.append(Group(number, str(number), tuple(ids), whole, key, n, draw))

        lengths = [len(group.prefix) for group in groups]
        # In few sizes, each of which is a program; a prompt lies on one of the mesh's shards.
        cache = bucket(max(max(lengths), min(sum(lengths), _CACHE)), 256) * device.shards(self.mesh)
        with jax.set_mesh(self.mesh):
            engine = self.engine(
                slots=min(_SLOTS, n * len(groups)), samples=n, max_new_tokens=max_new_tokens, cache_tokens=cache
            )
            found = zip(engine.sample(groups), begun, strict=True)
            return [[self._completion(x.tokens, x.logprobs, *how) for x in samples] for samples, how in found]

    def _completion(
        self, tokens: tuple[int, ...], logprobs: tuple[float, ...], behind: list[int], steps: str, prefix: Any
    ) -> Completion:
        """behind: the last tokens of its prompt."""
        written, decode = tokens[:-1] if tokens and tokens[-1] == self.stop else tokens, self.language.tokenizer.decode
        text = decode(written) if steps == "tags" else continuation(decode, behind, written)
        return Completion(text, tokens, logprobs, steps, prefix)


def _read(item: str | Problem | Messages, steps: str) -> tuple[Problem, tuple[str, ...]]:
    """The problem, and the solution so far. Raises UserError for a chat that no prompt has a place for."""
    if isinstance(item, Problem):
        return item, ()
    if isinstance(item, str):
        return Problem(item, item, ""), ()
    roles = [message.get("role") for message in item]
    if roles not in (["user"], ["user", "assistant"]):
        raise UserError(f"a chat of {', '.join(map(str, roles))}: give one message of the user, and the assistant's")
    question, *rest = (message["content"] for message in item)
    prefix = split(rest[0], steps) if rest else ()
    if rest and "".join("".join(prefix).split()) != "".join(rest[0].split()):
        raise UserError("the assistant's message must be whole steps, <step>…</step>, and nothing else")
    return Problem(question, question, ""), prefix
