"""Released checkpoints: safetensors in a folder or on the Hugging Face hub <-> parameters on a mesh.

Import reads tensor by tensor, each device (and so each host) its own part, and lays it out on the mesh; export writes
the same keys, shapes, dtypes and files that came in. No pickle, no remote code.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import copy
import dataclasses
import functools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mmprm_jax.models import build, hf_adapter, hf_config, hf_unreadable, tokenizer_files
from mmprm_jax.models.config import VLMConfig
from mmprm_jax.models.hf_layout import KAPPA, Group, get, layout, put
from mmprm_jax.records import UserError
from mmprm_jax.settings import HUB_ID
from mmprm_jax.sharding import AXES, fit_spec

_DTYPES = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}
# What belongs to a checkpoint beside its weights; code is copied for the original's sake and never run.
_OTHER = ("*.json", "*.model", "*.txt", "*.jinja", "*.py", "*.md")
INDEX = "model.safetensors.index.json"
MANIFEST = "manifest.json"
KAPPA_FILE = "kappa/model.safetensors"  # apart: others that read all weight files of a folder know nothing of it


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What an export needs to write the files that came in.

    files: {name: {"metadata": {…} or None, "tensors": {key: dtype}}}; index: the metadata of the index file, None when
    the checkpoint is a single file without one.
    """

    files: dict[str, Any]
    index: dict[str, Any] | None


@dataclasses.dataclass(frozen=True)
class Description:
    """A released model without its weights: config.json, sizes, the tensors' names, how they are filed."""

    config: dict[str, Any]
    cfg: VLMConfig
    groups: list[Group]
    manifest: Manifest

    @property
    def dtype(self) -> Any:
        """bfloat16 if that holds every tensor (but for the head for kappa) exactly, else float32."""
        files = (f for name, f in self.manifest.files.items() if name != KAPPA_FILE)
        found = {d for f in files for d in f["tensors"].values()}
        return jnp.bfloat16 if found == {"BF16"} else jnp.float32

    @functools.cached_property
    def dtypes(self) -> dict[str, Any]:
        """The dtype of each tensor in its file."""
        return {key: _DTYPES[d] for file in self.manifest.files.values() for key, d in file["tensors"].items()}


def describe(config: Mapping[str, Any], manifest: Manifest) -> Description:
    """Raises UserError when config.json is of an unknown kind."""
    kind, decoder = hf_config.checkpoint_kind(config), hf_config.decoder_kind(config)
    cfg = hf_config.from_hf_config(config)
    keys = {key for file in manifest.files.values() for key in file["tensors"]}
    prefixed = any(key.startswith("model.language_model.") for key in keys)
    heads = {"lm_head.weight", "language_model.lm_head.weight", "language_model.output.weight"}
    if cfg.decoder.tied and heads & keys:  # the files decide whether the head is one of its own
        cfg = dataclasses.replace(cfg, decoder=dataclasses.replace(cfg.decoder, tied=False))
    return Description(dict(config), cfg, layout(cfg, kind, decoder, prefixed), manifest)


def with_kappa(model: Description, kappa: bool) -> Description:
    """The same model with a head for a PRM's concentration, or without; it has a file of its own, in float32."""
    config = {key: value for key, value in model.config.items() if key != hf_config.KAPPA}
    files = {name: file for name, file in model.manifest.files.items() if name != KAPPA_FILE}
    if kappa:
        config[hf_config.KAPPA] = True
        files[KAPPA_FILE] = {"metadata": {"format": "pt"}, "tensors": dict.fromkeys(KAPPA, "F32")}
    return describe(config, dataclasses.replace(model.manifest, files=files))


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checked folder of weights. ``adapter``: what is added to them."""

    folder: Path
    model: Description
    adapter: hf_adapter.Adapter | None = None
    merged: Path | None = None

    @property
    def files(self) -> Path:
        """The folder of config.json and tokenizer; with an adapter not that of the weights."""
        return self.merged or self.folder

    @functools.cached_property
    def where(self) -> dict[str, str]:
        """The file of each tensor."""
        return {key: name for name, file in self.model.manifest.files.items() for key in file["tensors"]}


def find(path_or_id: str | os.PathLike, revision: str | None = None) -> Path:
    """The folder of a checkpoint: as given, or a hub id (``org/name`` or ``org/name@revision``) downloaded.

    HF_HUB_OFFLINE=1 takes what an earlier download left. Raises UserError when there is nothing.
    """
    folder, name = Path(path_or_id), os.fspath(path_or_id)
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(name):
        kept = "; copy it to a local disk first" if "://" in name else ""
        raise UserError(f"{name}: neither a folder nor a hub id (org/name or org/name@revision){kept}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, at = name.partition("@")
    try:
        return Path(snapshot_download(name, revision=at or revision, allow_patterns=[*_OTHER, "*.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().split("\n")[0]
        raise UserError(f"{name}: no such folder, and it could not be downloaded from the hub ({first})") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError when the file is missing, damaged or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or truncated safetensors ({error})") from None


def _scan(folder: Path, kappa: bool) -> tuple[Manifest, dict[str, tuple[int, ...]], dict[str, str]]:
    """The manifest, every tensor's shape, and what the index says is in a file but is not.

    kappa: whether there is a KAPPA_FILE. Raises UserError when a file is missing or damaged.
    """
    index = folder / INDEX
    if index.exists():
        listed = read_json(index)
        weights = listed.get("weight_map")
        if not isinstance(weights, dict) or not all(isinstance(n, str) and Path(n).name == n for n in weights.values()):
            raise UserError(f"{index}: no weight_map of file names")
        names = sorted(set(weights.values()))
    else:
        listed, weights = None, {}
        names = ["model.safetensors"] if (folder / "model.safetensors").exists() else []
    if not names:
        raise UserError(hf_unreadable.folder(folder) or f"{folder}: no model.safetensors and no {INDEX}")
    names += [KAPPA_FILE] * kappa
    lost = [name for name in names if not (folder / name).exists()]
    if lost:
        raise UserError(f"{folder}: {len(lost)} of {len(names)} weight files are missing: {', '.join(lost)}")
    files, shapes = {}, {}
    for name in names:
        with _opened(folder / name) as file:
            tensors = {}
            for key in file.offset_keys():
                part = file.get_slice(key)
                if not hf_unreadable.is_buffer(key):
                    tensors[key], shapes[key] = part.get_dtype(), tuple(part.get_shape())
            files[name] = {"metadata": file.metadata(), "tensors": tensors}
    claimed = {
        key: name
        for key, name in weights.items()
        if key not in files[name]["tensors"] and not hf_unreadable.is_buffer(key)
    }
    return Manifest(files, listed and listed.get("metadata", {})), shapes, claimed


def open_checkpoint(path_or_id: str | os.PathLike, revision: str | None = None) -> Checkpoint:
    """Reads config.json and the headers of all weight files, and checks every key, shape and dtype.

    A folder of LoRA adapters (peft) is its base with the adapters in it. Raises UserError: one that lists every
    missing, unexpected, mis-shaped and mistyped tensor, or the one thing that keeps us from getting that far.
    """
    folder = find(path_or_id, revision)
    if hf_adapter.is_adapter(folder):
        return _open_adapter(folder)
    if not (folder / "config.json").exists() and (known := hf_unreadable.folder(folder)):
        raise UserError(known)
    return _open(folder, read_json(folder / "config.json"))


def _open_adapter(folder: Path) -> Checkpoint:
    if whole := [name for name in (INDEX, "model.safetensors") if (folder / name).exists()]:
        raise UserError(
            f"{folder}: a whole model ({whole[0]}) and adapters ({hf_adapter.CONFIG}); move away what is not meant"
        )
    settings = read_json(folder / hf_adapter.CONFIG)
    base_name, revision = hf_adapter.base_of(folder, settings)
    try:
        base = open_checkpoint(base_name, revision)
        if base.adapter:
            raise UserError(f"{base_name}: adapters again; {hf_adapter.MERGE}")
    except UserError as error:
        raise UserError(f"{folder}: the base of the adapters: {error}") from None
    shapes = {key: shape for group in base.model.groups for key, shape, _ in group.tensors()}
    adapter = hf_adapter.read(folder, settings, shapes)
    config = copy.deepcopy(base.model.config)
    grown = {new[0] for key, new in adapter.shapes.items() if new != shapes[key] and new[1:] == shapes[key][1:]}
    if len(grown) == 1:  # rows of the embedding, and of the head
        hf_config.set_vocab_size(config, grown.pop())
    return _open(base.folder, config, adapter)


def _open(folder: Path, config: dict[str, Any], adapter: hf_adapter.Adapter | None = None) -> Checkpoint:
    where = adapter.folder if adapter else folder
    try:
        cfg = hf_config.from_hf_config(config)  # tell of a wrong architecture before missing files
        manifest, shapes, claimed = _scan(folder, cfg.kappa)
        model = describe(config, manifest)
    except UserError as error:
        raise UserError(str(error) if str(folder) in str(error) else f"{where}: {error}") from None
    shapes |= adapter.shapes if adapter else {}
    _check_tensors(where, model, shapes, claimed)
    _check_frequencies(folder, model)
    return Checkpoint(folder, model, adapter, _files_of(adapter.folder, folder, config) if adapter else None)


def _check_frequencies(folder: Path, model: Description) -> None:
    """Raises UserError when rotary frequencies that were saved are not those of config.json."""
    d = model.cfg.decoder
    wanted = d.rope_theta ** -(np.arange(0, d.head_dim, 2) / d.head_dim)
    for name in model.manifest.files:
        with _opened(folder / name) as file:
            for key in (k for k in file.keys() if k.endswith("rotary_emb.inv_freq")):  # noqa: SIM118
                found = file.get_tensor(key).astype(np.float64)
                if found.shape != wanted.shape or not np.allclose(found, wanted, rtol=0.02, atol=0):
                    raise UserError(
                        f"{folder / name}: the rotary frequencies {key} are not those of config.json's rope_theta"
                        f" {d.rope_theta:g}; correct rope_theta there"
                    )


def _files_of(adapter: Path, base: Path, config: Mapping[str, Any]) -> Path:
    """A folder of what stands beside the weights of a merged model: the base's, and the adapter's own tokenizer."""
    merged = Path(tempfile.mkdtemp(prefix="mmprm_jax"))
    atexit.register(shutil.rmtree, merged, ignore_errors=True)
    copy_other_files(base, merged)
    own = [name for name in tokenizer_files.FILES if (adapter / name).exists()]
    if tokenizer_files.CONFIG in own or tokenizer_files.FAST in own:
        for name in (*tokenizer_files.FILES, *tokenizer_files.FOREIGN):
            (merged / name).unlink(missing_ok=True)
        for name in own:
            shutil.copyfile(adapter / name, merged / name)
    write_config(merged, config)
    return merged


def _check_tensors(
    folder: Path, model: Description, shapes: Mapping[str, tuple[int, ...]], claimed: Mapping[str, str]
) -> None:
    """Raises UserError when the tensors are not those of config.json."""
    expected = {key: shape for group in model.groups for key, shape, _ in group.tensors()}
    problems = [
        f"missing: {key} {list(shape)}" + (f" (the index says it is in {claimed[key]})" if key in claimed else "")
        for key, shape in expected.items()
        if key not in shapes
    ]
    problems += [
        f"misfiled: {key} is not in {name}, where the index says it is"
        for key, name in claimed.items()
        if key in shapes
    ]
    unexpected = [key for key in shapes if key not in expected]
    problems += [f"unexpected: {key} {list(shapes[key])}" for key in unexpected]
    problems += [
        f"shape: {key} is {list(shapes[key])}, config.json makes it {list(shape)}"
        for key, shape in expected.items()
        if shapes.get(key, shape) != shape
    ]
    problems += [
        f"dtype: {key} is {dtype}; F32, F16 and BF16 are read"
        for file in model.manifest.files.values()
        for key, dtype in file["tensors"].items()
        if key in expected and dtype not in _DTYPES
    ]
    if problems:
        shards = any(folder.glob("global_step*"))
        if known := hf_unreadable.tensors(model.config, shapes, unexpected, shards):
            raise UserError(f"{folder}: {known}")
        counts = collections.Counter(p.partition(":")[0] for p in problems)
        summary = ", ".join(f"{count} {what}" for what, count in counts.items())
        raise UserError(f"{folder}: the weights do not fit config.json ({summary}):\n  " + "\n  ".join(problems))


def load_params(checkpoint: Checkpoint, mesh: Any, dtype: Any = None) -> Any:
    """The parameters on ``mesh``, laid out by its rules, in ``dtype`` (default: the checkpoint's own).

    Host memory holds about one tensor of one layer at a time.
    """
    model = checkpoint.model
    with jax.set_mesh(mesh):
        _, abstract = build.abstract(model.cfg, 0, mesh, model.dtype if dtype is None else dtype)
        params: dict[str, Any] = {}
        for group in model.groups:
            shapes = [get(abstract, leaf) for leaf in group.leaves]
            leaves = tuple(jnp.zeros(s.shape, s.dtype, device=s.sharding) for s in shapes)
            for layer in range(max(group.layers, 1)):
                raws = [_read(checkpoint, key, shape, mesh) for key, shape, at in group.tensors() if at == layer]
                leaves = _place(leaves, raws, layer, form=group.form, stacked=group.layers > 0)
                jax.block_until_ready(leaves)  # else the host runs ahead and holds many tensors
            for leaf, value in zip(group.leaves, leaves, strict=True):
                put(params, leaf, value)
    return params


def _spread(shape: tuple[int, ...], mesh: Any) -> P:
    """A layout of a tensor over as many devices as divide one of its dimensions: each part is read once."""
    choices = [AXES, ("data", "fsdp"), ("fsdp", "tensor"), ("data", "tensor"), *((axis,) for axis in AXES)]
    sizes = dict(mesh.shape)
    for axes in sorted(choices, key=lambda axes: -math.prod(sizes[a] for a in axes)):
        for d in range(len(shape)):
            spec = fit_spec(shape, (None,) * d + (axes,), mesh)
            if spec[d] is not None:
                return spec
    return P()


def _read(checkpoint: Checkpoint, key: str, shape: tuple[int, ...], mesh: Any) -> jax.Array:
    """One tensor as it is in the file; every device's part is read by its host."""
    parts: dict[str, np.ndarray] = {}

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        name = str(index)
        if name not in parts:  # a part that several devices hold is read once
            parts[name] = read_tensor(checkpoint, key, index)
        return parts[name]

    return jax.make_array_from_callback(shape, NamedSharding(mesh, _spread(shape, mesh)), part)


def read_tensor(checkpoint: Checkpoint, key: str, index: tuple[slice, ...] = ()) -> np.ndarray:
    """A tensor, or a part of it, as it is in the file, with the checkpoint's adapter."""
    if adapter := checkpoint.adapter:
        base = dataclasses.replace(checkpoint, adapter=None)
        whole = adapter.merged(key, lambda: read_tensor(base, key))  # whole: a part's sums could be rounded otherwise
        return whole[index] if index else whole
    with _opened(checkpoint.folder / checkpoint.where[key]) as file:
        return file.get_slice(key)[index] if index else file.get_tensor(key)


@functools.partial(jax.jit, static_argnames=("form", "stacked"), donate_argnames=("leaves",))
def _place(leaves: tuple[jax.Array, ...], raws: Sequence[jax.Array], layer: Any, *, form: Any, stacked: bool) -> Any:
    """The parameters with the tensors of one layer in place."""

    def place(leaves: tuple[jax.Array, ...], raws: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        blocks = form.read(*raws)
        if not stacked:
            return tuple(b.astype(leaf.dtype) for b, leaf in zip(blocks, leaves, strict=True))
        return tuple(
            jax.lax.dynamic_update_index_in_dim(leaf, b.astype(leaf.dtype), layer, 0)
            for leaf, b in zip(leaves, blocks, strict=True)
        )

    if any(leaf.ndim - stacked != raws[0].ndim for leaf in leaves):
        raws = [jax.sharding.reshard(raw, P()) for raw in raws]  # a split dimension cannot become heads
    layout = tuple(jax.typeof(leaf).sharding.spec for leaf in leaves)
    return jax.sharding.auto_axes(place, out_sharding=layout)(leaves, raws)


@functools.partial(jax.jit, static_argnames=("form", "stacked", "dtypes"))
def _tensors(leaves: tuple[jax.Array, ...], layer: Any, *, form: Any, stacked: bool, dtypes: tuple[Any, ...]) -> Any:
    """The tensors of one layer, whole on every device."""

    def pick(leaves: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        if stacked:
            leaves = tuple(jax.lax.dynamic_index_in_dim(leaf, layer, 0, keepdims=False) for leaf in leaves)
        return tuple(t.astype(d) for t, d in zip(form.write(*leaves), dtypes, strict=True))

    return jax.sharding.auto_axes(pick, out_sharding=(P(),) * len(dtypes))(leaves)


def tensors(groups: Sequence[Group], params: Any, dtypes: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """(key, host array) of every tensor that ``dtypes`` names, for parameters (or gradients) of a set mesh."""
    for group in groups:
        leaves = tuple(get(params, leaf) for leaf in group.leaves)
        for layer in range(max(group.layers, 1)):
            keys = [key for key, _, at in group.tensors() if at == layer]
            if not any(key in dtypes for key in keys):
                continue
            kinds = tuple(dtypes.get(key, jnp.float32) for key in keys)
            values = _tensors(leaves, layer, form=group.form, stacked=group.layers > 0, dtypes=kinds)
            for key, value in zip(keys, values, strict=True):
                if key in dtypes:
                    yield key, np.asarray(value.addressable_data(0))


def save(folder: Path, params: Any, mesh: Any, model: Description) -> None:
    """Writes config.json and the weight files of ``model`` into ``folder``; the first process writes.

    Host memory holds one weight file at a time.
    """
    writer = jax.process_index() == 0
    if writer:
        folder.mkdir(parents=True, exist_ok=True)
    total = 0
    with jax.set_mesh(mesh):
        for name, file in model.manifest.files.items():
            found = dict(tensors(model.groups, params, {key: model.dtypes[key] for key in file["tensors"]}))
            total += sum(x.nbytes for x in found.values()) if name != KAPPA_FILE else 0
            if writer:
                (folder / name).parent.mkdir(exist_ok=True)
                ordered = {key: np.ascontiguousarray(found[key]) for key in file["tensors"]}
                save_file(ordered, folder / name, file["metadata"])
    if not writer:
        return
    if model.manifest.index is not None:
        files = {name: file for name, file in model.manifest.files.items() if name != KAPPA_FILE}
        weights = {key: name for name, file in files.items() for key in file["tensors"]}
        index = {"metadata": {**model.manifest.index, "total_size": total}, "weight_map": dict(sorted(weights.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    write_config(folder, model.config)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Writes config.json, unless what is there says the same (then it keeps its bytes)."""
    path = folder / "config.json"
    if not path.exists() or read_json(path) != config:
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_other_files(source: Path | None, target: Path) -> None:
    """Copies what belongs to a checkpoint beside its weights: config.json, tokenizer, generation settings.

    source: None: of a model that was made here, there is nothing to copy.
    """
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()) if source else ():
        if any(path.match(pattern) for pattern in _OTHER) and path.name not in (INDEX, MANIFEST):
            shutil.copyfile(path, target / path.name)
