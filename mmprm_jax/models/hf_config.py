"""config.json of a released checkpoint -> VLMConfig. A setting that the model does not have is an error."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mmprm_jax.models.config import DecoderConfig, RopeScaling, VisionConfig, VLMConfig
from mmprm_jax.records import UserError

# How the weights are named: InternVLChatModel's remote code, transformers' own InternVL, a text-only policy or PRM.
CHAT, NATIVE, TEXT, TEXT_PRM = "internvl_chat", "internvl", "causal_lm", "qwen2_prm"
TEMPLATES = "mmprm_templates"  # a key of config.json: the prompts that the model was trained with
KAPPA = "mmprm_kappa"  # a key of config.json: true where a PRM has a head for its concentration
_KINDS = {
    "InternVLChatModel": CHAT,
    "InternVLRewardModel": CHAT,  # VisualPRM
    "InternVLForConditionalGeneration": NATIVE,
    "Qwen2ForCausalLM": TEXT,
    "Qwen3ForCausalLM": TEXT,
    "LlamaForCausalLM": TEXT,
    "Qwen2ForProcessRewardModel": TEXT_PRM,  # Qwen2.5-Math-PRM
}
_DECODERS = {
    "InternLM2ForCausalLM": "internlm2",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2ForProcessRewardModel": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "LlamaForCausalLM": "llama",
}


def checkpoint_kind(config: Mapping[str, Any]) -> str:
    """The checkpoint's kind: CHAT, NATIVE, TEXT or TEXT_PRM. Raises UserError on another architecture."""
    name = (config.get("architectures") or [None])[0]
    if name not in _KINDS:
        raise UserError(f"config.json: unknown architecture {name!r}; known: {', '.join(_KINDS)}")
    return _KINDS[name]


def decoder_kind(config: Mapping[str, Any]) -> str:
    """internlm2, qwen2, qwen3 or llama. Raises UserError on another language model."""
    text = text_section(config)
    name = (text.get("architectures") or [None])[0]
    found = str(_DECODERS.get(name) if name else text.get("model_type"))
    if found not in _DECODERS.values():
        raise UserError(f"config.json: unknown language model {name or found!r}; known: {', '.join(_DECODERS)}")
    return found


def text_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that describes the language model."""
    key = {CHAT: "llm_config", NATIVE: "text_config"}.get(checkpoint_kind(config))
    return config if key is None else _section(config, key)


def set_vocab_size(config: Mapping[str, Any], size: int) -> None:
    """Changes the size of the language model's vocabulary in place, in a config of one's own."""
    section: Any = text_section(config)
    section["vocab_size"] = size


def templates(config: Mapping[str, Any]) -> tuple[str, str]:
    """The names of the prompts that the model was trained with: as a policy, and as a PRM.

    Training writes them; a config.json that is silent is of a released model, whose kind says it. Raises UserError when
    they are no names.
    """
    released = {"InternVLRewardModel": "visual_prm", "Qwen2ForProcessRewardModel": "qwen_math_prm"}
    default = {"policy": "internvl", "prm": released.get((config.get("architectures") or [None])[0], "mm_prm")}
    named = config.get(TEMPLATES, {})
    if not isinstance(named, Mapping) or not all(isinstance(named.get(key, ""), str) for key in default):
        raise UserError(f"config.json: {TEMPLATES} must hold the names of two templates, policy and prm")
    found = {**default, **named}
    return found["policy"], found["prm"]


def tiling(config: Mapping[str, Any]) -> tuple[int, bool]:
    """Tiles of one image at most, and whether the whole image follows several of them, as config.json says."""
    max_tiles = config.get("max_dynamic_patch", 12) if config.get("dynamic_image_size", True) else 1
    return max_tiles, bool(config.get("use_thumbnail", True))


def from_hf_config(config: Mapping[str, Any]) -> VLMConfig:
    """The model's sizes from a config.json of InternVLChatModel, InternVLForConditionalGeneration or a text-only model.

    Raises UserError on an unknown architecture, a missing size, and settings that the model does not have.
    """
    if not isinstance(config.get(KAPPA, False), bool):
        raise UserError(f"config.json: {KAPPA} must be true or false, it is {config[KAPPA]!r}")
    return dataclasses.replace(_sizes(config), kappa=config.get(KAPPA, False))


def _sizes(config: Mapping[str, Any]) -> VLMConfig:
    kind = checkpoint_kind(config)
    decoder = _decoder(config)
    if kind == TEXT_PRM:
        # The published files may or may not hold an output head, which no score needs: import looks.
        decoder = dataclasses.replace(decoder, tied=True)
        return VLMConfig(vision=None, decoder=decoder, num_labels=int(config.get("num_labels", 2)))
    if kind == TEXT:
        return VLMConfig(vision=None, decoder=decoder)
    section = _section(config, "vision_config")
    vision = _vision_chat(section) if kind == CHAT else _vision_native(section)
    ratio = config.get("downsample_ratio", 0.5)
    if not 0 < ratio <= 1 or 1 / ratio != round(1 / ratio):
        raise UserError(f"config.json: downsample_ratio {ratio} is not 1 / an integer")
    if kind == CHAT:
        _require(config, "config.json", ps_version="v2", select_layer=-1, pad2square=False)
        tile = config.get("force_image_size") or vision.image_size
    else:
        _require(config, "config.json", vision_feature_layer=-1, vision_feature_select_strategy="default")
        _require(config, "config.json", projector_hidden_act="gelu")
        tile = vision.image_size
    cfg = VLMConfig(vision=vision, decoder=decoder, downsample=round(1 / ratio), tile_size=tile)
    if tile % (vision.patch_size * cfg.downsample):
        raise UserError(f"config.json: tiles of {tile} pixels are not whole blocks of {cfg.downsample} patches")
    tokens = config.get("image_seq_length", cfg.tokens_per_tile)
    if kind == NATIVE and tokens != cfg.tokens_per_tile:
        raise UserError(f"config.json: image_seq_length {tokens}, but a tile has {cfg.tokens_per_tile} visual tokens")
    return cfg


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    if not isinstance(config.get(key), Mapping):
        raise UserError(f"config.json: no {key} section")
    return config[key]


def _size(section: Mapping[str, Any], key: str, where: str) -> int:
    value = section.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"config.json, {where}: {key} must be a positive integer, it is {value!r}")
    return value


def _require(section: Mapping[str, Any], where: str, **wanted: Any) -> None:
    """Raises UserError when a setting that is there differs from the only one that is supported."""
    for key, value in wanted.items():
        if section.get(key, value) not in (value, None):
            raise UserError(f"{where}: {key} = {section[key]!r} is not supported; only {value!r} is")


def _decoder(config: Mapping[str, Any]) -> DecoderConfig:
    kind, c, where = decoder_kind(config), text_section(config), "language model"
    _require(c, f"config.json, {where}", hidden_act="silu", use_sliding_window=False)
    hidden, heads = _size(c, "hidden_size", where), _size(c, "num_attention_heads", where)
    kv_heads = _size(c, "num_key_value_heads", where) if c.get("num_key_value_heads") is not None else heads
    head_dim = c.get("head_dim") or (128 if kind == "qwen3" else hidden // heads)
    if heads % kv_heads or head_dim % 2:
        raise UserError(f"config.json, {where}: {heads} heads of size {head_dim} over {kv_heads} key/value heads")
    # qwen2: always qkv, never out; llama and qwen3: one switch for all four; internlm2 names it otherwise.
    biased = bool(c.get("bias" if kind == "internlm2" else "attention_bias", False))
    rope = c.get("rope_parameters") or {}
    tied = c.get("tie_word_embeddings", config.get("tie_word_embeddings", False))
    # transformers 4 goes by the language model's own setting, 5 by the whole model's
    if checkpoint_kind(config) == NATIVE:
        tied = tied or config.get("tie_word_embeddings", False)
    return DecoderConfig(
        vocab_size=_size(c, "vocab_size", where),
        hidden_size=hidden,
        num_layers=_size(c, "num_hidden_layers", where),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=_size(c, "intermediate_size", where),
        rms_norm_eps=float(c.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta", c.get("rope_theta", 1e4))),
        rope_scaling=_rope_scaling(c.get("rope_scaling") or rope, c),
        qkv_bias=kind == "qwen2" or biased,
        out_bias=kind != "qwen2" and biased,
        mlp_bias=kind == "llama" and bool(c.get("mlp_bias", False)),
        qk_norm=kind == "qwen3",
        tied=bool(tied),
    )


def _rope_scaling(scaling: Mapping[str, Any], section: Mapping[str, Any]) -> RopeScaling | None:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("linear", "dynamic"):
        raise UserError(f"config.json: rope scaling {kind!r} is not supported; linear and dynamic are")
    longest = section.get("max_position_embeddings") or 0
    if kind == "dynamic" and not longest:
        raise UserError("config.json: dynamic rope scaling needs max_position_embeddings")
    return RopeScaling(kind, float(scaling["factor"]), int(longest) if kind == "dynamic" else 0)


def _square(section: Mapping[str, Any], key: str) -> int:
    value = section.get(key)
    sides = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(set(sides)) != 1:
        raise UserError(f"config.json, vision_config: {key} {value} is not square")
    return _size({key: sides[0]}, key, "vision_config")


def _vision(c: Mapping[str, Any], *, qkv_bias: bool, qk_norm: bool, norm: str, qk_norm_eps: float) -> VisionConfig:
    where = "vision_config"
    _require(c, f"config.json, {where}", hidden_act="gelu", num_channels=3)
    if norm not in ("layer_norm", "rms_norm"):
        raise UserError(f"config.json, {where}: norm_type {norm!r} is not supported; layer_norm and rms_norm are")
    vision = VisionConfig(
        image_size=_square(c, "image_size"),
        patch_size=_square(c, "patch_size"),
        hidden_size=_size(c, "hidden_size", where),
        num_layers=_size(c, "num_hidden_layers", where),
        num_heads=_size(c, "num_attention_heads", where),
        intermediate_size=_size(c, "intermediate_size", where),
        norm=norm,
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        layer_norm_eps=float(c.get("layer_norm_eps", 1e-6)),
        qk_norm_eps=qk_norm_eps,
    )
    if vision.hidden_size % vision.num_heads or vision.image_size % vision.patch_size:
        raise UserError(f"config.json, {where}: sizes do not divide: {vision}")
    return vision


def _vision_chat(c: Mapping[str, Any]) -> VisionConfig:
    # Defaults of the remote code's InternVisionConfig: those of the 6B model.
    return _vision(
        c,
        qkv_bias=bool(c.get("qkv_bias", False)),
        qk_norm=bool(c.get("qk_normalization", True)),
        norm=c.get("norm_type", "rms_norm"),
        qk_norm_eps=float(c.get("layer_norm_eps", 1e-6)),
    )


def _vision_native(c: Mapping[str, Any]) -> VisionConfig:
    _require(c, "config.json, vision_config", use_mean_pooling=True, use_absolute_position_embeddings=True)
    return _vision(
        c,
        qkv_bias=bool(c.get("attention_bias", False)),
        qk_norm=bool(c.get("use_qk_norm", False)),
        norm=c.get("norm_type", "layer_norm"),
        qk_norm_eps=1e-6,  # fixed in transformers
    )
