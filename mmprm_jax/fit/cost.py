"""How much work sampling is: FLOPs and bytes by formula, whatever an implementation makes of it.

A multiplication with its addition is 2 FLOPs. Counted are the matrix products: of the layers (2 per token and weight),
of the output head (where a token is drawn), of attention (per layer, query head and pair of query and key: 2 D for the
score, 2 D for the value). Norms, rotations, softmax and the drawing itself are not; nor is padding.
"""

from __future__ import annotations

import math
from typing import Any

import jax

from mmprm_jax.models.config import DecoderConfig, VLMConfig


def layer_weights(cfg: DecoderConfig) -> int:
    """Elements of the matrices of one layer."""
    heads = 2 * (cfg.num_heads + cfg.num_kv_heads)  # q and o, k and v
    return cfg.hidden_size * (heads * cfg.head_dim + 3 * cfg.intermediate_size)


def decoder_flops(cfg: DecoderConfig, tokens: int, pairs: int, logits: int) -> int:
    """tokens: that go through the layers; pairs: of a token and one it attends to, itself included; logits: draws."""
    layer = 2 * layer_weights(cfg) * tokens + 4 * cfg.num_heads * cfg.head_dim * pairs
    return cfg.num_layers * layer + 2 * cfg.hidden_size * cfg.vocab_size * logits


def vision_flops(cfg: VLMConfig, tiles: int) -> int:
    """The vision tower and the projector on ``tiles`` image tiles."""
    if cfg.vision is None or not tiles:
        return 0
    v = cfg.vision
    patches = (cfg.tile // v.patch_size) ** 2
    weights = v.hidden_size * (4 * v.hidden_size + 2 * v.intermediate_size)
    layer = 2 * weights * (patches + 1) + 4 * v.hidden_size * (patches + 1) ** 2
    patch = 2 * patches * 3 * v.patch_size**2 * v.hidden_size
    return tiles * (v.num_layers * layer + patch) + projector_flops(cfg, tiles)


def projector_flops(cfg: VLMConfig, tiles: int) -> int:
    if cfg.vision is None:
        return 0
    out = cfg.decoder.hidden_size
    return tiles * 2 * cfg.tokens_per_tile * out * (cfg.vision.hidden_size * cfg.downsample**2 + out)


def rollout_flops(cfg: VLMConfig, groups: int, samples: int, prefix: int, new: int, tiles: int = 0) -> int:
    """The least work for ``samples`` of ``new`` tokens each behind each of ``groups`` prefixes of ``prefix`` tokens.

    A prefix and its ``tiles`` are computed once. Its last hidden state gives the first token of each sample, and the
    last token of a sample is not computed on.
    """
    steps = new - 1
    computed = prefix + samples * steps
    pairs = prefix * (prefix + 1) // 2 + samples * sum(prefix + t for t in range(1, new))
    draws = 1 + samples * steps
    return groups * (decoder_flops(cfg.decoder, computed, pairs, draws) + vision_flops(cfg, tiles))


def train_flops(cfg: VLMConfig, rows: int, tokens: int, tiles: int, logits: int) -> int:
    """The least work for one training step on ``rows`` of ``tokens`` with ``tiles`` in all, the vision tower frozen.

    Three times the forward pass of decoder (6 per token and weight) and projector, once that of the tower. A token
    attends to all tokens before it in its row, whichever example they belong to: kernels skip no blocks by segment.
    logits: tokens of a row that get a distribution over the vocabulary.
    """
    pairs = tokens * (tokens + 1) // 2
    decoder = rows * decoder_flops(cfg.decoder, tokens, pairs, logits)
    return 3 * decoder + vision_flops(cfg, tiles) + 2 * projector_flops(cfg, tiles)


def local_bytes(tree: Any) -> int:
    """Bytes of a tree of arrays (or ShapeDtypeStructs) on one device."""

    def size(x: Any) -> int:
        shape = x.sharding.shard_shape(x.shape) if x.sharding is not None else x.shape
        return math.prod(shape) * x.dtype.itemsize

    return sum(size(x) for x in jax.tree.leaves(tree))


def step_bytes(params: Any, layers: Any, rows: Any, state: Any) -> dict[str, int]:
    """The fewest bytes that one device reads in one decoding step: weights and caches, each once.

    The arguments of ``rollout.device.decode``, or their ShapeDtypeStructs. weights: of all layers, the last norm and
    the output head (of the embedding a few rows are read, which do not count); prefix, own: keys and values of the
    resident prefixes and of the slots, as long as their arrays are.
    """
    decoder = params["decoder"]
    with_head = isinstance(layers, dict) and "head" in layers  # a copy for decoding, which replaces the parameter
    head = () if with_head else decoder.get("lm_head", decoder["embed"])
    parts = {
        "weights": local_bytes((layers, head, decoder["norm"])),
        "prefix": local_bytes(rows),
        "own": local_bytes(state["own"]),
    }
    return {**parts, "total": sum(parts.values())}
