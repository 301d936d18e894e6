"""The trie of known prefixes over a pool of entries."""

import numpy as np
import pytest

from mmprm_jax.rollout.cache import CacheFull, PrefixCache


def remember(cache, problem, tokens, keep=()):
    """Adds what is new of a prefix; the entries of all of it and the number of new ones."""
    known = cache.find(problem, tokens)
    new = cache.add(problem, known, tokens[len(known) :], set(keep))
    return known + new, len(new)


def test_prefixes_share_what_they_have_in_common():
    cache = PrefixCache(20, 1)
    first, new = remember(cache, "a", [1, 2, 3, 4])
    assert new == 4 and len(set(first)) == 4
    longer, new = remember(cache, "a", [1, 2, 3, 4, 5])
    assert longer[:4] == first and new == 1
    other, new = remember(cache, "a", [1, 2, 9, 4])
    assert other[:2] == first[:2] and new == 2 and not set(other[2:]) & set(longer)
    assert remember(cache, "a", [1, 2]) == (first[:2], 0)
    assert remember(cache, "a", [1, 2, 9, 4]) == (other, 0)
    twice, new = remember(cache, "a", [7, 7, 7])  # one token in three contexts
    assert new == 3 and len(set(twice)) == 3


def test_problems_share_nothing():
    cache = PrefixCache(20, 1)
    a, _ = remember(cache, "a", [1, 2, 3])
    b, new = remember(cache, "b", [1, 2, 3])
    assert new == 3 and not set(a) & set(b)


def test_problems_are_spread():
    cache = PrefixCache(4, 3)
    assert [cache.shard(p) for p in "abcdef"] == [0, 1, 2, 0, 1, 2]
    assert [cache.shard(p) for p in "fa"] == [2, 0]
    cache.release("b")
    assert cache.shard("g") == 1  # the one with the fewest


def test_each_shard_has_its_own_places():
    cache = PrefixCache(3, 2)
    assert sorted(remember(cache, "a", [1, 2, 3])[0]) == sorted(remember(cache, "b", [1, 2, 3])[0]) == [0, 1, 2]


def test_the_least_recently_used_goes_first():
    cache = PrefixCache(9, 1)
    for problem in "abc":
        remember(cache, problem, [1, 2, 3])
    cache.find("a", [1])
    remember(cache, "d", [1, 2, 3])
    assert [len(cache.find(p, [1, 2, 3])) for p in "acd"] == [3, 3, 3]
    assert cache.find("b", [1, 2, 3]) == []


def test_no_more_go_than_must():
    cache = PrefixCache(9, 1)
    for problem in "abc":
        remember(cache, problem, [1, 2, 3])
    remember(cache, "d", [1, 2, 3, 4])
    assert [len(cache.find(p, [1, 2, 3])) for p in "abcd"] == [0, 0, 3, 3]


def test_keep():
    cache = PrefixCache(9, 1)
    for problem in "abc":
        remember(cache, problem, [1, 2, 3])
    remember(cache, "d", [1, 2, 3], keep="ab")
    assert [len(cache.find(p, [1, 2, 3])) for p in "abcd"] == [3, 3, 0, 3]
    with pytest.raises(CacheFull, match="3 more tokens do not fit into 9"):
        remember(cache, "e", [1, 2, 3], keep="abd")


def test_other_shards_are_left_alone():
    cache = PrefixCache(3, 2)
    remember(cache, "a", [1, 2, 3])
    remember(cache, "b", [1, 2, 3])
    remember(cache, "c", [5, 6])
    assert cache.shard("c") == 0
    assert len(cache.find("b", [1, 2, 3])) == 3


def test_a_problem_does_not_push_itself_out():
    cache = PrefixCache(4, 1)
    remember(cache, "a", [1, 2, 3])
    with pytest.raises(CacheFull):
        remember(cache, "a", [4, 5])
    assert len(cache.find("a", [1, 2, 3])) == 3
    assert remember(cache, "a", [1, 2, 3, 4])[1] == 1


def test_release():
    cache = PrefixCache(4, 1)
    before, _ = remember(cache, "a", [1, 2, 3, 4])
    cache.release("a")
    cache.release("a")
    cache.release("never seen")
    assert cache.find("a", [1, 2]) == []
    assert sorted(remember(cache, "b", [1, 2, 3, 4])[0]) == sorted(before)


@pytest.mark.parametrize("seed", range(5))
def test_random_use(seed):
    """Against a dict of what was added: no entry is shared by two contexts, none is lost."""
    rng, entries, shards = np.random.default_rng(seed), 40, 2
    cache, known, shard = PrefixCache(entries, shards), {}, {}  # known: problem -> {prefix: entry}
    evictions = full = 0
    for _ in range(600):
        problem, tokens = str(rng.integers(8)), rng.integers(0, 3, rng.integers(1, 12)).tolist()
        if rng.random() < 0.1:
            cache.release(problem)
            known.pop(problem, None)
            continue
        keep = {str(i) for i in rng.choice(8, 2)}
        found = cache.find(problem, tokens)
        mine = known.setdefault(problem, {})
        if not mine:
            shard[problem] = cache.shard(problem)
        assert cache.shard(problem) == shard[problem]
        prefixes = [tuple(tokens[: i + 1]) for i in range(len(tokens))]
        assert found == [mine[p] for p in prefixes if p in mine]
        try:
            new = cache.add(problem, found, tokens[len(found) :], keep)
        except CacheFull:
            full += 1
        else:
            mine |= dict(zip(prefixes[len(found) :], new, strict=True))
            assert all(0 <= entry < entries for entry in new)
        for other in known.keys() - {problem}:
            if known[other] and not cache.find(other, min(known[other], key=len)):
                assert other not in keep and shard[other] == shard[problem]
                del known[other]
                evictions += 1
        used = [(shard[other], entry) for other in known for entry in known[other].values()]
        assert len(used) == len(set(used))
    assert evictions > 20 and full > 3
    for problem in map(str, range(8)):
        cache.release(problem)
    for i in range(shards):  # all of them are free
        assert sorted(cache.add(f"new {i}", cache.find(f"new {i}", [1]), range(entries), set())) == list(range(entries))
    assert {cache.shard(f"new {i}") for i in range(shards)} == set(range(shards))
