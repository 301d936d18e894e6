"""The vision tower (InternViT), pixel shuffle and the MLP projector into the decoder's space."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmprm_jax.models.attention import self_attention
from mmprm_jax.models.config import VisionConfig, VLMConfig
from mmprm_jax.models.layers import LayerNorm, RMSNorm, plus, rms_normalise, scan_layers, stack, times, weight
from mmprm_jax.sharding import BATCH, dot, reshape


def make_norm(cfg: VisionConfig) -> LayerNorm | RMSNorm:
    kinds: dict[str, type[LayerNorm] | type[RMSNorm]] = {"layer_norm": LayerNorm, "rms_norm": RMSNorm}
    return kinds[cfg.norm](cfg.hidden_size, cfg.layer_norm_eps)


class VisionAttention(nnx.Module):
    """Bidirectional multi-head self-attention with a fused qkv projection."""

    def __init__(self, cfg: VisionConfig, rngs: nnx.Rngs):
        size, heads = cfg.hidden_size, cfg.num_heads
        self.eps = cfg.qk_norm_eps
        self.qkv = weight(rngs, (size, 3, heads, size // heads), size)
        self.qkv_bias = nnx.Param(jnp.zeros((3, heads, size // heads))) if cfg.qkv_bias else None
        self.proj = weight(rngs, (heads, size // heads, size), size)
        self.proj_bias = nnx.Param(jnp.zeros((size,)))
        self.q_norm = nnx.Param(jnp.ones((heads, size // heads))) if cfg.qk_norm else None
        self.k_norm = nnx.Param(jnp.ones((heads, size // heads))) if cfg.qk_norm else None

    def __call__(self, x: jax.Array) -> jax.Array:
        qkv = dot("bsd,dchk->bschk", x, self.qkv[...], BATCH, None, None, "tensor")
        if self.qkv_bias is not None:
            qkv = plus(qkv, self.qkv_bias)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        if self.q_norm is not None and self.k_norm is not None:  # one norm over all heads
            q = rms_normalise(q, self.q_norm[...], self.eps, (-2, -1))
            k = rms_normalise(k, self.k_norm[...], self.eps, (-2, -1))
        out = self_attention(q[:, :, :, None], k, v, None, causal=False)[:, :, :, 0]
        return plus(dot("bshk,hkd->bsd", out, self.proj[...], BATCH), self.proj_bias)


class VisionMLP(nnx.Module):
    def __init__(self, cfg: VisionConfig, rngs: nnx.Rngs):
        size, hidden = cfg.hidden_size, cfg.intermediate_size
        self.fc1 = weight(rngs, (size, hidden), size)
        self.fc1_bias = nnx.Param(jnp.zeros((hidden,)))
        self.fc2 = weight(rngs, (hidden, size), hidden)
        self.fc2_bias = nnx.Param(jnp.zeros((size,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = plus(dot("bsd,df->bsf", x, self.fc1[...], BATCH, None, "tensor"), self.fc1_bias)
        return plus(dot("bsf,fd->bsd", jax.nn.gelu(hidden, approximate=False), self.fc2[...], BATCH), self.fc2_bias)


class VisionLayer(nnx.Module):
    def __init__(self, cfg: VisionConfig, rngs: nnx.Rngs):
        self.norm1 = make_norm(cfg)
        self.attention = VisionAttention(cfg, rngs)
        self.ls1 = nnx.Param(jnp.full((cfg.hidden_size,), cfg.layer_scale_init, jnp.float32))
        self.norm2 = make_norm(cfg)
        self.mlp = VisionMLP(cfg, rngs)
        self.ls2 = nnx.Param(jnp.full((cfg.hidden_size,), cfg.layer_scale_init, jnp.float32))

    def __call__(self, x: jax.Array, keep: jax.Array | None = None) -> jax.Array:
        """x [B, S, D]; keep [B, 2]: factors of the two branches (see ``VisionTower.draw``)."""
        a, m = (1, 1) if keep is None else keep.astype(x.dtype).T[..., None, None]
        x = x + times(self.attention(self.norm1(x)), self.ls1) * a
        return x + times(self.mlp(self.norm2(x)), self.ls2) * m


def cubic_resize(old: int, new: int) -> np.ndarray:
    """Weights [new, old] of torch's bicubic interpolation along one axis (a = -0.75, no antialias).

    Source: ``torch.nn.functional.interpolate(mode="bicubic", align_corners=False)``.
    """
    a, weights = -0.75, np.zeros((new, old), np.float64)
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            d = abs(centre - tap)
            inner, outer = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
            weights[i, min(max(tap, 0), old - 1)] += inner if d <= 1 else outer
    return weights.astype(np.float32)


def resize_positions(positions: jax.Array, side: int, rows: int, columns: int) -> jax.Array:
    """Positions of side x side patches for a grid of rows x columns, the class token's first. [1, 1 + patches, D]."""
    if (rows, columns) == (side, side):
        return positions
    grid = positions[0, 1:].reshape(side, side, -1).astype(jnp.float32)
    grid = jnp.einsum("rs,std->rtd", cubic_resize(side, rows), grid)
    grid = jnp.einsum("ct,rtd->rcd", cubic_resize(side, columns), grid).astype(positions.dtype)
    return jnp.concatenate([positions[:, :1], grid.reshape(1, rows * columns, -1)], axis=1)


class VisionTower(nnx.Module):
    """Pixels -> patch features, the class token dropped."""

    def __init__(self, cfg: VisionConfig, rngs: nnx.Rngs, remat: str):
        patches = (cfg.image_size // cfg.patch_size) ** 2
        self.cfg, self.remat = cfg, remat
        self.patch = weight(rngs, (cfg.patch_size, cfg.patch_size, 3, cfg.hidden_size), 3 * cfg.patch_size**2)
        self.patch_bias = nnx.Param(jnp.zeros((cfg.hidden_size,)))
        self.class_token = weight(rngs, (1, 1, cfg.hidden_size), cfg.hidden_size)
        self.positions = weight(rngs, (1, patches + 1, cfg.hidden_size), cfg.hidden_size)
        self.layers = stack(lambda r: VisionLayer(cfg, r), cfg.num_layers, rngs)

    def resized_positions(self, rows: int, columns: int) -> jax.Array:
        """Positions of a grid of rows x columns patches, the class token's first. [1, 1 + patches, hidden]."""
        return resize_positions(self.positions[...], self.cfg.image_size // self.cfg.patch_size, rows, columns)

    def embed(self, pixels: jax.Array) -> jax.Array:
        """pixels [B, H, W, 3] -> what enters the first layer, the class token first: [B, 1 + patches, hidden].

        Computed in the dtype of ``pixels``.
        """
        batch, height, width, _ = pixels.shape
        p = self.cfg.patch_size
        rows, columns = height // p, width // p
        x = reshape(pixels, (batch, rows, p, columns, p, 3), BATCH)
        x = plus(dot("brpcqx,pqxd->brcd", x, self.patch[...], BATCH), self.patch_bias)
        x = reshape(x, (batch, rows * columns, self.cfg.hidden_size), BATCH)
        # Zeros carry the batch sharding that a broadcast class token lacks.
        first = plus(jnp.zeros_like(x[:, :1]), self.class_token)
        return plus(jnp.concatenate([first, x], axis=1), self.resized_positions(rows, columns))

    def draw(self, key: jax.Array, rows: int, tiles: int) -> jax.Array:
        """Which branches training leaves out: factors [rows, tiles, layers, 2], 0 or 1 / (1 - rate), of mean 1.

        The rate grows linearly with depth, from 0 to ``drop_path`` (stochastic depth, as in InternViT).
        """
        rate = jnp.linspace(0.0, self.cfg.drop_path, self.cfg.num_layers)[:, None]
        kept = jax.random.uniform(key, (rows, tiles, self.cfg.num_layers, 2)) >= rate
        return kept / (1 - rate)

    def __call__(self, pixels: jax.Array, keep: jax.Array | None = None) -> jax.Array:
        """pixels [B, H, W, 3], keep [B, layers, 2] from ``draw`` (None: all) -> [B, H/p, W/p, hidden]."""
        batch, height, width, _ = pixels.shape
        if keep is not None:
            keep = keep.swapaxes(0, 1)
        x, _ = scan_layers(
            self.layers, lambda layer, x, keep: (layer(x, keep), None), self.embed(pixels), keep, self.remat
        )
        p = self.cfg.patch_size
        return reshape(x[:, 1:], (batch, height // p, width // p, self.cfg.hidden_size), BATCH)


def pixel_shuffle(x: jax.Array, factor: int) -> jax.Array:
    """Folds factor x factor neighbours into channels. [B, R, C, D] -> [B, R/f * C/f, f f D], row-major."""
    batch, rows, columns, size = x.shape
    x = reshape(x, (batch, rows // factor, factor, columns // factor, factor, size), BATCH)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return reshape(x, (batch, rows * columns // factor**2, size * factor**2), BATCH)


class Projector(nnx.Module):
    """InternVL's mlp1: LayerNorm, linear, GELU, linear."""

    def __init__(self, cfg: VLMConfig, rngs: nnx.Rngs):
        size, out = cfg.with_vision.hidden_size * cfg.downsample**2, cfg.decoder.hidden_size
        self.norm = LayerNorm(size, 1e-5)
        self.fc1 = weight(rngs, (size, out), size)
        self.fc1_bias = nnx.Param(jnp.zeros((out,)))
        self.fc2 = weight(rngs, (out, out), out)
        self.fc2_bias = nnx.Param(jnp.zeros((out,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = plus(dot("bsd,df->bsf", self.norm(x), self.fc1[...], BATCH, None, "tensor"), self.fc1_bias)
        return plus(dot("bsf,fd->bsd", jax.nn.gelu(x, approximate=False), self.fc2[...], BATCH), self.fc2_bias)
