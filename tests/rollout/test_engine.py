"""The engine against plain full forwards, and what a sample must not depend on."""

import jax
import numpy as np
import pytest
from flax import nnx

from mmprm_jax.data.images import normalise
from mmprm_jax.rollout import engine as engine_module
from mmprm_jax.rollout.engine import Engine
from mmprm_jax.rollout.sampling import Sampling
from mmprm_jax.sharding import put_batch

STOP, N, MAX_NEW, WIDTH = 18, 3, 8, 32  # 18 is a token that this model likes
LENGTHS = (6, 9, 12, 14, 20)  # the last needs a wider batch


@pytest.fixture(scope="module")
def problems(tiny):
    """Five prefixes (1 and 3 without an image), their pixels and keys."""
    rng = np.random.default_rng(1)
    prefixes = []
    for i, length in enumerate(LENGTHS):
        prefix = rng.integers(8, 40, length)
        if i % 2 == 0:
            prefix[1:5] = tiny.image_token
        prefixes.append(prefix.tolist())
    return prefixes, rng.integers(0, 256, (5, 1, 8, 8, 3), np.uint8), rng.integers(0, 2**32, (5, 2), np.uint32)


@pytest.fixture(scope="module")
def params(tiny):
    """Sharper predictions than those of a random head."""
    head = 3 * tiny.params["decoder"]["lm_head"]
    return {**tiny.params, "decoder": {**tiny.params["decoder"], "lm_head": head}}


@pytest.fixture(scope="module")
def make(tiny, params, mesh_of):
    """``make(rows, sampling, **mesh) -> sample(prefixes, pixels, keys)``."""

    def make(rows=4, sampling=Sampling(), **shape):  # noqa: B008
        mesh = mesh_of(**(shape or {"data": 1}))
        with jax.set_mesh(mesh):
            model = tiny.graphdef, tiny.place(mesh, params)
            engine = Engine(*model, mesh, sampling, stop=STOP, rows=rows, max_new=MAX_NEW)

        def sample(prefixes, pixels, keys):
            with jax.set_mesh(mesh):
                return engine.sample(prefixes, pixels, keys, N)

        return sample

    return make


@pytest.fixture(scope="module")
def samples(make, problems):
    return make()(*problems)


@pytest.fixture(scope="module")
def log_probabilities(tiny, params, mesh_of):
    """``f(sequences, pixels)``: log-softmax [B, WIDTH, V] of full forwards, right-padded, without a cache."""
    mesh = mesh_of(data=1)
    placed = tiny.place(mesh, params)

    @jax.jit
    def run(params, batch):
        model = nnx.merge(tiny.graphdef, params)
        return jax.nn.log_softmax(model.decoder.logits(model(batch["tokens"], batch["valid"], batch["pixels"])[0]))

    def call(sequences, pixels):
        tokens, valid = np.zeros((len(sequences), WIDTH), np.int32), np.zeros((len(sequences), WIDTH), bool)
        for row, sequence in enumerate(sequences):
            tokens[row, : len(sequence)], valid[row, : len(sequence)] = sequence, True
        with jax.set_mesh(mesh):
            return np.asarray(
                run(placed, put_batch({"tokens": tokens, "valid": valid, "pixels": normalise(pixels)}, mesh))
            )

    return call


def assert_same(a, b, atol=0.0):
    assert [[s.tokens for s in group] for group in a] == [[s.tokens for s in group] for group in b]
    np.testing.assert_allclose([[s.logprob for s in g] for g in a], [[s.logprob for s in g] for g in b], atol=atol)


def test_greedy_is_a_plain_loop_of_full_forwards(make, problems, log_probabilities):
    prefixes, pixels, keys = problems
    sequences, logprobs, done = [list(p) for p in prefixes], np.zeros(5), np.zeros(5, bool)
    for _ in range(MAX_NEW):
        scores = log_probabilities(sequences, pixels)
        for row in np.flatnonzero(~done):
            last = scores[row, len(sequences[row]) - 1]
            top = np.sort(last)[-2:]
            assert top[1] - top[0] > 2e-3  # no ties: the comparison is fair
            sequences[row].append(int(last.argmax()))
            logprobs[row] += last.max()
            done[row] = sequences[row][-1] == STOP
    for row, group in enumerate(make(sampling=Sampling(temperature=1e-5))(prefixes, pixels, keys)):
        for sample in group:
            assert list(sample.tokens) == sequences[row][len(prefixes[row]) :]
            assert sample.logprob == pytest.approx(logprobs[row], abs=1e-4)


def test_logprobs_are_those_of_a_full_forward(samples, problems, log_probabilities):
    prefixes, pixels, _ = problems
    for i in range(N):
        scores = log_probabilities([p + list(g[i].tokens) for p, g in zip(prefixes, samples, strict=True)], pixels)
        for row, (prefix, group) in enumerate(zip(prefixes, samples, strict=True)):
            steps = len(prefix) - 1 + np.arange(len(group[i].tokens))
            expected = scores[row, steps, list(group[i].tokens)].sum()
            assert group[i].logprob == pytest.approx(expected, abs=1e-4)


def test_stop_and_max_new(samples):
    flat = [s.tokens for group in samples for s in group]
    for tokens in flat:
        assert STOP not in tokens[:-1]
        assert len(tokens) == MAX_NEW or (tokens[-1] == STOP and len(tokens) < MAX_NEW)
    lengths = {len(t) for t in flat}
    assert MAX_NEW in lengths and min(lengths) < MAX_NEW  # both ends were seen


def test_samples_differ(samples):
    assert len({s.tokens for group in samples for s in group}) > 3 * N


def test_independent_of_batch_and_order(make, problems, samples):
    prefixes, pixels, keys = problems
    assert_same(make(rows=8)(*problems), samples, atol=1e-4)
    assert_same(make(rows=1)(*problems), samples, atol=1e-4)
    order = [3, 0, 4, 2, 1]
    mixed = make()([prefixes[i] for i in order], pixels[order], keys[order])
    assert_same(mixed, [samples[i] for i in order])
    for i in (1, 2):
        assert_same(make()(prefixes[i : i + 1], pixels[i : i + 1], keys[i : i + 1]), samples[i : i + 1])


def test_only_the_key_of_a_prefix_matters(make, problems, samples):
    prefixes, pixels, keys = problems
    changed = keys.copy()
    changed[2, 1] += 1
    got = make()(prefixes, pixels, changed)
    assert_same(got[:2] + got[3:], samples[:2] + samples[3:])
    assert [s.tokens for s in got[2]] != [s.tokens for s in samples[2]]


def test_image_matters_only_with_image_tokens(make, problems, samples):
    prefixes, pixels, keys = problems
    got = make()(prefixes, 255 - pixels, keys)
    changed = [[s.logprob for s in a] != [s.logprob for s in b] for a, b in zip(got, samples, strict=True)]
    assert changed == [True, False, True, False, True]


def test_same_on_eight_devices(make, problems, samples):
    assert_same(make(rows=8, data=2, fsdp=2, tensor=2)(*problems), samples, atol=1e-4)


def test_parameters_do_not_recompile(make, problems, samples):
    before = engine_module._generate._cache_size()
    make(sampling=Sampling(0.6, 5, 0.9))(*problems)
    assert engine_module._generate._cache_size() == before


def test_no_prefixes(make, problems):
    assert make()([], problems[1][:0], problems[2][:0]) == []


def test_lengths_must_agree(make, problems):
    with pytest.raises(ValueError, match="same length"):
        make()(problems[0], problems[1], problems[2][:4])
