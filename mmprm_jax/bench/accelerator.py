"""How fast a large random model decodes on one accelerator: ``python -m mmprm_jax.bench.accelerator [--key=value …]``.

Groups of samples that share a prefix go through the sampling engine. Timed is decoding only, from the end of the second
call of the device to that of the last but one. Prints JSON.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmprm_jax.bench import common
from mmprm_jax.models import build
from mmprm_jax.models.config import VLMConfig
from mmprm_jax.models.released import named
from mmprm_jax.rollout.engine import Engine, Group
from mmprm_jax.rollout.sampling import Sampling
from mmprm_jax.sharding import make_mesh


def random_params(cfg: VLMConfig, mesh: Any, dtype: Any) -> tuple[Any, Any]:
    """The graph definition and random parameters, made in ``dtype`` one by one: nothing larger is ever in memory."""
    graphdef, shapes = build.abstract(cfg, -1, mesh, dtype)
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))

    def make(key: jax.Array, x: Any) -> jax.Array:
        draw = jax.jit(lambda key: jax.random.normal(key, x.shape, x.dtype) * 0.02, out_shardings=x.sharding)
        return draw(key)

    return graphdef, jax.tree.unflatten(tree, [make(key, x) for key, x in zip(keys, leaves, strict=True)])


def _groups(cfg: VLMConfig, groups: int, samples: int, prefix: int, new: int) -> list[Group]:
    rng = np.random.default_rng(0)
    sampling = Sampling(top_k=50, top_p=0.9, repetition_penalty=1.05, max_new_tokens=new)
    return [
        Group(
            i,
            str(i),
            tuple(rng.integers(0, cfg.decoder.vocab_size, prefix).tolist()),
            None,
            rng.integers(0, 1 << 32, 2, np.uint32),
            samples,
            sampling,
        )  # fmt: skip
        for i in range(groups)
    ]


def decode_8b(
    model: str = "internvl2_5-8b", groups: int = 16, samples: int = 16, prefix: int = 1024, new: int = 129,
    steps: int = 16, layers: int = 0, dtype: str = "bfloat16", copied: int = 1 << 30,
) -> dict[str, Any]:  # fmt: skip
    """Tokens/s of decoding, and the share of the memory's bandwidth: fewest bytes of a step over those of a copy.

    model: a name of ``models.released`` (its decoder only); new: tokens of a sample; steps: of one call of the device,
    at most a quarter of ``new``; layers: 0: all of the model's; copied: bytes of the array whose copy
    measures the bandwidth.
    """
    decoder = named(model).decoder
    decoder = dataclasses.replace(decoder, num_layers=layers or decoder.num_layers)
    cfg, mesh = VLMConfig(vision=None, decoder=decoder), make_mesh({"data": 1}, jax.devices()[:1])
    bandwidth, slots = common.copy_bandwidth(copied), groups * samples
    with jax.set_mesh(mesh):
        graphdef, params = random_params(cfg, mesh, jnp.dtype(dtype))
        engine = Engine(
            graphdef, params, cfg, -1, mesh, slots=slots, samples=samples, max_new=new, places=groups * prefix,
            rows=groups, steps=steps,
        )  # fmt: skip
        start = time.perf_counter()
        for group in _groups(cfg, groups, samples, prefix, new):
            engine.submit(group)
        marks = []
        while engine.busy:  # each call returns when the decoding that the one before it started is done
            engine.step()
            marks.append((time.perf_counter(), engine.counts.steps, engine.counts.live_steps))
        if len(marks) < 4:
            raise ValueError(f"{new} tokens are too few for calls of {steps} steps")
    first, last = marks[1], marks[-2]
    made, seconds = last[1] - first[1], last[0] - first[0]
    weights = sum(x.size for x in jax.tree.leaves(params)) - params["decoder"]["embed"].size * (not decoder.tied)
    own = 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * jnp.dtype(dtype).itemsize
    fewest = {
        "weights": weights * jnp.dtype(dtype).itemsize,
        "prefix": groups * prefix * own,
        "own": slots * new * own,
    }
    total = sum(fewest.values())
    return {
        "benchmark": "decode_8b",
        "device": jax.devices()[0].device_kind,
        "versions": common.versions(),
        "settings": dict(
            model=model, groups=groups, samples=samples, prefix=prefix, new=new, steps=steps,
            layers=decoder.num_layers, dtype=dtype,
        ),
        "steps": made,
        "seconds_per_step": seconds / made,
        "tokens_per_s": (last[2] - first[2]) / seconds,
        "fewest_bytes": {**fewest, "total": total},
        "copy_bytes_per_s": bandwidth,
        "fraction_of_bandwidth": total * made / seconds / bandwidth,
        "seconds_before_decoding": first[0] - start,
        "memory": jax.devices()[0].memory_stats(),
    }  # fmt: skip


if __name__ == "__main__":
    options = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[1:])
    numbers = {key: int(value) if value.isdigit() else value for key, value in options.items()}
    print(json.dumps(decode_8b(**numbers), indent=2))
