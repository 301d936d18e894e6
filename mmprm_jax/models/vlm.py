"""The vision-language model, policy and PRM alike: images and tokens in, hidden states and logits out."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from mmprm_jax.models.config import VLMConfig
from mmprm_jax.models.decoder import Decoder
from mmprm_jax.models.layers import attention
from mmprm_jax.models.vision import Projector, VisionTower, pixel_shuffle
from mmprm_jax.sharding import BATCH, dot, take_rows


class VLM(nnx.Module):
    """InternVL: the visual tokens of each row's tiles replace, in order, its image-context tokens."""

    def __init__(self, cfg: VLMConfig, image_token: int, rngs: nnx.Rngs):
        self.cfg, self.image_token = cfg, image_token
        self.vision = VisionTower(cfg.vision, rngs, cfg.remat)
        self.projector = Projector(cfg, rngs)
        self.decoder = Decoder(cfg.decoder, rngs, cfg.remat)

    def embed_images(self, pixels: jax.Array) -> jax.Array:
        """pixels [B, tiles, H, W, 3] float, normalised -> visual tokens [B, tiles * tokens_per_tile, D]."""
        tiles = [
            self.projector(pixel_shuffle(self.vision(pixels[:, i]), self.cfg.downsample))
            for i in range(pixels.shape[1])
        ]
        return jnp.concatenate(tiles, axis=1)

    def embed(self, tokens: jax.Array, pixels: jax.Array) -> jax.Array:
        """Token embeddings [B, S, D] with the visual tokens in place. A row without image tokens ignores its pixels."""
        x = self.decoder.embed_tokens(tokens)
        visual = self.embed_images(pixels)
        is_image = tokens == self.image_token
        index = jnp.maximum(jnp.cumsum(is_image, axis=1) - 1, 0)
        rows = jnp.arange(tokens.shape[0])[:, None]
        return jnp.where(is_image[..., None], take_rows(visual, (rows, index), BATCH), x)

    def __call__(self, tokens: jax.Array, valid: jax.Array, pixels: jax.Array) -> tuple[jax.Array, Any]:
        """Full forward over padded rows.

        tokens [B, S] int32; valid [B, S] bool, False at padding (left or right); pixels [B, tiles, H, W, 3] ->
        hidden states [B, S, D] after the final norm, and keys and values, each [layers, B, S, kv heads, head_dim].
        """
        positions = positions_of(valid)
        steps = jnp.arange(tokens.shape[1])
        mask = (steps[None, :, None] >= steps[None, None, :]) & valid[:, None, :]

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, _: None) -> tuple[jax.Array, Any]:
            return attention(q, k, v, mask), (k, v)

        return self.decoder(self.embed(tokens, pixels), positions, attend)

    def two_way_logits(self, hidden: jax.Array, yes: int, no: int) -> jax.Array:
        """The logits of the tokens Yes and No only. [B, S, D] -> [B, S, 2] float32."""
        head = jax.sharding.reshard(self.decoder.lm_head[...], P())
        columns = head[:, jnp.array([yes, no])]
        return dot("bsd,dc->bsc", hidden, columns, BATCH).astype(jnp.float32)


def positions_of(valid: jax.Array) -> jax.Array:
    """Rotary positions that count only valid tokens. [B, S] bool -> [B, S] int32."""
    return jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
