"""Records to the tokens, labels and images that training and scoring read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath

from mmprm_jax.data import images
from mmprm_jax.data.prompts import policy_prompt
from mmprm_jax.data.training_files import Encoded
from mmprm_jax.models import tokenizer as tok
from mmprm_jax.models.config import VLMConfig
from mmprm_jax.models.tokenizer import Tokenizer
from mmprm_jax.records import SFTExample, StepExample, UserError

TileCount = Callable[[str | None], int]  # image file, None: no image -> its number of tiles


def prompt_ids(tokenizer: Tokenizer, cfg: VLMConfig, question: str, tiles: int) -> list[int]:
    """The policy prompt of a problem whose image has so many tiles (0: no image) as ids."""
    return tokenizer.encode(policy_prompt(question, cfg.tokens_per_tile * tiles))


def prm_ids(tokenizer: Tokenizer, prompt: list[int], segments: Sequence[str]) -> tuple[list[int], list[int]]:
    """The prompt and the segments with ``<prm>`` after each, and where the markers stand."""
    ids, marks = list(prompt), []
    for segment in segments:
        ids += tokenizer.encode(segment)
        marks.append(len(ids))
        ids.append(tokenizer.id(tok.PRM))
    return ids, marks


def load_pixels(folder: epath.PathLike, names: Sequence[str | None], cfg: VLMConfig) -> tuple[np.ndarray, np.ndarray]:
    """The distinct images of ``names`` and, for each name, its index among them."""
    distinct = sorted(set(names), key=str)
    index = {name: i for i, name in enumerate(distinct)}
    return np.array([index[name] for name in names], np.int32), images.load_images(
        folder, distinct, cfg.vision.image_size
    )


def tile_count(folder: epath.PathLike, cfg: VLMConfig, max_tiles: int) -> TileCount:
    """Counts the tiles of images relative to ``folder``; each is opened, so that a damaged one is told before training.

    The function raises UserError as ``images.open_image``, and on any image if the model takes none.
    """

    @functools.lru_cache(2**16)
    def count(name: str | None) -> int:
        if name is None:
            return 0
        path = epath.Path(folder) / name
        if cfg.vision is None:
            raise UserError(f"{path}: the model takes no images; leave out the examples that have one")
        return images.count_tiles(*images.open_image(path).size, max_tiles, cfg.tile)

    return count


def encode_sft(example: SFTExample, tokenizer: Tokenizer, cfg: VLMConfig, tiles: TileCount) -> Encoded:
    """Prompt, response, end of turn; ``response`` is True from the response on."""
    count = tiles(example.image)
    prompt = prompt_ids(tokenizer, cfg, example.question, count)
    ids = [*prompt, *tokenizer.encode(example.response), tokenizer.id(tok.TURN_END)]
    labels = {"response": np.arange(len(ids)) >= len(prompt)}
    return Encoded(example.id, np.array(ids, np.int32), labels, _images(example.image, count))


def encode_steps(example: StepExample, tokenizer: Tokenizer, cfg: VLMConfig, tiles: TileCount) -> Encoded:
    """Prompt and steps, ``k`` and ``n`` at the ``<prm>`` behind each step and 0 elsewhere.

    Raises UserError unless there are counts 0 <= k <= n for each step.
    """
    lengths = {len(example.segments), len(example.k), len(example.n)}
    if len(lengths) > 1 or not all(0 <= k <= n for k, n in zip(example.k, example.n, strict=False)):
        raise UserError(
            f"step example {example.id}: needs counts 0 <= k <= n for each of its {len(example.segments)} steps"
        )
    count = tiles(example.image)
    ids, marks = prm_ids(tokenizer, prompt_ids(tokenizer, cfg, example.question, count), example.segments)
    k, n = np.zeros(len(ids), np.int32), np.zeros(len(ids), np.int32)
    k[marks], n[marks] = example.k, example.n
    return Encoded(example.id, np.array(ids, np.int32), {"k": k, "n": n}, _images(example.image, count))


def _images(name: str | None, tiles: int) -> tuple[tuple[str, int], ...]:
    return () if name is None else ((name, tiles),)
