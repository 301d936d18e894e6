"""The programs of each job on a mesh, with shapes in place of arrays: nothing is allocated."""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mmprm_jax.evaluation import score
from mmprm_jax.fit import chips, cost
from mmprm_jax.models import build
from mmprm_jax.models.config import VLMConfig
from mmprm_jax.models.released import released_config
from mmprm_jax.records import UserError
from mmprm_jax.rollout import device
from mmprm_jax.sharding import BATCH, fit_spec, make_mesh
from mmprm_jax.training import losses, optimizers, trainer

_IMAGE, _CLASSES = 0, (1, 2)  # ids of tokens; which ones does not change a program


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is compiled. Sizes that are 0 are chosen for the job, the model and the topology (``resolve``)."""

    model: str = "internvl2_5-8b"
    job: str = "train_prm"
    topology: str = "v5e-32"
    tensor: int = 0  # chips that share the heads and hidden units of a row; the others are fsdp
    layers: int = 0  # of the decoder; 0: as many as the model has
    examples: int = 0  # of the whole job, for its duration; 0: not given
    # sft, train_prm: a step takes ``rows`` of ``row_tokens``, each packed from ``row_examples`` with ``tiles`` in all
    rows: int = 64
    row_tokens: int = 8192
    row_examples: int = 7
    tiles: int = 24
    microbatches: int = 0  # 0: so many that a chip has one row at a time
    remat: str = "full"
    optimizer: str = "adamw"
    moments: str = "float32"
    # decode: samples at a time, each of at most ``columns`` tokens, behind ``prefixes`` of ``width`` tokens
    slots: int = 256
    prefixes: int = 32
    samples: int = 16
    width: int = 1024
    columns: int = 128
    # score: ``solutions`` of ``solution_tokens`` for each of ``problems``, whose prompts have ``prompt_tokens``
    problems: int = 0
    solutions: int = 16
    solution_tokens: int = 512
    prompt_tokens: int = 2048
    prompt_tiles: int = 7


def parse(items: Sequence[str], **named_settings: str) -> Settings:
    """Settings from ``key=value`` texts. Raises UserError that lists the keys."""
    kinds = typing.get_type_hints(Settings)
    values: dict[str, Any] = dict(named_settings)
    for item in items:
        key, _, text = item.partition("=")
        if key not in kinds:
            raise UserError(f"{item!r}: no such setting; there are {', '.join(f'{k}=' for k in kinds)}")
        try:
            values[key] = kinds[key](text)
        except ValueError:
            raise UserError(f"{item!r}: expected a number") from None
        least = 0 if key in ("tiles", "prompt_tiles") or getattr(Settings, key) == 0 else 1
        if kinds[key] is int and values[key] < least:
            raise UserError(f"{item!r}: must be at least {least}")
    return Settings(**values)


def config(s: Settings) -> VLMConfig:
    """The model's sizes. Raises UserError on an unknown name."""
    cfg = released_config(s.model)
    return dataclasses.replace(
        cfg, decoder=dataclasses.replace(cfg.decoder, num_layers=s.layers or cfg.decoder.num_layers)
    )


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function and its abstract arguments. ``turn``: what counts is one turn of its largest loop."""

    name: str
    run: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    turn: bool = False


@dataclasses.dataclass(frozen=True)
class Job:
    """One step of a job: its programs, and by formula the least FLOPs on all chips together."""

    programs: tuple[Program, ...]
    parameters: int  # of the model
    flops: int
    tokens: int
    examples: float
    fewest_bytes: dict[str, int] | None = None  # on one chip, where a formula says it
    kernels: Callable[[str, list[list[int]]], int] = lambda name, shapes: 0  # FLOPs of Pallas calls, see hlo.sum_flops


def _place(mesh: Any, tree: Any, spec: Callable[[Any], P] = lambda x: x.sharding.spec) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec(x))), tree)


def _abstract(mesh: Any, tree: Any) -> Any:
    """A ``device.Make`` that allocates nothing."""
    return _place(mesh, tree, lambda x: x.spec)


def _batch(mesh: Any, dtype: Any, *shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, fit_spec(shape, (BATCH,), mesh)))


def _size(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def train(s: Settings, cfg: VLMConfig, mesh: Any) -> Job:
    """``training.trainer.train_step`` on packed rows: bfloat16, float32 masters, a frozen vision tower."""
    cfg = dataclasses.replace(cfg, remat=s.remat)
    graphdef, params = build.abstract(cfg, _IMAGE, mesh)
    frozen = ("vision",) if cfg.vision else ()
    settings = trainer.Settings(
        1000, s.rows, optimizers.Settings(s.optimizer, 1e-5, moments=s.moments), s.microbatches, "bfloat16", frozen
    )
    loss = losses.policy_loss if s.job == "sft" else losses.prm_loss("soft", 0.5, *_CLASSES)
    task = trainer.make_task(graphdef, loss, settings)
    ints = functools.partial(_batch, mesh, jnp.int32, s.rows, s.row_tokens)
    batch = {"tokens": ints(), "segment": ints(), "example": _batch(mesh, jnp.int32, s.rows, s.row_examples)}
    if s.job == "sft":
        batch["response"] = _batch(mesh, jnp.bool, s.rows, s.row_tokens)
    else:
        batch |= {"k": ints(), "n": ints()}
    if cfg.vision and s.tiles:
        batch["pixels"] = _batch(mesh, jnp.float32, s.rows, s.tiles, cfg.tile, cfg.tile, 3)
    state, kept = trainer.abstract_state(params, task, mesh)
    return Job(
        (Program("step", trainer.train_step, (state, kept, batch), {"task": task}),),
        _size(params),
        cost.train_flops(cfg, s.rows, s.row_tokens, s.rows * s.tiles, s.row_tokens if s.job == "sft" else 0),
        s.rows * s.row_tokens,
        s.rows * s.row_examples,
        kernels=functools.partial(attention_flops, causal=s.row_tokens),
    )


def attention_flops(name: str, shapes: list[list[int]], causal: int) -> int:
    """FLOPs of a call of a splash attention kernel (see ``hlo.Kernels``), over rows of ``causal`` tokens if causal.

    Its operands are tables of n x n blocks, then q [..., heads, S, D], k and v. Blocks above the diagonal are skipped.
    """
    products = {"fwd": 2, "dkv": 4, "dq": 3}  # of each score or gradient: q k', p v; and two or one more, backwards
    found = next((count for part, count in products.items() if f"splash_mha_{part}" in name), 0)
    if not found:
        return 0
    blocks = shapes[0][-1]
    q, k = [shape for shape in shapes if len(shape) > 2 and shape[-1] % 128 == 0][:2]
    square = 2 * found * math.prod(q) * k[-2]
    return square * (blocks + 1) // (2 * blocks) if q[-2] == causal else square


def decode(s: Settings, cfg: VLMConfig, mesh: Any) -> Job:
    """One step of ``rollout.device.decode``, in bfloat16; an example is a sample."""
    decoder = cfg.decoder
    graphdef, params = build.abstract(VLMConfig(vision=None, decoder=decoder), -1, mesh, jnp.bfloat16)
    b = device.shards(mesh)
    layers = _place(mesh, jax.eval_shape(functools.partial(device.unstack, graphdef=graphdef), params))
    sizes = -(-s.slots // b), -(-s.prefixes // b)
    rows = device.new_rows(decoder, mesh, sizes[1], s.width, jnp.bfloat16, make=_abstract)
    state = device.new_state(decoder, mesh, *sizes, s.samples, s.columns, jnp.bfloat16, make=_abstract)
    numbers = functools.partial(_batch, mesh, jnp.int32, b)
    queue = {"order": numbers(sizes[1] * s.samples), "head": numbers(), "tail": numbers()}
    limit = {name: jax.ShapeDtypeStruct((), jnp.int32) for name in ("steps", "min_steps", "free_slots")}
    args = (params, layers, rows, state, queue, limit)
    return Job(
        (Program("decode", device.decode, args, {"graphdef": graphdef, "used": len(state["own"][0])}, turn=True),),
        _size(params),
        cost.decoder_flops(decoder, s.slots, s.slots * (s.width + s.columns // 2), s.slots),
        s.slots,
        s.slots / s.columns,
        cost.step_bytes(*args[:4]),
    )


def score_solutions(s: Settings, cfg: VLMConfig, mesh: Any) -> Job:
    """``evaluation.score`` of a batch of problems, in bfloat16; an example is a solution."""
    count = s.problems or device.shards(mesh)
    graphdef, params = build.abstract(cfg, _IMAGE, mesh, jnp.bfloat16)
    ints, bools = (functools.partial(_batch, mesh, dtype) for dtype in (jnp.int32, jnp.bool))
    prompt = (count, s.prompt_tokens)
    pixels = _batch(mesh, jnp.float32, count, s.prompt_tiles, cfg.tile, cfg.tile, 3) if cfg.vision else None
    first = {"tokens": ints(*prompt), "valid": bools(*prompt), "length": ints(count), "pixels": pixels}
    prefill = Program("prompts", score._prefill, (params, first), {"graphdef": graphdef})
    prefix = _place(mesh, jax.eval_shape(functools.partial(score._prefill, graphdef=graphdef), params, first))
    rows = count * s.solutions
    then = {"tokens": ints(rows, s.solution_tokens), "valid": bools(rows, s.solution_tokens)}
    then |= {"start": ints(rows), "length": ints(rows)}
    args = (params, prefix, first["valid"], then)
    scores = Program("solutions", score._scores, args, {"graphdef": graphdef, "classes": _CLASSES})
    tokens, pairs = s.solution_tokens, s.solution_tokens * (s.prompt_tokens + (s.solution_tokens + 1) // 2)
    flops = cost.decoder_flops(cfg.decoder, s.prompt_tokens, s.prompt_tokens * (s.prompt_tokens + 1) // 2, 0)
    flops += s.solutions * cost.decoder_flops(cfg.decoder, tokens, pairs, 0) + cost.vision_flops(cfg, s.prompt_tiles)
    total = count * (s.prompt_tokens + s.solutions * s.solution_tokens)
    kernels = functools.partial(attention_flops, causal=s.prompt_tokens)
    return Job((prefill, scores), _size(params), count * flops, total, rows, kernels=kernels)


JOBS: dict[str, Callable[[Settings, VLMConfig, Any], Job]] = {
    "sft": train, "train_prm": train, "decode": decode, "score": score_solutions,
}  # fmt: skip


def resolve(s: Settings) -> tuple[Settings, chips.Topology]:
    """The settings with everything that was left open chosen. Raises UserError on unknown names and bad sizes."""
    if s.job not in JOBS:
        raise UserError(f"job {s.job!r} is unknown; choose {', '.join(sorted(JOBS))}")
    topology, cfg = chips.topology(s.topology), config(s)
    trains = s.job in ("sft", "train_prm")
    heads = math.gcd(topology.count, cfg.decoder.num_kv_heads)
    # A training step has many rows, and sharing them is dearer; the others want all weights close to each token.
    tensor = s.tensor or (-(-topology.count // s.rows) if trains else heads)
    if topology.count % tensor:
        raise UserError(f"tensor={tensor} does not divide the {topology.count} chips of {topology.name}")
    shards = topology.count // tensor
    microbatches = s.microbatches or max(1, s.rows // shards)
    if trains and s.rows % (microbatches * shards):
        raise UserError(
            f"rows={s.rows} cannot be split into {microbatches} microbatches over {shards} chips: choose rows as a"
            f" multiple of {microbatches * shards}, or tensor= and microbatches= otherwise"
        )
    layers = cfg.decoder.num_layers
    s = dataclasses.replace(s, tensor=tensor, layers=layers, microbatches=microbatches, topology=topology.name)
    return s, topology


def make(s: Settings, devices: Sequence[Any]) -> tuple[Job, Any]:
    """The job of resolved settings on ``devices``, and their mesh."""
    mesh = make_mesh({"fsdp": -1, "tensor": s.tensor}, devices)
    with jax.set_mesh(mesh):
        return JOBS[s.job](s, config(s), mesh), mesh
