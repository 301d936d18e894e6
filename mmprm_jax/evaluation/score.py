"""Step scores of a PRM: P(Yes) against No at the ``<prm>`` after each segment."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from mmprm_jax.data.encode import pad_rows, prm_ids, prompt_ids
from mmprm_jax.data.images import normalise
from mmprm_jax.models import tokenizer as tok
from mmprm_jax.models.config import VLMConfig
from mmprm_jax.models.tokenizer import Tokenizer
from mmprm_jax.models.vlm import VLM
from mmprm_jax.records import Problem
from mmprm_jax.sharding import put_batch


@functools.partial(jax.jit, static_argnames=("graphdef", "yes", "no"))
def _scores(params: Any, batch: Any, *, graphdef: Any, yes: int, no: int) -> jax.Array:
    model: VLM = nnx.merge(graphdef, params)
    hidden, _ = model(batch["tokens"], batch["valid"], batch["pixels"])
    logits = model.two_way_logits(hidden, yes, no)
    return jax.nn.sigmoid(logits[..., 0] - logits[..., 1])


class Scorer:
    """Scores solutions ``rows`` at a time; equal solutions of a problem are scored once."""

    def __init__(
        self,
        graphdef: Any,
        params: Any,
        mesh: Any,
        tokenizer: Tokenizer,
        cfg: VLMConfig,
        *,
        rows: int,
        bucket: int = 16,
    ):
        self._graphdef, self._params, self._mesh = graphdef, params, mesh
        self._tokenizer, self._cfg = tokenizer, cfg
        self._rows, self._bucket = rows, bucket

    def score(
        self, problems: Sequence[Problem], solutions: Sequence[tuple[str, ...]], pixels: Sequence[np.ndarray]
    ) -> list[tuple[float, ...]]:
        """One score in [0, 1] per segment of each solution; an empty solution gets no scores.

        problems, solutions and pixels (uint8 [tiles, H, W, 3]) belong together one by one.
        """
        wanted: dict[tuple[str, tuple[str, ...]], int] = {}
        for i, (problem, segments) in enumerate(zip(problems, solutions, strict=True)):
            if segments:
                wanted.setdefault((problem.id, segments), i)
        found: dict[tuple[str, tuple[str, ...]], tuple[float, ...]] = {}
        items = sorted(wanted.items(), key=lambda item: len(item[0][1]))  # similar lengths share a batch
        for start in range(0, len(items), self._rows):
            part = items[start : start + self._rows]
            rows, marks = [], []
            for (_, segments), i in part:
                prompt = prompt_ids(self._tokenizer, self._cfg, problems[i].question, problems[i].image is not None)
                ids, where = prm_ids(self._tokenizer, prompt, segments)
                rows.append(ids)
                marks.append(where)
            scores = self._batch(rows, np.stack([pixels[i] for _, i in part]))
            for (key, _), where, row in zip(part, marks, scores, strict=False):
                found[key] = tuple(float(s) for s in row[where])
        return [found.get((p.id, s), ()) for p, s in zip(problems, solutions, strict=True)]

    def _batch(self, rows: list[list[int]], pixels: np.ndarray) -> np.ndarray:
        width = -(-max(len(row) for row in rows) // self._bucket) * self._bucket
        tokens, valid = pad_rows(rows, width, "solution")
        fill = self._rows - len(rows)
        valid = np.pad(valid, [(0, fill), (0, 0)])
        valid[len(rows) :, 0] = True
        batch = {
            "tokens": np.pad(tokens, [(0, fill), (0, 0)]),
            "valid": valid,
            "pixels": normalise(np.pad(pixels, [(0, fill)] + [(0, 0)] * (pixels.ndim - 1))),
        }
        yes, no = self._tokenizer.id(tok.YES), self._tokenizer.id(tok.NO)
        scores = _scores(self._params, put_batch(batch, self._mesh), graphdef=self._graphdef, yes=yes, no=no)
        return np.asarray(jax.device_get(scores))
