"""From sets of examples to packed rows: shuffled, mixed, endless, and the same whoever reads them.

The stream of rows depends on the sets, their weights, the sizes and the seed alone. Every process walks all of it
(token ids only: that is cheap) and takes its share of each batch later (``training.input``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from mmprm_jax.data.training_files import LABELS, TrainingSet
from mmprm_jax.records import UserError

OPEN_ROWS = 128  # rows that are filled at a time; fewer waste more of each, 32 already 5 %


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The shape of a batch of all processes together."""

    rows: int  # B
    tokens: int  # S, of a row
    tiles: int  # V, image tiles of a row; 0: text only
    examples: int = 1  # E, of a row at most; 1: no packing


def stream(sets: Sequence[TrainingSet], weights: Sequence[float], seed: int) -> grain.MapDataset:
    """The endless stream of examples: elements as ``pack`` takes them.

    Every set is repeated, in a new order each epoch. Of any part of the stream, set i holds the share weights[i] /
    sum(weights), up to 1 % of it. ``example`` is the epoch of its set x the size of all sets together + its index
    among the examples of all sets + 1. Raises UserError on weights that are not positive, or not one for each set.
    """
    if len(weights) != len(sets) or min(weights, default=0) <= 0:
        raise UserError(f"weights {tuple(weights)}: need one for each of the {len(sets)} sets, greater than 0")
    total, start, parts = sum(map(len, sets)), 0, []
    dtypes = label_dtypes(sets)
    for i, data in enumerate(sets):
        order = int(np.random.SeedSequence((seed, i)).generate_state(1)[0])
        part = grain.MapDataset.range(len(data)).shuffle(seed=order).repeat()
        parts.append(part.map_with_index(_Read(data, start, total, dtypes)))
        start += len(data)
    return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights)


@dataclasses.dataclass(frozen=True)
class _Read:
    """Reads an example of a set whose first one has the index ``start`` among all."""

    data: TrainingSet
    start: int
    total: int
    dtypes: Mapping[str, np.dtype]  # of the labels

    def __call__(self, position: int, row: int) -> dict[str, np.ndarray]:
        example = self.data[row]
        code = position // len(self.data) * self.total + self.start + row + 1
        tiles = np.ones(example.tiles, np.int8)
        labels = {name: example.labels[name].astype(dtype, copy=False) for name, dtype in self.dtypes.items()}
        return {"tokens": example.tokens, **labels, "tiles": tiles, "example": np.array([code])}


def label_dtypes(sets: Sequence[TrainingSet]) -> Mapping[str, np.dtype]:
    """The dtypes of the labels of all sets: those of the set that has step labels of files, if there is one.

    A row holds examples of several sets, and has room for whole numbers only if all labels are.
    """
    kinds = [data.kind for data in sets]
    return LABELS["labels" if "labels" in kinds else kinds[0]]


def pack(examples: grain.IterDataset, sizes: Sizes, labels: Sequence[str], seed: int) -> grain.IterDataset:
    """First-fit: each example goes into the first open row with room for its tokens, its tiles and itself.

    Examples: dicts of tokens int32 [L], the ``labels`` [L], tiles [T] and example int64 [1], a number > 0. Rows: tokens
    int32 [S], segment int32 [S] (1, 2, ... for the examples one behind the other; 0: padding), the labels [S], and
    example int64 [E] (-1: none). No example may exceed ``sizes``. Where one fits into no row, all open rows are
    handed out, in an order that depends on the seed, and new ones are opened. The state of its iterators is a few
    numbers: the rows that were open are filled again from it.
    """
    lengths = {"tokens": sizes.tokens, **dict.fromkeys(labels, sizes.tokens)}
    lengths |= {"tiles": sizes.tiles, "example": sizes.examples}
    packed = grain.experimental.FirstFitPackIterDataset(
        examples, length_struct=lengths, num_packing_bins=OPEN_ROWS, seed=seed, shuffle_bins=sizes.examples > 1,
        meta_features=[name for name in lengths if name != "tokens"],
    )  # fmt: skip

    def row(found: Mapping[str, Any]) -> dict[str, np.ndarray]:
        kept = {name: found[name] for name in ("tokens", *labels)}
        return {**kept, "segment": found["tokens_segment_ids"], "example": found["example"] - 1}

    return packed.map(row)


def rows(sets: Sequence[TrainingSet], weights: Sequence[float], sizes: Sizes, seed: int) -> grain.IterDataset:
    """The endless stream of packed rows, as ``pack`` makes them. Raises UserError if an example does not fit."""
    for data in sets:
        longest, tiles = data.summary["longest"], data.summary["most_tiles"]
        if longest > sizes.tokens or tiles > sizes.tiles:
            raise UserError(
                f"{data.path}: an example of {longest} tokens, one of {tiles} tiles; a row holds {sizes.tokens} and"
                f" {sizes.tiles}; delete the file and run the stage again"
            )
    read = grain.ReadOptions(num_threads=4, prefetch_buffer_size=64)
    return pack(stream(sets, weights, seed).to_iter_dataset(read), sizes, list(label_dtypes(sets)), seed)
