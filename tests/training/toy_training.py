"""Packed rows of random examples for the tiny model, and a run on them; alone: ``toy_training.py FOLDER ...``."""

import json
import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import IMAGE_TOKEN, TINY  # noqa: E402

from mmprm_jax import metrics  # noqa: E402
from mmprm_jax.models import build  # noqa: E402
from mmprm_jax.sharding import make_mesh, row_share  # noqa: E402
from mmprm_jax.training import losses, optimizers, trainer  # noqa: E402

ROWS, LENGTH, TILES, EXAMPLES = 8, 24, 3, 3
YES, NO = 8, 3


def example(rng, length, tiles, cfg=TINY):
    """One example: prompt with its image tokens, then a response; labels at some of its tokens."""
    tokens = rng.integers(5, cfg.decoder.vocab_size, length).astype(np.int32)
    images = tiles * cfg.tokens_per_tile
    tokens[1 : 1 + images] = IMAGE_TOKEN
    size = cfg.vision.image_size
    n = np.where((np.arange(length) > images) & (rng.random(length) < 0.4), rng.integers(1, 9, length), 0)
    return {
        "tokens": tokens,
        "response": np.arange(length) > images + 1,
        "k": (n * rng.random(length)).round().astype(np.int32),
        "n": n.astype(np.int32),
        "pixels": rng.standard_normal((tiles, size, size, 3), np.float32),
    }


def pack(rows, length, tiles, cfg=TINY):
    """Lists of examples to a batch by the contract of ``losses``; ``example`` counts through."""
    size = cfg.vision.image_size
    batch = {name: np.zeros((len(rows), length), np.int32) for name in ("tokens", "segment", "k", "n")}
    batch["response"] = np.zeros((len(rows), length), bool)
    batch["pixels"] = np.zeros((len(rows), tiles, size, size, 3), np.float32)
    batch["example"] = np.full((len(rows), EXAMPLES), -1, np.int32)
    count = 0
    for r, row in enumerate(rows):
        at = tile = 0
        for number, x in enumerate(row, 1):
            where = slice(at, at + len(x["tokens"]))
            for name in ("tokens", "k", "n", "response"):
                batch[name][r, where] = x[name]
            batch["segment"][r, where] = number
            batch["pixels"][r, tile : tile + len(x["pixels"])] = x["pixels"]
            batch["example"][r, number - 1] = count
            at, tile, count = where.stop, tile + len(x["pixels"]), count + 1
    return batch


def rows_of(seed, count=ROWS):
    """``count`` packed rows of one to three examples."""
    rng = np.random.default_rng(seed)
    shapes = [[(11, 1), (7, 0), (5, 0)], [(12, 2), (9, 1)], [(20, 3)], [(6, 0), (6, 0), (10, 1)]]
    rows = [[example(rng, *shape) for shape in shapes[rng.integers(len(shapes))]] for _ in range(count)]
    return pack(rows, LENGTH, TILES)


class Source:
    """Batch i depends on i only; a process has its share of the rows."""

    def __init__(self, mesh, poison=None, rows=ROWS):
        self.step, self.poison, self.rows = 0, poison, rows
        self.index, self.count = row_share(mesh)

    def __next__(self):
        self.step += 1
        batch = rows_of(self.step % 4, self.rows)
        if self.step == self.poison:
            batch["pixels"][2, 0, 0, 0, 0] = np.nan
        mine = slice(self.index * self.rows // self.count, (self.index + 1) * self.rows // self.count)
        return {name: x[mine] for name, x in batch.items()}

    def get_state(self):
        return {"step": self.step}

    def set_state(self, state):
        self.step = state["step"]


LOSSES = {"policy": losses.policy_loss} | {kind: losses.prm_loss(kind, 0.5, YES, NO) for kind in losses.LABELS}


def train(folder, shape, cfg=TINY, loss="policy", poison=None, rows=ROWS, **settings):
    """Trains the tiny model; returns what ``fit`` returns. shape: sizes of the mesh's axes."""
    count = np.prod(list(shape.values()))
    mesh = make_mesh(shape, jax.devices()[:count])
    optimizer = settings.pop("optimizer", optimizers.Settings("adamw", 3e-3, warmup=0.2))
    chosen = {"steps": 20, "batch_size": rows, "checkpoint_every": 1000, "log_every": 1} | settings
    s = trainer.Settings(optimizer=optimizer, **chosen)
    with jax.set_mesh(mesh):
        graphdef, params = build.initialise(cfg, IMAGE_TOKEN, 0, mesh)
        source = Source(mesh, poison, rows)
        return trainer.fit("toy", folder, graphdef, params, LOSSES[loss], source, s, mesh)


def curve(folder):
    return [row["loss"] for row in metrics.read(folder)]


def save(path, params):
    """The parameters as one npz."""
    flat = jax.tree_util.tree_flatten_with_path(jax.device_get(params))[0]
    np.savez(path, **{jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in flat})


def main():
    """FOLDER SHAPE(json) SETTINGS(json) [ADDRESS INDEX]: writes FOLDER/final.npz."""
    folder, shape, settings, *distributed = sys.argv[1:]
    folder = Path(folder)
    if distributed:
        jax.config.update("jax_num_cpu_devices", 4)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(distributed[0], 2, int(distributed[1]))
    jax.config.update("jax_compilation_cache_dir", str(folder.parent / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    params = train(folder, json.loads(shape), **json.loads(settings))
    if not distributed:
        save(folder / "final.npz", params)


if __name__ == "__main__":
    main()
