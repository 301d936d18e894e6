"""What the two training stages have in common: examples to packed rows, rows to a model folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from etils import epath

from mmprm_jax import convert, settings
from mmprm_jax.data import encode, training_files
from mmprm_jax.data.encode import Language
from mmprm_jax.data.packing import Sizes
from mmprm_jax.data.training_files import Encoded, TrainingSet
from mmprm_jax.models import hf, hf_config, lora
from mmprm_jax.models.config import VLMConfig
from mmprm_jax.processes import is_first, wait_for_all
from mmprm_jax.schema import from_config
from mmprm_jax.sharding import row_share
from mmprm_jax.training import losses, trainer
from mmprm_jax.training.input import Batches, Tiles


@dataclasses.dataclass(frozen=True)
class Job:
    """One training: its name, settings and folder, tiles of an image at most, the seed, and the devices."""

    name: str
    settings: settings.Training
    folder: epath.Path
    max_tiles: int
    seed: int
    mesh: Any


def trainer_settings(config: settings.Training, seed: int) -> trainer.Settings:
    """The settings of the training loop."""
    freeze = config.freeze
    if config.lora_rank:  # the adapters are trained in place of what they are beside
        freeze = tuple(dict.fromkeys((*freeze, "decoder")))
    return from_config(trainer.Settings, config, seed=seed, freeze=freeze)


def training_set(
    job: Job, name: str, kind: str, language: Language, sources: Sequence[epath.Path], images: epath.Path,
    examples: Callable[[encode.TileCount], Iterable[Encoded]], **made_of: Any,
) -> TrainingSet:  # fmt: skip
    """The encoded ``examples``, made anew where the ``sources`` or the settings are others than before.

    images: the folder that their images are relative to. made_of: further settings that the examples depend on.
    """
    c, path, cfg = job.settings, job.folder / "input" / name, language.cfg
    made_with = {
        "sources": training_files.checksum(sources), "tokenizer": language.tokenizer.fingerprint,
        "tokens_per_tile": cfg.tokens_per_tile, "tile": cfg.tile if cfg.vision else 0,
        "max_tiles": job.max_tiles, "max_length": c.max_length, "row_tiles": c.row_tiles, **made_of,
    }  # fmt: skip
    if is_first() and not training_files.is_current(path, made_with):
        encoded = examples(encode.tile_count(images, cfg, job.max_tiles))
        training_files.write(path, kind, encoded, c.max_length, c.row_tiles, made_with)
    wait_for_all(f"{path}: written")
    return TrainingSet(path, kind, images, made_with)


def train(
    job: Job, language: Language, start: convert.Start, loss: losses.Loss, sets: Sequence[TrainingSet],
    weights: Sequence[float] = (),
) -> Any:  # fmt: skip
    """Trains what ``start`` begins with on the sets and writes it into the job's folder. Returns the parameters.

    Adapters are added to their matrices. The job's folder becomes a model folder as ``mmprm convert`` writes them.
    """
    c, vision = job.settings, start.cfg.vision
    tiles = Tiles(start.cfg.tile, job.max_tiles, c.shift, c.noise) if vision else None
    sizes = Sizes(c.batch_size, c.max_length, c.row_tiles if vision else 0, c.row_examples)
    loop = trainer_settings(c, job.seed)
    with Batches(sets, sizes, job.seed, tiles, weights, row_share(job.mesh)) as source:
        params = trainer.fit(job.name, job.folder, start.graphdef, start.params, loss, source, loop, job.mesh)
    params = lora.merge(params, start.cfg)
    # what the model does by itself, wherever it is loaded: the prompts and the tiles that it was trained with
    trained_with: dict[str, Any] = {hf_config.TEMPLATES: dict(zip(("policy", "prm"), language.templates, strict=True))}
    if vision:
        trained_with |= {"max_dynamic_patch": job.max_tiles, "dynamic_image_size": True, "use_thumbnail": True}
    model = dataclasses.replace(start.loaded.model, config={**start.loaded.model.config, **trained_with})
    model = hf.with_kappa(model, start.cfg.kappa)
    convert.write_folder(job.folder, dataclasses.replace(start.loaded, model=model, params=params), start.tokenizer)
    return params


def adapters(config: settings.Training) -> dict[str, Any]:
    """The adapters of a training, as ``convert.warm_start`` and ``DecoderConfig`` take them."""
    return {"lora_rank": config.lora_rank, "lora_alpha": config.lora_alpha}


def with_adapters(cfg: VLMConfig, lora_rank: int, lora_alpha: float) -> VLMConfig:
    """The sizes of a model that trains adapters."""
    decoder = dataclasses.replace(cfg.decoder, lora_rank=lora_rank, lora_alpha=lora_alpha)
    return dataclasses.replace(cfg, decoder=decoder)


def own_start(cfg: VLMConfig, graphdef: Any, params: Any, language: Language, mesh: Any) -> convert.Start:
    """A model of our own sizes, to be trained."""
    loaded = convert.from_scratch(cfg, language.tokenizer, params, mesh)
    return convert.Start(cfg, graphdef, params, language.tokenizer, loaded)
