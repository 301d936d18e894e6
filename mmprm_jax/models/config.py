"""Sizes of the vision-language model. The tiny config differs from the released ones in numbers only."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """InternViT: pre-norm transformer with a class token, learned positions and layer scale.

    The 300M model has LayerNorm and a qkv bias; the 6B model has RMSNorm, no qkv bias and normalises queries and keys.
    """

    image_size: int = 448  # pixels: the square grid for which the positions were learned
    patch_size: int = 14
    hidden_size: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    intermediate_size: int = 4096
    norm: str = "layer_norm"  # or rms_norm
    qkv_bias: bool = True
    qk_norm: bool = False  # RMSNorm over all heads of the queries, and of the keys
    layer_norm_eps: float = 1e-6
    qk_norm_eps: float = 1e-6
    layer_scale_init: float = 0.1
    drop_path: float = 0.0  # training: how often the last layer's branches are left out; the first layer's never are


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Rotary positions beyond the trained length.

    ``linear`` divides positions by ``factor``. ``dynamic`` (NTK-aware) raises the base for a sequence that is longer
    than ``max_position``, by its length.
    """

    kind: str  # linear or dynamic
    factor: float
    max_position: int = 0  # tokens; dynamic only


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """InternLM2, Llama, Qwen2, Qwen3: grouped-query attention, rotary positions, RMSNorm, SwiGLU."""

    vocab_size: int = 92553
    hidden_size: int = 4096
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    intermediate_size: int = 14336
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    out_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each head's query and key
    tied: bool = False  # the output head is the embedding
    lora_rank: int = 0  # of adapters beside the layers' matrices (see lora.py); 0: none
    lora_alpha: float = 16.0


@dataclasses.dataclass(frozen=True)
class VLMConfig:
    """InternVL: vision tower, pixel shuffle by ``downsample`` per side, MLP projector, decoder."""

    vision: VisionConfig | None  # None: a text-only model
    decoder: DecoderConfig
    downsample: int = 2  # pixel shuffle: 2 x 2 patches become one visual token
    tile_size: int = 0  # pixels of the square tiles that go in; 0: vision.image_size
    num_labels: int = 0  # classes of a score head on the hidden states (Qwen2.5-Math-PRM has 2); 0: no such head
    remat: str = "full"  # what the backward pass recomputes: a name of layers.REMAT
    kappa: bool = False  # a head for the concentration of Beta-Binomial labels

    @property
    def tile(self) -> int:
        """Pixels per side of an image tile."""
        return self.tile_size or self.with_vision.image_size

    @property
    def with_vision(self) -> VisionConfig:
        """The vision tower's, of a model that has one."""
        assert self.vision is not None
        return self.vision

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of one image tile; 0 without a vision tower."""
        if self.vision is None:
            return 0
        return (self.tile // self.vision.patch_size // self.downsample) ** 2

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VLMConfig:
        values = dict(values)
        vision, decoder = values.pop("vision"), dict(values.pop("decoder"))
        if decoder.get("rope_scaling"):
            decoder["rope_scaling"] = RopeScaling(**decoder["rope_scaling"])
        return cls(vision=vision and VisionConfig(**vision), decoder=DecoderConfig(**decoder), **values)
