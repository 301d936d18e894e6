"""Scoring many solutions with a shared prefix against one full forward each."""

import jax
import numpy as np
import pytest
from flax import nnx

from mmprm_jax.evaluation.score import Scorer, Solutions
from mmprm_jax.models.vision import VisionTower
from mmprm_jax.sharding import put_batch

YES, NO = 9, 6
PROMPT = [5, 4, 4, 4, 4, 7, 8]  # 4: image tokens of one tile


@pytest.fixture(scope="module")
def problems(tiny):
    """Five problems of 1 to 6 solutions of very different lengths; some begin alike, some are equal or empty."""
    rng = np.random.default_rng(0)
    size, found = tiny.cfg.vision.image_size, []
    assert tiny.cfg.tokens_per_tile == 4
    for p in range(5):
        rows = []
        for r in range(p + 1 if p else 6):
            own = rng.integers(10, 40, 3 + 7 * r).tolist()
            ids = PROMPT + [10 + p, 11] + own
            rows.append((ids, sorted({len(PROMPT) + 1, len(PROMPT) + 3, len(ids) - 1})))
        rows += [rows[0], ([], [])]
        found.append(Solutions(rows, rng.standard_normal((1, size, size, 3), np.float32)))
    return found


def one_by_one(tiny, mesh, problem):
    """Scores by a full forward of each solution."""
    params, found = tiny.place(mesh), []

    @jax.jit
    def forward(params, batch):
        model = nnx.merge(tiny.graphdef, params)
        return model.decoder.logits(model(batch["tokens"], batch["valid"], batch["pixels"])[0])

    width = max(len(ids) for ids, _ in problem.rows)
    for ids, marks in problem.rows:
        tokens = np.zeros((1, width), np.int32)
        tokens[0, : len(ids)] = ids
        valid = np.arange(width)[None] < max(len(ids), 1)
        batch = {"tokens": tokens, "valid": valid, "pixels": problem.pixels[None]}
        logits = np.asarray(forward(params, put_batch(batch, mesh)))[0, list(marks)]
        found.append(tuple(1 / (1 + np.exp(logits[:, NO] - logits[:, YES]))))
    return found


def scorer(tiny, mesh, **settings):
    settings = {"problems": 2, "solutions": 4, "bucket": 8} | settings
    return Scorer(tiny.graphdef, tiny.place(mesh), mesh, (YES, NO), **settings)


def same(got, want):
    assert [len(x) for x in got] == [len(x) for x in want]
    np.testing.assert_allclose(np.concatenate(got), np.concatenate(want), atol=2e-6)


@pytest.fixture(scope="module")
def expected(tiny, mesh_of, problems):
    mesh = mesh_of(data=1)
    with jax.set_mesh(mesh):
        return [one_by_one(tiny, mesh, problem) for problem in problems]


@pytest.mark.parametrize(
    "shape, settings",
    [
        (dict(data=1), {}),
        (dict(data=1), dict(problems=5, solutions=2)),
        (dict(data=1), dict(longest=20)),  # longer rows share nothing
        (dict(data=2, fsdp=2, tensor=2), dict(problems=4)),  # problems over devices
        (dict(data=4, tensor=2), dict(problems=1, solutions=8)),  # solutions over devices
    ],
)
def test_as_one_by_one(tiny, mesh_of, problems, expected, shape, settings):
    mesh = mesh_of(**shape)
    with jax.set_mesh(mesh):
        for got, want in zip(scorer(tiny, mesh, **settings).score(problems), expected, strict=True):
            same(got, want)


def test_the_image_tower_runs_once_for_all_solutions(tiny, mesh, problems, expected, monkeypatch):
    seen = []
    original = VisionTower.__call__

    def counted(self, pixels, keep):
        jax.debug.callback(lambda x: seen.append(len(x)), pixels)
        return original(self, pixels, keep)

    monkeypatch.setattr(VisionTower, "__call__", counted)
    jax.clear_caches()
    found = scorer(tiny, mesh, problems=1, solutions=2)
    got = found.score(problems[:1])  # six different solutions, two at a time
    jax.effects_barrier()
    jax.clear_caches()
    assert seen == [1] and found.tiles == 1
    same(got[0], expected[0])


def test_text_only(tiny, mesh):
    rng = np.random.default_rng(1)
    rows = [([5, 7, 8, *rng.integers(10, 40, 4 + r).tolist()], [4, 6 + r]) for r in range(3)]
    found = scorer(tiny, mesh)
    got = found.score([Solutions(rows, None)])
    blank = np.zeros((1, 8, 8, 3), np.float32)
    same(got[0], one_by_one(tiny, mesh, Solutions(rows, blank)))
    assert found.tiles == 0


def test_images_of_different_numbers_of_tiles_share_a_batch(tiny, mesh):
    rng, found, problems = np.random.default_rng(2), scorer(tiny, mesh, problems=3), []
    for tiles in (2, 0, 1, 3, 1, 0):
        ids = [5, *[4] * (4 * tiles), 7, 8]
        rows = [(ids + rng.integers(10, 40, 6 + r).tolist(), [len(ids) + 1, len(ids) + 4]) for r in range(3)]
        pixels = rng.standard_normal((tiles, 8, 8, 3), np.float32)
        problems.append(Solutions(rows, pixels if tiles else None))
    blank = np.zeros((1, 8, 8, 3), np.float32)
    for got, p in zip(found.score(problems), problems, strict=True):
        same(got, one_by_one(tiny, mesh, p if p.pixels is not None else Solutions(p.rows, blank)))
    assert found.tiles == 3 * 2 + 3 * 3  # batches of images with 1, 1, 2 and with 3 tiles, of three rows each


def test_nothing_shared(tiny, mesh):
    rows = [([i, 7, 8, 30 - i], [0, 3]) for i in (5, 6, 12)]
    blank = np.zeros((1, 8, 8, 3), np.float32)
    same(scorer(tiny, mesh).score([Solutions(rows, None)])[0], one_by_one(tiny, mesh, Solutions(rows, blank)))


def test_nothing_to_score(tiny, mesh):
    assert scorer(tiny, mesh).score([]) == []
    assert scorer(tiny, mesh).score([Solutions([], None), Solutions([([1], [])], None)]) == [[], [()]]
