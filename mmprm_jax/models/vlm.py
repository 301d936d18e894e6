"""The vision-language model, policy and PRM alike: images and tokens in, hidden states and logits out."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmprm_jax.models.attention import segment_positions, self_attention
from mmprm_jax.models.config import VLMConfig
from mmprm_jax.models.decoder import Decoder
from mmprm_jax.models.layers import plus, weight
from mmprm_jax.models.vision import Projector, VisionTower, pixel_shuffle
from mmprm_jax.sharding import BATCH, dot, fit_spec, reshape


class ScoreHead(nnx.Module):
    """Classes of a step from its hidden state: linear, ReLU, linear (Qwen2.5-Math-PRM)."""

    def __init__(self, size: int, labels: int, rngs: nnx.Rngs):
        self.fc1 = weight(rngs, (size, size), size)
        self.fc1_bias = nnx.Param(jnp.zeros((size,)))
        self.fc2 = weight(rngs, (size, labels), size)
        self.fc2_bias = nnx.Param(jnp.zeros((labels,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, S, D] -> logits [B, S, labels] in float32."""
        x = jax.nn.relu(plus(dot("bsd,df->bsf", x, self.fc1[...], BATCH, None, "tensor"), self.fc1_bias))
        return plus(dot("bsf,fl->bsl", x, self.fc2[...], BATCH, dtype=jnp.float32), self.fc2_bias)


class KappaHead(nnx.Module):
    """How sure a PRM is of its score: linear, zero at first (see ``losses.beta_binomial_loss``)."""

    def __init__(self, size: int):
        self.kernel = nnx.Param(jnp.zeros((size, 1)))
        self.bias = nnx.Param(jnp.zeros((1,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, S, D] -> [B, S] in float32."""
        return plus(dot("bsd,df->bsf", x, self.kernel[...], BATCH, dtype=jnp.float32), self.bias)[..., 0]


class VLM(nnx.Module):
    """InternVL: the visual tokens of each row's tiles replace, in order, its image-context tokens.

    A model without a vision tower (``cfg.vision`` None) reads text only. Everything is computed in ``dtype``, by
    default that of the parameters; sums and logits in float32. With float32 parameters and another ``dtype``, matrices
    are rounded where they are used, and all gradients by parameters are summed and returned in float32.
    """

    dtype: Any = None

    def __init__(self, cfg: VLMConfig, image_token: int, rngs: nnx.Rngs):
        self.cfg, self.image_token = cfg, image_token
        self.vision = VisionTower(cfg.vision, rngs, cfg.remat) if cfg.vision else None
        self.projector = Projector(cfg, rngs) if cfg.vision else None
        self.decoder = Decoder(cfg.decoder, rngs, cfg.remat)
        self.score = ScoreHead(cfg.decoder.hidden_size, cfg.num_labels, rngs) if cfg.num_labels else None
        self.kappa = KappaHead(cfg.decoder.hidden_size) if cfg.kappa else None

    def embed_images(self, pixels: jax.Array, keep: jax.Array | None = None) -> jax.Array:
        """pixels [B, tiles, H, W, 3] float, normalised -> visual tokens [B, tiles * tokens_per_tile, D].

        keep [B, tiles, layers, 2]: from ``VisionTower.draw``, in training.
        """
        assert self.vision is not None and self.projector is not None
        rows, tiles, *shape = pixels.shape
        if keep is not None:
            keep = reshape(keep, (rows * tiles, *keep.shape[2:]), BATCH)
        pixels = reshape(pixels, (rows * tiles, *shape), BATCH)
        x = self.vision(pixels.astype(self.dtype or self.vision.patch.dtype), keep)
        # Barriers: fusing the shuffle or the last reshape into the projector's products crashes TPU's compiler
        # (libtpu 0.0.52: "split of a padded window dim is not supported").
        x = self.projector(jax.lax.optimization_barrier(pixel_shuffle(x, self.cfg.downsample)))
        x = jax.lax.optimization_barrier(x)
        return reshape(x, (rows, tiles * x.shape[1], x.shape[2]), BATCH)

    def embed(self, tokens: jax.Array, pixels: jax.Array | None, keep: jax.Array | None = None) -> jax.Array:
        """Token embeddings [B, S, D] with the visual tokens in place. A row without image tokens ignores its pixels."""
        x = self.decoder.embed_tokens(tokens, self.dtype)
        if pixels is None:
            return x
        visual = self.embed_images(pixels, keep)
        is_image = tokens == self.image_token
        # Other tokens point behind the last visual one, each to a place of its own: a gradient is put, never added.
        index = jnp.where(is_image, jnp.cumsum(is_image, axis=1) - 1, visual.shape[1] + jnp.arange(tokens.shape[1]))

        index = jax.sharding.reshard(index, fit_spec(index.shape, (BATCH,)))

        def of_row(visual: jax.Array, index: jax.Array) -> jax.Array:
            return visual.at[index].get(mode="fill", fill_value=0, unique_indices=True)

        return jnp.where(is_image[..., None], jax.vmap(of_row)(visual, index), x)

    def __call__(
        self,
        tokens: jax.Array,
        segment: jax.Array,
        pixels: jax.Array | None,
        length: jax.Array | None = None,
        *,
        keep: jax.Array | None = None,
        caches: bool = False,
        max_segments: int = 0,
    ) -> tuple[jax.Array, Any]:
        """Full forward over rows of one or more examples.

        tokens [B, S] int32; segment [B, S] int or bool: 0 at padding (left or right), else the number of the example
        within its row; pixels [B, tiles, H, W, 3], None when no row has an image; length [B]: tokens of each whole
        sequence, if more follow; keep: see ``embed_images``; max_segments: see ``self_attention`` -> hidden states
        [B, S, D] after the final norm and, with ``caches``, keys and values, each [layers, B, S, kv heads, head_dim].
        """
        segment = segment.astype(jnp.int32)
        positions, lengths = segment_positions(segment)
        rope = self.decoder.rope(positions, lengths if length is None else length)

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, _: Any) -> tuple[jax.Array, Any]:
            return self_attention(q, k, v, segment, causal=True, max_segments=max_segments), (k, v) if caches else None

        return self.decoder(self.embed(tokens, pixels, keep), rope, attend)

    def concentration(self, hidden: jax.Array) -> jax.Array:
        """The Beta-Binomial's kappa > 0, float32 [B, S], from hidden states [B, S, D]."""
        assert self.kappa is not None
        return jax.nn.softplus(self.kappa(hidden)) + 1e-3
