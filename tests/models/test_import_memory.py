"""How much host memory an import takes beyond the model itself, measured in a process of its own."""

import dataclasses
import json
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mmprm_jax.models import hf, hf_config
from mmprm_jax.models.hf_layout import layout
from mmprm_jax.models.released import released_config

SHARDS = 4
MEASURE = """
import json, os, sys, threading, time
import jax
jax.config.update("jax_num_cpu_devices", int(sys.argv[2]))
from mmprm_jax.models import hf
from mmprm_jax.sharding import make_mesh

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

mesh = make_mesh({"fsdp": -1})
checkpoint = hf.open_checkpoint(sys.argv[1])
before = peak = resident()
running = True

def watch():
    global peak
    while running:
        peak = max(peak, resident())
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
params = hf.load_params(checkpoint, mesh)
running = False
watcher.join()
model = sum(x.nbytes for x in jax.tree.leaves(params))
print(json.dumps({"extra": peak - before - model, "model": model, "after": resident() - before - model}))
"""


def write_8b_shaped(folder):
    """InternVL2.5-8B with 4 decoder and 2 vision layers, random bfloat16, in 4 files; the largest one's size."""
    cfg = released_config("internvl2_5-8b")
    cfg = dataclasses.replace(
        cfg,
        vision=dataclasses.replace(cfg.vision, num_layers=2),
        decoder=dataclasses.replace(cfg.decoder, num_layers=4),
    )
    v, d = cfg.vision, cfg.decoder
    config = {
        "architectures": ["InternVLChatModel"],
        "vision_config": dict(
            hidden_size=v.hidden_size, image_size=v.image_size, intermediate_size=v.intermediate_size,
            norm_type=v.norm, num_attention_heads=v.num_heads, num_hidden_layers=v.num_layers,
            patch_size=v.patch_size, qk_normalization=False, qkv_bias=True,
        ),
        "llm_config": dict(
            architectures=["InternLM2ForCausalLM"], hidden_size=d.hidden_size, intermediate_size=d.intermediate_size,
            num_attention_heads=d.num_heads, num_hidden_layers=d.num_layers, num_key_value_heads=d.num_kv_heads,
            vocab_size=d.vocab_size,
        ),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    groups = layout(hf_config.from_hf_config(config), hf_config.CHAT, "internlm2")
    tensors = [(key, shape) for group in groups for key, shape, _ in group.tensors()]
    tensors.sort(key=lambda item: -np.prod(item[1], dtype=np.int64))
    rng, weights = np.random.default_rng(0), {}
    for i in range(SHARDS):
        name = f"model-{i + 1:05d}-of-{SHARDS:05d}.safetensors"
        chosen = {
            key: rng.integers(0, 2**14, shape, np.uint16).view(ml_dtypes.bfloat16) for key, shape in tensors[i::SHARDS]
        }
        save_file(chosen, folder / name, {"format": "pt"})
        weights |= dict.fromkeys(chosen, name)
    (folder / hf.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    return max(p.stat().st_size for p in folder.glob("*.safetensors"))


@pytest.mark.slow
def test_import_takes_less_than_one_and_a_half_shards(tmp_path, capsys):
    largest = write_8b_shaped(tmp_path)
    for devices in (1, 8):
        found = subprocess.run(
            [sys.executable, "-c", MEASURE, str(tmp_path), str(devices)],
            env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=True, capture_output=True, text=True,
        )  # fmt: skip
        sizes = json.loads(found.stdout.splitlines()[-1])
        with capsys.disabled():
            print(
                f"\n8B-shaped import, {devices} devices: model {sizes['model'] / 2**20:.0f} MiB, largest shard"
                f" {largest / 2**20:.0f} MiB, extra at the peak {sizes['extra'] / 2**20:.0f} MiB"
                f" ({sizes['extra'] / largest:.2f} shards), left afterwards {sizes['after'] / 2**20:.0f} MiB"
            )
        assert sizes["extra"] < 1.5 * largest
