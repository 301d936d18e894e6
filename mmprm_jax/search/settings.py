"""The constants of a search, and what a search that is a coroutine says and hears."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator

from mmprm_jax import settings
from mmprm_jax.records import Request, Rollout, Tree
from mmprm_jax.schema import check


@dataclasses.dataclass(frozen=True)
class Settings(settings.Search):
    """Constants of a search. Raises ValueError for values with which no search can work."""

    def __post_init__(self) -> None:
        check(self)


Steps = tuple[str, ...]
Answers = list[tuple[Rollout, ...]]  # in the order of the requests
Search = Generator[list[Request], Answers, Tree]
