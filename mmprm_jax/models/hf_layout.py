"""Which tensors of a released checkpoint hold which parameters, and how to turn one into the other and back.

A file has one matrix [out, in] per layer; we keep [layers, in…, out…], heads apart.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mmprm_jax.models.config import VisionConfig, VLMConfig
from mmprm_jax.models.hf_config import CHAT, NATIVE, TEXT, TEXT_PRM

Arrays = tuple[jax.Array, ...]
KAPPA = ("kappa.weight", "kappa.bias")  # the head for a PRM's concentration


# How tensors become parameters (``read``) and parameters tensors again (``write``). Equal ones are compiled once.


@dataclasses.dataclass(frozen=True)
class Same:
    """The same values in the same order, in another shape."""

    stored_shape: tuple[int, ...]
    param_shape: tuple[int, ...]

    def read(self, x: jax.Array) -> Arrays:
        return (x.reshape(self.param_shape),)

    def write(self, p: jax.Array) -> Arrays:
        return (p.reshape(self.stored_shape),)


@dataclasses.dataclass(frozen=True)
class Matrices:
    """Matrices [out, in] in the file; here [*ins, *outs], or side by side as [*ins, count, *outs].

    Without ``ins`` they are biases [out].
    """

    ins: tuple[int, ...]
    outs: tuple[int, ...]
    count: int = 0  # 0: one matrix, not side by side

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return (math.prod(self.outs), math.prod(self.ins)) if self.ins else (math.prod(self.outs),)

    def read(self, *tensors: jax.Array) -> Arrays:
        blocks = [t.T.reshape(*self.ins, *self.outs) for t in tensors]
        return (jnp.stack(blocks, len(self.ins)) if self.count else blocks[0],)

    def write(self, p: jax.Array) -> Arrays:
        axis = len(self.ins)
        blocks = [jax.lax.index_in_dim(p, i, axis, False) for i in range(self.count)] if self.count else [p]
        return tuple(block.reshape(self.stored_shape[::-1]).T for block in blocks)


@dataclasses.dataclass(frozen=True)
class GroupedQKV:
    """InternLM2's wqkv: rows [queries of the group, its key, its value] for each key/value head."""

    size: int  # columns; 0: a bias
    groups: int
    per_group: int
    depth: int

    @property
    def stored_shape(self) -> tuple[int, ...]:
        rows = self.groups * (self.per_group + 2) * self.depth
        return (rows, self.size) if self.size else (rows,)

    def read(self, w: jax.Array) -> Arrays:
        first = (self.size,) if self.size else ()
        w = w.T.reshape(*first, self.groups, self.per_group + 2, self.depth)
        return w[..., : self.per_group, :], w[..., self.per_group, :], w[..., self.per_group + 1, :]

    def write(self, q: jax.Array, k: jax.Array, v: jax.Array) -> Arrays:
        whole = jnp.concatenate([q, k[..., None, :], v[..., None, :]], axis=-2)
        return (whole.reshape(self.stored_shape[::-1]).T,)


@dataclasses.dataclass(frozen=True)
class Patches:
    """The patch embedding: [out, 3, p, p] in the file, [p, p, 3, out] here."""

    stored_shape: tuple[int, ...]

    def read(self, w: jax.Array) -> Arrays:
        return (w.transpose(2, 3, 1, 0),)

    def write(self, p: jax.Array) -> Arrays:
        return (p.transpose(3, 2, 0, 1),)


@dataclasses.dataclass(frozen=True)
class Group:
    """Tensors of a file that belong together, of every layer, and the parameters that they are.

    ``{}`` in a key is the layer; parameters of a group with layers are stacked over them.
    """

    keys: tuple[str, ...]
    leaves: tuple[str, ...]  # parameter paths
    form: Same | Matrices | GroupedQKV | Patches
    layers: int = 0  # 0: not stacked

    def tensors(self) -> list[tuple[str, tuple[int, ...], int]]:
        """(name in the file, shape, layer) of every tensor, layer by layer."""
        return [(key.format(i), self.form.stored_shape, i) for i in range(max(self.layers, 1)) for key in self.keys]


def _plain(
    key: str, leaf: str, shape: Sequence[int], param_shape: Sequence[int] | None = None, layers: int = 0
) -> Group:
    return Group((key,), (leaf,), Same(tuple(shape), tuple(param_shape or shape)), layers)


def _linear(key: str, leaf: str, ins: Sequence[int], outs: Sequence[int], layers: int = 0) -> Group:
    return Group((key,), (leaf,), Matrices(tuple(ins), tuple(outs)), layers)


def _norm(key: str, leaf: str, size: int, kind: str = "rms_norm", layers: int = 0) -> list[Group]:
    groups = [_plain(f"{key}.weight", f"{leaf}/scale", (size,), layers=layers)]
    if kind == "layer_norm":
        groups.append(_plain(f"{key}.bias", f"{leaf}/bias", (size,), layers=layers))
    return groups


def _dense(key: str, leaf: str, size: int, out: int, layers: int = 0) -> list[Group]:
    """A matrix and its bias."""
    return [
        _linear(f"{key}.weight", leaf, (size,), (out,), layers),
        _plain(f"{key}.bias", f"{leaf}_bias", (out,), layers=layers),
    ]


def _vision(v: VisionConfig, root: str, native: bool) -> list[Group]:
    size, heads, layers, patch = v.hidden_size, v.num_heads, v.num_layers, v.patch_size
    depth = size // heads
    at, params = f"{root}encoder.{'layer' if native else 'layers'}.{{}}.", "vision/layers/"
    class_token, positions, conv, norms, attention, proj, scales = (
        (
            "cls_token", "position_embeddings", "patch_embeddings.projection", ("layernorm_before", "layernorm_after"),
            "attention", "projection_layer", ("lambda_1", "lambda_2"),
        )
        if native
        else (
            "class_embedding", "position_embedding", "patch_embedding", ("norm1", "norm2"),
            "attn", "proj", ("ls1", "ls2"),
        )
    )  # fmt: skip
    count = (v.image_size // patch) ** 2 + 1
    groups = [
        _plain(f"{root}embeddings.{class_token}", "vision/class_token", (1, 1, size)),
        _plain(f"{root}embeddings.{positions}", "vision/positions", (1, count, size)),
        Group((f"{root}embeddings.{conv}.weight",), ("vision/patch",), Patches((size, 3, patch, patch))),
        _plain(f"{root}embeddings.{conv}.bias", "vision/patch_bias", (size,)),
        _linear(f"{at}{attention}.{proj}.weight", f"{params}attention/proj", (heads, depth), (size,), layers),
        _plain(f"{at}{attention}.{proj}.bias", f"{params}attention/proj_bias", (size,), layers=layers),
        *_dense(f"{at}mlp.fc1", f"{params}mlp/fc1", size, v.intermediate_size, layers),
        *_dense(f"{at}mlp.fc2", f"{params}mlp/fc2", v.intermediate_size, size, layers),
    ]  # fmt: skip
    for i in (0, 1):
        groups += _norm(f"{at}{norms[i]}", f"{params}norm{i + 1}", size, v.norm, layers)
        groups.append(_plain(f"{at}{scales[i]}", f"{params}ls{i + 1}", (size,), layers=layers))
    if native:
        names, leaf = [f"{at}{attention}.{c}_proj" for c in "qkv"], f"{params}attention/qkv"
        form = Matrices((size,), (heads, depth), count=3)
        groups.append(Group(tuple(f"{n}.weight" for n in names), (leaf,), form, layers))
        if v.qkv_bias:
            form = Matrices((), (heads, depth), count=3)
            groups.append(Group(tuple(f"{n}.bias" for n in names), (f"{leaf}_bias",), form, layers))
    else:
        name = f"{at}{attention}.qkv"
        groups.append(_linear(f"{name}.weight", f"{params}attention/qkv", (size,), (3, heads, depth), layers))
        if v.qkv_bias:
            shape = (3, heads, depth)
            groups.append(_plain(f"{name}.bias", f"{params}attention/qkv_bias", (3 * size,), shape, layers))
    if v.qk_norm:
        for c in "qk":
            key, leaf = f"{at}{attention}.{c}_norm.weight", f"{params}attention/{c}_norm"
            groups.append(_plain(key, leaf, (size,), (heads, depth), layers))
    return groups


def _decoder(cfg: VLMConfig, root: str, head: str, internlm2: bool) -> list[Group]:
    """``root``: what stands before ``layers.N``; ``head``: the output head's name."""
    d, params = cfg.decoder, "decoder/layers/"
    size, hidden, layers = d.hidden_size, d.intermediate_size, d.num_layers
    groups, depth = d.num_kv_heads, d.head_dim
    per_group = d.num_heads // groups
    at = f"{root}layers.{{}}."
    embed = "tok_embeddings" if internlm2 else "embed_tokens"
    found = [
        _plain(f"{root}{embed}.weight", "decoder/embed", (d.vocab_size, size)),
        *_norm(f"{root}norm", "decoder/norm", size),
    ]
    if not d.tied:
        found.append(_linear(f"{head}.weight", "decoder/lm_head", (size,), (d.vocab_size,)))
    if internlm2:
        attention, out, mlp = f"{at}attention.", "wo", f"{at}feed_forward."
        names, norms = ("w1", "w3", "w2"), ("attention_norm", "ffn_norm")
        leaves = tuple(f"{params}attention/{c}" for c in "qkv")
        form = GroupedQKV(size, groups, per_group, depth)
        found.append(Group((f"{attention}wqkv.weight",), leaves, form, layers))
        if d.qkv_bias:
            form = dataclasses.replace(form, size=0)
            biases = tuple(f"{leaf}_bias" for leaf in leaves)
            found.append(Group((f"{attention}wqkv.bias",), biases, form, layers))
    else:
        attention, out, mlp = f"{at}self_attn.", "o_proj", f"{at}mlp."
        names, norms = ("gate_proj", "up_proj", "down_proj"), ("input_layernorm", "post_attention_layernorm")
        for c, shape in (("q", (groups, per_group, depth)), ("k", (groups, depth)), ("v", (groups, depth))):
            found.append(_linear(f"{attention}{c}_proj.weight", f"{params}attention/{c}", (size,), shape, layers))
            if d.qkv_bias:
                key, leaf = f"{attention}{c}_proj.bias", f"{params}attention/{c}_bias"
                found.append(_plain(key, leaf, (math.prod(shape),), shape, layers))
    found.append(
        _linear(f"{attention}{out}.weight", f"{params}attention/o", (groups, per_group, depth), (size,), layers)
    )
    if d.out_bias:
        found.append(_plain(f"{attention}{out}.bias", f"{params}attention/o_bias", (size,), layers=layers))
    if d.qk_norm:
        for c in "qk":
            found += _norm(f"{attention}{c}_norm", f"{params}attention/{c}_norm", depth, layers=layers)
    for name, leaf, (ins, outs) in zip(
        names, ("gate", "up", "down"), ((size, hidden), (size, hidden), (hidden, size)), strict=True
    ):
        found.append(_linear(f"{mlp}{name}.weight", f"{params}mlp/{leaf}", (ins,), (outs,), layers))
        if d.mlp_bias:
            found.append(_plain(f"{mlp}{name}.bias", f"{params}mlp/{leaf}_bias", (outs,), layers=layers))
    for i in (0, 1):
        found += _norm(f"{at}{norms[i]}", f"{params}norm{i + 1}", size, layers=layers)
    return found


def layout(cfg: VLMConfig, kind: str, decoder: str, prefixed: bool = False) -> list[Group]:
    """Every tensor of a checkpoint, a PRM's head for its concentration last.

    kind: CHAT, NATIVE, TEXT or TEXT_PRM; decoder: internlm2, qwen2, qwen3 or llama; prefixed: transformers' newer names
    of the NATIVE kind, ``model.language_model.*`` and ``lm_head.*``, not ``language_model.model.*``.
    """
    groups = _layout(cfg, kind, decoder, prefixed)
    if cfg.kappa:
        groups.append(_linear(KAPPA[0], "kappa/kernel", (cfg.decoder.hidden_size,), (1,)))
        groups.append(_plain(KAPPA[1], "kappa/bias", (1,)))
    return groups


def _layout(cfg: VLMConfig, kind: str, decoder: str, prefixed: bool) -> list[Group]:
    if kind == TEXT_PRM:
        size = cfg.decoder.hidden_size
        return [
            *_decoder(cfg, "model.", "lm_head", False),
            *_dense("score.0", "score/fc1", size, size),
            *_dense("score.2", "score/fc2", size, cfg.num_labels),
        ]
    if kind == TEXT:
        return _decoder(cfg, "model.", "lm_head", False)
    internlm2 = decoder == "internlm2"
    if kind == CHAT:
        vision, projector, names = "vision_model.", "mlp1.", ("0", "1", "3")
        text, head = "language_model.model.", f"language_model.{'output' if internlm2 else 'lm_head'}"
    else:
        first = "model." if prefixed else ""
        vision, projector = f"{first}vision_tower.", f"{first}multi_modal_projector."
        names = ("layer_norm", "linear_1", "linear_2")
        text, head = (
            ("model.language_model.", "lm_head") if prefixed else ("language_model.model.", "language_model.lm_head")
        )
    size = cfg.with_vision.hidden_size * cfg.downsample**2
    out = cfg.decoder.hidden_size
    return [
        *_vision(cfg.with_vision, vision, kind == NATIVE),
        *_norm(f"{projector}{names[0]}", "projector/norm", size, "layer_norm"),
        *_dense(f"{projector}{names[1]}", "projector/fc1", size, out),
        *_dense(f"{projector}{names[2]}", "projector/fc2", out, out),
        *_decoder(cfg, text, head, internlm2),
    ]


def get(tree: Any, path: str) -> Any:
    """The leaf of a nested dictionary at ``a/b/c``; None when there is none."""
    for part in path.split("/"):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def put(tree: dict, path: str, value: Any) -> None:
    """Sets the leaf of a nested dictionary at ``a/b/c``."""
    *parents, last = path.split("/")
    for part in parents:
        tree = tree.setdefault(part, {})
    tree[last] = value
