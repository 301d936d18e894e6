"""The sampling engine: tokens in, tokens and log-probabilities out. It knows no text.

A group asks for n samples that continue one prefix. A prefix is computed once, token by token of what is new in it
(``extend``): images and question of a problem first, each further step on top of what is known. Groups wait for a row,
their samples for a slot; slots are refilled on the device as samples finish. Only ``step`` waits for the device, for
what the step before has started, so the caller's work overlaps with decoding.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from mmprm_jax.data.images import normalise
from mmprm_jax.models.config import VLMConfig
from mmprm_jax.records import UserError
from mmprm_jax.rollout import device
from mmprm_jax.rollout.cache import CacheFull, PrefixCache
from mmprm_jax.rollout.sampling import Sampling
from mmprm_jax.sharding import put_batch

_CHUNK = 1024  # tokens; longer pieces of a prefix are computed one after the other, which bounds the attention's memory
_ADMITTED = 16  # rows of one call
_MIN_BATCH = 128  # tokens of one call at least; smaller ones, too, sum in another order
_BATCH = 2048  # tokens of one call, about; larger matrix products may sum in another order


@dataclasses.dataclass(frozen=True)
class Sample:
    tokens: tuple[int, ...]  # the stop token included, if it was reached
    logprobs: tuple[float, ...]  # of each token, unfiltered and at temperature 1, in nats

    @property
    def logprob(self) -> float:
        """Of the whole sample."""
        return float(np.sum(self.logprobs))


@dataclasses.dataclass(frozen=True)
class Group:
    """n samples that continue one prefix. Sample i depends on ``key`` and i, not on any other group.

    Prefixes of one ``problem`` share what they have in common; its images are those of ``pixels``.
    """

    id: Hashable
    problem: str
    prefix: tuple[int, ...]
    pixels: np.ndarray | None  # uint8 (or normalised float32) [tiles, H, W, 3]
    key: np.ndarray  # uint32 [2]
    n: int
    sampling: Sampling


@dataclasses.dataclass
class Counts:
    """Work done so far, over all shards."""

    prefix_tokens: int = 0  # computed, without padding
    padded_tokens: int = 0  # computed beyond those, to fill rows up to their bucket
    images: int = 0  # problems whose images went through the tower
    samples: int = 0
    tokens: int = 0  # sampled
    steps: int = 0  # decoding steps
    slot_steps: int = 0  # steps times slots
    live_steps: int = 0  # of those, slots that worked on a sample

    @property
    def occupancy(self) -> float:
        """Share of the slots' steps that worked on a sample."""
        return self.live_steps / max(self.slot_steps, 1)


def bucket(size: int, minimum: int) -> int:
    """The next size with three significant bits: 32, 40, 48, 56, 64, 80, 96, …; at most a fifth is padding."""
    unit = max(minimum, 1 << max(size.bit_length() - 3, 0))
    return -(-size // unit) * unit


def _batch(count: int, width: int) -> int:
    """Rows of ``width`` tokens that are computed together when there are ``count`` left: 1, 4 or 16, if they fit."""
    limit = max(1, _BATCH // width)
    return min(limit, next((size for size in (1, 4) if count <= size and size * width >= _MIN_BATCH), 16))


@dataclasses.dataclass
class _Part:
    """Up to M samples of a group in one row."""

    group: Group
    offset: int
    n: int
    entries: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class _NewPrefix:
    """What is not known yet of a group's prefix."""

    shard: int
    group: Group
    known: list[int]  # entries of the pool
    tokens: tuple[int, ...]
    entries: list[int]  # of ``tokens``


class Recompiled(Exception):
    """A program was compiled again for shapes that it had been compiled for."""


class Engine:
    """Samples any number of groups. Create it, and call it, under ``jax.set_mesh(mesh)``."""

    def __init__(
        self,
        graphdef: Any,
        params: Any,
        cfg: VLMConfig,
        image_token: int,
        mesh: Any,
        *,
        slots: int,
        samples: int,
        max_new: int,
        cache_tokens: int,
        rows: int = 0,
        steps: int = 32,
        min_bucket: int = 32,
    ):
        """slots: samples decoded at a time (rounded up to a multiple of the shards; on CPUs there are 48 at least).
        samples: of one row. max_new: the most tokens of a sample. cache_tokens: those of prefixes that are kept, over
        all shards. rows: resident prefixes; 0: enough for three times the slots. steps: of one call of the device at
        most. min_bucket: unit of padding, tokens.
        """
        b = device.shards(mesh)
        self._row_dependent = device.rounding_depends_on_rows(mesh)
        if self._row_dependent:
            heads = cfg.decoder.num_heads // cfg.decoder.num_kv_heads
            samples = next(m for m in itertools.count(samples) if not device.has_remainder_rows(m * heads))
            min_slots = max(-(-slots // b), device.SMALL_PRODUCT)
            slots = b * next(s for s in itertools.count(min_slots) if not device.has_remainder_rows(s))
        self._graphdef, self._params, self._cfg, self._mesh = graphdef, params, cfg, mesh
        self._image_token, self._shards, self._samples, self._max_new = image_token, b, samples, max_new
        self._slots = -(-slots // b)
        self._rows_per_shard = -(-rows // b) or max(2, -(-3 * self._slots // samples))
        self._steps, self._min_bucket, self._pool_size = steps, min_bucket, -(-cache_tokens // b)
        decoder, dtype = cfg.decoder, params["decoder"]["embed"].dtype
        self._dtype = dtype
        self._layers = device.unstack(params, graphdef=graphdef)
        self._pool = device.new_pool(decoder, mesh, self._pool_size, dtype)
        self._width = 0
        self._rows: Any = []
        self._state = device.new_state(decoder, mesh, self._slots, self._rows_per_shard, samples, max_new, dtype)
        self._cache = PrefixCache(self._pool_size, b)
        self._waiting: list[collections.deque[_Part]] = [collections.deque() for _ in range(b)]
        self._resident: list[dict[int, _Part]] = [{} for _ in range(b)]
        self._queue: list[list[int]] = [[] for _ in range(b)]
        self._found: dict[Hashable, list[Sample | None]] = {}
        self._refused: list[Any] = []
        self._report: Any = None
        self._longest = 1  # tokens of the longest sample in a slot
        self._signatures: set[Any] = set()
        self.frozen = False  # after a warm-up: no new shapes are expected
        self.strict = False  # raise Recompiled instead of warning
        self._warned = False
        self.counts = Counts()

    def submit(self, group: Group) -> None:
        """Takes a group on. Raises ValueError for one that this engine cannot sample."""
        scaling, max_new = self._cfg.decoder.rope_scaling, group.sampling.max_new_tokens
        shown, tiles = group.prefix.count(self._image_token), 0 if group.pixels is None else len(group.pixels)
        if group.id in self._found:
            raise ValueError(f"a group {group.id!r} is in flight already")
        if not group.prefix or group.n < 1:
            raise ValueError("needs a prefix and at least one sample")
        if max_new > self._max_new:
            raise ValueError(f"max_new_tokens is {max_new}; this engine samples {self._max_new} at most")
        if scaling is not None and scaling.kind == "dynamic" and len(group.prefix) + max_new > scaling.max_position:
            raise ValueError(
                f"{len(group.prefix)} + {max_new} tokens; the model's positions end at {scaling.max_position}"
            )
        if len(group.prefix) > self._pool_size:
            raise ValueError(
                f"a prefix of {len(group.prefix)} tokens; there is room for {self._pool_size} (cache_tokens)"
            )
        if shown and shown != tiles * self._cfg.tokens_per_tile:
            raise ValueError(f"{shown} image tokens, but {tiles} tiles of {self._cfg.tokens_per_tile}")
        self._found[group.id] = [None] * group.n
        shard = self._cache.shard(group.problem)
        for offset in range(0, group.n, self._samples):
            self._waiting[shard].append(_Part(group, offset, min(self._samples, group.n - offset)))

    @property
    def busy(self) -> bool:
        """Whether any group is not finished."""
        return bool(self._found)

    def release(self, problem: str) -> None:
        """Forgets the prefixes of a problem."""
        if any(part.group.problem == problem for waiting in self._waiting for part in waiting):
            return  # they are bound to its pool
        self._cache.release(problem)

    def step(self) -> list[tuple[Hashable, list[Sample] | UserError]]:
        """Starts the next piece of work and returns the groups that the one before has finished.

        A group whose prefix does not fit into the pool comes back as a UserError.
        """
        finished = self._collect_finished()
        self._admit()
        if any(self._resident):
            self._decode()
        refused, self._refused = self._refused, []
        return finished + refused

    def sample(self, groups: Sequence[Group]) -> list[list[Sample]]:
        """The samples of each group, in order. Raises what ``submit`` raises, and UserError for a refused group."""
        for group in groups:
            self.submit(group)
        found: dict[Hashable, Any] = {}
        while self.busy:
            found.update(self.step())
        for samples in found.values():
            if isinstance(samples, UserError):
                raise samples
        return [found[group.id] for group in groups]

    def _collect_finished(self) -> list[tuple[Hashable, list[Sample]]]:
        """Waits for the decoding under way; takes finished rows off."""
        if self._report is None:
            return []
        report, self._report = self._report, None
        count, head, steps, live = (np.asarray(report[name]) for name in ("count", "head", "steps", "live"))
        self.counts.steps += int(steps)
        self.counts.slot_steps += int(steps) * self._slots * self._shards
        self.counts.live_steps += int(live)
        self._longest = int(report["longest"])
        finished, tokens, logprobs = [], None, None
        for b, resident in enumerate(self._resident):
            self._queue[b] = self._queue[b][head[b] :]
            before = set(resident)
            for row, part in list(resident.items()):
                if not np.all(count[b, row, : part.n]):
                    continue
                if tokens is None or logprobs is None:
                    tokens, logprobs = np.asarray(report["tokens"]), np.asarray(report["logprobs"])
                del resident[row]
                found = self._found[part.group.id]
                for i in range(part.n):
                    size = count[b, row, i]
                    values = tuple(tokens[b, row, i, :size].tolist()), tuple(logprobs[b, row, i, :size].tolist())
                    found[part.offset + i] = Sample(*values)
                    self.counts.tokens += int(size)
                self.counts.samples += part.n
                complete = [sample for sample in found if sample is not None]
                if len(complete) == len(found):
                    del self._found[part.group.id]
                    finished.append((part.group.id, complete))
            gone = before - set(resident)  # samples that ended with their first token never took a slot
            self._queue[b] = [sample for sample in self._queue[b] if sample // self._samples not in gone]
        return finished

    def _admit(self) -> None:
        """Gives free rows to waiting groups and computes what is new in their prefixes."""
        chosen: list[list[tuple[int, _Part]]] = [[] for _ in self._waiting]
        work: list[list[_NewPrefix]] = []  # by the order in which they can be computed
        for b, waiting in enumerate(self._waiting):
            waves: dict[int, int] = {}  # entry -> its index in ``work``
            free = [row for row in range(self._rows_per_shard) if row not in self._resident[b]]
            while free and waiting:
                try:
                    new = self._find(b, waiting[0], {part.group.problem for _, part in chosen[b]})
                except CacheFull as error:
                    if chosen[b]:
                        break  # there is room again when these are in their rows
                    self._refuse(b, error)
                    continue
                row = free.pop(0)
                chosen[b].append((row, waiting.popleft()))
                if new.tokens:
                    wave = 1 + max((waves.get(entry, -1) for entry in new.known), default=-1)
                    waves |= dict.fromkeys(new.entries, wave)
                    work += [[] for _ in range(wave + 1 - len(work))]
                    work[wave].append(new)
        if not any(chosen):
            return
        for together in work:
            for batch in self._batches(together):
                self._extend(batch)
        self._resize_rows([part for parts in chosen for _, part in parts])
        for start in range(0, max(map(len, chosen)), _ADMITTED):
            self._fill_rows([parts[start : start + _ADMITTED] for parts in chosen])
        for b, parts in enumerate(chosen):
            self._resident[b].update(parts)
            self._queue[b] += [row * self._samples + i for row, part in parts for i in range(part.n)]

    def _refuse(self, b: int, error: CacheFull) -> None:
        """Gives the first waiting group back."""
        group = self._waiting[b].popleft().group
        self._waiting[b] = collections.deque(part for part in self._waiting[b] if part.group is not group)
        del self._found[group.id]
        self._refused.append((group.id, UserError(f"problem {group.problem}: {error}; raise cache_tokens")))

    def _find(self, b: int, part: _Part, keep: set[str]) -> _NewPrefix:
        """Looks the prefix of a group up in the pool, and makes room for what is new in it. Raises CacheFull."""
        group = part.group
        known = self._cache.find(group.problem, group.prefix)
        try:
            entries = self._cache.add(group.problem, known, group.prefix[len(known) :], keep)
        except CacheFull:
            if group.problem in keep or not known:
                raise
            self._cache.forget(group.problem)  # its other branches fill the pool
            known = []
            entries = self._cache.add(group.problem, known, group.prefix, keep)
        part.entries = known + entries
        return _NewPrefix(b, group, known, group.prefix[len(known) :], entries)

    def _batches(self, work: list[_NewPrefix]) -> Iterator[tuple[int, list[list[_NewPrefix]]]]:
        """(width, one list for each shard) of what is computed together: like lengths, with or without images."""
        kinds: dict[tuple[bool, int], list[list[_NewPrefix]]] = collections.defaultdict(
            lambda: [[] for _ in range(self._shards)]
        )
        for new in work:
            width = self._bucket(min(len(new.tokens), _CHUNK))
            kinds[self._image_token in new.tokens, width][new.shard].append(new)
        for (_, width), parts in sorted(kinds.items(), key=lambda item: item[0]):
            count, start = max(map(len, parts)), 0
            while start < count:
                size = _batch(count - start, width)
                yield width, [part[start : start + size] for part in parts]
                start += size

    def _extend(self, batch: tuple[int, list[list[_NewPrefix]]]) -> None:
        width, parts = batch
        rows = _batch(max(map(len, parts)), width)
        visual, pictures = self._encode_images(parts)
        shape = (self._shards, rows, width)
        for start in range(0, max(len(new.tokens) for part in parts for new in part), _CHUNK):
            longest = max(len(new.known) + min(start, len(new.tokens)) for part in parts for new in part)
            known = 1 << (longest + width - 1).bit_length() if longest else width
            arrays = {
                "tokens": np.zeros(shape, np.int32),
                "picture": np.full(shape, -1, np.int32),
                "known": np.zeros((*shape[:2], known), np.int32),
                "length": np.zeros(shape[:2], np.int32),
                "pool_entries": np.full(shape, self._pool_size, np.int32),
            }
            for b, part in enumerate(parts):
                for i, new in enumerate(part):
                    end = min(start + _CHUNK, len(new.tokens))
                    before, size = new.known + new.entries[:start], max(0, end - start)
                    arrays["tokens"][b, i, :size] = new.tokens[start:end]
                    arrays["pool_entries"][b, i, :size] = new.entries[start:end]
                    arrays["known"][b, i, : len(before)], arrays["length"][b, i] = before, len(before)
                    if visual is not None:
                        arrays["picture"][b, i, :size] = pictures[b][i][start:end]
                    self.counts.prefix_tokens += size
                    self.counts.padded_tokens -= size
            self.counts.padded_tokens += math.prod(shape)
            signature = (rows, width, known, None if visual is None else visual.shape)
            self._pool = self._run(
                device.extend, signature, self._params, self._pool, put_batch(arrays, self._mesh), visual
            )

    def _encode_images(self, parts: list[list[_NewPrefix]]) -> tuple[jax.Array | None, list[list[np.ndarray]]]:
        """The visual tokens of new images and, for every new token, which of its shard's it shows (-1: none)."""
        per_tile = self._cfg.tokens_per_tile
        indices: list[list[np.ndarray]] = []
        tiles: list[list[np.ndarray]] = []
        for part in parts:
            indices.append([])
            tiles.append([])
            for new in part:
                shown = np.array(new.tokens) == self._image_token
                start = sum(map(len, tiles[-1])) * per_tile
                start += new.group.prefix[: len(new.known)].count(self._image_token)
                index = start + np.cumsum(shown) - 1
                indices[-1].append(np.where(shown, index, -1))
                if shown.any() and new.group.pixels is not None:
                    tiles[-1].append(new.group.pixels)
                    self.counts.images += 1
        count = max(sum(map(len, group)) for group in tiles)
        if not count:
            return None, indices
        size = self._cfg.tile
        pixels = np.zeros((self._shards, self._tiles(count), size, size, 3), np.float32)
        for b, group in enumerate(tiles):
            if group:
                stacked = normalise(np.concatenate(group))
                pixels[b, : len(stacked)] = stacked
        put = put_batch({"pixels": pixels}, self._mesh)["pixels"]
        return self._run(device.tower, pixels.shape[1], self._params, put), indices

    def _bucket(self, tokens: int) -> int:
        """The width of a row for so many tokens."""
        width = bucket(tokens, self._min_bucket)
        if self._row_dependent and device.has_remainder_rows(width) and width - tokens < device.MAX_REMAINDER:
            return bucket(width + 1, self._min_bucket)  # those left over are padding
        return width

    def _tiles(self, count: int) -> int:
        """Tiles of one call of the tower for so many."""
        if self._row_dependent:  # the products of the tower have some rows more or less for each tile
            of_tile = self._cfg.tokens_per_tile
            count = max(count + -(-device.MAX_REMAINDER // of_tile), -(-device.SMALL_PRODUCT // of_tile))
        return bucket(count, 1)

    def _resize_rows(self, parts: list[_Part]) -> None:
        """Makes the rows wide enough for the longest prefix; less wide when all use less than half of it."""
        resident = [part for shard in self._resident for part in shard.values()]
        needed = bucket(max(len(part.entries) for part in parts + resident), self._min_bucket)
        if needed > self._width or 2 * needed <= self._width:
            if self._rows:
                self._rows = device.resize(self._rows, needed)
            else:
                self._rows = device.new_rows(self._cfg.decoder, self._mesh, self._rows_per_shard, needed, self._dtype)
            self._width = needed

    def _fill_rows(self, parts: list[list[tuple[int, _Part]]]) -> None:
        """Copies prefixes into rows and draws the first tokens."""
        shape = (self._shards, _ADMITTED)
        arrays = {
            "at": np.full(shape, self._rows_per_shard, np.int32),
            "pool_entries": np.zeros((*shape, self._width), np.int32),
            "tokens": np.zeros((*shape, self._width), np.int32),
            "length": np.zeros(shape, np.int32),
            "offset": np.zeros(shape, np.int32),
            "key": np.zeros((*shape, 2), np.uint32),
        }
        for name, value in Sampling().arrays().items():
            arrays[name] = np.broadcast_to(value, shape + value.shape).copy()
        for b, rows in enumerate(parts):
            for i, (row, part) in enumerate(rows):
                length = len(part.entries)
                arrays["at"][b, i], arrays["length"][b, i], arrays["offset"][b, i] = row, length, part.offset
                arrays["pool_entries"][b, i, :length], arrays["tokens"][b, i, :length] = part.entries, part.group.prefix
                arrays["key"][b, i] = part.group.key
                for name, value in part.group.sampling.arrays().items():
                    arrays[name][b, i] = value
        put = put_batch(arrays, self._mesh)
        self._rows, self._state = self._run(
            device.admit, self._width, self._params, self._rows, self._state, self._pool, put
        )

    def _decode(self) -> None:
        size = self._rows_per_shard * self._samples
        order, tail = np.zeros((self._shards, size), np.int32), np.zeros(self._shards, np.int32)
        for b, queue in enumerate(self._queue):
            order[b, : len(queue)], tail[b] = queue, len(queue)
        waiting = put_batch({"order": order, "head": np.zeros_like(tail), "tail": tail}, self._mesh)
        limits = {"steps": self._steps, "min_steps": min(8, self._steps), "free_slots": self._slots // 16}
        limit = {name: np.int32(value) for name, value in limits.items()}
        # Only as much of the slots' caches as is in use, and the rest of it later.
        ends = itertools.accumulate(device.blocks(self._max_new))
        used = 1 + sum(end < self._longest for end in ends)
        args = self._params, self._layers, self._rows, self._state, waiting, limit
        self._state, self._report = self._run(device.decode, (self._width, used), *args, used=used)

    def _run(self, program: Any, signature: Any, *args: Any, **static: Any) -> Any:
        """Calls a program; tells when it is compiled although its shapes are not new."""
        before = program.compiled()
        out = program(*args, graphdef=self._graphdef, **static)
        key = (program.__name__, signature)
        if program.compiled() > before and (self.frozen or key in self._signatures):
            message = f"{key[0]} was compiled again for the sizes {signature}"
            if self.strict:
                raise Recompiled(message)
            if not self._warned:
                logging.warning("%s: this costs time; later ones are not reported", message)
            self._warned = True
        self._signatures.add(key)
        return out
