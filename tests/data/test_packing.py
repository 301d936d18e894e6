"""Packing: nothing is lost, cut or mixed up; rows are full; the order depends on the seed and nothing else."""

import collections
import itertools
import json

import grain
import numpy as np
import pytest

from mmprm_jax.data.packing import Sizes, pack, rows, stream
from mmprm_jax.data.training_files import Encoded
from mmprm_jax.records import UserError


class Made:
    """A training set of examples with these numbers of tokens and tiles, in memory."""

    kind, path = "prm", "made"

    def __init__(self, lengths, tiles=None, start=0):
        tiles = [0] * len(lengths) if tiles is None else tiles
        self.lengths, self.tiles, self.start = list(map(int, lengths)), list(map(int, tiles)), start
        self.summary = {"longest": max(self.lengths), "most_tiles": max(self.tiles)}

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, row):
        length = self.lengths[row]
        tokens = np.random.default_rng((self.start, row)).integers(1, 1000, length, np.int32)
        return Encoded(f"{row}", tokens, {"k": tokens + 1, "n": tokens + 2}, (("a", self.tiles[row]),))


def made(seed, count=300, start=0):
    rng = np.random.default_rng(seed)
    return Made(rng.integers(1, 60, count), rng.integers(0, 7, count), start)


SIZES = Sizes(rows=1, tokens=100, tiles=9, examples=5)


def codes(row):
    return row["example"][row["example"] >= 0].tolist()


def take(dataset, count):
    return list(itertools.islice(dataset, count))


def equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sizes", [SIZES, Sizes(1, 60, 6, 40), Sizes(1, 1000, 30, 8), Sizes(1, 70, 8, 1)], ids=str)
def test_every_example_is_in_one_row_whole(seed, sizes):
    data = made(seed)
    finite = stream([data], [1.0], seed).slice(slice(0, 2 * len(data))).to_iter_dataset()
    found = list(pack(finite, sizes, ("k", "n"), seed))
    counts = collections.Counter(code for row in found for code in codes(row))
    assert counts == dict.fromkeys(range(2 * len(data)), 1)  # two epochs
    for row in found:
        assert {name: (x.shape, x.dtype) for name, x in row.items()} == {
            **dict.fromkeys(("tokens", "segment", "k", "n"), ((sizes.tokens,), np.int32)),
            "example": ((sizes.examples,), np.int64),
        }
        inside = codes(row)
        assert row["example"].tolist() == inside + [-1] * (sizes.examples - len(inside))
        at = 0
        for number, code in enumerate(inside, 1):
            example = data[code % len(data)]
            part = slice(at, at + len(example.tokens))
            equal(
                {name: row[name][part] for name in ("tokens", "k", "n")},
                {"tokens": example.tokens, **example.labels},
            )
            assert (row["segment"][part] == number).all()
            at += len(example.tokens)
        assert not any(row[name][at:].any() for name in ("tokens", "segment", "k", "n"))
        assert sum(data.tiles[code % len(data)] for code in inside) <= sizes.tiles


def test_first_fit_of_both_capacities():
    """Worked by hand: which example shares a row with which."""
    lengths, tiles = [6, 6, 4, 3, 1, 1, 1, 1], [2, 1, 1, 3, 0, 0, 1, 0]
    data = Made(lengths, tiles)
    order = grain.MapDataset.source(
        [{"tokens": data[i].tokens, "tiles": np.ones(tiles[i]), "example": np.array([i + 1])} for i in range(8)]
    )
    found = pack(order.to_iter_dataset(), Sizes(1, 10, 3, 3), (), 0)
    assert sorted(codes(row) for row in found) == [[0, 2], [1, 4, 5], [3, 7], [6]]


def test_rows_are_full():
    """Lengths as a PRM's: a few steps with images of 1 to 7 tiles of 256 tokens, in rows of 8,192 tokens."""
    rng = np.random.default_rng(0)
    tiles = rng.integers(1, 8, 4000)
    lengths = np.clip(rng.lognormal(np.log(1100), 0.7, 4000), 200, 6000).astype(int)
    shares = {}
    for name, tokens in {"images among them": np.maximum(lengths, 256 * tiles + 60), "text": lengths}.items():
        packed = rows([Made(tokens, tiles)], [1.0], Sizes(1, 8192, 32, 64), 0)
        filled = [(row["segment"] > 0).mean() for row in take(packed, 768)]  # six times the open rows
        shares[name] = np.mean(filled)
    print({name: f"{share:.1%}" for name, share in shares.items()})
    assert min(shares.values()) >= 0.95, shares


def test_one_example_a_row_is_the_stream():
    data = made(1, count=37)
    order = [int(x["example"][0]) - 1 for x in take(stream([data], [1.0], 5), 111)]
    assert [codes(row) for row in take(rows([data], [1.0], Sizes(1, 60, 6), 5), 111)] == [[code] for code in order]
    epochs = [order[i : i + 37] for i in (0, 37, 74)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(37 * e, 37 * e + 37)) for e in range(3)]
    assert len({tuple(code % 37 for code in epoch) for epoch in epochs}) == 3  # a new order each time


def test_the_order_depends_on_the_seed_only():
    data = [made(1), made(2, count=100, start=1)]
    first = take(rows(data, [1.0, 2.0], SIZES, 3), 300)
    for a, b in zip(first, take(rows(data, [1.0, 2.0], SIZES, 3), 300), strict=True):
        equal(a, b)
    other = take(rows(data, [1.0, 2.0], SIZES, 4), 300)
    assert [codes(row) for row in other] != [codes(row) for row in first]


@pytest.mark.parametrize("sizes", [SIZES, Sizes(1, 60, 6)], ids=["packed", "one a row"])
def test_resumed_behind_any_row(sizes):
    data = [made(1), made(2, count=50, start=1)]
    whole, states = iter(rows(data, [3.0, 1.0], sizes, 0)), []
    found = []
    for _ in range(360):
        found.append(next(whole))
        states.append(json.dumps(whole.get_state()))
    for at in (0, 126, 127, 128, 200, 255, 300):
        again = iter(rows(data, [3.0, 1.0], sizes, 0))
        next(again)
        again.set_state(json.loads(states[at]))
        for expected in found[at + 1 : at + 60]:
            equal(next(again), expected)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.7, 0.2, 0.1), (5.0, 1.0, 100.0)])
def test_mixture(weights):
    """Each set has its share everywhere in the stream, and is read in epochs of its own."""
    sets = [made(i, count, i) for i, count in enumerate((40, 7, 90))]
    drawn = np.array([int(x["example"][0]) - 1 for x in take(stream(sets, weights, 0), 1200)])
    epochs, index = np.divmod(drawn, 137)
    which = np.searchsorted([40, 47], index, "right")
    for part in np.split(which, 2):
        shares = np.bincount(part, minlength=3) / len(part)
        wanted = np.array(weights) / sum(weights)
        np.testing.assert_allclose(shares, wanted, rtol=0.01, atol=2 / len(part))
    for i, data in enumerate(sets):
        mine, turns = index[which == i], epochs[which == i]
        np.testing.assert_array_equal(turns, np.arange(len(mine)) // len(data))
        for e in range(len(mine) // len(data)):
            assert len(set(mine[turns == e])) == len(data)


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.0), (1.0, -1.0), ()])
def test_weights_that_cannot_be(weights):
    with pytest.raises(UserError, match="need one for each of the 2 sets, greater than 0"):
        stream([made(0), made(1)], weights, 0)


def test_examples_that_fit_into_no_row():
    with pytest.raises(UserError, match="made: an example of 50 tokens, one of 3 tiles; a row holds 49 and 3"):
        rows([Made([50, 3], [0, 3])], [1.0], Sizes(1, 49, 3, 2), 0)
    with pytest.raises(UserError, match="a row holds 50 and 2"):
        rows([Made([50, 3], [0, 3])], [1.0], Sizes(1, 50, 2, 2), 0)
