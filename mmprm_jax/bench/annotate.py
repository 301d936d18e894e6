"""``mmprm bench annotate``: many trees at once against one problem at a time.

The policy is random and so are its trees: numbers, of which four make a step; sixteen rollouts to a prefix, and an
answer is right when its last number is small. Lengths of rollouts are about geometric, as those of a sampler whose
stop token is likely everywhere. All ways grow the same trees (that is checked). One by one means that one call of 16
rollouts is under way, as in the original MM-PRM's loop for each GPU: on the same engine, and on one that has been made
for it, of sixteen slots. Unlike the original, which computes images and prefixes anew for every rollout, both share
them: the ratios are the loop's alone.
"""

from __future__ import annotations

import re
import time
import typing
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mmprm_jax.bench.common import machine
from mmprm_jax.data.encode import Language
from mmprm_jax.models import build
from mmprm_jax.models.config import DecoderConfig, VisionConfig, VLMConfig
from mmprm_jax.records import Problem, Tree
from mmprm_jax.rollout.engine import Engine
from mmprm_jax.rollout.rollouts import Answered, LocalSampler
from mmprm_jax.rollout.sampling import Sampling
from mmprm_jax.search.omegaprm import Forest, grow
from mmprm_jax.search.settings import Settings
from mmprm_jax.sharding import make_mesh

CFG = VLMConfig(  # the sizes of configs/digits.py
    vision=VisionConfig(
        image_size=24, patch_size=4, hidden_size=64, num_layers=2, num_heads=4, intermediate_size=128,
        layer_scale_init=1.0,
    ),
    decoder=DecoderConfig(
        vocab_size=64, hidden_size=64, num_layers=6, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=128,
        rope_theta=1e4,
    ),
)  # fmt: skip
IMAGE, FIRST, STOPS, STEP = 0, 1, (60, 61), 4
ROLLOUTS, LONGEST = 16, 64
SETTINGS = Settings(num_rollouts=ROLLOUTS, max_searches=8, rollout_budget=160, length_scale=50.0)


class Numbers:
    """A language whose texts are numbers: tokens to the text of steps and an answer, and back."""

    @property
    def tokenizer(self) -> Numbers:
        return self

    def decode(self, tokens: Sequence[int]) -> str:
        numbers = [max(t, FIRST) for t in tokens if t not in STOPS] or [FIRST]
        steps = [numbers[i : i + STEP] for i in range(0, len(numbers), STEP)]
        done = "".join(f"<step>{' '.join(map(str, step))}</step>" for step in steps[:-1])
        return f"{done}<answer>{' '.join(map(str, steps[-1]))}</answer>"

    def prompt(self, question: str, prefix: Sequence[str], tiles: Sequence[int]) -> list[int]:
        numbers = [int(n) for text in (question, *prefix) for n in re.findall(r"\d+", text)]
        return [FIRST, *[IMAGE] * (sum(tiles) * CFG.tokens_per_tile), *numbers]


def _pixels(problem: Problem) -> list[np.ndarray]:
    size = CFG.tile
    return [np.random.default_rng(int(problem.id)).integers(0, 256, (1, size, size, 3), np.uint8)]


def _verify(answers: Sequence[Answered]) -> list[bool]:
    return [int((answer or "99").split()[-1]) < 30 for answer, *_ in answers]


def problems(count: int) -> list[Problem]:
    """Questions of 20 to 60 numbers, each with an image."""
    rng = np.random.default_rng(0)
    texts = [" ".join(map(str, rng.integers(FIRST, 60, rng.integers(20, 61)))) for _ in range(count)]
    return [Problem(str(i), text, "", ("image",)) for i, text in enumerate(texts)]


def _grow(some: Sequence[Problem], slots: int, in_flight: int) -> tuple[list[Tree], dict[str, float]]:
    """The trees of ``some``, and the rates; compiled on the same problems before."""
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    with jax.set_mesh(mesh):
        graphdef, params = build.initialise(CFG, IMAGE, 0, mesh)
        for _ in range(2):
            engine = Engine(
                graphdef, params, CFG, IMAGE, mesh, slots=slots, samples=ROLLOUTS, max_new=LONGEST, cache_tokens=200_000
            )
            sampling = Sampling(max_new_tokens=LONGEST, stop=STOPS)
            sampler = LocalSampler(engine, typing.cast(Language, Numbers()), _pixels, sampling, 0, "bench", _verify)
            start = time.perf_counter()
            trees = dict(grow(enumerate(some), Forest(SETTINGS, in_flight), sampler))
            seconds = time.perf_counter() - start
    grown = [tree for _, tree in sorted(trees.items()) if isinstance(tree, Tree)]
    labels = sum(len(tree.nodes) for tree in grown)
    counts = engine.counts
    figures = {
        "seconds": seconds,
        "trees": len(trees),
        "labels_per_second": labels / seconds,
        "rollouts_per_second": counts.samples / seconds,
        "tokens_per_second": counts.tokens / seconds,
        "slot_occupancy": counts.occupancy,
        "mean_tokens": counts.tokens / counts.samples,
        "prefix_tokens": counts.prefix_tokens,
        "padded_tokens": counts.padded_tokens,
        "images": counts.images,
    }
    return grown, figures


def run(count: int = 256, alone: int = 16, slots: int = 256, in_flight: int = 64) -> dict[str, Any]:
    """Grows ``count`` trees at once and the first ``alone`` of them one by one. Raises ValueError if those differ."""
    before, some = machine(), problems(count)
    many_trees, many = _grow(some, slots, in_flight)
    ways = {"one_by_one": (alone // 4, slots), "one_by_one_16_slots": (alone, ROLLOUTS)}
    result: dict[str, Any] = {"benchmark": "annotate", "machine": before, "slots": slots, "in_flight": in_flight}
    result["together"] = many
    for name, (number, size) in ways.items():
        trees, result[name] = _grow(some[:number], size, 1)
        if many_trees[:number] != trees:
            raise ValueError("the trees grown one by one are not those grown together")
        for unit in ("labels", "rollouts"):
            result[f"{unit}_ratio_{name}"] = many[f"{unit}_per_second"] / result[name][f"{unit}_per_second"]
    return result


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    ways = ("together", "one_by_one", "one_by_one_16_slots")
    lines = [f"{'':22}" + "".join(f"{way.replace('_', ' '):>22}" for way in ways)]
    for name in result["together"]:
        lines.append(f"{name.replace('_', ' '):22}" + "".join(f"{result[way][name]:22.4g}" for way in ways))
    for way in ways[1:]:
        ratios = ", ".join(f"{unit} {result[f'{unit}_ratio_{way}']:.2f}" for unit in ("labels", "rollouts"))
        lines.append(f"together over {way.replace('_', ' ')}: {ratios}")
    return "\n".join(lines)
