"""The stage ``train_prm``: a PRM trained from the policy's weights, on step labels of trees, of files, or of both."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
from etils import epath

from mmprm_jax import convert, io, records, schema
from mmprm_jax.data import encode
from mmprm_jax.data.encode import Language
from mmprm_jax.data.training_files import Encoded, TrainingSet
from mmprm_jax.models import hf_config
from mmprm_jax.models.tokenizer import Tokenizer
from mmprm_jax.prm import PRM
from mmprm_jax.processes import is_first, wait_for_all
from mmprm_jax.records import StepExample, Tree, UserError
from mmprm_jax.schema import from_config
from mmprm_jax.search import labels, paper
from mmprm_jax.search.store import iter_trees
from mmprm_jax.settings import TrainPRM
from mmprm_jax.sharding import make_mesh
from mmprm_jax.stages import training
from mmprm_jax.training import losses

EXAMPLES = {"default": labels.step_examples, "paper": paper.step_examples}  # paper: as the original does


def train(
    config: TrainPRM, job: training.Job, trees: epath.Path, images: epath.Path, language: Language,
    start: Callable[[], convert.Start],
) -> dict[str, Any]:  # fmt: skip
    """Trains a PRM on the trees in the folder ``trees`` and on the files of step labels. Returns the stage's figures.

    images: the folder that the problems' images, and the names of the files, are relative to. language: the PRM's.
    start: makes what the training begins with.
    """
    files = [images / name for name in config.files]
    sets = [step_examples(config, job, trees, images, language)] if config.trees else []
    sets += [label_file(config, job, number, path, language) for number, path in enumerate(files)]
    assert language.classes is not None  # a PRM in training tells right from wrong by two tokens
    loss = losses.prm_loss(config.label, config.threshold, *language.classes)
    training.train(job, language, start(), loss, sets, config.weights)
    read = [job.folder / "examples.jsonl"] * config.trees + files
    found = labels.histogram(itertools.chain.from_iterable(records.read(path, StepExample) for path in read))
    left_out: Counter[str] = Counter()
    for data in sets:
        left_out.update(data.summary["left_out"])
    figures = {"labels": found, "left_out": dict(left_out)}
    if files:
        figures["files"] = {os.fspath(path): len(data) for path, data in zip(files, sets[-len(files) :], strict=True)}
    return figures


def step_examples(
    config: TrainPRM, job: training.Job, trees: epath.Path, images: epath.Path, language: Language
) -> TrainingSet:
    """The step examples of the trees, one tree in memory at a time; people can read them in ``examples.jsonl``."""
    path = job.folder / "examples.jsonl"
    chosen, labelled = from_config(labels.LabelSettings, config), EXAMPLES[config.mode]

    def write() -> None:
        found = (example for tree in iter_trees(trees) for example in labelled(tree, chosen, job.seed))
        if not records.write(path, found, noted=True):
            raise UserError(
                "train_prm: no tree has both right and wrong solutions; the policy is too weak or too strong"
            )

    def examples(tiles: encode.TileCount) -> Iterable[Encoded]:
        write()
        return (language.steps(e, tiles) for e in records.read(path, StepExample))

    sources, made = sorted(trees.glob("trees-*.jsonl")), dataclasses.asdict(chosen)
    encoded = training.training_set(
        job, "steps", "prm", language, sources, images, examples, mode=config.mode, seed=job.seed, **made
    )
    if is_first():
        if not path.exists():  # the encoded set alone was left
            write()
        io.check(path)
    return encoded


def label_file(config: TrainPRM, job: training.Job, number: int, path: epath.Path, language: Language) -> TrainingSet:
    """The step examples of a file, whose images are relative to its folder; ``number``: which of the files it is.

    Reading it raises UserError naming the first bad row: labels that cannot be, an image that is missing, and labels
    that are no counts where the loss needs them.
    """

    def examples(tiles: encode.TileCount) -> Iterator[Encoded]:
        labelled = 0
        for line, example in records.read_numbered(path, StepExample):
            try:
                encoded = language.steps(example, tiles)
            except UserError as error:
                raise UserError(f"{path}, line {line}: {error}") from None
            if config.needs_kappa and not example.counted:
                raise UserError(
                    f"{path}, line {line}: {example.id} has a label that is no count, but train_prm.label="
                    f"{config.label} needs k of n; choose soft or hard"
                )
            labelled += sum(n > 0 for n in example.n)
            yield encoded
        if not labelled:
            raise UserError(f"{path}: no step has a label, so there is nothing to train on")

    return training.training_set(
        job, f"labels-{number}-{path.stem}", "labels", language, [path], path.parent, examples, label=config.label
    )


def train_prm(
    policy: str | os.PathLike, trees: Sequence[Tree], folder: epath.PathLike, *, images: epath.PathLike = "",
    seed: int = 0, mesh: Any = None, max_tiles: int | None = None, **settings: Any,
) -> PRM:  # fmt: skip
    """Trains a PRM on trees from a policy's weights, and leaves a model folder; an interrupted training goes on there.

    policy: a model folder or hub id. trees: may be none where ``files`` names step labels, as ``mmprm prepare`` writes
    them. images: the folder that the problems' images, and the names of files, are relative to. mesh: default all
    devices, parameters split over them. max_tiles: of one image; default the model's own number. settings: those of
    ``settings.TrainPRM``, such as steps, batch_size, max_length, label, files, lora_rank. Raises UserError.
    """
    config, folder = schema.given(TrainPRM, {"trees": bool(trees), **settings}), epath.Path(folder)
    mesh = mesh or make_mesh({"fsdp": -1})
    source, model = convert.inspect(policy)
    default_tiles, _ = hf_config.tiling(model.config)
    job = training.Job("train_prm", config, folder, max_tiles or default_tiles, seed, mesh)
    language = Language.stored(Tokenizer.load(source), model.cfg, model.config).with_prm(config.needs_kappa)

    def start() -> convert.Start:
        return convert.warm_start(
            policy, mesh, prm=True, kappa=language.cfg.kappa, seed=seed, **training.adapters(config)
        )

    with jax.set_mesh(mesh):
        if is_first() and config.trees:
            records.write(folder / "trees-000000.jsonl", trees)
        wait_for_all("train_prm: trees")
        train(config, job, folder, epath.Path(images), language, start)
    return PRM.from_pretrained(folder, mesh=mesh, max_tiles=job.max_tiles)
