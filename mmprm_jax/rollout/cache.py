"""Which prefixes the device knows: a trie of tokens for each problem, over a pool of token places.

Every place of the pool holds the keys, values and last hidden state of one token in its context, so a place also names
the prefix that ends there. Two prefixes of a problem share the places of what they have in common.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass
class _Problem:
    shard: int
    following: dict[tuple[int, int], int] = dataclasses.field(default_factory=dict)  # (place or -1, token) -> place


class CacheFull(Exception):
    """One problem alone needs more places than there are."""


class PrefixCache:
    """``places`` token places in each of ``shards`` pools; a problem lives in one of them."""

    def __init__(self, places: int, shards: int):
        self._places = places
        self._free = [list(range(places))[::-1] for _ in range(shards)]
        self._problems: dict[str, _Problem] = {}  # the least recently used first

    def shard(self, problem: str) -> int:
        """The pool of a problem: for a new one that with the fewest problems."""
        if problem not in self._problems:
            load = [0] * len(self._free)
            for entry in self._problems.values():
                load[entry.shard] += 1
            self._problems[problem] = _Problem(load.index(min(load)))
        return self._problems[problem].shard

    def find(self, problem: str, tokens: Sequence[int]) -> list[int]:
        """The places of the longest known beginning of ``tokens``."""
        self.shard(problem)
        entry = self._problems[problem] = self._problems.pop(problem)
        places, place = [], -1
        for token in tokens:
            place = entry.following.get((place, token), -1)
            if place < 0:
                break
            places.append(place)
        return places

    def add(self, problem: str, known: Sequence[int], tokens: Sequence[int], keep: set[str]) -> list[int]:
        """Makes places for ``tokens``, which follow the places ``known``.

        Forgets other problems of the pool, the least recently used first, when there is no room; not those in ``keep``.
        Raises CacheFull when that is not enough.
        """
        entry = self._problems[problem]
        free = self._free[entry.shard]
        for other in list(self._problems):
            if len(free) >= len(tokens):
                break
            if other not in keep and other != problem and self._problems[other].shard == entry.shard:
                self.forget(other)
        if len(free) < len(tokens):
            raise CacheFull(f"{len(tokens)} more tokens do not fit into {self._places}")
        places, place = [], known[-1] if known else -1
        for token in tokens:
            new = free.pop()
            entry.following[place, token] = new
            places.append(new)
            place = new
        return places

    def forget(self, problem: str) -> None:
        """Frees the places of a problem, which stays in its pool."""
        entry = self._problems[problem]
        self._free[entry.shard] += entry.following.values()
        entry.following.clear()

    def release(self, problem: str) -> None:
        """Forgets a problem and its pool, if it is known."""
        if problem in self._problems:
            self.forget(problem)
            del self._problems[problem]
