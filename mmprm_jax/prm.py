"""Scoring solutions with a PRM: a released one, or one that a run trained.

prm = PRM.from_pretrained("Cierra0506/MM-PRM")
prm.score("What is the area of triangle ABC?", ["triangle.png"], ["The base is 4.", "So it is 6."])
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from PIL import Image

from mmprm_jax import convert, interruption, io, records
from mmprm_jax.data import images as image_files
from mmprm_jax.data.prompts import OWN, PRMTemplate, own_prm, prm_template
from mmprm_jax.evaluation.score import Scorer, Solutions
from mmprm_jax.metrics import progress
from mmprm_jax.models import build, hf, hf_config
from mmprm_jax.models import tokenizer as tok
from mmprm_jax.models.tokenizer import Tokenizer
from mmprm_jax.records import UserError
from mmprm_jax.sharding import make_mesh

Picture = str | os.PathLike | Image.Image


class PRM:
    """A process reward model with its tokenizer and prompt: text and images in, one score in [0, 1] per step out.

    settings: what the scores depend on beside the checkpoint: template, max_tiles, dtype.
    """

    def __init__(
        self,
        loaded: convert.Loaded,
        tokenizer: Tokenizer,
        template: PRMTemplate,
        *,
        max_tiles: int = 0,
        batch_size: int = 16,
        bucket: int = 64,
    ):
        """max_tiles: of one image, without the thumbnail; 0: as in config.json. batch_size: solutions at a time.

        Raises UserError when tokenizer, template and model do not fit each other.
        """
        if max_tiles < 0:
            raise UserError(f"max_tiles must be positive, or 0 for the model's own number, not {max_tiles}")
        cfg, config = loaded.model.cfg, loaded.model.config
        classes = _classes(loaded.folder, loaded.model, tokenizer, template)
        self._tokenizer, self._template, self._cfg, self._mesh = tokenizer, template, cfg, loaded.mesh
        dynamic = config.get("dynamic_image_size", True)
        self._max_tiles = max_tiles or (config.get("max_dynamic_patch", 12) if dynamic else 1)
        self._thumbnail = bool(config.get("use_thumbnail", True))
        self.settings = {
            "template": template.name, "max_tiles": self._max_tiles, "dtype": jnp.dtype(loaded.dtype).name
        }  # fmt: skip
        scaling = cfg.decoder.rope_scaling
        graphdef, _ = build.abstract(cfg, tokenizer.id(tok.IMAGE) if cfg.vision else -1, loaded.mesh)
        self._scorer = Scorer(
            graphdef, loaded.params, loaded.mesh, classes, problems=1, solutions=batch_size, bucket=bucket,
            longest=scaling.max_position if scaling else 0,
        )  # fmt: skip

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike,
        mesh: Any = None,
        *,
        template: str | None = None,
        dtype: Any = None,
        revision: str | None = None,
        **settings: Any,
    ) -> PRM:
        """A PRM from a released checkpoint (folder or hub id, ``org/name@revision``) or a model folder of ours.

        mesh: default all devices, heads over as many as divide them, parameters over the others. template: default the
        one that it was trained with (``own``), or by its kind (``mm_prm``, ``visual_prm`` or ``qwen_math_prm``);
        ``mm_prm_eval`` asks as MM-PRM's own evaluation does. dtype: default as stored. settings: as in ``PRM``. Raises
        UserError, before weights are read if tokenizer or template do not fit.
        """
        folder, model = convert.inspect(path_or_id, revision)
        tokenizer = Tokenizer.load(folder)
        name = template or hf_config.templates(model.config)[1]
        chosen = own_prm(tokenizer.own_markers) if name == OWN else prm_template(name)
        _classes(folder, model, tokenizer, chosen)
        if mesh is None:
            mesh = make_mesh({"fsdp": -1, "tensor": math.gcd(jax.device_count(), model.cfg.decoder.num_kv_heads)})
        return cls(convert.load(path_or_id, mesh, dtype, revision), tokenizer, chosen, **settings)

    @property
    def template(self) -> str:
        """The name of the prompt template."""
        return self._template.name

    @property
    def tiles(self) -> int:
        """Image tiles that went through the vision tower so far."""
        return self._scorer.tiles

    def score(self, question: str, images: Sequence[Picture], steps: Sequence[str]) -> list[float]:
        """The score of each step of one solution. images: files or PIL images, in order; empty: text only."""
        return self.score_candidates(question, images, [steps])[0]

    def score_candidates(
        self, question: str, images: Sequence[Picture], candidates: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """The step scores of many solutions of one problem; images and question are computed once.

        Raises UserError: images the model cannot take, an image that is none, placeholders that do not fit.
        """
        if isinstance(images, str) or any(isinstance(steps, str) for steps in candidates):
            raise UserError("images must be a list of files, and a solution a list of steps, not one string")
        if images and self._cfg.vision is None:
            raise UserError("this PRM reads text only, but the problem has images")
        tiles = [self._tiles(image) for image in images]
        counts = [len(t) * self._cfg.tokens_per_tile for t in tiles]
        rows = [
            self._tokenizer.encode_prompt(self._template.build(question, steps, counts)) if steps else ([], [])
            for steps in candidates
        ]
        with jax.set_mesh(self._mesh):
            found = self._scorer.score([Solutions(rows, np.concatenate(tiles) if tiles else None)])[0]
        return [list(scores) for scores in found]

    def _tiles(self, image: Picture) -> np.ndarray:
        picture = image_files.to_rgb(image) if isinstance(image, Image.Image) else image_files.open_image(image)
        return image_files.tiles(picture, self._max_tiles, self._cfg.tile, self._thumbnail)


def _classes(
    folder: Path, model: hf.Description, tokenizer: Tokenizer, template: PRMTemplate
) -> tuple[int, int] | None:
    """Ids of the tokens for right and wrong, None for a score head. Raises UserError when the three do not fit."""
    cfg = model.cfg
    if (template.positive is None) != bool(cfg.num_labels):
        has = "has" if cfg.num_labels else "has no"
        raise UserError(
            f"{folder}: the model {has} score head of its own; the template {template.name!r} is not for it"
        )
    try:
        tokenizer.check(_markers(template, cfg.vision is not None))
        if len(tokenizer) > cfg.decoder.vocab_size:
            raise UserError(f"{len(tokenizer)} tokens, but the model has {cfg.decoder.vocab_size} embeddings only")
        if template.positive is None:
            return None
        return tokenizer.piece(template.positive), tokenizer.piece(template.negative)
    except UserError as error:
        raise UserError(f"{folder}: the tokenizer does not fit the template {template.name!r}: {error}") from None


def _markers(template: PRMTemplate, images: bool) -> list[str]:
    """The special tokens that a template uses."""
    segments = template.build("q", ["s"], [1] if images else [])
    return sorted({segment.text for segment in segments if segment.marker})


def score_file(prm: PRM, model: str, problems: epath.PathLike, output: epath.PathLike) -> str:
    """Scores a JSONL file; returns a line that says what was done.

    Rows: ``{"id", "question", "images": [files beside it], "candidates": [[step, …], …]}``, or ``image``, one file;
    or for one candidate its ``steps``, as ``mmprm prepare`` writes step-detection benchmarks. Written rows: ``{"id",
    "scores": [[…], …], "model", "template"}`` in the same order, or ``{"id", "line", "error"}`` for a row that could
    not be scored. What an interrupted run scored (``<output>.part``) is not scored again. Raises UserError at the end
    if there were bad rows, with everything else written.
    """
    problems, output = epath.Path(problems), epath.Path(output)
    if not problems.exists():
        raise UserError(f"{problems}: no such file")
    if output.resolve() == problems.resolve():
        raise UserError(f"{problems}: the scores would replace the problems; choose another --output")
    try:
        text = problems.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{problems}: not UTF-8 text ({error})") from None
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    part = output.parent / f"{output.name}.part"
    made_by, run = {"model": model, "template": prm.template}, {"model": model, **prm.settings}
    done = _finished(part, run)
    rows, bad = [], 0
    with part.open("a") as log, progress(len(lines), "score", "problem") as bar:
        for number, line in lines:
            interruption.check()
            key = f"{number}:{line}"
            row = done.get(key)
            if row is None:
                row = _score_line(prm, problems, number, line, made_by)
                if "error" not in row:
                    log.write(json.dumps({"run": run, "key": key, "row": row}) + "\n")
                    log.flush()
            bad += "error" in row
            rows.append(json.dumps(row, ensure_ascii=False))
            bar.update()
    io.write(output, "".join(f"{row}\n" for row in rows))
    part.unlink()
    if bad:
        raise UserError(f"{output}: {bad} of {len(lines)} rows could not be scored; their errors are in the file")
    return f"{output}: {len(lines)} problems scored"


def _finished(part: epath.Path, run: dict[str, Any]) -> dict[str, Any]:
    """The rows of an interrupted run, cut back to its last whole line. Raises UserError if another run left them."""
    if not part.exists():
        return {}
    whole, end, _ = part.read_bytes().rpartition(b"\n")
    try:
        entries = [json.loads(line) for line in whole.split(b"\n") if line]
        left = [entry["run"] for entry in entries]
        done = {entry["key"]: entry["row"] for entry in entries}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{part}: not what an interrupted run leaves; remove it or choose another --output") from None
    for other in left:
        if other != run:
            raise UserError(f"{part}: left by a run with {other}; remove it or choose another --output")
    io.write(part, whole + end)
    return done


def _score_line(prm: PRM, problems: epath.Path, number: int, line: str, made_by: dict[str, str]) -> dict[str, Any]:
    row: Any = None
    try:
        row = json.loads(line)
        question, images, candidates = _parse(row)
        if not images:  # else a misspelt key would be scored without its image, and nobody told
            for key in difflib.get_close_matches("images", set(row) - {"image", "images"}, cutoff=0.7):
                records.warn_unknown(problems, "row", key, ("images", "image"))
        scores = prm.score_candidates(question, [problems.parent / name for name in images], candidates)
    except (UserError, ValueError, RecursionError) as error:
        name = row.get("id") if isinstance(row, dict) else None
        logging.error("line %d: %s", number, error)
        return {"id": name, "line": number, "error": str(error)}
    return {"id": row.get("id"), "scores": scores, **made_by}


def _parse(row: Any) -> tuple[str, list[str], list[list[str]]]:
    """question, images, candidates of a row. Raises UserError naming the key that is wrong."""

    def texts(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(x, str) for x in value)

    if not isinstance(row, dict):
        raise UserError("expected a JSON object")
    if not isinstance(row.get("question"), str):
        raise UserError("question must be a string")
    images, image = row.get("images"), row.get("image")
    images = [] if images is None else images
    if not texts(images):
        raise UserError("images must be a list of file names")
    if not isinstance(image, str | None):
        raise UserError("image must be a file name")
    if image is not None and image not in images:  # as Problem has it
        if images:
            raise UserError("image and images name different files; leave one out")
        images = [image]
    candidates = row.get("candidates", [row["steps"]] if "steps" in row else None)
    if not isinstance(candidates, list) or not all(texts(steps) for steps in candidates):
        raise UserError("candidates must be a list of lists of steps")
    return row["question"], images, candidates
