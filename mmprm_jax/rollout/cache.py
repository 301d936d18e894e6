"""Which prefixes the device knows: a trie of tokens for each problem, over a pool of cache entries.

Every entry of the pool holds the keys, values and last hidden state of one token in its context, so an entry also names
the prefix that ends there. Two prefixes of a problem share the entries of what they have in common.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass
class _Problem:
    shard: int
    following: dict[tuple[int, int], int] = dataclasses.field(default_factory=dict)  # (entry or -1, token) -> entry


class CacheFull(Exception):
    """One problem alone needs more entries than there are."""


class PrefixCache:
    """Pools of ``capacity`` entries, one for each of ``shards``; a problem lives in one of them."""

    def __init__(self, capacity: int, shards: int):
        self._capacity = capacity
        self._free = [list(range(capacity))[::-1] for _ in range(shards)]
        self._problems: dict[str, _Problem] = {}  # the least recently used first

    def shard(self, problem: str) -> int:
        """The pool of a problem: for a new one that with the fewest problems."""
        if problem not in self._problems:
            load = [0] * len(self._free)
            for trie in self._problems.values():
                load[trie.shard] += 1
            self._problems[problem] = _Problem(load.index(min(load)))
        return self._problems[problem].shard

    def find(self, problem: str, tokens: Sequence[int]) -> list[int]:
        """The entries of the longest known beginning of ``tokens``."""
        self.shard(problem)
        trie = self._problems[problem] = self._problems.pop(problem)
        entries, entry = [], -1
        for token in tokens:
            entry = trie.following.get((entry, token), -1)
            if entry < 0:
                break
            entries.append(entry)
        return entries

    def add(self, problem: str, known: Sequence[int], tokens: Sequence[int], keep: set[str]) -> list[int]:
        """Makes entries for ``tokens``, which follow the entries ``known``.

        Forgets other problems of the pool, the least recently used first, when there is no room; not those in ``keep``.
        Raises CacheFull when that is not enough.
        """
        trie = self._problems[problem]
        free = self._free[trie.shard]
        for other in list(self._problems):
            if len(free) >= len(tokens):
                break
            if other not in keep and other != problem and self._problems[other].shard == trie.shard:
                self.forget(other)
        if len(free) < len(tokens):
            raise CacheFull(f"{len(tokens)} more tokens do not fit into {self._capacity} cache entries")
        entries, entry = [], known[-1] if known else -1
        for token in tokens:
            new = free.pop()
            trie.following[entry, token] = new
            entries.append(new)
            entry = new
        return entries

    def forget(self, problem: str) -> None:
        """Frees the entries of a problem, which stays in its pool."""
        trie = self._problems[problem]
        self._free[trie.shard] += trie.following.values()
        trie.following.clear()

    def release(self, problem: str) -> None:
        """Forgets a problem and its pool, if it is known."""
        if problem in self._problems:
            self.forget(problem)
            del self._problems[problem]
