"""The language model: a Llama-like decoder with stacked layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from mmprm_jax.models.config import DecoderConfig
from mmprm_jax.models.layers import RMSNorm, rotary, scan_layers, stack, weight
from mmprm_jax.sharding import BATCH, dot, fit_spec, take_rows

# attend(q [B,S,G,R,D], k [B,S,G,D], v, state) -> ([B,S,G,R,D], new state)
Attend = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


class Attention(nnx.Module):
    """Projections of grouped-query attention; the heads are kept as [kv head, query heads per kv head]."""

    def __init__(self, cfg: DecoderConfig, rngs: nnx.Rngs):
        size, groups, depth = cfg.hidden_size, cfg.num_kv_heads, cfg.head_dim
        per_group = cfg.num_heads // groups
        self.theta = cfg.rope_theta
        self.q = weight(rngs, (size, groups, per_group, depth), size)
        self.k = weight(rngs, (size, groups, depth), size)
        self.v = weight(rngs, (size, groups, depth), size)
        self.o = weight(rngs, (groups, per_group, depth, size), groups * per_group * depth)

    def __call__(self, x: jax.Array, positions: jax.Array, attend: Attend, state: Any) -> tuple[jax.Array, Any]:
        q = dot("bsd,dgrk->bsgrk", x, self.q[...], BATCH, None, "tensor")
        k = dot("bsd,dgk->bsgk", x, self.k[...], BATCH, None, "tensor")
        v = dot("bsd,dgk->bsgk", x, self.v[...], BATCH, None, "tensor")
        out, state = attend(rotary(q, positions, self.theta), rotary(k, positions, self.theta), v, state)
        return dot("bsgrk,grkd->bsd", out, self.o[...], BATCH), state


class MLP(nnx.Module):
    """SwiGLU."""

    def __init__(self, cfg: DecoderConfig, rngs: nnx.Rngs):
        size, hidden = cfg.hidden_size, cfg.intermediate_size
        self.gate = weight(rngs, (size, hidden), size)
        self.up = weight(rngs, (size, hidden), size)
        self.down = weight(rngs, (hidden, size), hidden)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate = dot("bsd,df->bsf", x, self.gate[...], BATCH, None, "tensor")
        up = dot("bsd,df->bsf", x, self.up[...], BATCH, None, "tensor")
        return dot("bsf,fd->bsd", jax.nn.silu(gate) * up, self.down[...], BATCH)


class DecoderLayer(nnx.Module):
    def __init__(self, cfg: DecoderConfig, rngs: nnx.Rngs):
        self.norm1 = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.attention = Attention(cfg, rngs)
        self.norm2 = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = MLP(cfg, rngs)

    def __call__(self, x: jax.Array, positions: jax.Array, attend: Attend, state: Any) -> tuple[jax.Array, Any]:
        delta, state = self.attention(self.norm1(x), positions, attend, state)
        x = x + delta
        return x + self.mlp(self.norm2(x)), state


class Decoder(nnx.Module):
    def __init__(self, cfg: DecoderConfig, rngs: nnx.Rngs, remat: bool):
        self.cfg, self.remat = cfg, remat
        self.embed = weight(rngs, (cfg.vocab_size, cfg.hidden_size), cfg.hidden_size)
        self.layers = stack(lambda r: DecoderLayer(cfg, r), cfg.num_layers, rngs)
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.lm_head = weight(rngs, (cfg.hidden_size, cfg.vocab_size), cfg.hidden_size)

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """tokens [B, S] -> [B, S, D]. Ids must be inside the vocabulary: a gather clips silently."""
        # Gathered over fsdp first: the partitioner would otherwise replicate the result.
        table = jax.sharding.reshard(self.embed[...], fit_spec(self.embed.shape, ("tensor",)))
        return take_rows(table, tokens, BATCH)

    def __call__(self, x: jax.Array, positions: jax.Array, attend: Attend) -> tuple[jax.Array, Any]:
        """Full sequences: x [B, S, D] -> hidden states [B, S, D] and what ``attend`` returned, stacked by layer."""

        def body(layer: DecoderLayer, x: jax.Array, _: None) -> tuple[jax.Array, Any]:
            return layer(x, positions, attend, None)

        x, aux = scan_layers(self.layers, body, x, remat=self.remat)
        return self.norm(x), aux

    def decode(self, x: jax.Array, positions: jax.Array, attend: Attend, state: Any) -> tuple[jax.Array, Any]:
        """As ``__call__``, but ``attend`` gets ``(layer index, state)``; the state goes from layer to layer."""

        def body(layer: DecoderLayer, carry: Any, _: None) -> tuple[Any, None]:
            x, index, state = carry
            x, state = layer(x, positions, attend, (index, state))
            return (x, index + 1, state), None

        (x, _, state), _ = scan_layers(self.layers, body, (x, 0, state))
        return self.norm(x), state

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[B, S, D] -> [B, S, V] in float32."""
        return dot("bsd,dv->bsv", hidden, self.lm_head[...], BATCH, None, "tensor").astype("float32")
