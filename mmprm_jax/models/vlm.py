"""The vision-language model, policy and PRM alike: images and tokens in, hidden states and logits out."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmprm_jax.models.config import VLMConfig
from mmprm_jax.models.decoder import Decoder
from mmprm_jax.models.layers import attention, weight
from mmprm_jax.models.vision import Projector, VisionTower, pixel_shuffle
from mmprm_jax.sharding import BATCH, dot, reshape, take_rows


class ScoreHead(nnx.Module):
    """Classes of a step from its hidden state: linear, ReLU, linear (Qwen2.5-Math-PRM)."""

    def __init__(self, size: int, labels: int, rngs: nnx.Rngs):
        self.fc1 = weight(rngs, (size, size), size)
        self.fc1_bias = nnx.Param(jnp.zeros((size,)))
        self.fc2 = weight(rngs, (size, labels), size)
        self.fc2_bias = nnx.Param(jnp.zeros((labels,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, S, D] -> logits [B, S, labels] in float32."""
        x = jax.nn.relu(dot("bsd,df->bsf", x, self.fc1[...], BATCH, None, "tensor") + self.fc1_bias[...])
        return dot("bsf,fl->bsl", x, self.fc2[...], BATCH, dtype=jnp.float32) + self.fc2_bias[...]


class VLM(nnx.Module):
    """InternVL: the visual tokens of each row's tiles replace, in order, its image-context tokens.

    A model without a vision tower (``cfg.vision`` None) reads text only. Everything is computed in the dtype of the
    parameters, sums and logits in float32.
    """

    def __init__(self, cfg: VLMConfig, image_token: int, rngs: nnx.Rngs):
        self.cfg, self.image_token = cfg, image_token
        self.vision = VisionTower(cfg.vision, rngs, cfg.remat) if cfg.vision else None
        self.projector = Projector(cfg, rngs) if cfg.vision else None
        self.decoder = Decoder(cfg.decoder, rngs, cfg.remat)
        self.score = ScoreHead(cfg.decoder.hidden_size, cfg.num_labels, rngs) if cfg.num_labels else None

    def embed_images(self, pixels: jax.Array) -> jax.Array:
        """pixels [B, tiles, H, W, 3] float, normalised -> visual tokens [B, tiles * tokens_per_tile, D]."""
        rows, tiles, *shape = pixels.shape
        x = self.vision(reshape(pixels, (rows * tiles, *shape), BATCH))
        x = self.projector(pixel_shuffle(x, self.cfg.downsample))
        return reshape(x, (rows, tiles * x.shape[1], x.shape[2]), BATCH)

    def embed(self, tokens: jax.Array, pixels: jax.Array | None) -> jax.Array:
        """Token embeddings [B, S, D] with the visual tokens in place. A row without image tokens ignores its pixels."""
        x = self.decoder.embed_tokens(tokens)
        if pixels is None:
            return x
        visual = self.embed_images(pixels)
        is_image = tokens == self.image_token
        index = jnp.maximum(jnp.cumsum(is_image, axis=1) - 1, 0)
        rows = jnp.arange(tokens.shape[0])[:, None]
        return jnp.where(is_image[..., None], take_rows(visual, (rows, index), BATCH), x)

    def __call__(
        self, tokens: jax.Array, valid: jax.Array, pixels: jax.Array | None, length: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """Full forward over padded rows.

        tokens [B, S] int32; valid [B, S] bool, False at padding (left or right); pixels [B, tiles, H, W, 3], None when
        no row has an image; length [B]: tokens of each whole sequence, if more follow -> hidden states [B, S, D] after
        the final norm, and keys and values, each [layers, B, S, kv heads, head_dim].
        """
        rope = self.decoder.rope(positions_of(valid), jnp.sum(valid, axis=1) if length is None else length)
        steps = jnp.arange(tokens.shape[1])
        mask = (steps[None, :, None] >= steps[None, None, :]) & valid[:, None, :]

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, _: Any) -> tuple[jax.Array, Any]:
            return attention(q, k, v, mask), (k, v)

        return self.decoder(self.embed(tokens, pixels), rope, attend)


def positions_of(valid: jax.Array) -> jax.Array:
    """Rotary positions that count only valid tokens. [B, S] bool -> [B, S] int32."""
    return jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
