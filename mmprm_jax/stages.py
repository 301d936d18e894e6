"""The stages of the pipeline. Each reads record files and writes record files below ``<workdir>/<stage>``.

A finished stage leaves ``done.json`` (its figures) and is skipped from then on; an interrupted one goes on where it
was: training from its newest checkpoint, annotation inside of its trees, evaluation after its last saved piece.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from mmprm_jax import annotate as annotation
from mmprm_jax import convert, records
from mmprm_jax.data import digits, encode, training_files
from mmprm_jax.data.packing import Sizes
from mmprm_jax.data.prompts import policy_template
from mmprm_jax.data.training_files import Encoded, TrainingSet
from mmprm_jax.evaluation.stage import evaluate
from mmprm_jax.models import build
from mmprm_jax.models import tokenizer as tok
from mmprm_jax.models.config import VLMConfig
from mmprm_jax.models.tokenizer import Tokenizer
from mmprm_jax.records import Problem, SFTExample, StepExample, UserError
from mmprm_jax.report import report as report_page
from mmprm_jax.rollout.engine import Engine
from mmprm_jax.rollout.rollouts import (
    LocalSampler,
    Pixels,
    Policy,
    Verify,
    file_pixels,
    plain_prompt,
    template_prompt,
)
from mmprm_jax.rollout.sampling import Sampling
from mmprm_jax.search import labels, paper
from mmprm_jax.search.omegaprm import SEARCHES
from mmprm_jax.search.settings import Settings
from mmprm_jax.search.store import each_tree, read_trees
from mmprm_jax.sharding import make_mesh, row_share
from mmprm_jax.training import losses, optimizers, trainer
from mmprm_jax.training.checkpoints import load_params, save_params
from mmprm_jax.training.input import Batches, Tiles

Figures = dict[str, Any]


class Run:
    """A configuration, a work directory and the mesh; what every stage needs."""

    def __init__(self, config: ConfigDict, workdir: epath.Path, config_text: str):
        self.config, self.workdir, self.config_text = config, workdir, config_text
        choose(SEARCHES, config.annotate.mode, "annotate.mode")  # told before minutes of training
        choose(EXAMPLES, config.train_prm.mode, "train_prm.mode")
        self.mesh_shape = dict(zip(("data", "fsdp", "tensor"), config.mesh, strict=True))
        self.mesh = make_mesh(self.mesh_shape)
        jax.set_mesh(self.mesh)
        self.data = epath.Path(config.data.folder) if config.data.folder else workdir / "data"
        self.sampled = workdir / "evaluate"  # what the policy sampled for the evaluation
        self.controls = True  # whether the evaluation has them

    def folder(self, stage: str) -> epath.Path:
        return self.workdir / stage

    def figures(self, stage: str) -> Figures | None:
        """What a finished stage reported; None when it has not finished."""
        path = self.folder(stage) / "done.json"
        return json.loads(path.read_text()) if path.exists() else None

    def problems(self, split: str) -> list[Problem]:
        return records.read_all(self.data / f"{split}.jsonl", Problem)

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.data / "tokenizer.json")

    def model(self, tokenizer: Tokenizer) -> VLMConfig:
        """The model's sizes; the vocabulary is the tokenizer's, so that no id can be outside of it."""
        sizes = self.config.model.to_dict()
        sizes["decoder"]["vocab_size"] = len(tokenizer)
        return VLMConfig.from_dict(sizes)

    def prm(self, tokenizer: Tokenizer) -> VLMConfig:
        """The PRM's sizes."""
        return dataclasses.replace(self.model(tokenizer), kappa=self.config.train_prm.label == "beta_binomial")

    def pixels(self, problems: Sequence[Problem], cfg: VLMConfig) -> dict[str, np.ndarray]:
        """uint8 [tiles, H, W, 3] by problem id."""
        index, pixels = encode.load_pixels(self.data, [p.image for p in problems], cfg)
        return {p.id: pixels[i] for p, i in zip(problems, index, strict=True)}

    def load(self, stage: str, tokenizer: Tokenizer, cfg: VLMConfig) -> tuple[Any, Any]:
        """The graph definition and the weights that ``stage`` trained."""
        graphdef, abstract = build.abstract(cfg, tokenizer.id(tok.IMAGE), self.mesh)
        return graphdef, load_params(self.folder(stage) / "params", abstract)

    def policy(self, settings: ConfigDict, mesh: Any, tokenizer: Tokenizer, cfg: VLMConfig, pixels: Pixels) -> Sampled:
        """The policy that this run trained."""
        graphdef, abstract = build.abstract(cfg, tokenizer.id(tok.IMAGE), mesh)
        params = load_params(self.folder("sft") / "params", abstract)
        sampling = settings_of(Sampling, settings, stop=(tokenizer.id(tok.TURN_END),))
        policy = Policy(tokenizer, plain_prompt(tokenizer, cfg), pixels, sampling)
        return Sampled(graphdef, params, cfg, tokenizer.id(tok.IMAGE), policy)


@dataclasses.dataclass(frozen=True)
class Sampled:
    """A policy with its weights, ready for an engine."""

    graphdef: Any
    params: Any
    cfg: VLMConfig
    image_token: int
    policy: Policy

    def sampler(self, run: Run, settings: ConfigDict, mesh: Any, purpose: str, n: int, verify: Verify) -> LocalSampler:
        """Samples with ``settings``; n: rollouts per request, as a rule."""
        engine = Engine(
            self.graphdef, self.params, self.cfg, self.image_token, mesh, slots=settings.slots, samples=n,
            max_new=settings.max_new_tokens, places=settings.cache_tokens,
        )  # fmt: skip
        return LocalSampler(engine, self.policy, run.config.seed, purpose, verify)


def released_policy(run: Run, settings: ConfigDict, mesh: Any) -> Sampled:
    """The checkpoint that ``settings.policy`` names: a folder, a hub id, or what ``mmprm convert`` wrote."""
    loaded = convert.load(settings.policy, mesh, settings.dtype or None)
    tokenizer, cfg = Tokenizer.load(loaded.folder), loaded.model.cfg
    image_token = tokenizer.id(tok.IMAGE) if cfg.vision else -1
    graphdef, _ = build.abstract(cfg, image_token, mesh)
    prompt = template_prompt(tokenizer, cfg, policy_template(settings.template or "internvl"))
    sampling = settings_of(Sampling, settings, stop=(tokenizer.id(tok.TURN_END),))
    policy = Policy(tokenizer, prompt, file_pixels(run.data, cfg, settings.max_tiles), sampling)
    return Sampled(graphdef, loaded.params, cfg, image_token, policy)


def settings_of(cls: type, config: Mapping[str, Any], **more: Any) -> Any:
    """The dataclass ``cls`` from the keys of ``config`` that it has."""
    names = {f.name for f in dataclasses.fields(cls)}
    try:
        return cls(**{k: v for k, v in config.items() if k in names}, **more)
    except ValueError as error:
        raise UserError(str(error)) from None


EXAMPLES = {"default": labels.step_examples, "paper": paper.step_examples}  # paper: as the original does


def choose(choices: Mapping[str, Any], name: str, key: str) -> Any:
    """The choice of that name. Raises UserError naming the config key."""
    if name not in choices:
        raise UserError(f"{key}: {name!r} is not one of {', '.join(choices)}")
    return choices[name]


def training_settings(config: ConfigDict, seed: int) -> trainer.Settings:
    """The settings of one training stage."""
    values = {**config.to_dict(), "optimizer": settings_of(optimizers.Settings, config.optimizer)}
    return settings_of(trainer.Settings, values, seed=seed)


def data(run: Run) -> Figures:
    """Generates the embedded problem set, unless the configuration names a folder with a data set."""
    if run.config.data.folder:
        return {"problems": {split: len(run.problems(split)) for split in digits.SPLITS}}
    settings = settings_of(digits.Settings, run.config.data, seed=run.config.seed)
    digits.check(settings)
    digits.generate(run.data, settings)
    return {"problems": {split: getattr(settings, split) for split in digits.SPLITS}}


def training_set(
    run: Run, stage: str, name: str, kind: str, model: tuple[Tokenizer, VLMConfig], sources: Sequence[epath.Path],
    images: epath.Path, examples: Callable[[encode.TileCount], Iterable[Encoded]], **settings: Any,
) -> TrainingSet:  # fmt: skip
    """The encoded ``examples`` of a stage, made anew where the ``sources`` or the settings are others than before.

    images: the folder that their images are relative to.
    """
    c, path, (tokenizer, cfg) = run.config[stage], run.folder(stage) / "input" / name, model
    made_with = {
        "sources": training_files.checksum(sources), "tokenizer": tokenizer.fingerprint,
        "tokens_per_tile": cfg.tokens_per_tile, "tile": cfg.tile if cfg.vision else 0, "max_tiles": c.max_tiles,
        "max_length": c.max_length, "row_tiles": c.row_tiles, **settings,
    }  # fmt: skip
    if jax.process_index() == 0 and not training_files.is_current(path, made_with):
        encoded = examples(encode.tile_count(images, cfg, c.max_tiles))
        training_files.write(path, kind, encoded, c.max_length, c.row_tiles, made_with)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"{path}")
    return TrainingSet(path, kind, images, made_with)


def batches(
    run: Run, stage: str, cfg: VLMConfig, sets: Sequence[TrainingSet], weights: Sequence[float] = ()
) -> Batches:
    """This process's rows of the batches of a training stage."""
    c = run.config[stage]
    tiles = Tiles(cfg.tile, c.max_tiles, c.shift, c.noise) if cfg.vision else None
    sizes = Sizes(c.batch_size, c.max_length, c.row_tiles if cfg.vision else 0, c.row_examples)
    return Batches(sets, sizes, run.config.seed, tiles, weights, row_share(run.mesh))


def sft(run: Run) -> Figures:
    """Supervised fine-tuning of the policy, from random weights."""
    c, tokenizer = run.config.sft, run.tokenizer()
    cfg, folder = run.model(tokenizer), run.folder("sft")

    def load(number: int, path: epath.Path) -> TrainingSet:
        def examples(tiles: encode.TileCount) -> Iterable[Encoded]:
            return (encode.encode_sft(e, tokenizer, cfg, tiles) for e in records.read(path, SFTExample))

        name = f"{number}-{path.stem}"
        return training_set(run, "sft", name, "policy", (tokenizer, cfg), [path], path.parent, examples)

    sets = [load(number, run.data / name) for number, name in enumerate(c.files)]
    graphdef, params = build.initialise(cfg, tokenizer.id(tok.IMAGE), run.config.seed, run.mesh)
    settings = training_settings(c, run.config.seed)
    with batches(run, "sft", cfg, sets, c.weights) as source:
        params = trainer.fit("sft", folder, graphdef, params, losses.policy_loss, source, settings, run.mesh)
    save_params(folder / "params", params)
    left_out = [data.summary["left_out"] for data in sets]
    parameters = sum(x.size for x in jax.tree.leaves(params))
    return {"examples": sum(map(len, sets)), "left_out": left_out, "parameters": parameters}


def annotate(run: Run) -> Figures:
    """A search tree for every training problem."""
    c, folder, problems = run.config.annotate, run.folder("annotate"), run.problems("train")
    if c.servers and not c.policy:
        raise UserError("annotate.policy is empty; it names the model that the servers have")
    together = c.lockstep or jax.process_count() == 1
    share = (0, 1) if together else (jax.process_index(), jax.process_count())
    mesh = run.mesh if together else make_mesh(run.mesh_shape, jax.local_devices())

    def make(verify: Verify) -> LocalSampler:
        if c.policy:
            return released_policy(run, c, mesh).sampler(run, c, mesh, "annotate", c.num_rollouts, verify)
        tokenizer = run.tokenizer()
        cfg = run.model(tokenizer)
        tiles = run.pixels(problems, cfg)
        policy = run.policy(c, mesh, tokenizer, cfg, lambda p: tiles[p.id] if p.image else None)
        return policy.sampler(run, c, mesh, "annotate", c.num_rollouts, verify)

    if c.servers:
        source = annotation.remote(c, run.data, run.config.seed, settings_of(Sampling, c))
    else:
        source = annotation.local(make, c)
    with jax.set_mesh(mesh), source as sampler:
        failed = annotation.run(
            folder, problems, sampler, settings_of(Settings, c), c, worker=share[0], workers=share[1],
            writes=not together or jax.process_index() == 0,
        )  # fmt: skip
    return annotation.finish(folder, problems, failed, c.skip_failed)


def train_prm(run: Run) -> Figures:
    """Trees to step labels, and a PRM trained on them from the policy's weights."""
    c, folder = run.config.train_prm, run.folder("train_prm")
    policy_tokenizer = run.tokenizer()
    tokenizer = policy_tokenizer.with_token(tok.PRM)
    cfg = run.prm(tokenizer)
    data = step_examples(run, tokenizer, cfg)
    _, policy = run.load("sft", policy_tokenizer, run.model(policy_tokenizer))
    graphdef, _ = build.abstract(cfg, tokenizer.id(tok.IMAGE), run.mesh)
    params = build.complete(build.add_token(policy, run.mesh), cfg, tokenizer.id(tok.IMAGE), run.config.seed, run.mesh)
    loss = losses.prm_loss(c.label, c.threshold, tokenizer.piece(tok.YES), tokenizer.piece(tok.NO))
    settings = training_settings(c, run.config.seed)
    with batches(run, "train_prm", cfg, [data]) as source:
        params = trainer.fit("train_prm", folder, graphdef, params, loss, source, settings, run.mesh)
    save_params(folder / "params", params)
    if jax.process_index() == 0:
        tokenizer.save(folder / "tokenizer.json")
    found = labels.histogram(records.read(folder / "examples.jsonl", StepExample))
    return {"labels": found, "left_out": data.summary["left_out"]}


def step_examples(run: Run, tokenizer: Tokenizer, cfg: VLMConfig) -> TrainingSet:
    """The step examples of the trees, one tree in memory at a time; people can read them in ``examples.jsonl``."""
    c, path = run.config.train_prm, run.folder("train_prm") / "examples.jsonl"
    chosen, labelled = settings_of(labels.LabelSettings, c), choose(EXAMPLES, c.mode, "train_prm.mode")

    def examples(tiles: encode.TileCount) -> Iterable[Encoded]:
        trees = each_tree(run.folder("annotate"))
        if not records.write(path, (e for tree in trees for e in labelled(tree, chosen, run.config.seed))):
            raise UserError(
                "train_prm: no tree has both right and wrong solutions; the policy is too weak or too strong"
            )
        return (encode.encode_steps(e, tokenizer, cfg, tiles) for e in records.read(path, StepExample))

    sources, made = sorted(run.folder("annotate").glob("trees-*.jsonl")), dataclasses.asdict(chosen)
    return training_set(
        run, "train_prm", "steps", "prm", (tokenizer, cfg), sources, run.data, examples, mode=c.mode,
        seed=run.config.seed, **made,
    )  # fmt: skip


def report(run: Run) -> Figures:
    """``report/metrics.json`` and the page ``report/index.html``."""
    figures = {stage: run.figures(stage) for stage in STAGES if stage != "report"}
    missing = [stage for stage, found in figures.items() if found is None]
    if missing:
        raise UserError(f"report: these stages have not finished: {', '.join(missing)}")
    seconds = {stage: found["seconds"] for stage, found in figures.items()}
    result = dict(figures["evaluate"])
    result["labels"] = figures["train_prm"]["labels"]
    result["rollouts"] = {"annotate": figures["annotate"]["rollouts"], "evaluate": result["rollouts"]}
    result["seconds"] = seconds | {"total": sum(seconds.values())}
    folder = run.folder("report")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "metrics.json", result)
    report_page.write_report(
        folder / "index.html", result, read_trees(run.folder("annotate")), run.data, run.config_text
    )
    return {}


def write_json(path: epath.Path, values: Mapping[str, Any]) -> None:
    """Writes strict JSON atomically; a NaN becomes null."""

    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: clean(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [clean(v) for v in value]
        return None if isinstance(value, float) and not np.isfinite(value) else value

    temporary = path.parent / f"{path.name}.tmp"
    temporary.write_text(json.dumps(clean(values), indent=1, allow_nan=False) + "\n")
    temporary.replace(path)


STAGES: dict[str, Callable[[Run], Figures]] = {
    "data": data,
    "sft": sft,
    "annotate": annotate,
    "train_prm": train_prm,
    "evaluate": evaluate,
    "report": report,
}


def run_stage(run: Run, stage: str) -> None:
    """Runs one stage and writes its ``done.json``; a finished stage is left alone (the report is always made anew)."""
    if run.figures(stage) is not None and stage != "report":
        logging.info("%s: already done", stage)
        return
    before = list(STAGES)[: list(STAGES).index(stage)]
    if stage == "annotate" and (run.config.annotate.policy or run.config.annotate.servers):
        before = [] if run.config.data.folder else ["data"]  # somebody else's policy
    unfinished = [name for name in before if run.figures(name) is None and name != "report"]
    if unfinished:
        raise UserError(f"{stage}: the stage {unfinished[0]} has not finished; run `mmprm {unfinished[0]}` first")
    run.folder(stage).mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    figures = STAGES[stage](run)
    if jax.process_index() == 0:
        write_json(run.folder(stage) / "done.json", figures | {"seconds": round(time.monotonic() - started, 1)})


def pipeline(run: Run) -> None:
    """All stages, and the table of results."""
    for stage in STAGES:
        run_stage(run, stage)
    print(report_page.format_table(json.loads((run.folder("report") / "metrics.json").read_text())))
    print(f"\nreport: {run.folder('report') / 'index.html'}")
