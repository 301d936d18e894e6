"""Samplers without a model, which answer in various orders."""

import numpy as np


class FakeSampler:
    """``answer(request)`` gives the rollouts, or a Failure. ``order``: which open requests ``collect`` answers.

    all: all; one: the oldest; newest: the newest; shuffled: all, in random order; some: a random part.
    """

    def __init__(self, answer, order="all", seed=0):
        self.answer, self.order = answer, order
        self.rng = np.random.default_rng(seed)
        self.open, self.rounds, self.released = [], [], []  # rounds: the requests of each ``submit``
        self.waits = []  # how many requests were open at each ``collect``

    def submit(self, requests):
        assert requests
        self.rounds.append(list(requests))
        self.open += requests

    def collect(self):
        self.waits.append(len(self.open))
        order = {
            "all": lambda n: range(n),
            "one": lambda n: [0][:n],
            "newest": lambda n: [n - 1] if n else [],
            "shuffled": self.rng.permutation,
            "some": lambda n: self.rng.permutation(n)[: self.rng.integers(1, n + 1)] if n else [],
        }[self.order](len(self.open))
        taken = [self.open[i] for i in order]
        self.open = [request for request in self.open if request not in taken]
        return [(request, self.answer(request)) for request in taken]

    def release(self, problem_id):
        assert not any(request.problem.id == problem_id for request in self.open)
        self.released.append(problem_id)

    @property
    def requested(self):
        """All requests so far."""
        return [request for requests in self.rounds for request in requests]
