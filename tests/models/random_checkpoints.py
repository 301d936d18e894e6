"""Checkpoints of random weights in the released formats."""

import json

import numpy as np
from safetensors.numpy import save_file

from mmprm_jax.models import hf, hf_config
from mmprm_jax.models.hf_layout import layout


def random_checkpoint(folder, cfg, config, dtype=np.float32, shards=1, seed=0):
    """A checkpoint of random weights in the layout that its config.json asks for."""
    folder.mkdir()
    groups = layout(cfg, hf_config.checkpoint_kind(config), hf_config.decoder_kind(config))
    rng = np.random.default_rng(seed)
    tensors = [(key, shape) for group in groups for key, shape, _ in group.tensors()]
    sizes = np.cumsum([np.prod(shape, dtype=np.int64) for _, shape in tensors])
    owner = np.minimum((sizes - 1) * shards // sizes[-1], shards - 1)
    weights = {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        chosen = {
            key: rng.standard_normal(shape, np.float32).astype(dtype)
            for (key, shape), at in zip(tensors, owner, strict=True)
            if at == i
        }
        save_file(chosen, folder / name, {"format": "pt"})
        weights |= dict.fromkeys(chosen, name)
    if shards > 1:
        (folder / hf.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def chat_config(cfg, decoder, **text):
    """A config.json of InternVLChatModel with the sizes of ``cfg``."""
    v, d = cfg.vision, cfg.decoder
    return {
        "architectures": ["InternVLChatModel"],
        "downsample_ratio": 1 / cfg.downsample,
        "force_image_size": cfg.tile,
        "ps_version": "v2",
        "select_layer": -1,
        "vision_config": {
            "hidden_size": v.hidden_size,
            "image_size": v.image_size,
            "intermediate_size": v.intermediate_size,
            "norm_type": v.norm,
            "num_attention_heads": v.num_heads,
            "num_hidden_layers": v.num_layers,
            "patch_size": v.patch_size,
            "qk_normalization": v.qk_norm,
            "qkv_bias": v.qkv_bias,
        },
        "llm_config": {
            "architectures": [decoder],
            "hidden_size": d.hidden_size,
            "intermediate_size": d.intermediate_size,
            "num_attention_heads": d.num_heads,
            "num_hidden_layers": d.num_layers,
            "num_key_value_heads": d.num_kv_heads,
            "head_dim": d.head_dim,
            "rms_norm_eps": d.rms_norm_eps,
            "rope_theta": d.rope_theta,
            "vocab_size": d.vocab_size,
            "max_position_embeddings": 32768,
            "rope_scaling": d.rope_scaling and {"type": d.rope_scaling.kind, "factor": d.rope_scaling.factor},
            **text,
        },
    }
