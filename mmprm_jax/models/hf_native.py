"""Any model of ours as transformers' own classes have it: its config.json, how its weights are filed, its tiles.

With a vision tower that is InternVLForConditionalGeneration, without one the language model's own class. A model that
they cannot compute exactly is refused.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from mmprm_jax.models import hf, hf_config
from mmprm_jax.models import tokenizer as tok
from mmprm_jax.models.config import DecoderConfig, VisionConfig, VLMConfig
from mmprm_jax.models.hf_layout import Group, layout
from mmprm_jax.models.tokenizer import Tokenizer
from mmprm_jax.records import UserError

SHARD_BYTES = 5_000_000_000
_LONGEST = 32768  # tokens: what a config.json must say of a model whose positions have no limit
_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_DTYPES = {"float32": "F32", "bfloat16": "BF16"}


def describe(cfg: VLMConfig, tokenizer: Tokenizer, dtype: Any, longest: int = 0) -> hf.Description:
    """The model as transformers has it, in files of SHARD_BYTES at most.

    dtype: of all weights, float32 or bfloat16. longest: the positions that its config.json promises; 0: not known.
    Raises UserError, in one line, when its classes would not compute the same.
    """
    config = _config(cfg, tokenizer, longest) | {"torch_dtype": jnp.dtype(dtype).name}
    kind, decoder = hf_config.checkpoint_kind(config), hf_config.decoder_kind(config)
    groups = layout(dataclasses.replace(cfg, kappa=False), kind, decoder)
    return hf.with_kappa(hf.describe(config, _manifest(groups, jnp.dtype(dtype))), cfg.kappa)


def _config(cfg: VLMConfig, tokenizer: Tokenizer, longest: int) -> dict[str, Any]:
    if cfg.num_labels:
        raise UserError("transformers has no class for a model with a score head of its own (Qwen2.5-Math-PRM)")
    family = _family(cfg.decoder)
    text = _text(cfg.decoder, family, longest)
    text |= {"pad_token_id": tokenizer.pad, "eos_token_id": tokenizer.id(tok.TURN_END)}
    if cfg.vision is None:
        return {"architectures": [_CLASSES[family]], **text}
    _check_shuffle(cfg)
    return {
        "architectures": ["InternVLForConditionalGeneration"], "model_type": "internvl",
        "image_token_id": tokenizer.id(tok.IMAGE), "image_seq_length": cfg.tokens_per_tile,
        "downsample_ratio": 1 / cfg.downsample, "projector_hidden_act": "gelu",
        "vision_feature_layer": -1, "vision_feature_select_strategy": "default",
        "tie_word_embeddings": cfg.decoder.tied, "text_config": text, "vision_config": _vision(cfg.vision, cfg.tile),
    }  # fmt: skip


def _family(d: DecoderConfig) -> str:
    """The language model whose class has these biases and norms. Raises UserError when there is none."""
    if d.qk_norm and d.qkv_bias == d.out_bias and not d.mlp_bias:
        return "qwen3"
    if not d.qk_norm and d.qkv_bias == d.out_bias:
        return "llama"
    if d.qkv_bias and not (d.out_bias or d.mlp_bias or d.qk_norm):
        return "qwen2"
    found = ", ".join(name for name in ("qkv_bias", "out_bias", "mlp_bias", "qk_norm") if getattr(d, name))
    raise UserError(f"model.decoder: no language model of transformers has just {found}; leave one of them out")


def _text(d: DecoderConfig, family: str, longest: int) -> dict[str, Any]:
    """The language model's section, with rotary settings as every version of transformers reads them."""
    text = {
        "model_type": family, "vocab_size": d.vocab_size, "hidden_size": d.hidden_size, "hidden_act": "silu",
        "intermediate_size": d.intermediate_size, "num_hidden_layers": d.num_layers, "head_dim": d.head_dim,
        "num_attention_heads": d.num_heads, "num_key_value_heads": d.num_kv_heads, "rms_norm_eps": d.rms_norm_eps,
        "max_position_embeddings": longest or _LONGEST, "rope_theta": d.rope_theta, "rope_scaling": None,
        "tie_word_embeddings": d.tied, "use_sliding_window": False, "attention_dropout": 0.0,
    }  # fmt: skip
    if family != "qwen2":  # which has biases of queries, keys and values only, always
        text["attention_bias"] = d.qkv_bias
    if family == "llama":
        text["mlp_bias"] = d.mlp_bias
    if scaling := d.rope_scaling:
        text["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "dynamic":  # the length from which on it scales
            text["max_position_embeddings"] = scaling.max_position
    return text


def _vision(v: VisionConfig, tile: int) -> dict[str, Any]:
    if v.qk_norm and v.qk_norm_eps != 1e-6:
        raise UserError(f"transformers' vision tower has query and key norms of epsilon 1e-6, not {v.qk_norm_eps}")
    return {
        "model_type": "internvl_vision", "image_size": [tile, tile], "patch_size": [v.patch_size, v.patch_size],
        "num_channels": 3, "hidden_size": v.hidden_size, "num_hidden_layers": v.num_layers,
        "num_attention_heads": v.num_heads, "intermediate_size": v.intermediate_size, "hidden_act": "gelu",
        "norm_type": v.norm, "layer_norm_eps": v.layer_norm_eps, "attention_bias": v.qkv_bias,
        "use_qk_norm": v.qk_norm, "layer_scale_init_value": v.layer_scale_init, "use_mean_pooling": True,
        "use_absolute_position_embeddings": True, "use_mask_token": False, "hidden_dropout_prob": 0.0,
        "attention_dropout": 0.0, "projection_dropout": 0.0,
    }  # fmt: skip


def _check_shuffle(cfg: VLMConfig) -> None:
    """transformers computes sizes from the ratio 1 / downsample in floating point, cut to integers."""
    n, side, size = cfg.downsample, cfg.tile // cfg.with_vision.patch_size, cfg.with_vision.hidden_size
    ratio = 1 / n
    found = (int(1 / ratio), int(side * ratio), int(size / ratio), int(size / ratio**2))
    if found != (n, side // n, size * n, size * n * n):
        raise UserError(
            f"model.downsample: transformers cannot divide by {n}, it computes with {ratio}; choose 1, 2, 4"
        )


def _manifest(groups: Sequence[Group], dtype: Any) -> hf.Manifest:
    """One file, or several and an index."""
    shards: list[dict[str, str]] = [{}]
    size = 0
    for key, shape, _ in (tensor for group in groups for tensor in group.tensors()):
        more = math.prod(shape) * dtype.itemsize
        if shards[-1] and size + more > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][key] = _DTYPES[dtype.name]
        size += more
    count = len(shards)
    names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    names = names if count > 1 else ["model.safetensors"]
    files = {name: {"metadata": {"format": "pt"}, "tensors": keys} for name, keys in zip(names, shards, strict=True)}
    return hf.Manifest(files, {} if count > 1 else None)


def processor_files(cfg: VLMConfig, max_tiles: int) -> dict[str, dict[str, Any]]:
    """What transformers' InternVLProcessor reads: the tiles of at most ``max_tiles`` and a thumbnail; by file name."""
    image = {
        "processor_class": "InternVLProcessor", "image_processor_type": "GotOcr2ImageProcessor",
        "crop_to_patches": max_tiles > 1, "min_patches": 1, "max_patches": max_tiles,
        "do_resize": True, "size": {"height": cfg.tile, "width": cfg.tile}, "resample": 3,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True,
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
    }  # fmt: skip
    processor = {"processor_class": "InternVLProcessor", "image_seq_length": cfg.tokens_per_tile}
    return {"preprocessor_config.json": image, "processor_config.json": processor}
