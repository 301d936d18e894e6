"""The constants of a search, and what a search that is a coroutine says and hears."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator

from mmprm_jax.records import Request, Rollout, Tree


@dataclasses.dataclass(frozen=True)
class Settings:
    """Constants of the search. Raises ValueError for values with which no search can work."""

    num_rollouts: int = 16  # per estimated prefix
    max_searches: int = 200  # binary searches per tree
    rollout_budget: int = 1000  # no search starts once this many are used; the one under way is finished
    c_puct: float = 0.125
    alpha: float = 0.5
    beta: float = 0.9
    length_scale: float = 500.0  # L, in sampled tokens; in words in mode paper
    right_solutions: int = 0  # of how many right solutions per tree every prefix is estimated, after the searches
    flat_solutions: int = 4  # mode flat: solutions per problem whose every prefix is estimated; there are no searches

    def __post_init__(self) -> None:
        if self.num_rollouts < 2:
            raise ValueError(f"num_rollouts is {self.num_rollouts}; a value between 0 and 1 needs at least 2 rollouts")
        if not (self.alpha > 0 and self.beta > 0 and self.length_scale > 0):
            raise ValueError("alpha, beta and length_scale must be positive")
        if self.flat_solutions < 1:
            raise ValueError(f"flat_solutions is {self.flat_solutions}; it must be at least 1")


Steps = tuple[str, ...]
Answers = list[tuple[Rollout, ...]]  # in the order of the requests
Search = Generator[list[Request], Answers, Tree]
