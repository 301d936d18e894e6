"""The vision tower (InternViT), pixel shuffle and the MLP projector into the decoder's space."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from mmprm_jax.models.config import VisionConfig, VLMConfig
from mmprm_jax.models.layers import LayerNorm, attention, scan_layers, stack, weight
from mmprm_jax.sharding import BATCH, dot, reshape


class VisionAttention(nnx.Module):
    """Bidirectional multi-head self-attention with a biased, fused qkv projection."""

    def __init__(self, cfg: VisionConfig, rngs: nnx.Rngs):
        size, heads = cfg.hidden_size, cfg.num_heads
        self.qkv = weight(rngs, (size, 3, heads, size // heads), size)
        self.qkv_bias = nnx.Param(jnp.zeros((3, heads, size // heads)))
        self.proj = weight(rngs, (heads, size // heads, size), size)
        self.proj_bias = nnx.Param(jnp.zeros((size,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        qkv = dot("bsd,dchk->bschk", x, self.qkv[...], BATCH, None, None, "tensor") + self.qkv_bias[...]
        out = attention(qkv[:, :, 0, :, None], qkv[:, :, 1], qkv[:, :, 2], None)[:, :, :, 0]
        return dot("bshk,hkd->bsd", out, self.proj[...], BATCH) + self.proj_bias[...]


class VisionMLP(nnx.Module):
    def __init__(self, cfg: VisionConfig, rngs: nnx.Rngs):
        size, hidden = cfg.hidden_size, cfg.intermediate_size
        self.fc1 = weight(rngs, (size, hidden), size)
        self.fc1_bias = nnx.Param(jnp.zeros((hidden,)))
        self.fc2 = weight(rngs, (hidden, size), hidden)
        self.fc2_bias = nnx.Param(jnp.zeros((size,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = dot("bsd,df->bsf", x, self.fc1[...], BATCH, None, "tensor") + self.fc1_bias[...]
        return dot("bsf,fd->bsd", jax.nn.gelu(hidden, approximate=False), self.fc2[...], BATCH) + self.fc2_bias[...]


class VisionLayer(nnx.Module):
    def __init__(self, cfg: VisionConfig, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
        self.attention = VisionAttention(cfg, rngs)
        self.ls1 = nnx.Param(jnp.full((cfg.hidden_size,), cfg.layer_scale_init, jnp.float32))
        self.norm2 = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
        self.mlp = VisionMLP(cfg, rngs)
        self.ls2 = nnx.Param(jnp.full((cfg.hidden_size,), cfg.layer_scale_init, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x)) * self.ls1[...]
        return x + self.mlp(self.norm2(x)) * self.ls2[...]


class VisionTower(nnx.Module):
    """Pixels -> patch features, the class token dropped."""

    def __init__(self, cfg: VisionConfig, rngs: nnx.Rngs, remat: bool):
        patches = (cfg.image_size // cfg.patch_size) ** 2
        self.cfg, self.remat = cfg, remat
        self.patch = weight(rngs, (cfg.patch_size, cfg.patch_size, 3, cfg.hidden_size), 3 * cfg.patch_size**2)
        self.patch_bias = nnx.Param(jnp.zeros((cfg.hidden_size,)))
        self.class_token = weight(rngs, (1, 1, cfg.hidden_size), cfg.hidden_size)
        self.positions = weight(rngs, (1, patches + 1, cfg.hidden_size), cfg.hidden_size)
        self.layers = stack(lambda r: VisionLayer(cfg, r), cfg.num_layers, rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """pixels [B, H, W, 3] -> [B, H/p, W/p, hidden]."""
        batch, height, width, _ = pixels.shape
        p, size = self.cfg.patch_size, self.cfg.hidden_size
        rows, columns = height // p, width // p
        x = reshape(pixels, (batch, rows, p, columns, p, 3), BATCH)
        x = dot("brpcqx,pqxd->brcd", x, self.patch[...], BATCH) + self.patch_bias[...]
        x = reshape(x, (batch, rows * columns, size), BATCH)
        # Zeros carry the batch sharding that a broadcast class token lacks.
        first = jnp.zeros_like(x[:, :1]) + self.class_token[...]
        x = jnp.concatenate([first, x], axis=1) + self.positions[...]
        x, _ = scan_layers(self.layers, lambda layer, x, _: (layer(x), None), x, remat=self.remat)
        return reshape(x[:, 1:], (batch, rows, columns, size), BATCH)


def pixel_shuffle(x: jax.Array, factor: int) -> jax.Array:
    """Folds factor x factor neighbours into channels. [B, R, C, D] -> [B, R/f * C/f, f f D], row-major."""
    batch, rows, columns, size = x.shape
    x = reshape(x, (batch, rows // factor, factor, columns // factor, factor, size), BATCH)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return reshape(x, (batch, rows * columns // factor**2, size * factor**2), BATCH)


class Projector(nnx.Module):
    """InternVL's mlp1: LayerNorm, linear, GELU, linear."""

    def __init__(self, cfg: VLMConfig, rngs: nnx.Rngs):
        size, out = cfg.vision.hidden_size * cfg.downsample**2, cfg.decoder.hidden_size
        self.norm = LayerNorm(size, 1e-5)
        self.fc1 = weight(rngs, (size, out), size)
        self.fc1_bias = nnx.Param(jnp.zeros((out,)))
        self.fc2 = weight(rngs, (out, out), out)
        self.fc2_bias = nnx.Param(jnp.zeros((out,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = dot("bsd,df->bsf", self.norm(x), self.fc1[...], BATCH, None, "tensor") + self.fc1_bias[...]
        return dot("bsf,fd->bsd", jax.nn.gelu(x, approximate=False), self.fc2[...], BATCH) + self.fc2_bias[...]
