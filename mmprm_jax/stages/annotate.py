"""The stage ``annotate``: a search tree for every training problem."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from etils import epath

from mmprm_jax import annotation
from mmprm_jax.policy import Policy
from mmprm_jax.processes import is_first
from mmprm_jax.records import Problem
from mmprm_jax.rollout.remote import RemoteSampler
from mmprm_jax.rollout.rollouts import LocalSampler, Verify
from mmprm_jax.rollout.sampling import Sampling
from mmprm_jax.schema import from_config
from mmprm_jax.search.settings import Settings
from mmprm_jax.settings import Annotate


def annotate(
    config: Annotate, problems: Sequence[Problem], images: epath.Path, folder: epath.Path,
    policy: Callable[[], Policy], mesh: Any, seed: int, max_tiles: int,
) -> dict[str, Any]:  # fmt: skip
    """Grows the trees of all problems into ``folder``. Returns the stage's figures.

    images: the folder that the problems' images are relative to. policy: loads it onto ``mesh``, unless servers have
    it. mesh: of all processes in lockstep, else of this process. max_tiles: of an image, which servers are told.
    """

    def make(verify: Verify) -> LocalSampler:
        return policy().sampler(config, images, config.num_rollouts, seed, "annotate", verify)

    source: contextlib.AbstractContextManager[LocalSampler | RemoteSampler]
    if config.servers:
        tiles = max_tiles if any(problem.images for problem in problems) else 0
        source = annotation.remote(config, images, seed, from_config(Sampling, config, stop=()), tiles)
    else:
        source = annotation.local(make, config)
    together = is_together(config)
    share = (0, 1) if together else (jax.process_index(), jax.process_count())
    with jax.set_mesh(mesh), source as sampler:
        failed = annotation.run(
            folder, problems, sampler, from_config(Settings, config), config, worker=share[0], workers=share[1],
            writes=not together or is_first(),
        )  # fmt: skip
    return annotation.finish(folder, problems, failed, config.skip_failed, sampler.reader)


def is_together(config: Annotate) -> bool:
    """Whether all processes do the same with one engine."""
    return config.lockstep or jax.process_count() == 1
