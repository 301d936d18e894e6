"""LoRA adapters that peft saved (adapter_config.json and adapter_model.safetensors), added to their base's tensors.

An adapter of a matrix W [out, in] is A [r, in] and B [out, r]; W becomes W + scale B A with scale = alpha / r, or
alpha / sqrt(r) (rsLoRA), in float32 and rounded to W's dtype. Tensors that were trained whole, such as an embedding
that has grown by a token, replace the base's.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from mmprm_jax.records import UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MERGE = "merge it where it was trained (peft: merge_and_unload, then save_pretrained) and name that folder"
# What changes a product otherwise than by A and B, or the base itself.
_OTHER = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "layer_replication", "trainable_token_indices",
    "target_parameters", "fan_in_fan_out", "alora_invocation_tokens",
)  # fmt: skip
_HARMLESS = ("loftq_config", "eva_config", "corda_config", "lora_ga_config")  # of initialisations, see _KEPT_BASE
_KEPT_BASE = ("gaussian", "eva", "orthogonal")  # initialisations that leave the base as it is
_PAIR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.(?!bias)[^.]+)??(?:\.weight)?")
_WHOLE = re.compile(r"(.+?)(?:\.modules_to_save(?:\.default)?|\.base_layer)?\.(weight|bias)")


@dataclasses.dataclass(frozen=True)
class _Delta:
    """The names of A and B in the adapter's file. embedding: they are of an embedding [tokens, size], transposed."""

    a: str
    b: str
    scale: float
    embedding: bool


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What an adapter changes in its base, by the base's keys. shapes, dtypes: of the tensors that it replaces."""

    folder: Path
    deltas: dict[str, _Delta]
    whole: dict[str, str]
    shapes: dict[str, tuple[int, ...]]

    def merged(self, key: str, read: Callable[[], np.ndarray]) -> np.ndarray:
        """The tensor ``key`` with the adapter in it, in the base's dtype; ``read`` gives the base's."""
        if key not in self.deltas and key not in self.whole:
            return read()
        base = read()
        with safe_open(self.folder / WEIGHTS, framework="np") as file:
            tensor = file.get_tensor(self.whole[key]) if key in self.whole else base
            if delta := self.deltas.get(key):
                a, b = (file.get_tensor(name).astype(np.float32) for name in (delta.a, delta.b))
                product = (b @ a).T if delta.embedding else b @ a
                tensor = tensor.astype(np.float32) + np.float32(delta.scale) * product
        return tensor.astype(base.dtype)


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).exists()


def base_of(folder: Path, config: Mapping[str, Any]) -> tuple[str, str | None]:
    """The folder or hub id of the base, and its revision. Raises UserError for what is no LoRA that we can merge."""
    where = folder / CONFIG
    if (kind := config.get("peft_type")) != "LORA":
        raise UserError(f"{where}: peft_type {kind!r} is not read, only LORA is; {MERGE}")
    variants = [key for key in config if key.endswith("_config") and key not in _HARMLESS]
    if other := [key for key in (*_OTHER, *variants) if config.get(key)]:
        raise UserError(f"{where}: {other[0]} is not read; {MERGE}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init not in _KEPT_BASE:
        raise UserError(f"{where}: init_lora_weights {init!r} changed the base as well; {MERGE}")
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base:
        raise UserError(f"{where}: no base_model_name_or_path; write the base's folder or hub id there")
    return base, revision if isinstance(revision, str) else None


def read(folder: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    """The adapter of a base with these ``shapes``.

    Raises UserError when it is damaged, when a tensor of it belongs to nothing in the base, and when it does not fit.
    """
    try:
        with safe_open(folder / WEIGHTS, framework="np") as file:
            found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        pickled = [p.name for p in folder.glob("adapter_model.*")]
        more = (
            f"; only {pickled[0]}, which can run code when it is read: save it again as safetensors" if pickled else ""
        )
        raise UserError(f"{folder / WEIGHTS}: no such file{more}") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / WEIGHTS}: damaged or truncated safetensors ({error})") from None
    if not found:
        raise UserError(f"{folder / WEIGHTS}: holds no tensors; copy the adapter again")
    names = {_canonical(key): key for key in shapes}
    pairs: dict[tuple[str, bool], dict[str, str]] = {}
    whole: dict[str, str] = {}
    lost: list[str] = []
    for key in found:
        name = key.removeprefix("base_model.model.")
        if ".original_module." in name:  # what stood in place of one that was trained whole
            continue
        pair, alone = _PAIR.fullmatch(name), _WHOLE.fullmatch(name)
        if pair and (target := names.get(_canonical(f"{pair[1].removesuffix('.base_layer')}.weight"))):
            pairs.setdefault((target, bool(pair[2])), {})[pair[3]] = key
        elif not pair and alone and (target := names.get(_canonical(f"{alone[1]}.{alone[2]}"))):
            if not _equal(folder, whole.setdefault(target, key), key):
                raise UserError(f"{folder / WEIGHTS}: {whole[target]} and {key} are one tensor and differ; {MERGE}")
        else:
            lost.append(key)
    if embedding := next((whole[t] for t in whole if t.endswith("embed_tokens.weight")), None):
        # a tied head is saved beside its embedding
        heads = [k for k in lost if k.endswith("lm_head.weight")]
        if any(not _equal(folder, k, embedding) for k in heads):
            raise UserError(f"{folder / WEIGHTS}: its head is not its embedding, to which the base's is tied; {MERGE}")
        lost = [k for k in lost if k not in heads]
    lost += [key for parts in pairs.values() if len(parts) < 2 for key in parts.values()]
    if lost:
        raise UserError(
            f"{folder / WEIGHTS}: {len(lost)} of {len(found)} tensors belong to nothing in the base, such as {lost[0]};"
            " is base_model_name_or_path the model that it was trained on?"
        )
    deltas = {
        target: _Delta(parts["A"], parts["B"], _scale(folder, config, target, found[parts["A"]][0]), embedding)
        for (target, embedding), parts in pairs.items()
    }
    new = {target: found[key] for target, key in whole.items()}
    for target, delta in deltas.items():
        size = new.get(target, shapes[target])
        (rank, ins), (outs, other) = (_matrix(found[name]) for name in (delta.a, delta.b))
        if rank != other or size != ((ins, outs) if delta.embedding else (outs, ins)):
            raise UserError(
                f"{folder / WEIGHTS}: {delta.a} {list(found[delta.a])} and {delta.b} {list(found[delta.b])} do not fit"
                f" the base's {target} {list(size)}; is base_model_name_or_path the model that it was trained on?"
            )
    return Adapter(folder, deltas, whole, new)


def _equal(folder: Path, one: str, other: str) -> bool:
    if one == other:
        return True
    with safe_open(folder / WEIGHTS, framework="np") as file:
        return np.array_equal(file.get_tensor(one), file.get_tensor(other))


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape if len(shape) == 2 else (0, -1)


def _canonical(key: str) -> str:
    """One name for what versions of transformers name differently (see ``hf_layout.layout``)."""
    for part in ("language_model.", "vision_tower.", "multi_modal_projector."):
        key = key.removeprefix("model.") if key.startswith(f"model.{part}") else key
    if key.startswith("language_model.lm_head."):
        return key.removeprefix("language_model.")
    inner = "language_model.model."
    return f"language_model.{key.removeprefix(inner)}" if key.startswith(inner) else key


def _scale(folder: Path, config: Mapping[str, Any], target: str, rank: int) -> float:
    """alpha / rank of one matrix; ``alpha_pattern`` names matrices with an alpha of their own."""
    alpha, module = config.get("lora_alpha"), target.rpartition(".")[0]
    for name, own in _pattern(folder, config):
        if module == name or module.endswith(f".{name}"):
            alpha = own
            break
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha) or rank < 1:
        raise UserError(f"{folder / CONFIG}: lora_alpha {alpha!r} for a rank of {rank}; copy the adapter again")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _pattern(folder: Path, config: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    pattern = config.get("alpha_pattern") or {}
    if not isinstance(pattern, Mapping) or any(re.search(r"[^\w.\-]", name) for name in pattern):
        raise UserError(f"{folder / CONFIG}: alpha_pattern holds regular expressions, which are not read; {MERGE}")
    return pattern.items()
