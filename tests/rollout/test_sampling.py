"""The distribution of drawn tokens, against float64 arithmetic in the order of the warpers of ``transformers``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mmprm_jax.rollout.sampling import MAX_STOPS, Sampling, draw, uniforms

SMALL = np.array([0.3, -1.0, 2.0, 2.0, -4.0, 0.0, 1.1, -0.5], np.float32)  # the two most likely tokens are equal
SEEN = np.array([0, 1, 0, 1, 0, 0, 1, 0], bool)
LARGE = np.random.default_rng(0).standard_normal(300).astype(np.float32)  # more than two blocks, the last not full
jitted = jax.jit(draw)
CASES = [
    Sampling(),
    Sampling(temperature=0.5),
    Sampling(temperature=3.0),
    Sampling(temperature=0.0),
    Sampling(temperature=0.0, top_p=0.5, min_p=0.1, top_k=3),
    Sampling(temperature=0.0, repetition_penalty=2.0),
    Sampling(temperature=1e-4),
    Sampling(top_k=1),
    Sampling(top_k=3),
    Sampling(top_k=99_999),
    Sampling(top_p=0.8),
    Sampling(top_p=0.3),
    Sampling(top_p=0.01),
    Sampling(min_p=0.3),
    Sampling(min_p=1.0),
    Sampling(repetition_penalty=1.7),
    Sampling(repetition_penalty=0.6),
    # Pairs whose order matters.
    Sampling(temperature=2.0, top_p=0.6),
    Sampling(temperature=2.0, min_p=0.4),
    Sampling(temperature=0.5, repetition_penalty=1.3, top_p=0.9),
    Sampling(top_k=4, top_p=0.85),
    Sampling(top_k=5, top_p=0.7, temperature=1.5),
    Sampling(top_p=0.9, min_p=0.45, temperature=1.5),
    Sampling(temperature=1.5, top_k=6, top_p=0.95, min_p=0.1, repetition_penalty=1.4),
]


def exact(logits, seen, s):
    """The filtered distribution."""
    x = logits.astype(np.float64)
    x = np.where(seen, np.where(x > 0, x / s.repetition_penalty, x * s.repetition_penalty), x)
    if s.temperature == 0:
        return (np.arange(len(x)) == x.argmax()).astype(float)
    x /= s.temperature
    if s.top_k:
        x[x < np.sort(x)[-min(s.top_k, len(x))]] = -np.inf
    p = np.exp(x - x.max())
    p /= p.sum()
    if s.top_p < 1:
        falling = np.sort(p)[::-1]
        p[p < falling[np.argmax(np.cumsum(falling) >= s.top_p)]] = 0  # the token that crosses the border stays
        p /= p.sum()
    p[p < s.min_p * p.max()] = 0
    return p / p.sum()


def together(samplings):
    """The parameters of several requests, stacked."""
    return {name: np.stack([s.arrays()[name] for s in samplings]) for name in Sampling().arrays()}


def rows(values, count):
    return np.broadcast_to(values, (count, len(values)))


@pytest.mark.parametrize("logits", [SMALL, LARGE], ids=["small", "large"])
def test_distribution(logits):
    """On an even grid of uniforms every token comes up as often as its probability says, but for rounding."""
    count, size = 1000, len(logits)
    seen = np.resize(SEEN, size)
    grid = (np.arange(count, dtype=np.float32) + 0.5) / count
    unfiltered = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    for sampling in CASES:
        found, logprobs = map(
            np.asarray, jitted(rows(logits, count), rows(seen, count), grid, together([sampling] * count))
        )
        p = exact(logits, seen, sampling)
        counts = np.bincount(found, minlength=size)
        assert np.all(counts[p == 0] == 0), sampling
        np.testing.assert_allclose(counts, count * p, atol=1.01, err_msg=str(sampling))
        assert np.all(np.diff(found) >= 0)  # the ids in their order
        np.testing.assert_allclose(logprobs, unfiltered[found], atol=1e-5)


def test_filters_of_the_cases():
    """The cases do what they are there for."""
    kept = [int(np.sum(exact(SMALL, SEEN, s) > 0)) for s in CASES]
    assert kept[3:10] == [1, 1, 1, 2, 2, 3, 8]  # of two equal tokens top-k keeps both, greedy the first
    assert len(set(kept)) > 5
    after = {s: exact(SMALL, SEEN, s) for s in CASES}
    with_k = after[Sampling(top_k=4, top_p=0.85)]
    assert np.sum(with_k > 0) < np.sum(exact(SMALL, SEEN, Sampling(top_p=0.85)) > 0)  # top-p counts what top-k left


@pytest.mark.parametrize("sampling", [CASES[0], CASES[-1]], ids=["all", "filtered"])
def test_random_numbers(sampling):
    """Chi-square of draws with the engine's random numbers: sample i, token t."""
    count = 20_000
    keys = np.broadcast_to(np.array([3, 7], np.uint32), (count, 2))
    uniform = jax.jit(uniforms)(keys, np.arange(count) // 20, np.arange(count) % 20)
    assert len(np.unique(uniform)) > 0.998 * count  # 2^23 different ones: some 24 pairs meet
    assert stats.kstest(np.asarray(uniform), "uniform").pvalue > 1e-3
    tokens, _ = jitted(rows(SMALL, count), rows(SEEN, count), uniform, together([sampling] * count))
    p = exact(SMALL, SEEN, sampling)
    counts = np.bincount(tokens, minlength=8)
    assert stats.chisquare(counts[p > 0], count * p[p > 0]).pvalue > 1e-3


WIDE = np.random.default_rng(2).standard_normal((8, 2000)).astype(np.float32)  # enough to look at few of them first
WIDE[0, 3] = 9.0  # one token has nearly everything
WIDE[1] = np.round(WIDE[1] * 4)  # many are equal
WIDE[2] = 0.0
WIDE[3, :64] += 20.0  # the likely ones side by side
WIDE[4, ::31] += 20.0  # and in one group, or nearly
WIDE[5, 100:] = -np.inf
WIDE_CASES = [
    Sampling(top_k=k, top_p=p, repetition_penalty=r, temperature=t)
    for k, p, r, t in [
        (50, 0.9, 1.05, 1.0), (64, 1.0, 1.0, 1.0), (65, 0.9, 1.0, 1.0), (1, 0.5, 1.0, 1.0), (0, 0.9, 1.0, 0.7),
        (3, 1.0, 1.5, 2.0), (0, 1.0, 1.0, 0.0), (0, 1.0, 1.0, 1.0), (40, 0.2, 1.0, 1.3), (500, 0.99, 1.0, 1.0),
    ]
]  # fmt: skip


@pytest.mark.parametrize("row", range(len(WIDE)))
def test_large_vocabularies(row):
    """Every kind of request at once; one alone gets the same."""
    count, seen = 400, np.random.default_rng(3).random(WIDE.shape[1]) < 0.05
    grid = (np.arange(count, dtype=np.float32) + 0.5) / count
    tokens = []
    for sampling in WIDE_CASES:
        tokens.append(jitted(rows(WIDE[row], count), rows(seen, count), grid, together([sampling] * count))[0])
        p = exact(WIDE[row], seen, sampling)
        counts = np.bincount(tokens[-1], minlength=len(seen))
        assert np.all(counts[p == 0] == 0), sampling
        np.testing.assert_allclose(np.cumsum(counts), count * np.cumsum(p), atol=1.01, err_msg=str(sampling))
    for i in range(0, count, 40):
        mixed = jitted(rows(WIDE[row], 10), rows(seen, 10), np.full(10, grid[i]), together(WIDE_CASES))[0]
        assert mixed.tolist() == [int(found[i]) for found in tokens]


def test_uniforms_depend_on_key_and_each_index():
    def one(key, *indices):
        return float(uniforms(np.array([key], np.uint32), *(np.array([i]) for i in indices))[0])

    found = [one([0, 1], 0, 0), one([1, 0], 0, 0), one([0, 1], 1, 0), one([0, 1], 0, 1), one([0, 1], 1, 1)]
    assert len(set(found)) == 5 and all(0 <= x < 1 for x in found)
    assert one([0, 1], 0, 1) == found[3]
    shape = (2, 3)
    many = uniforms(np.broadcast_to(np.array([0, 1], np.uint32), (*shape, 2)), np.arange(3), np.zeros(shape, int))
    assert many.shape == shape and float(many[1, 1]) == found[2] and float(many[0, 0]) == found[0]


def test_rows_do_not_affect_each_other():
    """Each row has its own parameters, in one compiled call."""
    count = len(CASES)
    rng = np.random.default_rng(1)
    logits, seen = rng.standard_normal((count, 300)).astype(np.float32), rng.random((count, 300)) < 0.3
    uniform = rng.random(count).astype(np.float32)
    tokens, logprobs = jitted(logits, seen, uniform, together(CASES))
    assert tokens.dtype == jnp.int32
    for i, sampling in enumerate(CASES):
        alone = jitted(logits[i], seen[i], uniform[i], sampling.arrays())
        assert (int(alone[0]), float(alone[1])) == (int(tokens[i]), pytest.approx(float(logprobs[i]), abs=1e-6))
        p = exact(logits[i], seen[i], sampling)
        at = np.cumsum(p)
        assert at[tokens[i]] > uniform[i] - 1e-5 and at[tokens[i]] - p[tokens[i]] < uniform[i] + 1e-5


def test_parameters_do_not_recompile():
    jitted(SMALL, SEEN, np.float32(0.5), CASES[0].arrays())
    before = jitted._cache_size()
    for sampling in CASES:
        jitted(SMALL, SEEN, np.float32(0.5), sampling.arrays())
    assert jitted._cache_size() == before


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, 5, 0.9), Sampling(0.0), Sampling(min_p=0.2)])
def test_extreme_uniforms_and_logits(sampling):
    """The ends of the unit interval, ruled out tokens and a vocabulary whose probabilities do not sum to exactly 1."""
    size = 20_000
    logits = np.random.default_rng(0).standard_normal((4, size)).astype(np.float32)
    logits[2, 10:] = -1e30
    logits[3, :-1] = -np.inf
    ends = np.array([0.0, 1 - 2**-24, 1 - 2**-24, 0.5], np.float32)
    tokens, logprob = map(np.asarray, jitted(logits, np.zeros(logits.shape, bool), ends, together([sampling] * 4)))
    p = [exact(row, np.zeros(size, bool), sampling) for row in logits]
    assert [int(t) for t in tokens[[0, 2, 3]]] == [np.flatnonzero(p[0])[0], np.flatnonzero(p[2])[-1], size - 1]
    assert p[1][tokens[1]] > 0 and np.sum(p[1][tokens[1] + 1 :]) < 1e-3
    assert np.all(np.isfinite(logprob))


def test_uniforms_at_the_borders_of_blocks():
    """Rounding must not move a draw on to a token that is out: here the first of every block of 128."""
    rng, count = np.random.default_rng(4), 40
    logits = rng.standard_normal(128 * count).astype(np.float32)
    logits[::128] = -np.inf
    p = exact(logits, np.zeros(len(logits), bool), Sampling())
    ends = np.cumsum(p.reshape(count, 128).sum(axis=1))
    ends = np.repeat(ends.astype(np.float32), 17) * (1 + np.tile(np.arange(-8, 9), count) * np.float32(2**-24))
    uniform = np.minimum(ends, 1 - 2**-24).astype(np.float32)
    tokens, _ = jitted(
        rows(logits, 17 * count),
        np.zeros((17 * count, len(logits)), bool),
        uniform,
        together([Sampling()] * len(uniform)),
    )
    assert np.all(p[tokens] > 0)


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(temperature=-0.1), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(top_k=-1), "top_k"),
        (dict(top_p=0.0), "top_p"),
        (dict(top_p=1.01), "top_p"),
        (dict(min_p=-0.1), "min_p"),
        (dict(min_p=1.1), "min_p"),
        (dict(repetition_penalty=0.0), "repetition_penalty"),
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(stop=tuple(range(MAX_STOPS + 1))), "stop: 5 ids"),
    ],
    ids=str,
)
def test_values_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**values)


def test_all_that_is_wrong_is_reported():
    with pytest.raises(ValueError, match="top_k.*min_p"):
        Sampling(top_k=-1, min_p=2)


def test_arrays():
    arrays = Sampling(0.5, 3, 0.9, 0.1, 1.2, 7, (5, 6)).arrays()
    assert arrays.pop("stop").tolist() == [5, 6] + [-1] * (MAX_STOPS - 2)
    assert {k: v.item() for k, v in arrays.items()} == {
        "temperature": 0.5, "top_k": 3, "top_p": np.float32(0.9), "min_p": np.float32(0.1),
        "penalty": np.float32(1.2), "max_new": 7,
    }  # fmt: skip
    assert len(Sampling(stop=tuple(range(MAX_STOPS))).arrays()["stop"]) == MAX_STOPS


@pytest.mark.parity
def test_as_transformers():
    """Kept tokens and probabilities are those of the warpers of ``transformers``."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    rng = np.random.default_rng(2)
    for sampling in [s for s in CASES if s.temperature > 1e-3]:
        logits = rng.permutation(np.linspace(-5, 5, 300)).astype(np.float32)  # all different
        seen = rng.random(300) < 0.3
        warpers = [
            transformers.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
            transformers.TemperatureLogitsWarper(sampling.temperature),
            transformers.TopKLogitsWarper(sampling.top_k or 300),
            transformers.TopPLogitsWarper(sampling.top_p),
            transformers.MinPLogitsWarper(sampling.min_p),
        ]
        ids = torch.tensor(np.flatnonzero(seen))[None]
        scores = transformers.LogitsProcessorList(warpers)(ids, torch.tensor(logits)[None])
        np.testing.assert_allclose(torch.softmax(scores, -1)[0].numpy(), exact(logits, seen, sampling), atol=1e-6)
