"""The process reward model: what scores the steps of solutions.

prm = PRM.from_pretrained("Cierra0506/MM-PRM")
prm.score("What is the area of triangle ABC?", ["The base is 4.", "So it is 6."], images=["triangle.png"])
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from mmprm_jax import convert, interruption, io, markup, records
from mmprm_jax.data import encode
from mmprm_jax.data.encode import Language, Picture, Pixels
from mmprm_jax.evaluation import aggregate
from mmprm_jax.evaluation.score import Scorer, Solutions
from mmprm_jax.metrics import progress
from mmprm_jax.models import build, hf_config
from mmprm_jax.models.tokenizer import Tokenizer
from mmprm_jax.records import Problem, UserError


class StepScores(list[float]):
    """The scores of the steps of one solution; in a notebook these steps, coloured."""

    def __init__(self, steps: Sequence[str], scores: Iterable[float]) -> None:
        super().__init__(scores)
        self.steps = tuple(steps)

    def _repr_html_(self) -> str:
        return markup.scoped(markup.solution(self.steps, self))


@dataclasses.dataclass(frozen=True, eq=False)
class PRM:
    """A process reward model: weights on a mesh, tokenizer and prompt, and how images are cut.

    max_tiles: of one image, without the thumbnail, which follows several tiles where ``thumbnail`` says so. problems,
    solutions: that are scored at a time; bucket: tokens, see ``Scorer``. Raises UserError when tokenizer, prompt and
    model do not fit each other.
    """

    language: Language
    params: Any = dataclasses.field(repr=False)
    mesh: Any
    max_tiles: int
    thumbnail: bool = True
    problems: int = 1
    solutions: int = 16
    bucket: int = 64

    def __post_init__(self) -> None:
        if self.max_tiles < 1:
            raise UserError(f"max_tiles must be positive, not {self.max_tiles}")
        check_fit(self.language)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike,
        *,
        mesh: Any = None,
        template: str | None = None,
        dtype: Any = None,
        revision: str | None = None,
        max_tiles: int | None = None,
        **batch: int,
    ) -> PRM:
        """A PRM from a released checkpoint (folder or hub id, ``org/name@revision``) or a model folder of ours.

        mesh: default all devices, heads over as many as divide them, parameters over the others. template: default the
        one that it was trained with (``own``), or by its kind (``mm_prm``, ``visual_prm`` or ``qwen_math_prm``);
        ``mm_prm_eval`` asks as MM-PRM's own evaluation does. dtype: default as stored. max_tiles: of one image; default
        the model's own number. batch: problems, solutions, bucket, as in ``PRM``. Raises UserError, before weights are
        read if tokenizer or template do not fit.
        """
        folder, model = convert.inspect(path_or_id, revision)
        name = template or hf_config.templates(model.config)[1]
        language = Language.of_prm(Tokenizer.load(folder), model.cfg, name)
        try:
            check_fit(language)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None
        default_tiles, thumbnail = hf_config.tiling(model.config)
        loaded = convert.load(path_or_id, mesh or convert.inference_mesh(model.cfg), dtype, revision)
        return cls(language, loaded.params, loaded.mesh, max_tiles or default_tiles, thumbnail, **batch)

    @functools.cached_property
    def scorer(self) -> Scorer:
        """What computes the scores of tokenised solutions."""
        cfg = self.language.cfg
        graphdef, _ = build.abstract(cfg, self.language.image_token, self.mesh)
        scaling = cfg.decoder.rope_scaling
        return Scorer(
            graphdef, self.params, self.mesh, self.language.classes, problems=self.problems, solutions=self.solutions,
            bucket=self.bucket, longest=scaling.max_position if scaling else 0,
        )  # fmt: skip

    @property
    def template(self) -> str:
        """The name of the prompt template."""
        return self.language.prm.name

    @property
    def settings(self) -> dict[str, Any]:
        """What the scores depend on beside the checkpoint."""
        dtype = jax.tree.leaves(self.params)[0].dtype
        kappa = {"kappa": True} if self.language.cfg.kappa else {}
        return {"template": self.template, "max_tiles": self.max_tiles, "dtype": jnp.dtype(dtype).name, **kappa}

    @property
    def tiles(self) -> int:
        """Image tiles that went through the vision tower so far."""
        return self.scorer.tiles

    def pixels(self, folder: epath.PathLike) -> Pixels:
        """Opens the tiles of a problem's images, which are relative to ``folder``."""
        return encode.file_pixels(folder, self.language.cfg, self.max_tiles, self.thumbnail)

    def score(
        self, problem: Problem | str, steps: Sequence[str], *, images: Sequence[Picture] | None = None
    ) -> StepScores:
        """The score in [0, 1] of each step of one solution. problem: a record, or the question.

        images: files or PIL images, in order; None: the record's own.
        """
        return self.score_candidates(problem, [steps], images=images)[0]

    def score_candidates(
        self, problem: Problem | str, candidates: Sequence[Sequence[str]], *, images: Sequence[Picture] | None = None
    ) -> list[StepScores]:
        """The step scores of many solutions of one problem; images and question are computed once."""
        return self.scores_and_kappas(problem, candidates, images=images)[0]

    def scores_and_kappas(
        self, problem: Problem | str, candidates: Sequence[Sequence[str]], *, images: Sequence[Picture] | None = None
    ) -> tuple[list[StepScores], list[list[float]] | None]:
        """The step scores, and how reliable each is: the concentration kappa > 0 of a Beta-Binomial PRM, else None.

        The PRM believes that a rollout behind the step is right with a probability that is Beta distributed, with the
        mean ``score`` and the variance score (1 - score) / (kappa + 1) (arXiv 2605.15529). Raises UserError: images the
        model cannot take, an image that is none, placeholders that do not fit.
        """
        if any(isinstance(steps, str) for steps in candidates):
            raise UserError("a solution must be a list of steps, not one string")
        question, pictures = encode.problem_text(problem, images)
        tiles = encode.picture_tiles(pictures, self.language.cfg, self.max_tiles, self.thumbnail)
        with jax.set_mesh(self.mesh):
            solutions = [self.tokens(question, candidates, tiles)]
            if self.language.cfg.kappa:
                scores, kappas = self.scorer.score_with_kappa(solutions)
            else:
                scores, kappas = self.scorer.score(solutions), None
        named = [StepScores(steps, found) for steps, found in zip(candidates, scores[0], strict=True)]
        return named, None if kappas is None else [list(x) for x in kappas[0]]

    def tokens(self, question: str, candidates: Sequence[Sequence[str]], tiles: Sequence[np.ndarray]) -> Solutions:
        """The candidates of one problem as ``scorer`` takes them. tiles: of each image, uint8 [tiles, H, W, 3]."""
        counts = [len(t) for t in tiles]
        rows = [self.language.solution(question, steps, counts) if steps else ([], []) for steps in candidates]
        return Solutions(rows, encode.joined(tiles))


@dataclasses.dataclass(frozen=True)
class Choice:
    """The candidate that a PRM has chosen. ``scores``: of every candidate, by one aggregator."""

    index: int
    scores: tuple[float, ...]


def best_of_n(
    prm: PRM, problem: Problem | str, candidates: Sequence[Sequence[str]], *,
    images: Sequence[Picture] | None = None, aggregator: str = "min",
) -> Choice:  # fmt: skip
    """The best of the candidates by their aggregated step scores; of equal ones the first.

    aggregator: a name of ``evaluation.aggregate.AGGREGATORS``. images: as in ``PRM.score``. Raises UserError for a name
    that there is not, and for no candidates.
    """
    if aggregator not in aggregate.AGGREGATORS:
        raise UserError(f"aggregator: {aggregator!r} is not one of {', '.join(aggregate.AGGREGATORS)}")
    if not candidates:
        raise UserError("there are no candidates to choose from")
    combine = aggregate.AGGREGATORS[aggregator]
    scores = [combine(np.array(s)) for s in prm.score_candidates(problem, candidates, images=images)]
    return Choice(int(np.argmax(scores)), tuple(map(float, scores)))


def check_fit(language: Language) -> None:
    """Raises UserError when a PRM's tokenizer, template and model do not fit each other."""
    cfg, tokenizer, template = language.cfg, language.tokenizer, language.prm
    if (template.positive is None) != bool(cfg.num_labels):
        has = "has" if cfg.num_labels else "has no"
        raise UserError(f"the model {has} score head of its own; the template {template.name!r} is not for it")
    segments = template.build("q", ["s"], [1] if cfg.vision else [])
    markers = sorted({segment.text for segment in segments if segment.marker})
    try:
        tokenizer.check(markers)
        if len(tokenizer) > cfg.decoder.vocab_size:
            raise UserError(f"{len(tokenizer)} tokens, but the model has {cfg.decoder.vocab_size} embeddings only")
        language.classes  # noqa: B018  # looks both tokens up
    except UserError as error:
        raise UserError(f"the tokenizer does not fit the template {template.name!r}: {error}") from None


def score_file(prm: PRM, model: str, problems: epath.PathLike, output: epath.PathLike) -> str:
    """Scores a JSONL file; returns a line that says what was done.

    Rows: ``{"id", "question", "images": [files beside it], "candidates": [[step, …], …]}``, or ``image``, one file;
    or for one candidate its ``steps``, as ``mmprm prepare`` writes step-detection benchmarks. Written rows: ``{"id",
    "scores": [[…], …], "model", "template"}`` in the same order, with ``"kappa": [[…], …]`` (see
    ``PRM.scores_and_kappas``) of a Beta-Binomial PRM, or ``{"id", "line", "error"}`` for a row that could not be
    scored. What an interrupted run scored (``<output>.part``) is not scored again. Raises UserError at the end if
    there were bad rows, with everything else written.
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
        if not images:  # else a misspelt key would be scored without its image, and nobody notice
            for key in difflib.get_close_matches("images", set(row) - {"image", "images"}, cutoff=0.7):
                records.warn_unknown(problems, "row", key, ("images", "image"))
        files = [problems.parent / name for name in images]
        scores, kappas = prm.scores_and_kappas(question, candidates, images=files)
    except (UserError, ValueError, RecursionError) as error:
        name = row.get("id") if isinstance(row, dict) else None
        logging.error("line %d: %s", number, error)
        return {"id": name, "line": number, "error": str(error)}
    return {"id": row.get("id"), "scores": scores, **({"kappa": kappas} if kappas is not None else {}), **made_by}


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
