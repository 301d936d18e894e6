"""Model folders: released checkpoints <-> Orbax, what training writes, and turning a policy into a PRM.

A model folder of ours holds ``params/`` (Orbax) and ``hf/``: config.json, tokenizer and every other file of a released
source that is not weights, and ``manifest.json``, which says how an export files the weights. A model of our own sizes
is described as transformers' classes have it (``hf_native``).
"""

from __future__ import annotations

import atexit
import copy
import dataclasses
import functools
import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import PartitionSpec as P

from mmprm_jax.models import build, hf, hf_config, hf_native, tokenizer_files
from mmprm_jax.models import tokenizer as tok
from mmprm_jax.models.config import VLMConfig
from mmprm_jax.models.tokenizer import Tokenizer
from mmprm_jax.models.vision import resize_positions
from mmprm_jax.records import UserError
from mmprm_jax.sharding import make_mesh
from mmprm_jax.training.checkpoints import load_params, save_params

_TILING = ("max_dynamic_patch", "dynamic_image_size", "use_thumbnail")  # keys of config.json: how images are cut


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model in memory. ``folder``: where its config.json and tokenizer are; None: it was made here, from scratch."""

    folder: Path | None
    model: hf.Description
    params: Any
    mesh: Any

    @property
    def dtype(self) -> Any:
        return jax.tree.leaves(self.params)[0].dtype


def is_model_folder(path: str | os.PathLike) -> bool:
    """Whether ``path`` is a model folder that we wrote. Raises UserError for a bucket that cannot be read."""
    try:
        return (epath.Path(path) / "hf" / hf.MANIFEST).exists()
    except ImportError as error:
        raise UserError(f"{path}: reading it needs pip install 'mmprm_jax[gcs]' ({error})") from None


@functools.cache
def _local(folder: str) -> Path:
    """``folder``, or a copy of one in a bucket on this machine."""
    if "://" not in folder:
        return Path(folder)
    copied = Path(tempfile.mkdtemp(prefix="mmprm_jax"))
    atexit.register(shutil.rmtree, copied, ignore_errors=True)
    for path in epath.Path(folder).iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    return copied


def _open(path_or_id: str | os.PathLike, revision: str | None) -> hf.Checkpoint:
    folder = epath.Path(path_or_id)
    if (folder / "params").exists() and not (folder / "config.json").exists():
        raise UserError(
            f"{folder}: weights without a description (hf/), as earlier versions left them; remove done.json there and"
            " run the stage again: its checkpoints are taken as they are and the folder is made whole"
        )
    return hf.open_checkpoint(path_or_id, revision)


def from_scratch(cfg: VLMConfig, tokenizer: Tokenizer, params: Any, mesh: Any) -> Loaded:
    """A model of our own sizes, of parameters in float32, without adapters, and without the head for kappa so far.

    Raises UserError when transformers has no class for it.
    """
    if cfg.vision and cfg.tile != cfg.vision.image_size:
        raise UserError(
            f"model.tile_size is {cfg.tile}: the tiles of a new model are as large as model.vision.image_size"
        )
    plain = dataclasses.replace(cfg, kappa=False, decoder=dataclasses.replace(cfg.decoder, lora_rank=0))
    return Loaded(None, hf_native.describe(plain, tokenizer, jnp.float32), params, mesh)


def to_native(loaded: Loaded, tokenizer: Tokenizer) -> Loaded:
    """The same model as transformers' own classes have it. Raises UserError when they cannot compute it exactly.

    InternLM2's decoder is Llama's with the matrices of queries, keys and values in one. Positions of another tile size
    than that of the tiles are resized once and for all.
    """
    cfg, old, params = loaded.model.cfg, loaded.model.config, loaded.params
    longest = hf_config.text_section(old).get("max_position_embeddings") or 0
    try:
        model = hf_native.describe(cfg, tokenizer, loaded.dtype, longest)
    except UserError as error:
        raise UserError(f"{loaded.folder}: --layout=hf: {error}") from None
    kept = {key: old[key] for key in _TILING if key in old}
    policy, prm = hf_config.templates(old)
    config = {**model.config, **kept, hf_config.TEMPLATES: {"policy": policy, "prm": prm}}
    if cfg.vision and cfg.tile != cfg.vision.image_size:
        before, after = cfg.vision.image_size // cfg.vision.patch_size, cfg.tile // cfg.vision.patch_size
        with jax.set_mesh(loaded.mesh):
            whole = jax.sharding.reshard(params["vision"]["positions"], P())
            resized = resize_positions(whole, before, after, after)
        vision = {**params["vision"], "positions": resized}
        params = {**params, "vision": vision}
    return Loaded(loaded.folder, dataclasses.replace(model, config=config), params, loaded.mesh)


def inspect(path_or_id: str | os.PathLike, revision: str | None = None) -> tuple[Path, hf.Description]:
    """The folder of config.json and tokenizer, and the model's description; weights are not read, but checked."""
    if not is_model_folder(path_or_id):
        checkpoint = _open(path_or_id, revision)
        return checkpoint.files, checkpoint.model
    folder = _local(os.fspath(epath.Path(path_or_id) / "hf"))
    stored = hf.read_json(folder / hf.MANIFEST)
    return folder, hf.describe(hf.read_json(folder / "config.json"), hf.Manifest(stored["files"], stored["index"]))


def load(path_or_id: str | os.PathLike, mesh: Any, dtype: Any = None, revision: str | None = None) -> Loaded:
    """A released checkpoint (folder or hub id) or a model folder of ours, on ``mesh``; dtype: as stored by default."""
    if not is_model_folder(path_or_id):
        checkpoint = _open(path_or_id, revision)
        return Loaded(checkpoint.files, checkpoint.model, hf.load_params(checkpoint, mesh, dtype), mesh)
    folder, model = inspect(path_or_id)
    kept = jnp.dtype(hf.read_json(folder / hf.MANIFEST)["dtype"])
    _, abstract = build.abstract(model.cfg, 0, mesh, kept if dtype is None else dtype)
    return Loaded(folder, model, load_params(epath.Path(path_or_id) / "params", abstract), mesh)


def inference_mesh(cfg: VLMConfig) -> Any:
    """All devices: heads over as many as divide them, parameters over the others."""
    return make_mesh({"fsdp": -1, "tensor": math.gcd(jax.device_count(), cfg.decoder.num_kv_heads)})


def convert(
    source: str, target: str, mesh: Any, *, dtype: Any = None, prm: bool = False, verify: bool = False,
    layout: str | None = None,
) -> str:  # fmt: skip
    """A released checkpoint to Orbax, or back, by what ``source`` is. Returns a line that says what was done.

    prm: adds ``<prm>`` as the original does. verify: reads the result again and compares every tensor. layout: "hf":
    whatever ``source`` is, to a checkpoint of transformers' own classes; None: back to the files that came in. Raises
    UserError; a conversion that fails leaves no target behind.
    """
    final = Path(target)
    if final.exists():
        raise UserError(f"{target}: exists already; choose another target or remove it")
    from_folder = is_model_folder(source)
    if from_folder and prm:
        raise UserError("a PRM is made on the way from the released checkpoint: mmprm convert CHECKPOINT TARGET --prm")
    if from_folder and dtype is not None and not layout:
        raise UserError("--dtype is for the way to Orbax; an export has the dtypes of the files that came in")
    note = _check_tokenizer(*inspect(source))
    loaded, tokenizer = load(source, mesh, dtype), None
    if prm:
        loaded, tokenizer = add_prm(loaded)
    part = final.with_name(f"{final.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    if layout or from_folder:
        if layout:
            loaded, more = _native_files(loaded, tokenizer or Tokenizer.load(loaded.folder), part)
            note += more
        else:
            hf.copy_other_files(loaded.folder, part)
        hf.save(part, loaded.params, mesh, loaded.model)
        written, again, added = hf.open_checkpoint(part), loaded, None
    else:
        write_folder(part, loaded, tokenizer)
        written, added = hf.open_checkpoint(source), tokenizer.id(tok.PRM) if tokenizer else None
        again = dataclasses.replace(loaded, params=load(os.fspath(part), mesh).params) if verify else loaded
    if verify:
        _compare(written, again, added)
    part.rename(final)
    size = sum(x.size for x in jax.tree.leaves(loaded.params))
    done = f"{target}: {len(loaded.model.dtypes)} tensors, {size:,} parameters" + (", verified" if verify else "")
    return done + note


def _check_tokenizer(folder: Path, model: hf.Description) -> str:
    """What to say of a model without a tokenizer. Raises UserError for one that cannot be read, or does not fit."""
    if not any((folder / name).exists() for name in (*tokenizer_files.FILES, *tokenizer_files.FOREIGN)):
        return "; there is no tokenizer in it: copy the checkpoint's beside its config.json"
    count, rows = len(Tokenizer.load(folder)), model.cfg.decoder.vocab_size
    if count > rows:
        raise UserError(f"{folder}: the tokenizer has {count} tokens, and the model {rows} embeddings only")
    return ""


def _native_files(loaded: Loaded, tokenizer: Tokenizer, folder: Path) -> tuple[Loaded, str]:
    """Writes all but config.json and weights; returns the model as it is to be written, and what the user must know."""
    native = to_native(loaded, tokenizer)
    hf.copy_other_files(loaded.folder, folder)
    for path in (*folder.glob("*.py"), *folder.glob("config.json"), *folder.glob("*processor_config.json")):
        path.unlink()  # code that must not run, and what is of the other layout
    note = ""
    if tokenizer.is_internlm2:
        tokenizer.save(folder)
        note = "; the tokenizer stays InternLM2's, which transformers has as remote code only: encode prompts with ours"
    else:
        tokenizer.for_transformers().save(folder)
    if native.model.cfg.vision and not note:
        tiles, thumbnail = hf_config.tiling(native.model.config)
        if tiles > 1 and not thumbnail:  # which transformers always adds
            return native, "; no image processor: transformers has none without a thumbnail"
        for name, content in hf_native.processor_files(native.model.cfg, tiles).items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    return native, note


def write_folder(folder: epath.PathLike, loaded: Loaded, tokenizer: Tokenizer | None = None) -> None:
    """Writes a model folder of ours. tokenizer: instead of that in ``loaded.folder``. Every process calls it."""
    folder = epath.Path(folder)
    save_params(folder / "params", loaded.params)
    if jax.process_index() > 0:
        return
    (folder / "hf").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        other = Path(temporary)
        hf.copy_other_files(loaded.folder, other)
        if tokenizer is not None:
            tokenizer.in_folder().save(other)
        hf.write_config(other, loaded.model.config)
        for path in sorted(other.iterdir()):
            (folder / "hf" / path.name).write_bytes(path.read_bytes())
    manifest = {**dataclasses.asdict(loaded.model.manifest), "dtype": jnp.dtype(loaded.dtype).name}
    (folder / "hf" / hf.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")  # last: now it is one


def _compare(checkpoint: hf.Checkpoint, loaded: Loaded, added: int | None) -> None:
    """Raises UserError listing the tensors of the files that differ, bit for bit in the parameters' dtype."""
    wanted, wrong = dict.fromkeys(checkpoint.model.dtypes, loaded.dtype), []
    with jax.set_mesh(loaded.mesh):
        for key, got in hf.tensors(loaded.model.groups, loaded.params, wanted):
            want = hf.read_tensor(checkpoint, key).astype(loaded.dtype)
            if added is not None and got.shape[0] == loaded.model.cfg.decoder.vocab_size:
                got = np.delete(got, added, axis=0)  # the new row
                want = want[: len(got)] if len(want) == len(got) else np.delete(want, added, axis=0)
            if got.shape != want.shape or got.tobytes() != want.tobytes():
                wrong.append(key)
    if wrong:
        raise UserError(f"verification failed: {len(wrong)} of {len(wanted)} tensors differ: {', '.join(wrong[:20])}")


def add_prm(loaded: Loaded) -> tuple[Loaded, Tokenizer]:
    """A policy with the token ``<prm>``: its embedding and output row are the means of the old ones (MM-PRM).

    Raises UserError when the tokenizer has it already or cannot take it.
    """
    old = Tokenizer.load(loaded.folder)
    tokenizer = old.with_token(tok.PRM)
    if len(tokenizer) == len(old):
        raise UserError(f"{loaded.folder}: the tokenizer has {tok.PRM} already; this is a PRM")
    size, new = loaded.model.cfg.decoder.vocab_size, tokenizer.id(tok.PRM)
    if new > size:
        raise UserError(f"{loaded.folder}: the tokenizer's next id is {new}, but the model has {size} embeddings only")
    with jax.set_mesh(loaded.mesh):
        params = build.add_token(loaded.params, loaded.mesh, new)
    config = copy.deepcopy(loaded.model.config)
    hf_config.set_vocab_size(config, max(size, new + 1))
    model = hf.describe(config, loaded.model.manifest)
    return dataclasses.replace(loaded, model=model, params=params), tokenizer


@dataclasses.dataclass(frozen=True)
class Start:
    """What a training run begins with: sizes, graph definition and parameters on the mesh, and the tokenizer."""

    cfg: VLMConfig
    graphdef: Any
    params: Any
    tokenizer: Tokenizer
    loaded: Loaded  # as the model folder will have it, with <prm> where it was added


def warm_start(
    path_or_id: str | os.PathLike, mesh: Any, *, prm: bool = False, kappa: bool = False, lora_rank: int = 0,
    lora_alpha: float = 16.0, remat: str = "full", seed: int = 0,
) -> Start:  # fmt: skip
    """A released checkpoint (folder or hub id), or a model folder of ours, to be trained.

    prm: adds the token <prm> if the tokenizer lacks it; kappa: a head for Beta-Binomial labels; lora_rank, lora_alpha:
    adapters in the decoder (``lora.merge`` adds them to the matrices afterwards); remat: a name of ``layers.REMAT``.
    """
    loaded = load(path_or_id, mesh)
    tokenizer = Tokenizer.load(loaded.folder)
    if prm and len(tokenizer.with_token(tok.PRM)) > len(tokenizer):
        loaded, tokenizer = add_prm(loaded)
    cfg = loaded.model.cfg
    decoder = dataclasses.replace(cfg.decoder, lora_rank=lora_rank, lora_alpha=lora_alpha)
    cfg = dataclasses.replace(cfg, kappa=kappa, remat=remat, decoder=decoder)
    image = tokenizer.id(tok.IMAGE) if cfg.vision else -1
    with jax.set_mesh(mesh):
        have = {name: x for name, x in loaded.params.items() if name != "kappa" or kappa}
        params = build.complete(have, cfg, image, seed, mesh)
    return Start(cfg, build.abstract(cfg, image, mesh)[0], params, tokenizer, loaded)
