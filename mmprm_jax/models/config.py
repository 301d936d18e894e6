"""Sizes of the vision-language model. The tiny config differs from the released ones in numbers only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """InternViT: pre-norm transformer with a class token, learned positions and layer scale."""

    image_size: int = 448  # pixels, square tiles
    patch_size: int = 14
    hidden_size: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    intermediate_size: int = 4096
    layer_norm_eps: float = 1e-6
    layer_scale_init: float = 0.1


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Llama-like decoder: grouped-query attention, rotary positions, RMSNorm, SwiGLU."""

    vocab_size: int = 92553
    hidden_size: int = 4096
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    intermediate_size: int = 14336
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6


@dataclasses.dataclass(frozen=True)
class VLMConfig:
    """InternVL: vision tower, pixel shuffle by ``downsample`` per side, MLP projector, decoder."""

    vision: VisionConfig
    decoder: DecoderConfig
    downsample: int = 2  # pixel shuffle: 2 x 2 patches become one visual token
    remat: bool = True  # recompute layers in the backward pass

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of one image tile."""
        return (self.vision.image_size // self.vision.patch_size // self.downsample) ** 2

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VLMConfig:
        values = dict(values)
        vision = VisionConfig(**values.pop("vision"))
        decoder = DecoderConfig(**values.pop("decoder"))
        return cls(vision=vision, decoder=decoder, **values)
