"""The models of a run: its tokenizer and prompts, its policy and its PRM."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from mmprm_jax import convert
from mmprm_jax.data.encode import Language
from mmprm_jax.models import build
from mmprm_jax.models.config import VLMConfig
from mmprm_jax.models.tokenizer import Tokenizer
from mmprm_jax.policy import EngineSettings, Policy
from mmprm_jax.prm import PRM
from mmprm_jax.stages import training
from mmprm_jax.stages.run import Run
from mmprm_jax.training.checkpoints import load_params


def load_language(run: Run) -> Language:
    """The policy's: that of ``config.policy``, or of a model of our own. Weights are not read for it."""
    c = run.config
    if c.policy:
        folder, model = convert.inspect(c.policy)
        cfg = dataclasses.replace(model.cfg, remat=c.model.remat, kappa=False)  # which only a PRM has
        return Language.stored(Tokenizer.load(folder), cfg, model.config)
    path = run.data / "tokenizer.json"
    tokenizer = Tokenizer.load(path if path.exists() else run.folder("data") / "tokenizer.json")
    sizes = dataclasses.asdict(c.model)
    sizes["decoder"]["vocab_size"] = len(tokenizer)  # so that no id can be outside of it
    return Language.own(tokenizer, VLMConfig.from_dict(sizes))


def load_stage_params(run: Run, stage: str, language: Language, mesh: Any, dtype: str = "") -> Any:
    """The weights that ``stage`` trained, or those of ``config.policy`` if there was nothing to train.

    dtype: default as stored.
    """
    c = run.config
    if stage == "sft" and c.policy and not c.sft.steps:
        params = convert.load(c.policy, mesh, dtype or None).params
        return {name: x for name, x in params.items() if name != "kappa"}
    _, shapes = build.abstract(language.cfg, language.image_token, mesh, dtype or "float32")
    return load_params(run.folder(stage) / "params", shapes)


def load_policy(run: Run, settings: EngineSettings, mesh: Any) -> Policy:
    """The policy that samples with ``settings``: another checkpoint that they name, or the run's own."""
    template = getattr(settings, "template", "")  # the evaluation has none
    if other := getattr(settings, "policy", ""):
        found = Policy.from_pretrained(other, mesh=mesh, dtype=settings.dtype or None, template=template or None)
        return dataclasses.replace(found, max_tiles=run.config.max_tiles, thumbnail=True)
    language = load_language(run)
    if run.config.policy and template:
        language = Language.released(language.tokenizer, language.cfg, template)
    params = load_stage_params(run, "sft", language, mesh, settings.dtype)
    return Policy(language, params, mesh, run.config.max_tiles)


def load_prm(run: Run, mesh: Any) -> PRM:
    """The run's PRM, as the evaluation uses it."""
    c, folder = run.config.evaluate, run.folder("train_prm")
    kappa = convert.is_model_folder(folder) and convert.inspect(folder)[1].cfg.kappa
    language = load_language(run).with_prm(kappa)
    params = load_stage_params(run, "train_prm", language, mesh, c.dtype)
    problems = max(1, c.score_rows // 4)
    return PRM(language, params, mesh, run.config.max_tiles, problems=problems, solutions=4, bucket=16)


def policy_start(run: Run, language: Language, mesh: Any) -> convert.Start:
    """What the policy's training begins with: ``config.policy``, or random weights."""
    c, adapters = run.config, training.adapters(run.config.sft)
    if c.policy:
        return convert.warm_start(c.policy, mesh, remat=language.cfg.remat, seed=c.seed, **adapters)
    cfg = training.with_adapters(language.cfg, **adapters)
    graphdef, params = build.initialise(cfg, language.image_token, c.seed, mesh)
    return training.own_start(cfg, graphdef, params, language, mesh)


def prm_start(run: Run, language: Language, mesh: Any) -> convert.Start:
    """What the PRM's training begins with: the policy's weights, with what a PRM has more.

    language: the PRM's.
    """
    c, adapters = run.config, training.adapters(run.config.train_prm)
    if c.policy:
        source = os.fspath(run.folder("sft")) if c.sft.steps else c.policy
        return convert.warm_start(
            source, mesh, prm=True, kappa=language.cfg.kappa, remat=language.cfg.remat, seed=c.seed, **adapters
        )
    cfg, image = training.with_adapters(language.cfg, **adapters), language.image_token
    params = build.add_token(load_stage_params(run, "sft", load_language(run), mesh), mesh)
    params = build.complete(params, cfg, image, c.seed, mesh)
    return training.own_start(cfg, build.abstract(cfg, image, mesh)[0], params, language, mesh)
