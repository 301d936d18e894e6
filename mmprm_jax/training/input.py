"""Batches for training: the same ones in the same order, however many processes share them, interrupted or not."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import numpy as np

from mmprm_jax.data import images
from mmprm_jax.data.packing import Sizes, rows
from mmprm_jax.data.training_files import TrainingSet
from mmprm_jax.records import UserError

BATCHES_AHEAD = 2


class Tiles:
    """Opens, tiles and augments the images of examples."""

    def __init__(self, tile: int, max_tiles: int, shift: int = 0, noise: float = 0.0):
        """tile: pixels per side; max_tiles: of one image; shift, noise: as ``images.augment`` takes them."""
        self.tile, self.max_tiles, self.shift, self.noise = tile, max_tiles, shift, noise

    def __call__(self, data: TrainingSet, row: int, key: tuple[int, ...]) -> np.ndarray:
        """The normalised tiles of all images of an example, float32 [T, tile, tile, 3]. ``key``: of the augmentation.

        Raises UserError for an image that cannot be read, or has not the tiles that its tokens are for.
        """
        example, parts = data[row], [np.zeros((0, self.tile, self.tile, 3), np.uint8)]
        for name, count in example.images:
            path = data.images / name  # which may be absolute
            parts.append(images.tiles(images.open_image(path), self.max_tiles, self.tile))
            if len(parts[-1]) != count:
                raise UserError(
                    f"{path}: {len(parts[-1])} tiles, but {count} in {data.path}, row {row}"
                    f" ({example.id}); the image has changed: delete that file and run the stage again"
                )
        found = np.concatenate(parts)
        if len(found) and (self.shift or self.noise):
            found = images.augment(found, np.random.default_rng(key), self.shift, self.noise)
        return images.normalise(found)


class Batches(Iterator):
    """An endless iterator over this process's rows of the global batches, as dicts of host arrays.

    With B rows in all and b = B / n for n shares: tokens int32 [b, S]; segment int32 [b, S], the number (1, 2,
    ...) of the example within its row, 0: padding; pixels float32 [b, V, H, W, 3], the tiles of a row's examples in
    order, unused slots zero (absent without ``tiles``); response bool [b, S], or n int32 and k int32
    (float32 with labels of files) [b, S]; example int32 [b, E], the index of each example among those of all sets, -1:
    none.

    Batches are made ahead in a thread, images in several. ``close`` ends them.
    """

    def __init__(
        self, sets: Sequence[TrainingSet], sizes: Sizes, seed: int, tiles: Tiles | None = None,
        weights: Sequence[float] = (), share: tuple[int, int] = (0, 1),
    ):  # fmt: skip
        """weights: of the sets; default: their sizes. tiles: None for a text-only model. share: (i, n), part i of n of
        the rows of each batch (``sharding.row_share``).

        Raises UserError when the rows cannot be shared so, and as ``packing.rows``.
        """
        index, count = share
        if sizes.rows % count:
            raise UserError(f"batch_size: {sizes.rows} rows cannot be shared by {count} processes; take a multiple")
        self._sets, self._sizes, self._seed, self._tiles = tuple(sets), sizes, seed, tiles
        self._share = slice(index * sizes.rows // count, (index + 1) * sizes.rows // count)
        self._starts = np.cumsum([0, *map(len, sets)])
        self._weights = tuple(weights) or tuple(map(len, sets))
        self._threads = ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1)), "images")
        batches = rows(sets, self._weights, sizes, seed).batch(sizes.rows, batch_fn=self._assemble)
        prefetched = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=BATCHES_AHEAD)
        self._batches = iter(prefetched)

    def _assemble(self, all_rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        own = all_rows[self._share]
        batch = {name: np.stack([row[name] for row in own]) for name in own[0]}
        codes, total = batch["example"], self._starts[-1]
        batch["example"] = np.where(codes < 0, -1, codes % total).astype(np.int32)
        if self._tiles:
            batch["pixels"] = np.stack(list(self._threads.map(self._pixels, codes)))
        return batch

    def _pixels(self, codes: np.ndarray) -> np.ndarray:
        """The tiles of one row's examples, float32 [V, H, W, 3]."""
        assert self._tiles is not None
        out, at = np.zeros((self._sizes.tiles, self._tiles.tile, self._tiles.tile, 3), np.float32), 0
        for code in codes[codes >= 0].tolist():
            epoch, example = divmod(code, int(self._starts[-1]))
            which = int(np.searchsorted(self._starts, example, "right")) - 1
            found = self._tiles(self._sets[which], example - int(self._starts[which]), (self._seed, epoch, example))
            out[at : at + len(found)] = found
            at += len(found)
        return out

    def _made_of(self) -> dict[str, Any]:
        """What the order of the examples depends on."""
        sets = [data.summary["checksum"] for data in self._sets]
        sizes = [self._sizes.rows, self._sizes.tokens, self._sizes.tiles, self._sizes.examples]
        return {"sets": sets, "weights": list(self._weights), "sizes": sizes, "seed": self._seed}

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """The position behind the batch handed out last, as plain JSON types; the same in every process."""
        return {"made_of": self._made_of(), "position": self._batches.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to a position. Raises UserError if it is one in other batches."""
        for name, now in self._made_of().items():
            if state["made_of"][name] != now:
                raise UserError(
                    f"the checkpoint's position is one in other data: {name} was {state['made_of'][name]} and is {now};"
                    " use another --workdir, or what it was before"
                )
        self._batches.set_state(state["position"])

    def close(self) -> None:
        """Stops the threads. No batch can be asked for afterwards."""
        self._batches.close()
        self._threads.shutdown(cancel_futures=True)

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
