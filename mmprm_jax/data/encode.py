"""Records to the fixed-length rows that training and scoring read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from absl import logging
from etils import epath

from mmprm_jax.data import images
from mmprm_jax.data.prompts import policy_prompt
from mmprm_jax.models import tokenizer as tok
from mmprm_jax.models.config import VLMConfig
from mmprm_jax.models.tokenizer import Tokenizer
from mmprm_jax.records import SFTExample, StepExample, UserError


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Rows of fixed length in host memory. ``image`` [N] indexes ``pixels`` uint8 [M, tiles, H, W, 3]."""

    columns: Mapping[str, np.ndarray]
    image: np.ndarray
    pixels: np.ndarray


def prompt_ids(tokenizer: Tokenizer, cfg: VLMConfig, question: str, has_image: bool) -> list[int]:
    """The policy prompt of a problem as ids."""
    return tokenizer.encode(policy_prompt(question, cfg.tokens_per_tile if has_image else 0))


def prm_ids(tokenizer: Tokenizer, prompt: list[int], segments: Sequence[str]) -> tuple[list[int], list[int]]:
    """The prompt and the segments with ``<prm>`` after each, and where the markers stand."""
    ids, marks = list(prompt), []
    for segment in segments:
        ids += tokenizer.encode(segment)
        marks.append(len(ids))
        ids.append(tokenizer.id(tok.PRM))
    return ids, marks


def pad_rows(rows: Sequence[Sequence[int]], length: int, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded tokens int32 [N, length] and their validity. Raises UserError naming the first row too long."""
    tokens, valid = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        if len(row) > length:
            raise UserError(f"{what} {i}: {len(row)} tokens; the limit (max_length) is {length}")
        tokens[i, : len(row)] = row
        valid[i, : len(row)] = True
    return tokens, valid


def load_pixels(folder: epath.PathLike, names: Sequence[str | None], cfg: VLMConfig) -> tuple[np.ndarray, np.ndarray]:
    """The distinct images of ``names`` and, for each name, its index among them."""
    distinct = sorted(set(names), key=str)
    index = {name: i for i, name in enumerate(distinct)}
    return np.array([index[name] for name in names], np.int32), images.load_images(
        folder, distinct, cfg.vision.image_size
    )


def sft_dataset(
    examples: Sequence[SFTExample], folder: epath.PathLike, tokenizer: Tokenizer, cfg: VLMConfig, length: int
) -> Dataset:
    """Rows for ``policy_loss``: prompt, response, end of turn."""
    rows, starts = [], []
    end = tokenizer.id(tok.TURN_END)
    for example in examples:
        prompt = prompt_ids(tokenizer, cfg, example.question, example.image is not None)
        rows.append([*prompt, *tokenizer.encode(example.response), end])
        starts.append(len(prompt))
    tokens, valid = pad_rows(rows, length, "SFT example")
    response = valid & (np.arange(length) >= np.array(starts)[:, None])
    image, pixels = load_pixels(folder, [e.image for e in examples], cfg)
    return Dataset({"tokens": tokens, "segment": valid.astype(np.int32), "response": response}, image, pixels)


def step_dataset(
    examples: Sequence[StepExample], folder: epath.PathLike, tokenizer: Tokenizer, cfg: VLMConfig, length: int
) -> Dataset:
    """Rows for ``prm_loss``: counts k, n at the ``<prm>`` markers, 0 elsewhere.

    Solutions longer than ``length`` tokens are left out: a rambling policy must not stop the training.
    """
    rows, marks, kept = [], [], []
    for example in examples:
        prompt = prompt_ids(tokenizer, cfg, example.question, example.image is not None)
        ids, where = prm_ids(tokenizer, prompt, example.segments)
        if len(ids) <= length:
            rows.append(ids)
            marks.append(where)
            kept.append(example)
    if len(kept) < len(examples):
        logging.warning(
            "%d of %d step examples exceed %d tokens: left out",
            len(examples) - len(kept),
            len(examples),
            length,
        )
    tokens, valid = pad_rows(rows, length, "step example")
    k, n = np.zeros_like(tokens), np.zeros_like(tokens)
    for i, (example, where) in enumerate(zip(kept, marks, strict=True)):
        k[i, where], n[i, where] = example.k, example.n
    image, pixels = load_pixels(folder, [e.image for e in kept], cfg)
    return Dataset({"tokens": tokens, "segment": valid.astype(np.int32), "k": k, "n": n}, image, pixels)
