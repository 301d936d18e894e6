"""Trees in flight: which requests of which tree are open, and which trees have all their answers.

``Flight`` is what ``omegaprm.grow`` drives: start trees while there is room, send what ``requests`` returns
to a sampler, ``answer`` in any order, call ``requests`` again. Implementations: ``omegaprm.Forest`` (array trees) and
``Coroutines``.
"""

from __future__ import annotations

from collections.abc import Callable

from mmprm_jax.records import Failure, Problem, Request, Rollout, Tree
from mmprm_jax.search.settings import Search, Settings

Answered = dict[Request, tuple[Rollout, ...]]  # all requests that a tree made at once, in their order


class Flight:
    """Up to ``capacity`` trees, each waiting for the answers to the requests it made last."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}; at least one tree must be in flight")
        self.capacity = capacity
        self._pending: dict[int, Answered] = {}  # by tree; (): not yet answered
        self._ready: dict[int, Answered] = {}  # trees that have all their answers
        self._new_requests: list[tuple[int, Request]] = []  # not yet returned, nor the trees below
        self._finished: list[tuple[int, Tree | Failure]] = []

    @property
    def room(self) -> int:
        """How many more trees may be started."""
        return self.capacity - len(self._pending) - len(self._ready)

    def start(self, index: int, problem: Problem) -> None:
        """Begins the tree of a problem; ``index`` names it from now on."""
        raise NotImplementedError

    def requests(self) -> list[tuple[int, Request]]:
        """The new requests since the last call. All trees that have their answers advance together."""
        if self._ready:
            ready, self._ready = self._ready, {}
            self._advance(ready)
        requests, self._new_requests = self._new_requests, []
        return requests

    def answer(self, index: int, request: Request, rollouts: tuple[Rollout, ...]) -> None:
        """Takes the answer to one request of a tree. Raises ValueError if it does not fit the request."""
        if len(rollouts) != request.n:
            raise ValueError(f"problem {request.problem.id}: {request.n} rollouts were requested, {len(rollouts)} came")
        pending = self._pending.get(index, {})
        if pending.get(request) != ():
            raise ValueError(f"problem {request.problem.id}: an answer to no open request, {request}")
        pending[request] = tuple(rollouts)
        if all(pending.values()):
            self._ready[index] = self._pending.pop(index)

    def finished(self) -> list[tuple[int, Tree | Failure]]:
        """The trees that ended since the last call; a Failure is one that does not fit into its arrays."""
        finished, self._finished = self._finished, []
        return finished

    def drop(self, index: int) -> None:
        """Forgets a tree in flight: one of its requests failed."""
        self._pending.pop(index, None)
        self._ready.pop(index, None)
        self._new_requests = [(i, request) for i, request in self._new_requests if i != index]

    def _advance(self, ready: dict[int, Answered]) -> None:
        """Takes the answers of some trees; each of them asks again or ends."""
        raise NotImplementedError

    def _request(self, index: int, requests: list[Request]) -> None:
        """Notes the next requests of a tree: at least one, all distinct."""
        self._pending[index] = dict.fromkeys(requests, ())
        self._new_requests += [(index, request) for request in requests]


class Coroutines(Flight):
    """A coroutine per problem: it yields lists of requests, is sent their answers in this order, returns the tree."""

    def __init__(self, search: Callable[[Problem, Settings], Search], settings: Settings, capacity: int) -> None:
        super().__init__(capacity)
        self._search, self._settings = search, settings
        self._searches: dict[int, Search] = {}

    def start(self, index: int, problem: Problem) -> None:
        self._searches[index] = self._search(problem, self._settings)
        self._request(index, next(self._searches[index]))

    def drop(self, index: int) -> None:
        super().drop(index)
        del self._searches[index]

    def _advance(self, ready: dict[int, Answered]) -> None:
        for index, answered in ready.items():
            try:
                self._request(index, self._searches[index].send(list(answered.values())))
            except StopIteration as stop:
                del self._searches[index]
                self._finished.append((index, stop.value))
