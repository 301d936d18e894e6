"""The stages of the pipeline. Each reads record files and writes record files below ``<workdir>/<stage>``.

A finished stage leaves ``done.json`` (its figures) and is skipped from then on; an interrupted one goes on where it
was: training from its newest checkpoint, annotation inside of its trees, evaluation after its last saved piece.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import logging
from etils import epath

from mmprm_jax import annotation, convert, environment, interruption, io, manifest, records
from mmprm_jax.data import digits, encode, training_files
from mmprm_jax.data.encode import Language
from mmprm_jax.data.packing import Sizes
from mmprm_jax.data.training_files import Encoded, TrainingSet
from mmprm_jax.evaluation.stage import evaluate
from mmprm_jax.manifest import Depth
from mmprm_jax.models import build, hf_config, lora
from mmprm_jax.models.config import VLMConfig
from mmprm_jax.models.tokenizer import Tokenizer
from mmprm_jax.policy import EngineSettings, Policy
from mmprm_jax.prm import PRM
from mmprm_jax.processes import in_first, is_first, wait_for_all
from mmprm_jax.records import Candidate, Problem, SFTExample, StepExample, UserError
from mmprm_jax.report import report as report_page
from mmprm_jax.rollout.rollouts import LocalSampler, Verify
from mmprm_jax.rollout.sampling import Sampling
from mmprm_jax.schema import from_config, raise_for
from mmprm_jax.search import labels, paper
from mmprm_jax.search.settings import Settings
from mmprm_jax.search.store import each_tree, read_trees
from mmprm_jax.settings import Annotate, Config, Training
from mmprm_jax.sharding import BATCH, make_mesh, make_own_mesh, row_share
from mmprm_jax.training import losses, trainer
from mmprm_jax.training.checkpoints import load_params
from mmprm_jax.training.input import Batches, Tiles

Figures = dict[str, Any]
TRAINING = ("sft", "train_prm")  # the stages that train


class Run:
    """A configuration, a work directory and the mesh; what every stage needs."""

    def __init__(self, config: Config, workdir: epath.Path, config_text: str):
        self.config, self.workdir, self.config_text = config, workdir, config_text
        self.root = workdir  # of the run whose stages this one reads
        self.mesh_shape = dict(zip(("data", "fsdp", "tensor"), config.mesh, strict=True))
        self.mesh = make_mesh(self.mesh_shape)
        jax.set_mesh(self.mesh)
        self.data = epath.Path(config.data.folder) if config.data.folder else workdir / "data"
        self.sampled = workdir / "evaluate"  # what the policy sampled for the evaluation
        self.controls = True  # whether the evaluation has them
        self.verdicts: Mapping[str, int] = {}  # of official rules, see evaluation.benchmark

    @functools.cached_property
    def own_mesh(self) -> Any:
        """Of this process's devices."""
        return self.mesh if jax.process_count() == 1 else make_own_mesh(self.mesh_shape)

    def folder(self, stage: str) -> epath.Path:
        return self.workdir / stage

    def figures(self, stage: str) -> Figures | None:
        """What a finished stage reported; None when it has not finished. Raises UserError if that is damaged."""
        found = manifest.read_done(self.folder(stage), manifest.again(self, stage))
        return None if found is None else {key: value for key, value in found.items() if key != "manifest"}

    def record_files(self) -> list[epath.Path]:
        """The files of records, and the tokenizer, that no stage wrote."""
        if not self.config.data.folder:
            return []
        names = [f"{name}.jsonl" for name in (*digits.SPLITS, "truth")] + ["tokenizer.json", *self._sft_files()]
        return [path for path in (self.data / name for name in dict.fromkeys(names)) if path.exists()]

    def image_files(self) -> Iterator[epath.Path]:
        """The images that the records name."""
        for split in digits.SPLITS:
            yield from (self.data / p.image for p in records.read(self.data / f"{split}.jsonl", Problem) if p.image)
        for path in (self.data / name for name in self._sft_files()):
            found = records.read(path, SFTExample) if path.exists() else ()  # told by the stage that needs it
            yield from (path.parent / x.image for x in found if x.image)

    def _sft_files(self) -> Sequence[str]:
        return self.config.sft.files if self.config.sft.steps else ()

    def problems(self, split: str) -> list[Problem]:
        return records.read_problems(self.data / f"{split}.jsonl")

    def judged(self, candidate: Candidate) -> Candidate:
        """A candidate as the evaluation counts it: right if it was verified."""
        return candidate

    def category(self, problem: Problem) -> str:
        """What the evaluation's figures are broken down by."""
        return problem.source

    @functools.cached_property
    def language(self) -> Language:
        """The policy's: that of ``config.policy``, or of a model of our own. Weights are not read for it."""
        c = self.config
        if c.policy:
            folder, model = convert.inspect(c.policy)
            cfg = dataclasses.replace(model.cfg, remat=c.model.remat)
            return Language.stored(Tokenizer.load(folder), cfg, model.config)
        path = self.data / "tokenizer.json"
        tokenizer = Tokenizer.load(path if path.exists() else self.folder("data") / "tokenizer.json")
        sizes = dataclasses.asdict(c.model)
        sizes["decoder"]["vocab_size"] = len(tokenizer)  # so that no id can be outside of it
        return Language.own(tokenizer, VLMConfig.from_dict(sizes))

    def load(self, stage: str, language: Language, mesh: Any, dtype: str = "") -> Any:
        """The weights that ``stage`` trained, or those of ``config.policy`` if there was nothing to train.

        dtype: default as stored.
        """
        c = self.config
        if stage == "sft" and c.policy and not c.sft.steps:
            return convert.load(c.policy, mesh, dtype or None).params
        _, shapes = build.abstract(language.cfg, language.image_token, mesh, dtype or "float32")
        return load_params(self.folder(stage) / "params", shapes)

    def policy(self, settings: EngineSettings, mesh: Any) -> Policy:
        """The policy of this run."""
        language = self.language
        template = getattr(settings, "template", "")  # the evaluation has none
        if self.config.policy and template:
            language = Language.released(language.tokenizer, language.cfg, template)
        return Policy(language, self.load("sft", language, mesh, settings.dtype), mesh, self.config.max_tiles)

    def prm(self, mesh: Any) -> PRM:
        """The PRM of this run, for the evaluation."""
        language, c = self.language.with_prm(), self.config.evaluate
        params = self.load("train_prm", language, mesh, c.dtype)
        batch = {"problems": max(1, c.score_rows // 4), "solutions": 4, "bucket": 16}
        return PRM(language, params, mesh, self.config.max_tiles, **batch)


def other_policy(run: Run, settings: Annotate, mesh: Any) -> Policy:
    """The checkpoint that ``settings.policy`` names: a folder, a hub id, or what ``mmprm convert`` wrote."""
    found = Policy.from_pretrained(
        settings.policy, mesh=mesh, dtype=settings.dtype or None, template=settings.template or None
    )
    return dataclasses.replace(found, max_tiles=run.config.max_tiles, thumbnail=True)


EXAMPLES = {"default": labels.step_examples, "paper": paper.step_examples}  # paper: as the original does


def choose(choices: Mapping[str, Any], name: str, key: str) -> Any:
    """The choice of that name. Raises UserError naming the config key."""
    if name not in choices:
        raise UserError(f"{key}: {name!r} is not one of {', '.join(choices)}")
    return choices[name]


def training_settings(config: Training, seed: int) -> trainer.Settings:
    """The settings of one training stage."""
    freeze = config.freeze
    if config.lora_rank:  # the adapters are trained in place of what they are beside
        freeze = tuple(dict.fromkeys((*freeze, "decoder")))
    return from_config(trainer.Settings, config, seed=seed, freeze=freeze)


def check_rows(run: Run, names: Sequence[str]) -> None:
    """Raises UserError when several processes cannot split the rows of a step of these training stages."""
    if row_share(run.mesh)[1] == 1:
        return
    parts = math.prod(run.mesh.shape[axis] for axis in BATCH)
    raise_for(
        (f"{name}.batch_size", f"{run.config[name].batch_size} rows cannot be split over {parts} devices of the mesh")
        for name in names
        if run.config[name].steps and run.config[name].batch_size % parts
    )


def data(run: Run) -> Figures:
    """Generates the embedded problem set, unless the configuration names a folder with a data set.

    A folder without tokenizer.json gets one of its own, in ``<workdir>/data``, unless the policy has one.
    """
    if run.config.data.folder:
        figures: Figures = {"problems": {split: len(run.problems(split)) for split in digits.SPLITS}}
        for name in run.config.sft.files if run.config.sft.steps else ():  # told before anything is trained
            if not (run.data / name).exists():
                raise UserError(f"{run.data / name}: no such file; sft.files names it")
        if is_first() and not run.config.policy and not (run.data / "tokenizer.json").exists():
            tokenizer = Tokenizer.train_bpe(texts(run), run.config.data.vocab)
            tokenizer.save(run.folder("data") / "tokenizer.json")
            figures["vocabulary"] = len(tokenizer)
        return figures
    settings = from_config(digits.Settings, run.config.data, seed=run.config.seed)
    if is_first():
        digits.generate(run.data, settings)
    return {"problems": {split: getattr(settings, split) for split in digits.SPLITS}}


def texts(run: Run) -> Iterator[str]:
    """What a tokenizer is learned from: the demonstrations, and the questions of the training problems."""
    for name in run.config.sft.files:
        for example in records.read(run.data / name, SFTExample):
            yield example.question
            yield example.response
    for problem in records.read(run.data / "train.jsonl", Problem):
        yield problem.question


def training_set(
    run: Run, stage: str, name: str, kind: str, language: Language, sources: Sequence[epath.Path],
    images: epath.Path, examples: Callable[[encode.TileCount], Iterable[Encoded]], **settings: Any,
) -> TrainingSet:  # fmt: skip
    """The encoded ``examples`` of a stage, made anew where the ``sources`` or the settings are others than before.

    images: the folder that their images are relative to.
    """
    c, path, cfg = run.config[stage], run.folder(stage) / "input" / name, language.cfg
    made_with = {
        "sources": training_files.checksum(sources), "tokenizer": language.tokenizer.fingerprint,
        "tokens_per_tile": cfg.tokens_per_tile, "tile": cfg.tile if cfg.vision else 0,
        "max_tiles": run.config.max_tiles, "max_length": c.max_length, "row_tiles": c.row_tiles, **settings,
    }  # fmt: skip
    if is_first() and not training_files.is_current(path, made_with):
        encoded = examples(encode.tile_count(images, cfg, run.config.max_tiles))
        training_files.write(path, kind, encoded, c.max_length, c.row_tiles, made_with)
    wait_for_all(f"{path}: written")
    return TrainingSet(path, kind, images, made_with)


def train(
    run: Run, stage: str, language: Language, start: convert.Start, loss: losses.Loss, sets: Sequence[TrainingSet],
    weights: Sequence[float] = (),
) -> Any:  # fmt: skip
    """Trains what ``start`` begins with on the sets and writes it into the stage's folder. Returns the parameters.

    Adapters are added to their matrices, and the head that only Beta-Binomial labels need is left out. The stage's
    folder becomes a model folder as ``mmprm convert`` writes them.
    """
    c, folder, vision = run.config[stage], run.folder(stage), start.cfg.vision
    tiles = Tiles(start.cfg.tile, run.config.max_tiles, c.shift, c.noise) if vision else None
    sizes = Sizes(c.batch_size, c.max_length, c.row_tiles if vision else 0, c.row_examples)
    settings = training_settings(c, run.config.seed)
    with Batches(sets, sizes, run.config.seed, tiles, weights, row_share(run.mesh)) as source:
        params = trainer.fit(stage, folder, start.graphdef, start.params, loss, source, settings, run.mesh)
    params = {name: x for name, x in lora.merge(params, start.cfg).items() if name != "kappa"}
    # what the model does by itself, wherever it is loaded: the prompts and the tiles that it was trained with
    trained_with = {hf_config.TEMPLATES: dict(zip(("policy", "prm"), language.templates, strict=True))}
    if vision:
        trained_with |= {"max_dynamic_patch": run.config.max_tiles, "dynamic_image_size": True, "use_thumbnail": True}
    model = dataclasses.replace(start.loaded.model, config={**start.loaded.model.config, **trained_with})
    convert.write_folder(folder, dataclasses.replace(start.loaded, model=model, params=params), start.tokenizer)
    return params


def adapters(run: Run, stage: str) -> dict[str, Any]:
    """The adapters of a training stage, as ``convert.warm_start`` and ``DecoderConfig`` take them."""
    return {"lora_rank": run.config[stage].lora_rank, "lora_alpha": run.config[stage].lora_alpha}


def sft(run: Run) -> Figures:
    """Supervised fine-tuning of the policy, from random weights or those of ``config.policy``."""
    c, language = run.config.sft, run.language
    if not c.steps:
        if not run.config.policy:
            raise UserError("sft.steps is 0: name the policy that is left as it is, --config.policy=FOLDER_OR_HUB_ID")
        return {}

    def load(number: int, path: epath.Path) -> TrainingSet:
        def examples(tiles: encode.TileCount) -> Iterable[Encoded]:
            return (language.demonstration(e, tiles) for e in records.read(path, SFTExample))

        return training_set(run, "sft", f"{number}-{path.stem}", "policy", language, [path], path.parent, examples)

    sets = [load(number, run.data / name) for number, name in enumerate(c.files)]
    if run.config.policy:
        start = convert.warm_start(
            run.config.policy, run.mesh, remat=language.cfg.remat, seed=run.config.seed, **adapters(run, "sft")
        )
    else:
        cfg = with_adapters(language.cfg, **adapters(run, "sft"))
        graphdef, params = build.initialise(cfg, language.image_token, run.config.seed, run.mesh)
        start = own_start(cfg, graphdef, params, language, run.mesh)
    params = train(run, "sft", language, start, losses.policy_loss, sets, c.weights)
    left_out = [data.summary["left_out"] for data in sets]
    parameters = sum(x.size for x in jax.tree.leaves(params))
    return {"examples": sum(map(len, sets)), "left_out": left_out, "parameters": parameters}


def own_start(cfg: VLMConfig, graphdef: Any, params: Any, language: Language, mesh: Any) -> convert.Start:
    """A model of our own sizes, to be trained."""
    loaded = convert.from_nothing(cfg, language.tokenizer, params, mesh)
    return convert.Start(cfg, graphdef, params, language.tokenizer, loaded)


def with_adapters(cfg: VLMConfig, lora_rank: int, lora_alpha: float) -> VLMConfig:
    """The sizes of a model that trains adapters."""
    return dataclasses.replace(
        cfg, decoder=dataclasses.replace(cfg.decoder, lora_rank=lora_rank, lora_alpha=lora_alpha)
    )


def annotate(run: Run) -> Figures:
    """A search tree for every training problem."""
    c, folder, problems = run.config.annotate, run.folder("annotate"), run.problems("train")
    together = c.lockstep or jax.process_count() == 1
    share = (0, 1) if together else (jax.process_index(), jax.process_count())
    mesh = run.mesh if together else run.own_mesh

    def make(verify: Verify) -> LocalSampler:
        policy = other_policy(run, c, mesh) if c.policy else run.policy(c, mesh)
        return policy.sampler(c, run.data, c.num_rollouts, run.config.seed, "annotate", verify)

    if c.servers:
        source = annotation.remote(c, run.data, run.config.seed, from_config(Sampling, c, stop=()))
    else:
        source = annotation.local(make, c)
    with jax.set_mesh(mesh), source as sampler:
        failed = annotation.run(
            folder, problems, sampler, from_config(Settings, c), c, worker=share[0], workers=share[1],
            writes=not together or is_first(),
        )  # fmt: skip
    return annotation.finish(folder, problems, failed, c.skip_failed)


def train_prm(run: Run) -> Figures:
    """Trees to step labels, and a PRM trained on them from the policy's weights."""
    c, folder, kappa = run.config.train_prm, run.folder("train_prm"), run.config.train_prm.label == "beta_binomial"
    language = run.language.with_prm(kappa)
    data = step_examples(run, language)
    start = prm_start(run, language)
    loss = losses.prm_loss(c.label, c.threshold, *language.classes)
    train(run, "train_prm", language, start, loss, [data])
    found = labels.histogram(records.read(folder / "examples.jsonl", StepExample))
    return {"labels": found, "left_out": data.summary["left_out"]}


def prm_start(run: Run, language: Language) -> convert.Start:
    """The policy's weights, with what a PRM has more."""
    seed, policy = run.config.seed, run.config.policy
    if policy:
        source = os.fspath(run.folder("sft")) if run.config.sft.steps else policy
        return convert.warm_start(
            source, run.mesh, prm=True, kappa=language.cfg.kappa, remat=language.cfg.remat, seed=seed,
            **adapters(run, "train_prm"),
        )  # fmt: skip
    cfg, image = with_adapters(language.cfg, **adapters(run, "train_prm")), language.image_token
    params = build.add_token(run.load("sft", run.language, run.mesh), run.mesh)
    params = build.complete(params, cfg, image, seed, run.mesh)
    return own_start(cfg, build.abstract(cfg, image, run.mesh)[0], params, language, run.mesh)


def step_examples(run: Run, language: Language) -> TrainingSet:
    """The step examples of the trees, one tree in memory at a time; people can read them in ``examples.jsonl``."""
    c, path = run.config.train_prm, run.folder("train_prm") / "examples.jsonl"
    chosen, labelled = from_config(labels.LabelSettings, c), EXAMPLES[c.mode]

    def write() -> None:
        trees = each_tree(run.folder("annotate"))
        if not records.write(path, (e for tree in trees for e in labelled(tree, chosen, run.config.seed)), noted=True):
            raise UserError(
                "train_prm: no tree has both right and wrong solutions; the policy is too weak or too strong"
            )

    def examples(tiles: encode.TileCount) -> Iterable[Encoded]:
        write()
        return (language.steps(e, tiles) for e in records.read(path, StepExample))

    sources, made = sorted(run.folder("annotate").glob("trees-*.jsonl")), dataclasses.asdict(chosen)
    encoded = training_set(
        run, "train_prm", "steps", "prm", language, sources, run.data, examples, mode=c.mode, seed=run.config.seed,
        **made,
    )  # fmt: skip
    if is_first():
        if not path.exists():  # the encoded set alone was left
            write()
        io.check(path)
    return encoded


def report(run: Run) -> Figures:
    """``report/metrics.json`` and the page ``report/index.html``."""
    if not is_first():
        return {}
    figures = {stage: run.figures(stage) for stage in STAGES if stage != "report"}
    missing = [stage for stage, found in figures.items() if found is None]
    if missing:
        raise UserError(f"report: these stages have not finished: {', '.join(missing)}")
    seconds = {stage: found["seconds"] for stage, found in figures.items()}
    result = dict(figures["evaluate"])
    result["labels"] = figures["train_prm"]["labels"]
    result["rollouts"] = {"annotate": figures["annotate"]["rollouts"], "evaluate": result["rollouts"]}
    result.pop("environment", None)  # that of one stage
    result["seconds"] = seconds | {"total": sum(seconds.values())}
    folder = run.folder("report")
    folder.mkdir(parents=True, exist_ok=True)
    io.write_json(folder / "metrics.json", result)
    report_page.write_report(
        folder / "index.html", result, read_trees(run.folder("annotate")), run.data, run.config_text
    )
    return {}


STAGES: dict[str, Callable[[Run], Figures]] = {
    "data": data,
    "sft": sft,
    "annotate": annotate,
    "train_prm": train_prm,
    "evaluate": evaluate,
    "report": report,
}


def run_stage(run: Run, stage: str) -> None:
    """Runs one stage and writes its ``done.json``; a finished stage is left alone (the report is always made anew).

    Raises UserError when what the stage reads is no longer what was written.
    """
    done = stage != "report" and run.figures(stage) is not None
    wait_for_all(f"stage {stage}: begin")  # before one of them can be done with it
    if done:
        in_first(lambda: manifest.check(run, [stage], Depth.SIZES))
        logging.info("%s: already done", stage)
        return
    interruption.check()
    check_rows(run, [stage] if stage in TRAINING else [])
    before = manifest.reads(run, stage)
    unfinished = [name for name in before if run.figures(name) is None]
    if unfinished:
        raise UserError(f"{stage}: the stage {unfinished[0]} has not finished; run `mmprm {unfinished[0]}` first")
    run.folder(stage).mkdir(parents=True, exist_ok=True)
    in_first(lambda: manifest.begin(run, stage))
    started = time.monotonic()
    figures = STAGES[stage](run)
    if is_first():
        noted = {"seconds": round(time.monotonic() - started, 1), "environment": environment.describe()}
        manifest.finish(run, stage, figures | noted)
    wait_for_all(f"stage {stage}: end")


def force(run: Run, stage: str, command: str) -> None:
    """Moves aside what a stage made and what follows, for ``command`` to make anew. Raises UserError."""
    choose(STAGES, stage, "--force-stage")
    if command not in ("pipeline", stage):
        raise UserError(f"--force-stage={stage}: run it with `mmprm {stage}` or `mmprm pipeline`")
    if is_first():
        manifest.force(run, stage)
    wait_for_all("forced")


def pipeline(run: Run) -> None:
    """All stages, and the table of results."""
    check_rows(run, TRAINING)
    for stage in STAGES:
        run_stage(run, stage)
    if not is_first():
        return
    print(report_page.format_table(json.loads((run.folder("report") / "metrics.json").read_text())))
    print(f"\nreport: {run.folder('report') / 'index.html'}")
