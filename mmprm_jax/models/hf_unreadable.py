"""Checkpoints that are not read, each in one line: what it is, and what makes one that is read of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmprm_jax.models.hf_adapter import MERGE

_GATHER = "gather them where they were written: python zero_to_fp32.py . NEW --safe_serialization"
_RELEASE = "name the release that they were made of"
_FILES = {  # a pattern of files or folders that weights were left in: what they are; what to do
    "global_step*": ("DeepSpeed's shards", _GATHER),
    "*zero_pp_rank_*": ("DeepSpeed's shards", f"{_GATHER}, in the folder above"),
    "mp_rank_*": ("shards of DeepSpeed or Megatron", "gather them with the tools of the framework that wrote them"),
    "pytorch_model_fsdp*": ("FSDP's shards", "gather them: accelerate merge-weights FOLDER/pytorch_model_fsdp_0 NEW"),
    "*.distcp": ("shards of torch.distributed", "gather them: accelerate merge-weights FOLDER NEW"),
    "latest_checkpointed_iteration.txt": ("Megatron's weights", "convert them to safetensors with Megatron's tools"),
    "*.gguf": ("quantised weights for llama.cpp", _RELEASE),
    "consolidated.*": ("weights in their author's own layout", "name the release for transformers (config.json)"),
    "tf_model*.h5": ("TensorFlow's weights", "save them as safetensors with transformers"),
    "flax_model*.msgpack": ("Flax's weights", "save them as safetensors with transformers"),
    "*.onnx": ("a program of ONNX", _RELEASE),
}
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_QUANTISED = (
    ".qweight", ".qzeros", ".g_idx", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".absmax", ".quant_map",
    ".SCB", ".input_scale", ".scales",
)  # fmt: skip
_ADAPTER = (".lora_A", ".lora_B", ".lora_embedding_", ".base_layer.")
_BUFFERS = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached", ".embeddings.position_ids")


def is_buffer(key: str) -> bool:
    """Whether older versions of transformers saved it though it follows from config.json."""
    return key.endswith(_BUFFERS)


def folder(path: Path) -> str:
    """What a folder without config.json or without weights is; "" if that is not known."""
    saved = [p for p in path.glob("checkpoint-*") if p.is_dir() and p.name.rpartition("-")[2].isdecimal()]
    if saved:
        newest = max(saved, key=lambda p: int(p.name.rpartition("-")[2]))
        return f"{path}: no model, but {len(saved)} checkpoints of a training; name one of them, such as {newest}"
    if (path / "hf").is_dir() and (path / "params").is_dir():
        return f"{path}: a model folder of ours; export it first: mmprm convert {path} NEW --layout=hf"
    for pattern, (kind, remedy) in _FILES.items():
        if found := next(path.glob(pattern), None):
            return f"{path}: no safetensors, but {kind} ({found.name}), which are not read; {remedy}"
    if pickled := sorted(p.name for pattern in _PICKLED for p in path.glob(pattern)):
        return (
            f"{path}: only pickled weights ({pickled[0]}, …), which can run code when they are read; convert them"
            " to safetensors where you trust them (transformers: save_pretrained)"
        )
    inner = sorted(p.parent for p in path.glob("*/config.json"))
    return f"{path}: no model; did you mean {inner[0]}?" if inner else ""


def tensors(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], unexpected: Iterable[str], has_shards: bool
) -> str:
    """What weights that do not fit config.json are, if that is known; "" if not. has_shards: of DeepSpeed, beside."""
    unexpected = list(unexpected)
    if adapters := [k for k in unexpected if any(part in k for part in _ADAPTER)]:
        return f"{len(adapters)} tensors are of LoRA adapters that are not merged, such as {adapters[0]}; {MERGE}"
    quantised = [k for k in unexpected if k.endswith(_QUANTISED) or ".quant_state." in k]
    sections = [config, *(config.get(k) for k in ("llm_config", "text_config", "vision_config"))]
    settings = [s["quantization_config"] for s in sections if isinstance(s, Mapping) and s.get("quantization_config")]
    if quantised or settings:
        method = settings[0].get("quant_method") if settings and isinstance(settings[0], Mapping) else None
        such = ", ".join(filter(None, [method, f"such as {quantised[0]}" if quantised else ""]))
        return f"quantised weights ({such or 'quantization_config'}) are not read; {_RELEASE}"
    empty = [key for key, shape in shapes.items() if shape == (0,)]
    if empty:
        what = "DeepSpeed's shards (global_step*) have them" if has_shards else "as DeepSpeed's stage 3 leaves them"
        return f"{len(empty)} tensors are empty, such as {empty[0]}: {what}; {_GATHER}"
    return ""
