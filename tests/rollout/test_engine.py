"""The engine against plain full forwards, what a sample must not depend on, and the work it does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx
from scipy import stats

from mmprm_jax.data.images import normalise
from mmprm_jax.models import build
from mmprm_jax.models.config import RopeScaling
from mmprm_jax.models.vision import VisionTower
from mmprm_jax.records import UserError
from mmprm_jax.rollout import engine as engine_module
from mmprm_jax.rollout.engine import Engine, Group, Recompiled, bucket
from mmprm_jax.rollout.sampling import Sampling
from mmprm_jax.sharding import put_batch

STOP = 18  # a token that this model likes
MAX_NEW, WIDTH, ROWS, TILES = 8, 112, 16, 2  # WIDTH, ROWS and TILES: of the full forwards
BASE = dict(slots=16, samples=4, max_new=MAX_NEW, cache_tokens=1024, steps=5, min_bucket=64)
GREEDY = Sampling(temperature=0.0, max_new_tokens=MAX_NEW)
TEXT = range(8, 40)


@pytest.fixture(scope="module")
def params(tiny):
    """Sharper predictions than those of a random head."""
    head = 3 * tiny.params["decoder"]["lm_head"]
    return {**tiny.params, "decoder": {**tiny.params["decoder"], "lm_head": head}}


@pytest.fixture(scope="module")
def make(tiny, params, mesh_of):
    """``make(mesh sizes, **settings)``: an engine that can be used without a mesh set; it raises on recompilation."""

    class Meshed(Engine):
        def __init__(self, mesh, model, cfg, settings):
            self.mesh = mesh
            with jax.set_mesh(mesh):
                super().__init__(*model, cfg, tiny.image_token, mesh, **BASE | settings)
            self.strict = True

        def step(self):
            with jax.set_mesh(self.mesh):
                return super().step()

    placed = {}

    def make(shape=None, cfg=tiny.cfg, **settings):
        shape = shape or {"data": 1}
        mesh, key = mesh_of(**shape), str(shape)
        if key not in placed:
            with jax.set_mesh(mesh):
                placed[key] = tiny.place(mesh, params)
        return Meshed(mesh, (tiny.graphdef, placed[key]), cfg, settings)

    return make


@pytest.fixture(scope="module")
def base(make):
    """An engine for tests that do not look at its counts."""
    return make()


@pytest.fixture(scope="module")
def logits_of(tiny, params, mesh_of):
    """``f(sequences, pixels)``: logits [B, WIDTH, V] of full forwards, right-padded, without a cache."""
    mesh = mesh_of(data=1)
    placed = tiny.place(mesh, params)

    @jax.jit
    def run(params, batch):
        model = nnx.merge(tiny.graphdef, params)
        return model.decoder.logits(model(batch["tokens"], batch["valid"], batch["pixels"])[0])

    def some(sequences, pixels):
        tokens, valid = np.zeros((ROWS, WIDTH), np.int32), np.zeros((ROWS, WIDTH), bool)
        shown = np.zeros((ROWS, TILES, *[tiny.cfg.tile] * 2, 3), np.float32)
        for row, (sequence, tiles) in enumerate(zip(sequences, pixels, strict=True)):
            tokens[row, : len(sequence)], valid[row, : len(sequence)] = sequence, True
            if tiles is not None:
                shown[row, : len(tiles)] = normalise(tiles)
        batch = put_batch({"tokens": tokens, "valid": valid, "pixels": shown}, mesh)
        with jax.set_mesh(mesh):
            return np.asarray(run(placed, batch))[: len(sequences)]

    def call(sequences, pixels):
        parts = range(0, len(sequences), ROWS)
        return np.concatenate([some(sequences[i : i + ROWS], pixels[i : i + ROWS]) for i in parts])

    return call


def pixels_of(rng, tiles):
    return rng.integers(0, 256, (tiles, 8, 8, 3), np.uint8) if tiles else None


def prefix_of(rng, length, tiles=0, at=1):
    """Random text with the image tokens of ``tiles`` tiles from place ``at`` on."""
    tokens = rng.choice(TEXT, length)
    assert at + 4 * tiles <= length
    tokens[at : at + 4 * tiles] = 4
    return tuple(tokens.tolist())


def key_of(rng):
    return rng.integers(0, 2**32, 2, np.uint32)


def tokens_of(results):
    return [[sample.tokens for sample in group] for group in results]


def assert_same(results, expected, atol=1e-4):
    """Token ids are equal, log-probabilities close."""
    assert tokens_of(results) == tokens_of(expected)
    for group, wanted in zip(results, expected, strict=True):
        for sample, other in zip(group, wanted, strict=True):
            np.testing.assert_allclose(sample.logprobs, other.logprobs, atol=atol, rtol=0)


def check_against_full_forwards(groups, results, logits_of, atol=1e-4):
    """The log-probability of every token; for greedy groups also that it is the most likely one.

    Up to an image token that was sampled: a full forward would put a picture there.
    """
    sequences = [g.prefix + s.tokens for g, samples in zip(groups, results, strict=True) for s in samples]
    pixels = [g.pixels for g, samples in zip(groups, results, strict=True) for _ in samples]
    rows = iter(scipy.special.log_softmax(logits_of(sequences, pixels).astype(np.float64), axis=-1))
    for group, samples in zip(groups, results, strict=True):
        for sample in samples:
            tokens = list(sample.tokens[: (*sample.tokens, 4).index(4) + 1])
            scores = next(rows)[len(group.prefix) - 1 :][: len(tokens)]
            chosen = scores[np.arange(len(tokens)), tokens]
            np.testing.assert_allclose(sample.logprobs[: len(tokens)], chosen, atol=atol, rtol=0, err_msg=str(group.id))
            assert sample.logprob == pytest.approx(sum(sample.logprobs), abs=1e-5)
            if group.sampling == GREEDY:
                top = np.sort(scores)[:, -2:]
                assert np.all(top[:, 1] - top[:, 0] > 2 * atol), group.id  # no ties: the comparison is fair
                assert tokens == scores.argmax(axis=-1).tolist(), group.id


# What a sample must not depend on.

SAMPLINGS = [
    Sampling(max_new_tokens=8, stop=(STOP,)),
    Sampling(temperature=1.5, top_k=10, max_new_tokens=5, stop=(STOP, 9)),
    Sampling(top_p=0.8, max_new_tokens=8),
    Sampling(temperature=0.7, min_p=0.05, repetition_penalty=1.5, max_new_tokens=7, stop=(9,)),
    Sampling(temperature=0.0, max_new_tokens=3),
    Sampling(max_new_tokens=1),
    Sampling(temperature=1.2, max_new_tokens=6),
]


@pytest.fixture(scope="module")
def groups():
    """Nine problems, three with images, each with a question and some steps; 1 to 11 samples, more than a row has."""
    rng, found = np.random.default_rng(1), []
    for problem in range(9):
        tiles = (1, 0, 2, 0, 1, 0, 0, 0, 0)[problem]
        pixels, prefix = pixels_of(rng, tiles), prefix_of(rng, 9 + 2 * problem, tiles)
        for step in range(1 + problem % 3):
            n = (1, 4, 11, 3, 6)[len(found) % 5]
            sampling = SAMPLINGS[len(found) % len(SAMPLINGS)]
            found.append(Group(len(found), f"problem {problem}", prefix, pixels, key_of(rng), n, sampling))
            prefix += tuple(rng.choice(TEXT, 3 + 7 * step).tolist())
    return found


@pytest.fixture(scope="module")
def samples(make, groups):
    return make().sample(groups)


def test_samples_are_of_all_kinds(groups, samples):
    """What the tests of this section compare is worth it."""
    flat = [s.tokens for group in samples for s in group]
    assert len(set(flat)) > 0.6 * len(flat) and len({len(t) for t in flat}) == MAX_NEW
    for group, found in zip(groups, samples, strict=True):
        assert len(found) == group.n
        for sample in found:
            stop, most = group.sampling.stop, group.sampling.max_new_tokens
            assert not set(stop) & set(sample.tokens[:-1])
            assert len(sample.tokens) == most or (len(sample.tokens) < most and sample.tokens[-1] in stop)
    long = [found for group, found in zip(groups, samples, strict=True) if group.n > BASE["samples"]]
    for found in (group for group in long if len(group[0].tokens) > 3):
        assert len({s.tokens for s in found}) > 1  # the parts of a group differ
    assert max(len(group.prefix) for group in groups) > 30


def test_logprobs_of_full_forwards(groups, samples, logits_of):
    check_against_full_forwards(groups, samples, logits_of)


FEW = 40  # cache entries of one shard: just enough for the longest problem
SHAPES = [
    dict(shape=dict(data=8), cache_tokens=8 * FEW),
    dict(shape=dict(data=2, fsdp=2, tensor=2), cache_tokens=4 * FEW),
]


def slow(**settings):
    """Settings whose programs take seconds to compile, where others say nearly the same."""
    return pytest.param(settings, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "settings",
    [
        slow(slots=1, rows=1, samples=1),
        slow(slots=64),
        dict(rows=3, samples=2, steps=3),
        dict(steps=1),
        dict(steps=1000),
        dict(cache_tokens=FEW),
        slow(**SHAPES[0]),
        SHAPES[1],
    ],
    ids=str,
)
def test_invariance(make, groups, samples, settings):
    engine = make(**settings)
    assert_same(engine.sample(groups), samples)
    assert not engine.busy and engine.step() == []
    check_counts(engine, groups, samples)


@pytest.mark.parametrize("settings", [{}, slow(slots=3), slow(shape=dict(data=2, fsdp=2, tensor=2))], ids=str)
def test_caches_in_blocks(make, groups, samples, logits_of, monkeypatch, settings):
    """Of a slot's cache, 3 + 3 + 2 columns, only the blocks in use are worked on; the samples are the same."""
    monkeypatch.setattr(engine_module.device, "_BLOCK", 3)
    engine, used = make(**settings), []
    run = engine._run

    def watched(program, signature, *args, **static):
        used.append(static.get("used", 0))
        return run(program, signature, *args, **static)

    engine._run = watched
    found = engine.sample(groups)
    assert set(used) == {0, 1, 2, 3}
    assert_same(found, samples)
    check_against_full_forwards(groups, found, logits_of)
    check_counts(engine, groups, found)


def check_counts(engine, groups, samples):
    """What can be said of any engine that has sampled just these."""
    flat = [s.tokens for group in samples for s in group]
    counts = engine.counts
    assert (counts.samples, counts.tokens) == (len(flat), sum(map(len, flat)))
    assert counts.live_steps == sum(len(t) - 1 for t in flat)  # the first token is drawn on admission
    assert counts.slot_steps % max(counts.steps, 1) == 0
    assert counts.prefix_tokens >= len(contexts(groups))
    assert counts.images >= len({g.problem for g in groups if g.pixels is not None})


def contexts(groups):
    """The distinct tokens of prefixes in their contexts."""
    return {(g.problem, g.prefix[: i + 1]) for g in groups for i in range(len(g.prefix))}


@pytest.mark.parametrize("seed", [0, 1, pytest.param(2, marks=pytest.mark.slow)])
def test_order_and_time_of_submission(make, groups, samples, seed):
    """In random order, some while others are under way, with a small pool; problems are released when they are done."""
    rng = np.random.default_rng(seed)
    engine = make(**[{}, dict(cache_tokens=FEW), SHAPES[0]][seed])
    waiting, found, released = [groups[i] for i in rng.permutation(len(groups))], {}, 0
    while waiting or engine.busy:
        for _ in range(rng.integers(0, 4)):
            if waiting:
                engine.submit(waiting.pop())
        for number, result in engine.step():
            assert number not in found
            found[number] = result
            problem = groups[number].problem
            if all(g.id in found for g in groups if g.problem == problem) and rng.random() < 0.5:
                engine.release(problem)
                released += 1
    assert released
    assert_same([found[g.id] for g in groups], samples)
    assert_same(engine.sample(groups), samples)  # once more, of what is left in the cache


@pytest.mark.parametrize("settings", [slow(**SHAPES[0]), SHAPES[1]], ids=str)
def test_problems_are_released_while_others_wait(make, groups, samples, settings):
    """Releasing is allowed at any time, also while groups of the problem are still to come."""
    engine = make(**settings)
    for group in groups:
        engine.submit(group)
    found = {}
    while engine.busy:
        found.update(engine.step())
        for group in groups:
            engine.release(group.problem)
    assert_same([found[g.id] for g in groups], samples)


@pytest.mark.parametrize("settings", [dict(cache_tokens=FEW), *(slow(**shape) for shape in SHAPES)], ids=str)
def test_problems_that_were_forgotten_come_back(make, base, settings):
    """The pools are too small for the problems of a shard; others may have more room when one comes back."""
    rng = np.random.default_rng(3)
    prefixes = [prefix_of(rng, 14 + i) for i in range(27)]
    groups = [
        Group(i, f"{i % 27}", prefixes[i % 27][: 40 - i // 2], None, key_of(rng), 3, SAMPLINGS[0]) for i in range(54)
    ]
    expected = base.sample(groups)
    engine = make(**settings)
    assert_same(engine.sample(groups), expected)
    assert_same(engine.sample(groups[::-1])[::-1], expected)


def test_only_key_and_number_matter(base, groups, samples):
    """Another key changes the samples of its group alone; fewer or more samples are the first of the same."""
    changed = [dataclasses.replace(g, key=g.key + np.uint32(g.id == 2)) for g in groups]
    found = base.sample(changed)
    assert_same(found[:2] + found[3:], samples[:2] + samples[3:])
    assert tokens_of(found)[2] != tokens_of(samples)[2]
    other_n = base.sample([dataclasses.replace(g, n=7) for g in groups])
    for group, other in zip(samples, other_n, strict=True):
        both = min(len(group), 7)
        assert_same([other[:both]], [group[:both]])
    alone = [base.sample([g])[0] for g in groups[2:5]]
    assert_same(alone, samples[2:5])


def test_sampling_parameters_belong_to_their_group(base, groups, samples):
    """The same group with other parameters beside it."""
    twins = [dataclasses.replace(g, id=100 + g.id, sampling=SAMPLINGS[(g.id + 1) % len(SAMPLINGS)]) for g in groups]
    mixed = [g for pair in zip(groups, twins, strict=True) for g in pair]
    found = base.sample(mixed)
    assert_same(found[::2], samples)
    assert tokens_of(found[1::2]) != tokens_of(samples)


def test_images_matter_only_with_image_tokens(base, groups, samples):
    found = base.sample(
        [
            g if g.pixels is None else dataclasses.replace(g, problem=f"{g.problem} inverted", pixels=255 - g.pixels)
            for g in groups
        ]
    )
    changed = [[s.logprobs for s in a] != [s.logprobs for s in b] for a, b in zip(found, samples, strict=True)]
    assert changed == [g.pixels is not None for g in groups]


def test_pixels_without_image_tokens_are_ignored(make, groups, samples):
    text = [g for g in groups if g.pixels is None]
    engine = make()
    some = pixels_of(np.random.default_rng(0), 2)
    found = engine.sample([dataclasses.replace(g, pixels=some) for g in text])
    assert_same(found, [samples[g.id] for g in text])
    assert engine.counts.images == 0


def test_normalised_pixels(base, groups, samples):
    shown = [g for g in groups if g.pixels is not None]
    found = base.sample(
        [dataclasses.replace(g, problem=f"{g.problem} normalised", pixels=normalise(g.pixels)) for g in shown]
    )
    assert_same(found, [samples[g.id] for g in shown])


@pytest.mark.slow
def test_ordinary_sizes(tiny, mesh_of):
    """Log-probabilities hardly depend on what is sampled beside, with whole vectors of a processor in every sum."""
    decoder = dataclasses.replace(tiny.cfg.decoder, hidden_size=64, head_dim=16, intermediate_size=128)
    cfg, mesh, rng = (
        dataclasses.replace(tiny.cfg, vision=None, decoder=decoder),
        mesh_of(data=1),
        np.random.default_rng(5),
    )
    groups = [Group(i, f"{i // 2}", prefix_of(rng, 5 + 3 * i), None, key_of(rng), 3, SAMPLINGS[0]) for i in range(6)]
    with jax.set_mesh(mesh):
        model = build.initialise(cfg, tiny.image_token, 0, mesh)
        engine = Engine(*model, cfg, tiny.image_token, mesh, **BASE)
        engine.strict = True
        expected = engine.sample(groups)
        order = np.random.default_rng(0).permutation(len(groups))
        other = Engine(*model, cfg, tiny.image_token, mesh, **BASE | dict(steps=2))
        other.strict = True
        mixed = other.sample([groups[i] for i in order])
        one_by_one = [other.sample([group])[0] for group in groups]
    assert_same([mixed[i] for i in np.argsort(order)], expected, atol=1e-5)
    assert_same(one_by_one, expected, atol=1e-5)


# Prefixes of all lengths.


def test_bucket():
    for least in (1, 8, 32):
        for size in range(1, 5000):
            found = bucket(size, least)
            assert found >= size and found % least == 0 and bucket(found, least) == found
            assert found - size < least or found - size <= found / 5
            assert found // (found & -found) < 8 or found <= 8 * least  # three significant bits
    assert [bucket(size, 8) for size in (1, 8, 9, 31, 32, 33, 40, 41, 63, 64, 65, 80, 81)] == (
        [8, 8, 16, 32, 32, 40, 40, 48, 64, 64, 80, 80, 96]
    )


BORDERS = [1, 7, 8, 9, 16, 17, 31, 32, 33, 40, 41, 63, 64]


def border_groups(tiles, sampling):
    rng, found = np.random.default_rng(7), []
    for length in (length for length in BORDERS if length > 4 * tiles):
        prefix, pixels = prefix_of(rng, length, tiles), pixels_of(rng, tiles)
        found.append(Group((length, tiles), f"{length} {tiles}", prefix, pixels, key_of(rng), 2, sampling))
    return found


@pytest.fixture(scope="module")
def narrow(make):
    """Like ``base``, with padding to multiples of 8 tokens."""
    return make(min_bucket=8)


@pytest.mark.parametrize("tiles", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_every_border_of_an_extension(narrow, logits_of, tiles):
    """Greedily: the tokens of a plain loop of full forwards. Each prefix is computed in a batch of its width."""
    groups = border_groups(tiles, GREEDY)
    check_against_full_forwards(groups, narrow.sample(groups), logits_of)
    sampled = [dataclasses.replace(g, sampling=SAMPLINGS[2]) for g in groups]
    check_against_full_forwards(sampled, narrow.sample(sampled), logits_of)


@pytest.mark.slow
def test_every_border_of_a_row(narrow, logits_of):
    """One after the other: the rows are as wide as this prefix needs. They grow and shrink."""
    groups = [g for tiles in (0, 1) for g in border_groups(tiles, GREEDY) if len(g.prefix) in (7, 8, 9, 16)]
    results, widths = [], []
    for group in groups:
        results += narrow.sample([group])
        widths.append(narrow._width)
    check_against_full_forwards(groups, results, logits_of)
    assert set(widths) == {8, 16} and np.sum(np.diff(widths) < 0) == 1


def test_rows_grow_and_shrink_around_samples_under_way(narrow, logits_of):
    rng = np.random.default_rng(2)
    lengths = [5, 16, 7, 13, 8, 6, 5, 5, 5, 5, 16, 4, 4, 4, 4]
    groups = [
        Group(i, str(i), prefix_of(rng, length), None, key_of(rng), 4, GREEDY) for i, length in enumerate(lengths)
    ]
    found, waiting, widths = {}, list(groups), []
    while waiting or narrow.busy:
        if waiting:
            narrow.submit(waiting.pop(0))
        found.update(narrow.step())
        widths.append(narrow._width)
    assert np.sum(np.diff(widths[1:]) > 0) >= 1 and np.sum(np.diff(widths[1:]) < 0) >= 2
    check_against_full_forwards(groups, [found[g.id] for g in groups], logits_of)


def test_a_prefix_in_pieces(make, logits_of):
    """The question is sampled first, then each further step on top; so is a beginning of a known prefix."""
    rng = np.random.default_rng(2)
    whole, pixels = prefix_of(rng, 64, 2, at=2), pixels_of(rng, 2)
    ends = [12, 13, 33, 51, 64, 40]
    groups = [Group(i, "p", whole[:end], pixels, key_of(rng), 2, GREEDY) for i, end in enumerate(ends)]
    branch = Group("branch", "p", whole[:33] + tuple(rng.choice(TEXT, 20).tolist()), pixels, key_of(rng), 2, GREEDY)
    groups.append(branch)
    engine, together = make(), make()
    one_by_one = [engine.sample([group])[0] for group in groups]
    check_against_full_forwards(groups, one_by_one, logits_of)
    assert_same(together.sample(groups[::-1])[::-1], one_by_one)
    for counts in (engine.counts, together.counts):
        assert (counts.prefix_tokens, counts.images) == (len(contexts(groups)), 1)


def test_pieces_of_various_widths(narrow, logits_of):
    """What is known and what is new may together need far more room than either."""
    rng = np.random.default_rng(9)
    whole = prefix_of(rng, 64)
    groups = [Group(i, "various", whole[:end], None, key_of(rng), 2, GREEDY) for i, end in enumerate((23, 31, 48, 64))]
    wide = Group("wide", "wide", prefix_of(rng, 64), None, key_of(rng), 1, GREEDY)  # it keeps the rows at one width
    results = [narrow.sample([group, wide])[0] for group in groups]
    check_against_full_forwards(groups, results, logits_of)


def watch_extensions(engine):
    """The shapes of the tokens of every extension, as they come."""
    shapes, run = [], engine._run

    def watched(program, signature, *args, **static):
        if program is engine_module.device.extend:
            shapes.append(args[2]["tokens"].shape)
        return run(program, signature, *args, **static)

    engine._run = watched
    return shapes


@pytest.mark.parametrize("at", [8, 11])
def test_prefixes_longer_than_a_chunk(make, logits_of, monkeypatch, at):
    """Pieces of 16 tokens; the 8 image tokens end with the first and cross its border."""
    rng = np.random.default_rng(at)
    groups = []
    for length in (20, 32, 33, 64):  # all in one batch
        for tiles in (2, 0):
            prefix, pixels = prefix_of(rng, length, tiles, at), pixels_of(rng, tiles)
            groups.append(Group((length, tiles), f"{length} {tiles}", prefix, pixels, key_of(rng), 2, GREEDY))
    monkeypatch.setattr(engine_module, "_CHUNK", 16)
    engine = make(min_bucket=8)
    shapes = watch_extensions(engine)
    check_against_full_forwards(groups, engine.sample(groups), logits_of)
    assert {width for _, _, width in shapes} == {16}
    assert engine.counts.prefix_tokens == len(contexts(groups))
    assert engine.counts.prefix_tokens + engine.counts.padded_tokens == sum(map(np.prod, shapes))


# The distribution of samples.

DISTRIBUTIONS = [
    Sampling(),
    Sampling(temperature=0.6),
    Sampling(temperature=1.8),
    Sampling(temperature=0.0),
    Sampling(top_k=4),
    Sampling(top_p=0.7),
    Sampling(min_p=0.15),
    Sampling(repetition_penalty=2.0),
    Sampling(repetition_penalty=0.8),
    Sampling(temperature=1.3, top_k=12, top_p=0.9, min_p=0.02, repetition_penalty=1.3),
]


def filtered(logits, seen, s):
    """Probabilities after the filters, in float64, in the order of the warpers of ``transformers``."""
    x = np.asarray(logits, np.float64)
    x = np.where(seen, np.where(x > 0, x / s.repetition_penalty, x * s.repetition_penalty), x)
    if s.temperature == 0:
        return np.eye(len(x))[x.argmax()]
    p = np.exp(x / s.temperature)
    order = np.argsort(-p)
    p[order[s.top_k or len(p) :]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= s.top_p]] = 0
    p /= p.sum()
    p[p < s.min_p * p.max()] = 0
    return p / p.sum()


@pytest.fixture(scope="module")
def exact_pairs(tiny, params, mesh_of):
    """``f(prefix, sampling)``: the probabilities [V, V] of the first two tokens, by full forwards."""
    mesh = mesh_of(data=1)
    placed = tiny.place(mesh, params)

    @jax.jit
    def run(params, tokens):
        model = nnx.merge(tiny.graphdef, params)
        return model.decoder.logits(model(tokens, jnp.ones(tokens.shape, bool), None)[0])

    def call(prefix, sampling):
        vocab = tiny.cfg.decoder.vocab_size
        rows = np.array([[*prefix, token] for token in range(vocab)], np.int32)
        with jax.set_mesh(mesh):
            logits = np.asarray(run(placed, put_batch({"tokens": rows}, mesh)["tokens"]))
        seen = np.isin(np.arange(vocab), prefix)
        first = filtered(logits[0, -2], seen, sampling)
        second = [filtered(logits[t, -1], seen | (np.arange(vocab) == t), sampling) for t in range(vocab)]
        return first[:, None] * np.array(second)

    return call


def chi_square(counts, p):
    """The p-value; cells with few expected counts are merged."""
    expected = counts.sum() * p
    rare = expected < 5
    assert np.all(counts[p == 0] == 0)
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    kept = expected > 0
    return 1.0 if kept.sum() == 1 else stats.chisquare(counts[kept], expected[kept]).pvalue


@pytest.fixture(scope="module")
def many(make):
    return make(slots=256, samples=64, max_new=2, rows=8)


@pytest.mark.parametrize("sampling", DISTRIBUTIONS, ids=str)
def test_distribution(many, exact_pairs, sampling):
    """Chi-square of 4000 pairs of tokens: the second depends on the first, the penalty on it and on the prompt."""
    rng, n = np.random.default_rng(17), 4000
    prefix = prefix_of(rng, 10)
    sampling = dataclasses.replace(sampling, max_new_tokens=2)
    group = Group(0, "p", prefix, None, key_of(rng), n, sampling)
    found = np.array([s.tokens for s in many.sample([group])[0]])
    p = exact_pairs(prefix, sampling)
    counts = np.zeros(p.shape)
    np.add.at(counts, tuple(found.T), 1)
    values = chi_square(counts.ravel(), p.ravel()), chi_square(counts.sum(axis=1), p.sum(axis=1))
    assert min(values) > 1e-3
    if sampling.temperature > 0:
        assert np.sum(n * p >= 5) > 8  # enough cells
    plain = exact_pairs(prefix, Sampling(max_new_tokens=2))
    assert plain[0].sum() > 0.1 and 0 not in prefix  # 0 fills up what a row's prefix leaves: it must not count as seen
    if sampling != Sampling(max_new_tokens=2):  # and the test can tell the parameter
        impossible = np.any(counts[plain == 0])
        assert not impossible and chi_square(counts.ravel(), plain.ravel()) < 1e-6


def test_parameters_do_not_recompile(many):
    """All of the above were one program each."""
    assert {name for name, _ in many._signatures} >= {"extend", "admit", "decode"}
    before = [p.compiled() for p in (engine_module.device.admit, engine_module.device.decode)]
    many.frozen = True
    group = Group(0, "p", prefix_of(np.random.default_rng(17), 10), None, np.zeros(2, np.uint32), 4000, SAMPLINGS[5])
    many.sample([group])
    many.frozen = False
    assert before == [p.compiled() for p in (engine_module.device.admit, engine_module.device.decode)]


def test_penalty_on_every_sampled_token(base, logits_of):
    """Greedily: in a loop on the host the same tokens come, in eight steps."""
    rng, sampling = np.random.default_rng(5), dataclasses.replace(GREEDY, repetition_penalty=1.6)
    groups = [Group(i, f"{i}", prefix_of(rng, 6), None, key_of(rng), 1, sampling) for i in range(ROWS)]
    found, repeats = [list(group[0].tokens) for group in base.sample(groups)], 0
    rows = logits_of([g.prefix + tuple(tokens) for g, tokens in zip(groups, found, strict=True)], [None] * ROWS)
    for group, tokens, logits in zip(groups, found, rows, strict=True):
        for i, token in enumerate(tokens[: [*tokens, 4].index(4)]):
            x = logits[len(group.prefix) - 1 + i]
            seen = np.isin(np.arange(len(x)), group.prefix + tuple(tokens[:i]))
            p = filtered(x, seen, dataclasses.replace(sampling, temperature=1.0))
            assert p[token] == pytest.approx(p.max(), rel=1e-3)
            repeats += x.argmax() in tokens[1:i] and x.argmax() != token
    assert repeats > 10  # without the penalty a token would have come again


@pytest.mark.slow
def test_samples_of_other_keys_and_groups_are_independent(many, exact_pairs):
    """One sample each of 1500 groups with keys that differ a little, by chi-square as well."""
    rng = np.random.default_rng(17)
    prefix, sampling = prefix_of(rng, 10), Sampling(max_new_tokens=2)
    groups = [Group(i, "p", prefix, None, np.array([0, i], np.uint32), 1, sampling) for i in range(1500)]
    found = np.array([group[0].tokens for group in many.sample(groups)])
    p = exact_pairs(prefix, sampling)
    counts = np.zeros(p.shape)
    np.add.at(counts, tuple(found.T), 1)
    assert chi_square(counts.ravel(), p.ravel()) > 1e-3


# The work.


@pytest.mark.parametrize("seed", range(3))
def test_every_token_of_a_prefix_is_computed_once(make, seed):
    """Random tries of prefixes, in several rounds; equal and nested ones, in the same round and later."""
    rng, engine = np.random.default_rng(seed), make()
    shapes, problems = watch_extensions(engine), []
    for problem in range(5):
        tiles = int(rng.integers(0, 2))
        problems.append((f"{problem}", prefix_of(rng, 10 + problem, tiles), pixels_of(rng, tiles)))
    known, submitted = {name: [prefix] for name, prefix, _ in problems}, []
    for _ in range(4):
        round_ = []
        for _ in range(rng.integers(3, 9)):
            name, _, pixels = problems[rng.integers(5)]
            base = known[name][rng.integers(len(known[name]))]
            prefix = base + tuple(rng.choice(TEXT[:2], rng.integers(0, 9)).tolist())  # few tokens: many in common
            known[name].append(prefix)
            round_.append(Group(len(submitted) + len(round_), name, prefix, pixels, key_of(rng), 2, SAMPLINGS[5]))
        submitted += round_
        engine.sample(round_)
        assert engine.counts.prefix_tokens == len(contexts(submitted))
        assert engine.counts.images == len({g.problem for g in submitted if g.pixels is not None})
        assert engine.counts.prefix_tokens + engine.counts.padded_tokens == sum(map(np.prod, shapes))
    assert engine.counts.prefix_tokens < 0.5 * sum(len(g.prefix) for g in submitted)


def test_padding(make):
    """Four new prefixes of one length: only the padding up to the bucket."""
    rng, engine = np.random.default_rng(0), make(min_bucket=8)
    engine.sample([Group(i, f"{i}", prefix_of(rng, 61), None, key_of(rng), 1, SAMPLINGS[5]) for i in range(4)])
    assert (engine.counts.prefix_tokens, engine.counts.padded_tokens) == (4 * 61, 4 * 3)


def test_the_image_tower_runs_once_per_problem(make, groups, samples, monkeypatch):
    """Tiles that went through the tower, counted inside of the program (empty ones fill its batch)."""
    seen, original, device = [], VisionTower.__call__, engine_module.device

    def counted(self, pixels, keep=None):
        jax.debug.callback(lambda x: seen.extend(np.any(x != 0, axis=(1, 2, 3)).tolist()), pixels)
        return original(self, pixels, keep)

    monkeypatch.setattr(VisionTower, "__call__", counted)

    function = device.tower.function

    @device.program(static_argnames=("graphdef",))
    def tower(params, pixels, *, graphdef):  # traced anew, with the counter
        return function(params, pixels, graphdef=graphdef)

    monkeypatch.setattr(device, "tower", tower)
    engine = make()
    assert_same(engine.sample(groups), samples)
    engine.sample([dataclasses.replace(g, key=g.key + np.uint32(1)) for g in groups])
    jax.effects_barrier()
    tiles = {g.problem: len(g.pixels) for g in groups if g.pixels is not None}
    assert sum(seen) == sum(tiles.values()) == 4 and engine.counts.images == len(tiles) == 3
    engine.release("problem 2")
    engine.sample(groups)
    jax.effects_barrier()
    assert sum(seen) == 4 + tiles["problem 2"] == 6 and engine.counts.images == 4


@pytest.mark.slow
def test_slots_are_refilled(make):
    """Samples of very different lengths: slots are never idle but at the end."""
    rng, slots = np.random.default_rng(0), 48
    engine = make(max_new=64, slots=slots, samples=4, steps=32)
    groups = [
        Group(i, f"{i}", prefix_of(rng, 6), None, key_of(rng), 4, Sampling(max_new_tokens=int(most)))
        for i, most in enumerate(rng.permutation(np.repeat([1, 2, 5, 9, 17, 30, 64], 45)))
    ]
    results = engine.sample(groups)
    assert [len(s.tokens) for group in results for s in group] == [
        g.sampling.max_new_tokens for g in groups for _ in range(g.n)
    ]
    lengths = [g.sampling.max_new_tokens for g in groups for _ in range(g.n)]
    batches = sum(max(lengths[i : i + slots]) for i in range(0, len(lengths), slots))
    counts = engine.counts
    assert counts.occupancy >= 0.9
    assert counts.steps <= 1.12 * (sum(lengths) - len(lengths)) / slots < 0.6 * batches
    assert counts.slot_steps == slots * counts.steps
    check_counts(engine, groups, results)


# Guards.


def test_recompilation_is_reported(make, groups, monkeypatch):
    """A parameter of another type."""
    engine, told = make(), []
    monkeypatch.setattr(engine_module.logging, "warning", lambda text, *args: told.append(text % args))

    def change():
        decoder = engine._params["decoder"]
        norm = {"scale": decoder["norm"]["scale"].astype(jnp.bfloat16)}
        engine._params = {**engine._params, "decoder": {**decoder, "norm": norm}}

    engine.sample(groups[1:2])
    change()
    with pytest.raises(Recompiled, match="extend was compiled again for the sizes"):
        engine.sample([dataclasses.replace(groups[1], problem="another")])
    engine = make()
    engine.strict = False
    engine.sample(groups[1:2])
    change()
    engine.sample([dataclasses.replace(groups[1], problem="another")])  # two programs, besides the one above
    assert len(told) == 1 and "admit was compiled again for the sizes" in told[0]


def test_frozen(make):
    """After a warm-up a new size is told as well; known ones are not."""
    engine, rng = make(), np.random.default_rng(0)

    def group(length):
        return Group(0, f"{length}", prefix_of(rng, length), None, key_of(rng), 2, SAMPLINGS[0])

    engine.sample([group(20)])
    engine.frozen = True
    engine.sample([group(21)])
    with pytest.raises(Recompiled):
        engine.sample([group(300)])


def one(**values):
    base = Group(0, "the problem", (9, 10, 11), None, np.zeros(2, np.uint32), 1, SAMPLINGS[0])
    return dataclasses.replace(base, **values)


@pytest.fixture(scope="module")
def small(make):
    return make(cache_tokens=FEW)


@pytest.mark.parametrize(
    "group, words",
    [
        (one(prefix=()), ("prefix",)),
        (one(n=0), ("at least one sample",)),
        (one(sampling=Sampling(max_new_tokens=9)), ("max_new_tokens", "9", "8")),
        (one(prefix=(9,) * 41), ("41 tokens", "40")),
        (one(prefix=(4, 4, 4)), ("3 image tokens", "0 tiles")),
        (one(prefix=(4, 4, 4, 9), pixels=np.zeros((1, 8, 8, 3), np.uint8)), ("3 image tokens", "1 tiles")),
        (one(prefix=(4,) * 4, pixels=np.zeros((2, 8, 8, 3), np.uint8)), ("4 image tokens", "2 tiles")),
    ],
    ids=str,
)
def test_groups_that_cannot_be_sampled(small, group, words):
    with pytest.raises(ValueError) as error:
        small.submit(group)
    assert all(word in str(error.value) for word in words)
    assert not small.busy and len(small.sample([one()])[0]) == 1


def test_the_longest_that_can_be_sampled(small, logits_of):
    group = one(problem="long", prefix=(*range(10, 40), *range(10, 20)), n=3, sampling=GREEDY)
    check_against_full_forwards([group], small.sample([group]), logits_of)


def test_the_end_of_the_positions(make, tiny):
    """Dynamic scaling would change what is cached."""
    decoder = dataclasses.replace(tiny.cfg.decoder, rope_scaling=RopeScaling("dynamic", 2.0, 12))
    engine = make(cfg=dataclasses.replace(tiny.cfg, decoder=decoder))
    with pytest.raises(ValueError, match="positions end at 12"):
        engine.submit(one(prefix=(9,) * 5))
    assert len(engine.sample([one(prefix=(9,) * 4)])[0]) == 1


@pytest.mark.parametrize("at_once", [True, False])
def test_one_problem_fills_the_cache(make, at_once):
    engine = make(cache_tokens=FEW)
    groups = [one(id=i, prefix=(10 + i,) * 15) for i in range(3)]
    with pytest.raises(UserError, match="problem the problem: 15 more tokens do not fit into 40"):
        engine.sample(groups) if at_once else [engine.sample([group]) for group in groups]


# Small things.


@pytest.mark.slow
def test_samples_that_end_at_once(make, base):
    """Rows whose samples all end with their first token are done before any of them got a slot."""
    rng = np.random.default_rng(6)
    groups = [
        Group(i, str(i), prefix_of(rng, 6), None, key_of(rng), 4, Sampling(max_new_tokens=int(most)))
        for i, most in enumerate(np.where(np.arange(24) % 3 < 2, 1, rng.integers(2, 9, 24)))
    ]
    engine = make(slots=2, rows=4, steps=1)
    results = engine.sample(groups)
    assert_same(results, base.sample(groups))
    check_counts(engine, groups, results)


def test_no_groups(make):
    engine = make()
    assert engine.sample([]) == [] and engine.step() == [] and not engine.busy
    assert dataclasses.astuple(engine.counts) == (0,) * 8 and engine.counts.occupancy == 0


def test_stop_ids(base):
    """Several for one request; on the first token; where there is just one. Greedy: what comes is known."""
    prefix = prefix_of(np.random.default_rng(4), 9)
    whole = base.sample([one(prefix=prefix, sampling=GREEDY)])[0][0]
    tokens = whole.tokens
    assert len(tokens) == MAX_NEW
    cases = [()] + [(token,) for token in tokens] + [(tokens[3], tokens[1]), (39, 38, 37, tokens[2]), (tokens[-1],)]
    cases = [(stop, most) for stop in dict.fromkeys(cases) for most in (1, 2, 3, MAX_NEW)]
    groups = [
        one(id=case, prefix=prefix, n=3, sampling=Sampling(temperature=0.0, stop=case[0], max_new_tokens=case[1]))
        for case in cases
    ]
    for (stop, most), group in zip(cases, base.sample(groups), strict=True):
        end = min([most, *(tokens.index(t) + 1 for t in stop if t in tokens)])
        for sample in group:
            assert sample.tokens == tokens[:end]
            np.testing.assert_allclose(sample.logprobs, whole.logprobs[:end], atol=1e-5)


def test_ids_and_problems_may_be_anything_hashable(base):
    base.submit(one(id=("a", 1)))
    base.submit(one(id=None))
    found = {}
    while base.busy:
        found.update(base.step())
    assert set(found) == {("a", 1), None}
    assert isinstance(found[None][0].tokens[0], int) and isinstance(found[None][0].logprobs[0], float)


def test_a_step_waits_for_the_step_before_only(make):
    """The first call starts work and returns nothing; a finished group comes with the call after."""
    engine = make(steps=1000)
    engine.submit(one())
    assert engine.step() == [] and engine.busy
    (found,) = engine.step()
    assert found[0] == 0 and not engine.busy


@pytest.mark.parametrize("steps", [1, 5])
def test_no_more_steps_in_a_call_than_asked_for(make, groups, steps):
    engine, before = make(steps=steps), 0
    for group in groups:
        engine.submit(group)
    while engine.busy:
        engine.step()
        assert engine.counts.steps <= before + steps
        before = engine.counts.steps
