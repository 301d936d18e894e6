"""Records to the tokens, labels and images that training, sampling and scoring read: the same for all of them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from mmprm_jax.data import images, prompts
from mmprm_jax.data.training_files import Encoded
from mmprm_jax.models import hf_config
from mmprm_jax.models import tokenizer as tok
from mmprm_jax.models.config import VLMConfig
from mmprm_jax.models.tokenizer import Segment, Tokenizer
from mmprm_jax.records import Problem, SFTExample, StepExample, UserError

TileCount = Callable[[str], int]  # image file -> its number of tiles
Pixels = Callable[[Problem], list[np.ndarray]]  # uint8 [tiles, H, W, 3] of each image of a problem
Picture = str | os.PathLike | Image.Image


@dataclasses.dataclass(frozen=True)
class Language:
    """What a policy and its PRM read and write: a tokenizer, the sizes of the model, prompts.

    Solutions are tuples of segments (``records``). ask: the policy's prompt, which ends where it goes on. respond: a
    demonstration's response behind it. prm: a solution as the PRM reads it, with one score per segment. policy: the
    name of the policy's template.
    """

    tokenizer: Tokenizer
    cfg: VLMConfig
    ask: prompts.Build
    respond: Callable[[str], list[Segment]]
    prm: prompts.PRMTemplate
    policy: str = prompts.OWN

    @classmethod
    def own(cls, tokenizer: Tokenizer, cfg: VLMConfig) -> Language:
        """Of a model of our own: the tags of steps are tokens, and ``<prm>`` stands behind each segment."""
        markers = tokenizer.own_markers
        chat = prompts.policy_template("plain").build

        def ask(question: str, segments: Sequence[str], image_tokens: Sequence[int]) -> list[Segment]:
            return chat(question, (), image_tokens) + prompts.marked("".join(segments), markers)

        return cls(tokenizer, cfg, ask, lambda response: prompts.marked(response, markers), prompts.own_prm(markers))

    @classmethod
    def released(cls, tokenizer: Tokenizer, cfg: VLMConfig, policy: str = "internvl", prm: str = "mm_prm") -> Language:
        """Of a released policy, by the names of its templates. Raises UserError when there is no such template."""
        policy_template, prm_template = prompts.policy_template(policy), prompts.prm_template(prm)
        if prm_template.positive is None or prm_template.negative is None:
            raise UserError(f"the template {prm!r} is for a model with a score head; a policy has none")
        ask = prompts.asking(policy_template, "tags", tokenizer.written)
        return cls(tokenizer, cfg, ask, lambda response: [Segment(response)], prm_template, policy)

    def writing(self, steps: str) -> Language:
        """The same for a policy that writes its steps so (``settings.Reading``): a released one may be asked to."""
        if self.policy == prompts.OWN:  # it writes what it has learned from its demonstrations
            return self
        ask = prompts.asking(prompts.policy_template(self.policy), steps, self.tokenizer.written)
        return dataclasses.replace(self, ask=ask)

    @classmethod
    def stored(cls, tokenizer: Tokenizer, cfg: VLMConfig, config: Mapping[str, Any]) -> Language:
        """Of a model in a folder, as its config.json says it was trained, or else as a released policy."""
        named = hf_config.templates(config) if hf_config.TEMPLATES in config else ("internvl", "mm_prm")
        if prompts.OWN in named:
            return cls.own(tokenizer, cfg)
        return cls.released(tokenizer, cfg, *named)

    @classmethod
    def of_prm(cls, tokenizer: Tokenizer, cfg: VLMConfig, template: str) -> Language:
        """Of a PRM, by the name of its template, which may be for a score head. Raises UserError as ``released``."""
        if template == prompts.OWN:
            return cls.own(tokenizer, cfg)
        return dataclasses.replace(cls.released(tokenizer, cfg), prm=prompts.prm_template(template))

    @property
    def templates(self) -> tuple[str, str]:
        """The names of the policy's prompt and of the PRM's, as a model folder keeps them."""
        return self.policy, self.prm.name

    @property
    def image_token(self) -> int:
        """The id of an image's visual tokens; -1 for a model that takes none."""
        return self.tokenizer.id(tok.IMAGE) if self.cfg.vision else -1

    @property
    def classes(self) -> tuple[int, int] | None:
        """The ids of the tokens for right and wrong; None: the PRM has a score head."""
        if self.prm.positive is None or self.prm.negative is None:
            return None
        return self.tokenizer.piece(self.prm.positive), self.tokenizer.piece(self.prm.negative)

    def with_prm(self, kappa: bool = False) -> Language:
        """The PRM's: with the token ``<prm>``, and a head for the concentration of Beta-Binomial labels."""
        tokenizer = self.tokenizer.with_token(tok.PRM)
        size = max(self.cfg.decoder.vocab_size, tokenizer.id(tok.PRM) + 1)
        decoder = dataclasses.replace(self.cfg.decoder, vocab_size=size)
        return dataclasses.replace(
            self, tokenizer=tokenizer, cfg=dataclasses.replace(self.cfg, decoder=decoder, kappa=kappa)
        )

    def _counts(self, tiles: int | Sequence[int]) -> list[int]:
        each = ([tiles] if tiles else []) if isinstance(tiles, int) else tiles
        return [count * self.cfg.tokens_per_tile for count in each]

    def prompt(self, question: str, segments: Sequence[str], tiles: int | Sequence[int]) -> list[int]:
        """The ids of the policy's prompt. tiles: of each image; a number: of the only one, 0: there is none."""
        return self.tokenizer.encode_prompt(self.ask(question, segments, self._counts(tiles)))[0]

    def solution(
        self, question: str, segments: Sequence[str], tiles: int | Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """The ids of a solution as the PRM reads it, and where its scores stand. tiles: as in ``prompt``."""
        return self.tokenizer.encode_prompt(self.prm.build(question, segments, self._counts(tiles)))

    def demonstration(self, example: SFTExample, tiles: TileCount) -> Encoded:
        """Prompt, response, end of turn; ``response`` is True from the response on."""
        counts = [tiles(name) for name in example.images]
        asked = self.ask(example.question, (), self._counts(counts))
        prompt, _ = self.tokenizer.encode_prompt(asked)
        ids, _ = self.tokenizer.encode_prompt([*asked, *self.respond(example.response)])
        # one text, as the policy reads it when it goes on: where they meet, a token may be of both
        start = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prompt, ids, strict=False)))
        ids.append(self.tokenizer.id(tok.TURN_END))
        labels = {"response": np.arange(len(ids)) >= start}
        return Encoded(example.id, np.array(ids, np.int32), labels, _images(example.images, counts))

    def steps(self, example: StepExample, tiles: TileCount) -> Encoded:
        """Prompt and steps, ``k`` and ``n`` where a step's score stands and 0 elsewhere.

        ``k`` is int32, or float32 where a label is no count. Raises UserError as ``StepExample.check``.
        """
        try:
            example.check()
        except ValueError as error:
            raise UserError(f"step example {example.id}: {error}") from None
        counts = [tiles(name) for name in example.images]
        ids, marks = self.solution(example.question, example.segments, counts)
        k = np.zeros(len(ids), np.int32 if example.counted else np.float32)
        n = np.zeros(len(ids), np.int32)
        k[marks], n[marks] = example.k, example.n
        return Encoded(example.id, np.array(ids, np.int32), {"k": k, "n": n}, _images(example.images, counts))


def _images(names: Sequence[str], tiles: Sequence[int]) -> tuple[tuple[str, int], ...]:
    return tuple(zip(names, tiles, strict=True))


def tile_count(folder: epath.PathLike, cfg: VLMConfig, max_tiles: int) -> TileCount:
    """Counts the tiles of images relative to ``folder``; each is opened, damaged ones are found before training.

    The function raises UserError as ``images.open_image``, and on any image if the model takes none.
    """

    @functools.lru_cache(2**16)
    def count(name: str) -> int:
        path = _image(folder, name, cfg)
        return images.count_tiles(*images.open_image(path).size, max_tiles, cfg.tile)

    return count


def picture_tiles(
    pictures: Sequence[Picture], cfg: VLMConfig, max_tiles: int, thumbnail: bool = True
) -> list[np.ndarray]:
    """The tiles of each picture, a file or a PIL image: uint8 [tiles, H, W, 3].

    Raises UserError for a picture that cannot be read, and for any if the model takes none.
    """
    if isinstance(pictures, str | os.PathLike | Image.Image):
        raise UserError("images must be a list of files or PIL images, not one of them")
    if pictures and cfg.vision is None:
        raise UserError("this model reads text only, but the problem has images")
    found = []
    for picture in pictures:
        found.append(images.tiles(_opened(picture), max_tiles, cfg.tile, thumbnail))
    return found


def _opened(picture: Picture) -> Image.Image:
    """In RGB. Raises UserError."""
    if not isinstance(picture, Image.Image):
        return images.open_image(picture)
    try:
        return images.to_rgb(picture)
    except ValueError as error:
        raise UserError(f"an image that cannot be shown ({error})") from None


def problem_text(problem: Problem | str, pictures: Sequence[Picture] | None) -> tuple[str, Sequence[Picture]]:
    """The question, and the pictures that come with it: those given, or else the problem's own."""
    if isinstance(problem, str):
        return problem, pictures or ()
    return problem.question, problem.images if pictures is None else pictures


def file_pixels(folder: epath.PathLike, cfg: VLMConfig, max_tiles: int, thumbnail: bool = True) -> Pixels:
    """The tiles of a problem's images, which are relative to ``folder``; opened when they are needed.

    The function raises as that of ``tile_count``.
    """

    def pixels(problem: Problem) -> list[np.ndarray]:
        opened = (images.open_image(_image(folder, name, cfg)) for name in problem.images)
        return [images.tiles(image, max_tiles, cfg.tile, thumbnail) for image in opened]

    return pixels


def joined(tiles: Sequence[np.ndarray]) -> np.ndarray | None:
    """The tiles of all images of a problem, uint8 [tiles, H, W, 3]; None: it has no image."""
    return np.concatenate(tiles) if tiles else None


def _image(folder: epath.PathLike, name: str, cfg: VLMConfig) -> epath.Path:
    """Raises UserError when the model takes no images."""
    path = epath.Path(folder) / name
    if cfg.vision is None:
        raise UserError(f"{path}: the model takes no images; leave out the examples that have one")
    return path
