"""Process reward models for multimodal mathematics, in JAX.

What is public is here, and imported when it is first asked for: ``import mmprm_jax`` alone is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # type checkers do not run __getattr__
    from mmprm_jax.annotation import annotate as annotate
    from mmprm_jax.answers.workers import Verifier as Verifier
    from mmprm_jax.errors import UserError as UserError
    from mmprm_jax.evaluation.aggregate import AGGREGATORS as AGGREGATORS
    from mmprm_jax.evaluation.calibration import calibrate as calibrate
    from mmprm_jax.finished_run import open_run as open_run
    from mmprm_jax.metrics import read_metrics as read_metrics
    from mmprm_jax.policy import Policy as Policy
    from mmprm_jax.prm import PRM as PRM
    from mmprm_jax.prm import best_of_n as best_of_n
    from mmprm_jax.records import Problem as Problem
    from mmprm_jax.records import open_problems as open_problems
    from mmprm_jax.search.replay import replay as replay
    from mmprm_jax.sharding import make_mesh as make_mesh
    from mmprm_jax.stages.train_prm import train_prm as train_prm

    __version__: str

_MODULES = {
    "AGGREGATORS": "evaluation.aggregate",
    "PRM": "prm",
    "Policy": "policy",
    "Problem": "records",
    "UserError": "errors",
    "Verifier": "answers.workers",
    "annotate": "annotation",
    "best_of_n": "prm",
    "calibrate": "evaluation.calibration",
    "make_mesh": "sharding",
    "open_problems": "records",
    "open_run": "finished_run",
    "read_metrics": "metrics",
    "replay": "search.replay",
    "train_prm": "stages.train_prm",
}
__all__ = [*_MODULES, "__version__"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        return metadata.version("mmprm_jax")
    if name not in _MODULES:
        raise AttributeError(f"module 'mmprm_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"mmprm_jax.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
