"""The language model: a Llama-like decoder with stacked layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from mmprm_jax.models.config import DecoderConfig
from mmprm_jax.models.layers import RMSNorm, plus, rotary, rotary_table, scan_layers, stack, weight
from mmprm_jax.models.lora import adapters, project
from mmprm_jax.sharding import BATCH, dot, fit_spec, gather_rounded, take_rows

Rope = tuple[jax.Array, jax.Array]  # from rotary_table
# attend(q [B,S,G,R,D], k [B,S,G,D], v, state) -> ([B,S,G,R,D], new state)
Attend = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


def bias(create: bool, shape: tuple[int, ...]) -> nnx.Param | None:
    """A zero bias, or None."""
    return nnx.Param(jnp.zeros(shape)) if create else None


class Attention(nnx.Module):
    """Projections of grouped-query attention; the heads are kept as [kv head, query heads per kv head]."""

    def __init__(self, cfg: DecoderConfig, rngs: nnx.Rngs):
        size, groups, depth = cfg.hidden_size, cfg.num_kv_heads, cfg.head_dim
        per_group = cfg.num_heads // groups
        self.q = weight(rngs, (size, groups, per_group, depth), size)
        self.k = weight(rngs, (size, groups, depth), size)
        self.v = weight(rngs, (size, groups, depth), size)
        self.o = weight(rngs, (groups, per_group, depth, size), groups * per_group * depth)
        self.q_bias = bias(cfg.qkv_bias, (groups, per_group, depth))
        self.k_bias = bias(cfg.qkv_bias, (groups, depth))
        self.v_bias = bias(cfg.qkv_bias, (groups, depth))
        self.o_bias = bias(cfg.out_bias, (size,))
        heads, one = (groups, per_group, depth), (groups, depth)
        shapes = {"q": ((size,), heads), "k": ((size,), one), "v": ((size,), one), "o": (heads, (size,))}
        self.lora = adapters(shapes, cfg, rngs)
        self.q_norm = RMSNorm(depth, cfg.rms_norm_eps) if cfg.qk_norm else None
        self.k_norm = RMSNorm(depth, cfg.rms_norm_eps) if cfg.qk_norm else None

    def __call__(self, x: jax.Array, rope: Rope, attend: Attend, state: Any) -> tuple[jax.Array, Any]:
        q = plus(project(self, "q", "bsd,dgrk->bsgrk", x, BATCH, None, "tensor"), self.q_bias)
        k = plus(project(self, "k", "bsd,dgk->bsgk", x, BATCH, None, "tensor"), self.k_bias)
        v = plus(project(self, "v", "bsd,dgk->bsgk", x, BATCH, None, "tensor"), self.v_bias)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        out, state = attend(rotary(q, rope), rotary(k, rope), v, state)
        return plus(project(self, "o", "bsghk,ghkd->bsd", out, BATCH), self.o_bias), state


class MLP(nnx.Module):
    """SwiGLU."""

    def __init__(self, cfg: DecoderConfig, rngs: nnx.Rngs):
        size, hidden = cfg.hidden_size, cfg.intermediate_size
        self.gate = weight(rngs, (size, hidden), size)
        self.up = weight(rngs, (size, hidden), size)
        self.down = weight(rngs, (hidden, size), hidden)
        wide, narrow = ((size,), (hidden,)), ((hidden,), (size,))
        self.lora = adapters({"gate": wide, "up": wide, "down": narrow}, cfg, rngs)
        self.gate_bias = bias(cfg.mlp_bias, (hidden,))
        self.up_bias = bias(cfg.mlp_bias, (hidden,))
        self.down_bias = bias(cfg.mlp_bias, (size,))

    def __call__(self, x: jax.Array) -> jax.Array:
        gate = plus(project(self, "gate", "bsd,df->bsf", x, BATCH, None, "tensor"), self.gate_bias)
        up = plus(project(self, "up", "bsd,df->bsf", x, BATCH, None, "tensor"), self.up_bias)
        return plus(project(self, "down", "bsf,fd->bsd", jax.nn.silu(gate) * up, BATCH), self.down_bias)


class DecoderLayer(nnx.Module):
    def __init__(self, cfg: DecoderConfig, rngs: nnx.Rngs):
        self.norm1 = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.attention = Attention(cfg, rngs)
        self.norm2 = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = MLP(cfg, rngs)

    def __call__(self, x: jax.Array, rope: Rope, attend: Attend, state: Any) -> tuple[jax.Array, Any]:
        delta, state = self.attention(self.norm1(x), rope, attend, state)
        x = x + delta
        return x + self.mlp(self.norm2(x)), state


class Decoder(nnx.Module):
    def __init__(self, cfg: DecoderConfig, rngs: nnx.Rngs, remat: str):
        self.cfg, self.remat = cfg, remat
        self.embed = weight(rngs, (cfg.vocab_size, cfg.hidden_size), cfg.hidden_size)
        self.layers = stack(lambda r: DecoderLayer(cfg, r), cfg.num_layers, rngs)
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.lm_head = None if cfg.tied else weight(rngs, (cfg.hidden_size, cfg.vocab_size), cfg.hidden_size)

    def embed_tokens(self, tokens: jax.Array, dtype: Any = None) -> jax.Array:
        """tokens [B, S] -> [B, S, D], in ``dtype`` (default: as stored), its gradient summed as stored.

        Ids must be inside the vocabulary: a gather clips silently.
        """
        table = self.embed[...]
        columns = jax.typeof(table).sharding.spec[1:]
        # Each device looks up all tokens of its fsdp group in its own columns: the tokens travel, the table does not.
        rows = take_rows(table, tokens, "data", None, *columns).astype(dtype or table.dtype)
        return jax.sharding.reshard(rows, fit_spec(rows.shape, (BATCH,)))

    def rope(self, positions: jax.Array, length: jax.Array) -> Rope:
        """The rotary angles of positions [B, S] in sequences of ``length`` [B] or [B, S] tokens."""
        cfg = self.cfg
        return rotary_table(positions, length, cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)

    def __call__(self, x: jax.Array, rope: Rope, attend: Attend) -> tuple[jax.Array, Any]:
        """Full sequences: x [B, S, D] -> hidden states [B, S, D] and what ``attend`` returned, stacked by layer.

        ``attend`` gets the layer's index as its state.
        """

        def body(layer: DecoderLayer, x: jax.Array, index: jax.Array) -> tuple[jax.Array, Any]:
            return layer(x, rope, attend, index)

        x, aux = scan_layers(self.layers, body, x, jnp.arange(self.cfg.num_layers), remat=self.remat)
        return self.norm(x), aux

    def decode(
        self, layers: Sequence[DecoderLayer], x: jax.Array, rope: Rope, attend: Attend, states: Sequence[Any]
    ) -> tuple[jax.Array, list[Any]]:
        """As ``__call__`` with single layers; each layer's ``attend`` gets, and returns, a state of its own.

        A scan would copy every cache, and on some backends every weight, out of its stack in each step.
        """
        after = []
        for layer, state in zip(layers, states, strict=True):
            x, state = layer(x, rope, attend, state)
            after.append(state)
        return self.norm(x), after

    def head(self, dtype: Any) -> jax.Array:
        """The output head, [D, V] or (tied) [V, D], gathered over fsdp: for many calls of ``logits`` in ``dtype``."""
        head, axes = (self.embed, ("tensor",)) if self.lm_head is None else (self.lm_head, (None, "tensor"))
        return gather_rounded(head[...], fit_spec(head.shape, axes), dtype)

    def logits(self, hidden: jax.Array, head: jax.Array | None = None) -> jax.Array:
        """[B, S, D] -> [B, S, V] in float32. ``head``: from ``head()``."""
        equation, own = ("bsd,vd->bsv", self.embed) if self.lm_head is None else ("bsd,dv->bsv", self.lm_head)
        return dot(equation, hidden, own[...] if head is None else head, BATCH, None, "tensor", dtype=jnp.float32)

    def logits_of(self, hidden: jax.Array, tokens: Sequence[int]) -> jax.Array:
        """The logits of a few tokens only. [B, S, D] -> [B, S, len(tokens)] in float32."""
        ids = jnp.array(tokens)  # gathered where they lie: the whole head never leaves its devices
        if self.lm_head is None:
            columns = self.embed[...].at[ids].get(out_sharding=P()).T
        else:
            columns = self.lm_head[...].at[:, ids].get(out_sharding=P())
        return dot("bsd,dc->bsc", hidden, columns, BATCH, dtype=jnp.float32)
