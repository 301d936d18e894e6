"""``mmprm pipeline`` and its stages, and how every command opens a run."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from mmprm_jax.cli.command import (
    CONFIG,
    DATA,
    DISTRIBUTED,
    EVALUATE,
    PIPELINE,
    SEARCH,
    TRAIN,
    WORKDIR,
    Option,
    command,
    option,
)

if TYPE_CHECKING:
    from mmprm_jax.stages import Run

# In the order in which they run: group, summary.
STAGES = {
    "data": (DATA, "stage 1: makes the embedded problem set, or checks a folder with your own"),
    "sft": (TRAIN, "stage 2: trains the policy on demonstrations"),
    "annotate": (SEARCH, "stage 3: grows a search tree for every training problem"),
    "train_prm": (TRAIN, "stage 4: trains the PRM on the step labels of the trees"),
    "evaluate": (EVALUATE, "stage 5: samples and scores candidates, Best-of-N with intervals"),
    "report": (EVALUATE, "stage 6: the table and the page of results"),
}
ALONE = ("data", "report")  # stages that run in one process
_EXAMPLE = "--config=configs/digits.py --workdir=runs/digits"


def open_run(args: argparse.Namespace) -> Run:
    """The run of a configuration in its work directory, when all its processes are there. Raises UserError."""
    from mmprm_jax import config as configs

    config = configs.load(args.config, args.overrides)
    primary = True
    if getattr(args, "distributed", False):
        from mmprm_jax import processes

        primary = processes.connect()
    workdir = configs.guard_workdir(args.workdir, config, primary=primary)
    cache_compilations(os.fspath(workdir / "compilation_cache"))

    from mmprm_jax import stages

    return stages.Run(config, workdir, configs.to_text(config))


def cache_compilations(folder: str) -> None:
    """Keeps compiled programs in ``folder``, unless the user has chosen another one."""
    import jax

    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", folder)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _force_stage(meaning: str, *choices: str) -> Option:
    return option("--force-stage", meaning, default=None, unset="none", choices=choices)


@command(
    "pipeline",
    PIPELINE,
    "runs all six stages; skips what is done, goes on where it was interrupted",
    CONFIG,
    WORKDIR,
    _force_stage("the stage to make anew, with all that follows from it", *STAGES),
    DISTRIBUTED,
    example=f"mmprm pipeline {_EXAMPLE}",
    resumes=True,
)
def pipeline(args: argparse.Namespace) -> None:
    run = open_run(args)

    from mmprm_jax import stages

    if args.force_stage:
        stages.force(run, args.force_stage, "pipeline")
    stages.pipeline(run)


def _declare(name: str, group: str, summary: str) -> None:
    @command(
        name,
        group,
        summary,
        CONFIG,
        WORKDIR,
        _force_stage(f"{name}: make it anew; later stages then have to be run again, too", name),
        *(() if name in ALONE else (DISTRIBUTED,)),
        example=f"mmprm {name} {_EXAMPLE}",
        resumes=True,
    )
    def run_stage(args: argparse.Namespace) -> None:
        run = open_run(args)

        from mmprm_jax import stages

        if args.force_stage:
            stages.force(run, args.force_stage, name)
        stages.run_stage(run, name)


for _name, (_group, _summary) in STAGES.items():
    _declare(_name, _group, _summary)
