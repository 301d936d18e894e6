"""Process reward models for multimodal mathematics, in JAX.

What is public is here, and imported when it is first asked for: ``import mmprm_jax`` alone is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # type checkers do not run __getattr__
    from mmprm_jax.annotation import annotate as annotate
    from mmprm_jax.answers.workers import Verifier as Verifier
    from mmprm_jax.finished_run import open_run as open_run
    from mmprm_jax.policy import Policy as Policy
    from mmprm_jax.prm import PRM as PRM
    from mmprm_jax.prm import best_of_n as best_of_n
    from mmprm_jax.stages.train_prm import train_prm as train_prm

    __version__: str

_MODULES = {
    "PRM": "prm",
    "Policy": "policy",
    "Verifier": "answers.workers",
    "annotate": "annotation",
    "best_of_n": "prm",
    "open_run": "finished_run",
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
