"""A program for test_rows.py: samples of a random model of the embedded default's sizes, in several schedules.

Prints for each schedule how many samples have other tokens or other log-probabilities than in the first one.
"""

import json

import jax
import numpy as np

from mmprm_jax import sharding
from mmprm_jax.models import build
from mmprm_jax.models.config import VLMConfig
from mmprm_jax.rollout.engine import Engine, Group
from mmprm_jax.rollout.sampling import Sampling

IMAGE, VOCABULARY = 4, 300
CFG = VLMConfig.from_dict(
    {
        "vision": dict(
            image_size=28, patch_size=7, hidden_size=64, num_layers=1, num_heads=4, intermediate_size=128,
        ),
        "decoder": dict(
            vocab_size=VOCABULARY, hidden_size=64, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=16,
            intermediate_size=192,
        ),
        "remat": "none",
    }
)  # fmt: skip
SAMPLING = Sampling(temperature=0.8, max_new_tokens=16, top_k=50, top_p=0.9)
BASE = dict(slots=64, samples=4, max_new=16, cache_tokens=20_000)
SCHEDULES = [dict(slots=1), dict(samples=16)]


def groups_of(rng):
    """Three branches each of eight problems with up to three tiles, with one to nine samples."""
    groups = []
    for problem in range(8):
        tiles = int(rng.integers(0, 4))
        question = rng.integers(8, VOCABULARY, rng.integers(40, 130))
        question[1 : 1 + CFG.tokens_per_tile * tiles] = IMAGE
        pixels = rng.integers(0, 256, (tiles, CFG.tile, CFG.tile, 3), np.uint8) if tiles else None
        for _ in range(3):
            prefix = (*question.tolist(), *rng.integers(8, VOCABULARY, rng.integers(0, 20)).tolist())
            key = rng.integers(0, 2**32, 2, np.uint32)
            groups.append(Group(len(groups), str(problem), prefix, pixels, key, int(rng.integers(1, 10)), SAMPLING))
    return groups


def main():
    mesh = sharding.make_mesh({"data": 1}, devices=jax.devices()[:1])
    groups = groups_of(np.random.default_rng(0))
    with jax.set_mesh(mesh):
        graphdef, params = build.initialise(CFG, IMAGE, 0, mesh)
        head = 6 * params["decoder"]["lm_head"]  # sharper predictions
        params = {**params, "decoder": {**params["decoder"], "lm_head": head}}

        def engine(**settings):
            return Engine(graphdef, params, CFG, IMAGE, mesh, **BASE | settings)

        found = {"base": engine().sample(groups)}
        for settings in SCHEDULES:
            found[str(settings)] = engine(**settings).sample(groups)
        alone = engine()
        found["one by one"] = [alone.sample([group])[0] for group in groups[::-1]][::-1]
        found["by seven"], some = [], engine()
        for i in range(0, len(groups), 7):
            found["by seven"] += some.sample(groups[i : i + 7])
    base = found.pop("base")
    different = {}
    for name, samples in found.items():
        pairs = [(x, y) for a, b in zip(base, samples, strict=True) for x, y in zip(a, b, strict=True)]
        different[name] = sum(x != y for x, y in pairs)
    print(json.dumps({"samples": len(pairs), "different": different}))


main()
