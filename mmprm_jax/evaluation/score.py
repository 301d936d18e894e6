"""Step scores of a PRM for many solutions of each problem: what the solutions share is computed once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmprm_jax import interruption
from mmprm_jax.data.images import normalise
from mmprm_jax.models.attention import segment_positions
from mmprm_jax.models.layers import shared_attention
from mmprm_jax.models.vlm import VLM
from mmprm_jax.sharding import put_batch


@dataclasses.dataclass(frozen=True)
class Solutions:
    """Tokenised solutions of one problem.

    rows: for each solution its ids, image-context tokens included, and the positions of its step scores. pixels: uint8
    (or normalised float32) [tiles, H, W, 3], None without images.
    """

    rows: Sequence[tuple[Sequence[int], Sequence[int]]]
    pixels: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class _Group:
    """Rows that share a prefix, in the order of their length; ``index``: (solutions, row) of each."""

    prefix: tuple[int, ...]
    rows: list[tuple[tuple[int, ...], tuple[int, ...]]]
    index: list[tuple[int, int]]
    pixels: np.ndarray | None

    @property
    def tiles(self) -> int:
        """Of its images."""
        return 0 if self.pixels is None else len(self.pixels)

    @property
    def length(self) -> int:
        """Tokens of the longest whole row."""
        return max(len(ids) for ids, _ in self.rows)


@functools.partial(jax.jit, static_argnames=("graphdef",))
def _prefill(params: Any, batch: Any, *, graphdef: Any) -> Any:
    """Keys and values of the prefixes, each [layers, R, P, G, D]."""
    model: VLM = nnx.merge(graphdef, params)
    return model(batch["tokens"], batch["valid"], batch["pixels"], batch["length"], caches=True)[1]


@functools.partial(jax.jit, static_argnames=("graphdef", "classes", "kappa"))
def _scores(
    params: Any, prefix: Any, known: Any, batch: Any, *, graphdef: Any, classes: Any, kappa: bool = False
) -> tuple[jax.Array, ...]:
    """Scores at every position of the suffixes, [R n, S], and with ``kappa`` their concentrations.

    known [R, P]: where the prefix is no padding; batch: tokens, valid [R n, S], start, length [R n].
    """
    model: VLM = nnx.merge(graphdef, params)
    valid = batch["valid"]
    rope = model.decoder.rope(batch["start"][:, None] + segment_positions(valid)[0], batch["length"])
    steps = jnp.arange(valid.shape[1])
    mask = (steps[:, None] >= steps[None, :]) & valid[:, None, :]

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array) -> tuple[jax.Array, None]:
        shared = tuple(jax.lax.dynamic_index_in_dim(c, layer, keepdims=False) for c in prefix)
        return shared_attention(q, shared, known, (k, v), mask), None

    hidden, _ = model.decoder(model.decoder.embed_tokens(batch["tokens"]), rope, attend)
    more = (model.concentration(hidden),) if kappa else ()
    if classes is None:
        assert model.score is not None
        return jax.nn.softmax(model.score(hidden), axis=-1)[..., 1], *more
    logits = model.decoder.logits_of(hidden, classes)
    return jax.nn.sigmoid(logits[..., 0] - logits[..., 1]), *more


class Scorer:
    """Scores solutions; equal solutions of a problem are scored once.

    The part that a problem's solutions have in common (images and question) goes through the model once, however many
    solutions there are. ``tiles``: image tiles that went through the vision tower so far, padding included.
    """

    def __init__(
        self,
        graphdef: Any,
        params: Any,
        mesh: Any,
        classes: tuple[int, int] | None,
        *,
        problems: int,
        solutions: int,
        bucket: int = 16,
        longest: int = 0,
    ):
        """classes: ids of the tokens for right and wrong, None: the model's own score head, whose class 1 is right.

        problems, solutions: of one batch. bucket: widths are padded to its multiples, long ones to an eighth of a power
        of two: each width is a program. longest: rows with more tokens
        share nothing (their rotary positions go by their own length); 0: no such limit.
        """
        self._graphdef, self._params, self._mesh, self._classes = graphdef, params, mesh, classes
        self._problems, self._solutions, self._bucket, self._longest = problems, solutions, bucket, longest
        self.tiles = 0

    def score(self, problems: Sequence[Solutions]) -> list[list[tuple[float, ...]]]:
        """For each problem and each of its solutions one score in [0, 1] per position."""
        return self._score(problems, kappa=False)[0]

    def score_with_kappa(self, problems: Sequence[Solutions]) -> tuple[list[list[tuple[float, ...]]], ...]:
        """The scores, and in the same form how sure the PRM is of each: kappa > 0 of a Beta-Binomial PRM."""
        return self._score(problems, kappa=True)

    def _score(self, problems: Sequence[Solutions], kappa: bool) -> tuple[list[list[tuple[float, ...]]], ...]:
        found: tuple[list[list[tuple[float, ...]]], ...] = tuple(
            [[()] * len(problem.rows) for problem in problems] for _ in range(1 + kappa)
        )
        for batch in self._batches(list(self._groups(problems))):
            interruption.check()
            for (p, r), values in self._run(batch, kappa):
                for part, value in zip(found, values, strict=True):
                    part[p][r] = value
        first: list[dict[Any, int]] = [{} for _ in problems]
        for p, problem in enumerate(problems):
            for r, row in enumerate(problem.rows):
                for part in found:
                    part[p][r] = part[p][first[p].setdefault(_key(row), r)]
        return found

    def _groups(self, problems: Sequence[Solutions]) -> Iterator[_Group]:
        for p, problem in enumerate(problems):
            distinct: dict[Any, int] = {}
            for r, row in enumerate(problem.rows):
                if len(row[1]):
                    distinct.setdefault(_key(row), r)
            items = sorted(distinct.items(), key=lambda item: len(item[0][0]))
            alone = [[item] for item in items if self._longest and len(item[0][0]) > self._longest]
            together = [item for item in items if not self._longest or len(item[0][0]) <= self._longest]
            for part in [together, *alone] if together else alone:
                rows = [row for row, _ in part]
                prefix = rows[0][0][: _common(rows)]
                yield _Group(prefix, rows, [(p, r) for _, r in part], problem.pixels)

    def _batches(self, groups: list[_Group]) -> Iterator[list[_Group]]:
        """Groups of similar numbers of tiles, prefix widths and numbers of solutions; with images or without."""

        def size(group: _Group) -> tuple[int, ...]:
            return group.tiles, self._width(len(group.prefix)), len(group.rows), group.length

        for same in ([g for g in groups if g.tiles], [g for g in groups if not g.tiles]):
            same.sort(key=size)
            for start in range(0, len(same), self._problems):
                yield same[start : start + self._problems]

    def _width(self, tokens: int) -> int:
        step = max(self._bucket, 1 << max(0, (tokens - 1).bit_length() - 4))
        return max(1, -(-tokens // step)) * step

    def _run(self, groups: list[_Group], kappa: bool) -> Iterator[tuple[tuple[int, int], list[tuple[float, ...]]]]:
        count, n = self._problems, self._solutions
        width = self._width(max(len(group.prefix) for group in groups))
        tokens, known = np.zeros((count, width), np.int32), np.zeros((count, width), bool)
        for i, group in enumerate(groups):
            tokens[i, : len(group.prefix)], known[i, : len(group.prefix)] = group.prefix, True
        length = np.ones(count, np.int32)
        length[: len(groups)] = [group.length for group in groups]
        batch = {"tokens": tokens, "valid": known, "length": length}
        if tiles := max(group.tiles for group in groups):
            # A row ignores tiles behind its own.
            shown = [group.pixels for group in groups]
            pixels = np.zeros((count, tiles, *next(x.shape[1:] for x in shown if x is not None)), np.float32)
            for i, own in enumerate(shown):
                if own is not None:
                    pixels[i, : len(own)] = normalise(own)
            batch["pixels"] = pixels
            self.tiles += count * tiles
        put = put_batch(batch, self._mesh)
        prefix = _prefill(self._params, {"pixels": None} | put, graphdef=self._graphdef)
        for start in range(0, max(len(group.rows) for group in groups), n):
            parts = [group.rows[start : start + n] for group in groups]
            suffixes = [[ids[len(g.prefix) :] for ids, _ in part] for g, part in zip(groups, parts, strict=True)]
            wide = self._width(max(len(ids) for part in suffixes for ids in part))
            rows, valid = np.zeros((count, n, wide), np.int32), np.zeros((count, n, wide), bool)
            valid[..., 0] = True  # rows without a solution
            for i, part in enumerate(suffixes):
                for j, ids in enumerate(part):
                    rows[i, j, : len(ids)], valid[i, j, : len(ids)] = ids, True
            starts = np.zeros(count, np.int32)
            starts[: len(groups)] = [len(group.prefix) for group in groups]
            suffix = {
                "tokens": rows.reshape(count * n, wide),
                "valid": valid.reshape(count * n, wide),
                "start": np.repeat(starts, n),
                "length": np.repeat(length, n),
            }
            scores = _scores(
                self._params, prefix, put["valid"], put_batch(suffix, self._mesh),
                graphdef=self._graphdef, classes=self._classes, kappa=kappa,
            )  # fmt: skip
            values = [np.asarray(x).reshape(count, n, wide) for x in jax.device_get(scores)]
            for i, (group, solutions) in enumerate(zip(groups, parts, strict=True)):
                for j, (_, marks) in enumerate(solutions):
                    at = np.array(marks) - len(group.prefix)
                    yield group.index[start + j], [tuple(x[i, j, at].tolist()) for x in values]


def _key(row: tuple[Sequence[int], Sequence[int]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(row[0]), tuple(row[1])


def _common(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> int:
    """How many first tokens all rows share, ending before the first score."""
    limit = min(marks[0] for _, marks in rows)
    for i, column in zip(range(limit), zip(*(ids for ids, _ in rows), strict=False), strict=False):
        if len(set(column)) > 1:
            return i
    return limit
