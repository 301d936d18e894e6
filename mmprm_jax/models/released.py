"""Sizes of the released InternVL models by name, for building one without its checkpoint.

From the models' config.json files and cards; a checkpoint's own config.json is what counts when there is one.
"""

from __future__ import annotations

import difflib
from typing import Any

from mmprm_jax.models.config import DecoderConfig, RopeScaling, VisionConfig, VLMConfig
from mmprm_jax.records import UserError

VIT_300M = VisionConfig()
VIT_6B = VisionConfig(
    hidden_size=3200, num_layers=45, num_heads=25, intermediate_size=12800, norm="rms_norm", qkv_bias=False,
    qk_norm=True,
)  # fmt: skip


def _internlm2(layers: int, hidden: int, inter: int, heads: int, kv: int, **more: Any) -> DecoderConfig:
    settings: dict[str, Any] = {"vocab_size": 92553, "rms_norm_eps": 1e-5, "rope_theta": 1e6}
    settings["rope_scaling"] = RopeScaling("dynamic", 2.0, 32768)
    return DecoderConfig(
        num_layers=layers, hidden_size=hidden, intermediate_size=inter, num_heads=heads, num_kv_heads=kv,
        head_dim=hidden // heads, **(settings | more),
    )  # fmt: skip


def _qwen2(layers: int, hidden: int, inter: int, heads: int, kv: int, **more: Any) -> DecoderConfig:
    settings: dict[str, Any] = {"vocab_size": 151674, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "qkv_bias": True}
    return DecoderConfig(
        num_layers=layers, hidden_size=hidden, intermediate_size=inter, num_heads=heads, num_kv_heads=kv,
        head_dim=hidden // heads, **(settings | more),
    )  # fmt: skip


def _qwen3(layers: int, hidden: int, inter: int, heads: int, kv: int, **more: Any) -> DecoderConfig:
    settings: dict[str, Any] = {"vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "qk_norm": True}
    settings["head_dim"] = 128
    return DecoderConfig(
        num_layers=layers, hidden_size=hidden, intermediate_size=inter, num_heads=heads, num_kv_heads=kv,
        **(settings | more),
    )  # fmt: skip


_LONG = {"rope_scaling": RopeScaling("dynamic", 2.0, 32768)}
_TINY = VisionConfig(image_size=28, patch_size=7, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=80)
_TINY_6B = VisionConfig(
    image_size=28, patch_size=7, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=80, norm="rms_norm",
    qkv_bias=False, qk_norm=True,
)  # fmt: skip

RELEASED: dict[str, tuple[VisionConfig, DecoderConfig]] = {
    "internvl2_5-1b": (VIT_300M, _qwen2(24, 896, 4864, 14, 2)),
    "internvl2_5-2b": (VIT_300M, _internlm2(24, 2048, 8192, 16, 8)),
    "internvl2_5-4b": (VIT_300M, _qwen2(36, 2048, 11008, 16, 2)),
    "internvl2_5-8b": (VIT_300M, _internlm2(32, 4096, 14336, 32, 8)),
    # Rotary settings of internlm2_5-20b-chat's card: the 26B's own config.json was not available.
    "internvl2_5-26b": (
        VIT_6B,
        _internlm2(48, 6144, 16384, 48, 8, rope_theta=5e7, rope_scaling=RopeScaling("dynamic", 2.5, 32768)),
    ),
    "internvl2_5-38b": (VIT_6B, _qwen2(64, 5120, 27648, 40, 8)),
    "internvl2_5-78b": (VIT_6B, _qwen2(80, 8192, 29568, 64, 8)),
    "internvl3-1b": (VIT_300M, _qwen2(24, 896, 4864, 14, 2, **_LONG)),
    "internvl3-2b": (VIT_300M, _qwen2(28, 1536, 8960, 12, 2, **_LONG)),
    "internvl3-8b": (VIT_300M, _qwen2(28, 3584, 18944, 28, 4, **_LONG)),
    "internvl3-14b": (VIT_300M, _qwen2(48, 5120, 13824, 40, 8, **_LONG)),
    "internvl3-38b": (VIT_6B, _qwen2(64, 5120, 27648, 40, 8, **_LONG)),
    "internvl3-78b": (VIT_6B, _qwen2(80, 8192, 29568, 64, 8, **_LONG)),
    "internvl3_5-1b": (VIT_300M, _qwen3(28, 1024, 3072, 16, 8)),
    "internvl3_5-2b": (VIT_300M, _qwen3(28, 2048, 6144, 16, 8)),
    "internvl3_5-4b": (VIT_300M, _qwen3(36, 2560, 9728, 32, 8)),
    "internvl3_5-8b": (VIT_300M, _qwen3(36, 4096, 12288, 32, 8)),
    "internvl3_5-14b": (VIT_300M, _qwen3(40, 5120, 17408, 40, 8)),
    "internvl3_5-38b": (VIT_6B, _qwen3(64, 5120, 25600, 64, 8)),
    "tiny-internlm2": (_TINY, _internlm2(2, 48, 96, 6, 2, vocab_size=320)),
    "tiny-qwen2": (_TINY_6B, _qwen2(2, 48, 96, 6, 2, vocab_size=320)),
    "tiny-qwen3": (_TINY, _qwen3(2, 48, 96, 6, 2, vocab_size=320, head_dim=16)),
}


def released_config(name: str) -> VLMConfig:
    """The sizes of a released (or tiny) model. Raises UserError naming the nearest names."""
    if name not in RELEASED:
        near = difflib.get_close_matches(name.lower(), RELEASED, 3, 0)
        raise UserError(f"model {name!r} is unknown; did you mean {', '.join(near)}?")
    vision, decoder = RELEASED[name]
    return VLMConfig(vision=vision, decoder=decoder)
