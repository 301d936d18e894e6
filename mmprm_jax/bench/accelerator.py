"""A large random model on one accelerator: ``python -m mmprm_jax.bench.accelerator {decode,train} [--key=value …]``.

decode: groups of samples that share a prefix go through the sampling engine. Timed is decoding only, from the end of
the second call of the device to that of the last but one. train: training steps on packed rows. Prints JSON.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmprm_jax.bench import common
from mmprm_jax.environment import versions
from mmprm_jax.fit import chips, cost, jobs
from mmprm_jax.models import build
from mmprm_jax.models.config import VLMConfig
from mmprm_jax.models.released import released_config
from mmprm_jax.rollout.engine import Engine, Group
from mmprm_jax.rollout.sampling import Sampling
from mmprm_jax.sharding import make_mesh


def random_params(cfg: VLMConfig, mesh: Any, dtype: Any) -> tuple[Any, Any]:
    """The graph definition and random parameters, made in ``dtype`` one by one: nothing larger is ever in memory."""
    graphdef, shapes = build.abstract(cfg, -1, mesh, dtype)
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return graphdef, jax.tree.unflatten(tree, [_draw(key, x) for key, x in zip(keys, leaves, strict=True)])


def _draw(key: jax.Array, x: Any) -> jax.Array:
    """A random array like ``x``."""
    draw = jax.jit(lambda key: jax.random.normal(key, x.shape, x.dtype) * 0.02, out_shardings=x.sharding)
    return draw(key)


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


def decode(
    model: str = "internvl2_5-8b", groups: int = 16, samples: int = 16, prefix: int = 1024, new: int = 129,
    steps: int = 16, layers: int = 0, dtype: str = "bfloat16", copied: int = 1 << 30,
) -> dict[str, Any]:  # fmt: skip
    """Tokens/s of decoding, and the share of the memory's bandwidth: fewest bytes of a step over those of a copy.

    model: a name of ``models.released`` (its decoder only); new: tokens of a sample; steps: of one call of the device,
    at most a quarter of ``new``; layers: 0: all of the model's; copied: bytes of the array whose copy
    measures the bandwidth.
    """
    decoder = released_config(model).decoder
    decoder = dataclasses.replace(decoder, num_layers=layers or decoder.num_layers)
    cfg, mesh = VLMConfig(vision=None, decoder=decoder), make_mesh({"data": 1}, jax.devices()[:1])
    bandwidth, slots = common.copy_bandwidth(copied), groups * samples
    with jax.set_mesh(mesh):
        graphdef, params = random_params(cfg, mesh, jnp.dtype(dtype))
        engine = Engine(
            graphdef, params, cfg, -1, mesh, slots=slots, samples=samples, max_new=new, cache_tokens=groups * prefix,
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
        "benchmark": "decode",
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
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


def _segments(rows: int, tokens: int, examples: int) -> np.ndarray:
    """int32 [rows, tokens]: ``examples`` of equal length in each row, numbered from 1."""
    return np.tile(np.arange(tokens) * examples // tokens + 1, (rows, 1)).astype(np.int32)


def train(
    model: str = "internvl2_5-1b", job: str = "train_prm", rows: int = 8, tokens: int = 8192, examples: int = 7,
    tiles: int = 24, microbatches: int = 8, remat: str = "full", layers: int = 0, steps: int = 6,
) -> dict[str, Any]:  # fmt: skip
    """Tokens/s and the share of the chip's peak (MFU) of ``trainer.train_step`` as ``mmprm fit`` compiles it.

    A step takes ``rows`` of ``tokens``, in each ``examples`` of equal length and ``tiles`` image tiles; bfloat16 with
    float32 masters and moments of AdamW, the vision tower frozen. The first step is not timed. ``mfu`` counts the least
    work: attention within examples only, and nothing that is computed twice; ``mfu_whole_rows`` counts attention as if
    each row were one example.
    """
    s = jobs.Settings(
        model, job, layers=layers, rows=rows, row_tokens=tokens, row_examples=examples, tiles=tiles,
        microbatches=microbatches, remat=remat,
    )  # fmt: skip
    cfg, mesh, rng = jobs.config(s), make_mesh({"data": 1}, jax.devices()[:1]), np.random.default_rng(0)
    with jax.set_mesh(mesh):
        work = jobs.JOBS[job](s, cfg, mesh)
        state, frozen, batch = work.programs[0].args
        key = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves((state["params"], frozen)))))
        state["params"], frozen = jax.tree.map(lambda x: _draw(next(key), x), (state["params"], frozen))
        state["opt"], state["step"] = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype, out_sharding=x.sharding), (state["opt"], state["step"])
        )
        filled = {"segment": _segments(rows, tokens, examples), "example": np.zeros((rows, examples), np.int32)}
        filled["tokens"] = rng.integers(1, cfg.decoder.vocab_size, (rows, tokens), np.int32)
        filled["tokens"][:, : min(tokens, tiles * cfg.tokens_per_tile)] = 0  # the image token of jobs.train
        filled["n"] = np.where(rng.random((rows, tokens)) < 0.01, 8, 0).astype(np.int32)
        filled["k"] = filled["n"] // 2
        filled["response"] = np.ones((rows, tokens), bool)
        if "pixels" in batch:
            filled["pixels"] = rng.standard_normal(batch["pixels"].shape, np.float32)
        batch = {name: jax.device_put(filled[name], x.sharding) for name, x in batch.items()}
        losses, marks = [], []
        for _ in range(steps + 1):
            state, scalars = work.programs[0].run(state, frozen, batch, **work.programs[0].kwargs)
            losses.append(float(scalars["loss"]))
            marks.append(time.perf_counter())
    seconds = (marks[-1] - marks[0]) / steps
    kind = jax.devices()[0].device_kind
    peak = next((chip.flops for name, chip in chips.CHIPS.items() if name in kind.lower()), float("nan"))
    drawn = tokens if job == "sft" else 0
    least = {
        name: cost.train_flops(cfg, rows * parts, tokens // parts, rows * tiles, drawn // parts)
        for name, parts in {"mfu": examples, "mfu_whole_rows": 1}.items()
    }
    return {
        "benchmark": "train",
        "device": kind,
        "versions": versions(),
        "settings": dataclasses.asdict(s),
        "parameters": work.parameters,
        "seconds_per_step": seconds,
        "tokens_per_s": rows * tokens / seconds,
        "peak_flops": peak,
        **{name: flops / seconds / peak for name, flops in least.items()},
        "losses": losses,
        "memory": jax.devices()[0].memory_stats(),
    }


if __name__ == "__main__":
    commands: dict[str, Callable[..., dict]] = {"decode": decode, "train": train}
    if sys.argv[1:2] == [] or sys.argv[1] not in commands:
        sys.exit(f"usage: python -m mmprm_jax.bench.accelerator {{{','.join(commands)}}} [--key=value …]")
    options = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[2:])
    numbers = {key: int(value) if value.isdigit() else value for key, value in options.items()}
    print(json.dumps(commands[sys.argv[1]](**numbers), indent=2))
