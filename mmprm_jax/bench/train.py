"""``mmprm bench train [CASE]``: our packed training step against a plain loop of torch and transformers, on this CPU.

Same model, weights, examples, batches, loss and optimizer. Ours packs the examples into rows, and compiles; the other
pads them to the longest, as such loops do, of all or of a few at a time: whatever is fastest. A better loop, which
sorts each batch by length first, is measured too. The two sides run in a process each and take turns; loading,
compilation and a first run are not timed, nor is the making of batches.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np

from mmprm_jax.bench import common
from mmprm_jax.bench.rollout import IMAGE, MODELS, export
from mmprm_jax.data import packing
from mmprm_jax.environment import versions
from mmprm_jax.models import build
from mmprm_jax.models.config import VLMConfig
from mmprm_jax.records import UserError
from mmprm_jax.sharding import make_mesh, put_rows
from mmprm_jax.spawn import Child
from mmprm_jax.training import losses, optimizers, trainer

_TOLERANCE = 1e-4  # relative, of the first step's loss and gradient norm
_CLIP = 1.0


@dataclasses.dataclass(frozen=True)
class Case:
    """``steps`` batches of ``rows`` rows with ``tokens`` tokens each, filled with examples of about ``median``."""

    model: str = "tiny_vlm"
    rows: int = 60
    tokens: int = 120
    examples: int = 4  # of a row at most; each has one image of one tile
    median: float = 45.0
    shortest: int = 24
    steps: int = 10
    remat: str = "full"  # for the tiny model faster on CPUs than to keep what was computed

    @property
    def cfg(self) -> VLMConfig:
        return dataclasses.replace(MODELS[self.model], remat=self.remat)


CASES = {
    "tiny_vlm": Case(),  # the model of configs/digits.py
    "small_vlm": Case("small_vlm", rows=8, tokens=256, examples=6, median=75, shortest=30, steps=5),
}


@dataclasses.dataclass(frozen=True)
class Example:
    tokens: np.ndarray  # int32 [L]
    response: np.ndarray  # bool [L]
    tile: np.ndarray  # float32 [H, W, 3]


def batches(case: Case, seed: int) -> Iterator[tuple[dict[str, np.ndarray], list[Example]]]:
    """Endless batches, packed and as the list of their examples."""
    rng, cfg = np.random.default_rng(seed), case.cfg
    found: list[Example] = []

    def example(number: int) -> dict[str, np.ndarray]:
        length = int(np.clip(rng.lognormal(np.log(case.median), 0.5), case.shortest, case.tokens))
        tokens = rng.integers(IMAGE + 1, cfg.decoder.vocab_size, length, np.int32)
        tokens[1 : 1 + cfg.tokens_per_tile] = IMAGE
        response = np.arange(length) >= min(length // 2, length - 4)
        tile = rng.standard_normal((cfg.tile, cfg.tile, 3), np.float32)
        found.append(Example(tokens, response & (tokens != IMAGE), tile))
        return {
            "tokens": tokens, "response": found[-1].response, "tiles": np.ones(1, np.int8),
            "example": np.array([number + 1]),
        }  # fmt: skip

    sizes = packing.Sizes(case.rows, case.tokens, tiles=case.examples, examples=case.examples)
    # In one thread: the random numbers are drawn in order.
    source = grain.MapDataset.range(1 << 30).to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    rows = iter(packing.pack(source.map(example), sizes, ["response"], seed))
    while True:
        chosen = [next(rows) for _ in range(case.rows)]
        batch = {name: np.stack([row[name] for row in chosen]) for name in ("tokens", "segment", "response")}
        batch["pixels"] = np.zeros((case.rows, case.examples, cfg.tile, cfg.tile, 3), np.float32)
        here = [[found[i] for i in row["example"] if i >= 0] for row in chosen]
        for pixels, examples in zip(batch["pixels"], here, strict=True):
            pixels[: len(examples)] = [e.tile for e in examples]
        yield batch, [e for examples in here for e in examples]


def _settings(case: Case) -> trainer.Settings:
    optimizer = optimizers.Settings("adamw", 1e-3, weight_decay=0.01, clip=_CLIP)
    return trainer.Settings(steps=1000, batch_size=case.rows, optimizer=optimizer)


def run_packed(case: Case, folder: Path) -> Iterator[Any]:
    """A child's work: exports the model and yields loss and gradient norm of the first batch, then measurements.

    A measurement: seconds of ``steps`` steps, their tokens and the share of padding.
    """
    jax.config.update("jax_platforms", "cpu")
    mesh, cfg = make_mesh({"data": 1}, jax.devices("cpu")[:1]), case.cfg
    with jax.set_mesh(mesh):
        graphdef, params = build.initialise(cfg, IMAGE, 0, mesh)
        export(cfg, params, mesh, folder)
        task = trainer.make_task(graphdef, losses.policy_loss, _settings(case))
        state, frozen = trainer.new_state(params, task, mesh)
        source = batches(case, 0)
        state, scalars = trainer.train_step(state, frozen, put_rows(next(source)[0], mesh), task=task)
        yield {name: float(scalars[name]) for name in ("loss", "grad_norm")}
        while True:
            work = [next(source)[0] for _ in range(case.steps)]
            start = time.perf_counter()
            for batch in work:
                state, scalars = trainer.train_step(state, frozen, put_rows(batch, mesh), task=task)
            jax.block_until_ready(state)
            seconds = time.perf_counter() - start
            used = [float((batch["segment"] > 0).mean()) for batch in work]
            tokens = sum(int((batch["segment"] > 0).sum()) for batch in work)
            yield {"seconds": seconds, "tokens": tokens, "padding": 1 - statistics.mean(used)}


class TorchBaseline:
    """``InternVLForConditionalGeneration`` in ``folder``, AdamW, clipping: float32, sdpa attention, all cores."""

    def __init__(self, case: Case, folder: Path):
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        torch.set_num_threads(common.cores())
        self._torch, self._case = torch, case
        self._model = transformers.InternVLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        ).train()
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-5, betas=(0.9, 0.98), weight_decay=0.01)

    def _inputs(self, examples: list[Example]) -> tuple[dict[str, Any], Any]:
        """Padded to the longest; and the targets, -100 where there is none."""
        torch, longest = self._torch, max(len(e.tokens) for e in examples)
        tokens = np.zeros((len(examples), longest), np.int64)
        valid, targets = np.zeros_like(tokens), np.full_like(tokens, -100)
        for i, e in enumerate(examples):
            tokens[i, : len(e.tokens)], valid[i, : len(e.tokens)] = e.tokens, 1
            targets[i, : len(e.tokens)] = np.where(e.response, e.tokens, -100)
        pixels = np.stack([e.tile for e in examples]).transpose(0, 3, 1, 2)
        inputs = {"input_ids": tokens, "attention_mask": valid, "pixel_values": pixels}
        return {name: torch.tensor(x) for name, x in inputs.items()}, torch.tensor(targets)

    def step(self, examples: list[Example], microbatch: int, by_length: bool) -> dict[str, float]:
        """One update by all ``examples``, ``microbatch`` at a time (0: all), sorted by their lengths or not."""
        torch, microbatch = self._torch, microbatch or len(examples)
        examples = sorted(examples, key=lambda e: len(e.tokens)) if by_length else examples
        weight = sum(int(e.response[1:].sum()) for e in examples)
        self._optimizer.zero_grad()
        total = 0.0
        for start in range(0, len(examples), microbatch):
            inputs, targets = self._inputs(examples[start : start + microbatch])
            logits = self._model(**inputs, use_cache=False).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), reduction="sum")
            (loss / weight).backward()
            total += float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), _CLIP)
        self._optimizer.step()
        return {"loss": total / weight, "grad_norm": float(norm)}


_MICROBATCHES = (0, 32, 8)


def run_torch(case: Case, folder: Path) -> Iterator[Any]:
    """A child's work, as ``run_packed``; a measurement has seconds for the plain loop and the one that sorts.

    Once warm it yields the seconds of a step for each number of examples at once, for both.
    """
    model, source = TorchBaseline(case, folder), batches(case, 0)
    yield model.step(next(source)[1], 0, False)
    ways: dict[bool, dict[int, float]] = {False: {}, True: {}}
    _, examples = next(source)
    for by_length, found in ways.items():
        for microbatch in _MICROBATCHES:
            model.step(examples, microbatch, by_length)
            start = time.perf_counter()
            model.step(examples, microbatch, by_length)
            found[microbatch] = time.perf_counter() - start
    yield {"plain": ways[False], "by_length": ways[True]}
    while True:
        work, seconds = [next(source)[1] for _ in range(case.steps)], {}
        for by_length, found in ways.items():
            start = time.perf_counter()
            for examples in work:
                model.step(examples, min(found, key=found.__getitem__), by_length)
            seconds["by_length" if by_length else "plain"] = time.perf_counter() - start
        yield {"seconds": seconds, "tokens": sum(len(e.tokens) for examples in work for e in examples)}


def _agreement(packed: dict[str, float], padded: dict[str, float]) -> float:
    """The largest relative difference. Raises UserError when the two differ."""
    difference = max(abs(packed[name] - padded[name]) / abs(padded[name]) for name in packed)
    if not difference <= _TOLERANCE:
        raise UserError(f"the two trainings differ in their first step: {packed} here, {padded} in transformers")
    return difference


def find_case(name: str) -> Case:
    """The case of that name. Raises UserError."""
    if name not in CASES:
        raise UserError(f"no case is called {name}; there are: {', '.join(CASES)}")
    return CASES[name]


def run(pairs: int, case: Case) -> dict[str, Any]:
    """Raises UserError when torch or transformers is missing, or the two do not train alike."""
    if not {"torch", "transformers"} <= versions().keys():
        raise UserError("torch or transformers is missing: pip install 'mmprm_jax[bench]'")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        with Child(run_packed, case, folder) as left, Child(run_torch, case, folder) as right:
            agreement = _agreement(next(left), next(right))
            next(left)
            ways = next(right)
            runs = [(next(left), next(right)) for _ in range(pairs)]
    rates = [
        {"mmprm_jax": left["tokens"] / left["seconds"]}
        | {name: right["tokens"] / seconds for name, seconds in right["seconds"].items()}
        for left, right in runs
    ]
    return {
        "benchmark": "train",
        "machine": common.machine(),
        "case": dataclasses.asdict(case),
        "agreement": agreement,
        "tokens_per_s": {name: max(rate[name] for rate in rates) for name in rates[0]},
        "padding": statistics.mean(left["padding"] for left, _ in runs),
        "seconds_by_examples_at_once": ways,
        "ratio": statistics.median(rate["mmprm_jax"] / rate["plain"] for rate in rates),
        "ratio_by_length": statistics.median(rate["mmprm_jax"] / rate["by_length"] for rate in rates),
        "load": common.load(),
    }


def describe(found: dict[str, Any]) -> str:
    rates, case = found["tokens_per_s"], found["case"]
    return (
        f"training steps of {case['model']}, {case['rows']} rows of {case['tokens']} tokens"
        f" ({found['padding']:.1%} padding): {rates['mmprm_jax']:,.0f} tokens/s; torch and transformers, padded:"
        f" {rates['plain']:,.0f}, ratio {found['ratio']:.2f}; sorted by length first: {rates['by_length']:,.0f}, ratio"
        f" {found['ratio_by_length']:.2f}; loss and gradient norm of the first step agree to {found['agreement']:.0e}"
    )
