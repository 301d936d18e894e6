"""The stages of the pipeline. Each reads record files and writes record files below ``<workdir>/<stage>``.

A stage is a function of what it needs: its section of the configuration, folders, models, a mesh. ``STAGES`` says what
that is in a run, and ``run_stage`` does the bookkeeping around it: a finished stage leaves ``done.json`` (its figures)
and is skipped from then on; an interrupted one goes on where it was: training from its newest checkpoint, annotation
inside of its trees, evaluation after its last saved piece.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import logging

from mmprm_jax import environment, interruption, manifest
from mmprm_jax.manifest import Depth
from mmprm_jax.processes import check_on_first, is_first, wait_for_all
from mmprm_jax.records import UserError
from mmprm_jax.report import report as report_page
from mmprm_jax.schema import raise_for
from mmprm_jax.settings import Config, Training
from mmprm_jax.sharding import BATCH, row_share
from mmprm_jax.stages import annotate, data, evaluate, models, report, sft, train_prm, training
from mmprm_jax.stages.run import Figures, Run, process_mesh, run_mesh

TRAINING = ("sft", "train_prm")  # the stages that train


def _data(run: Run) -> Figures:
    if run.config.data.folder:
        return data.take(run.config, run.data, run.folder("data"))
    return data.generate(run.config, run.folder("data"))


def _job(run: Run, name: str) -> training.Job:
    c: Training = run.config[name]
    return training.Job(name, c, run.folder(name), run.config.max_tiles, run.config.seed, run_mesh(run.config))


def _sft(run: Run) -> Figures:
    if not run.config.sft.steps:
        if not run.config.policy:
            raise UserError("sft.steps is 0: name the policy to use as it is, --config.policy=FOLDER_OR_HUB_ID")
        return {}
    language, job = models.load_language(run), _job(run, "sft")
    return sft.sft(run.config.sft, job, run.data, language, lambda: models.policy_start(run, language, job.mesh))


def _annotate(run: Run) -> Figures:
    c = run.config.annotate
    mesh = run_mesh(run.config) if annotate.is_together(c) else process_mesh(run.config)
    return annotate.annotate(
        c, run.problems("train"), run.data, run.folder("annotate"), lambda: models.load_policy(run, c, mesh), mesh,
        run.config.seed, run.config.max_tiles,
    )  # fmt: skip


def _train_prm(run: Run) -> Figures:
    c, job = run.config.train_prm, _job(run, "train_prm")
    language = models.load_language(run).with_prm(kappa=c.needs_kappa)
    return train_prm.train(
        c, job, run.folder("annotate"), run.data, language, lambda: models.prm_start(run, language, job.mesh)
    )


def _evaluate(run: Run) -> Figures:
    return evaluate.evaluate(evaluate.make_inputs(run))


def _report(run: Run) -> Figures:
    if is_first():
        figures = {stage: run.figures(stage) for stage in manifest.reads(run, "report")}
        report.write(figures, run.folder("report"), run.folder("annotate"), run.data, run.config_text)
    return {}


STAGES: dict[str, Callable[[Run], Figures]] = {
    "data": _data,
    "sft": _sft,
    "annotate": _annotate,
    "train_prm": _train_prm,
    "evaluate": _evaluate,
    "report": _report,
}


def choose(choices: Mapping[str, Any], name: str, key: str) -> Any:
    """The choice of that name. Raises UserError naming the config key."""
    if name not in choices:
        raise UserError(f"{key}: {name!r} is not one of {', '.join(choices)}")
    return choices[name]


def check_rows(config: Config, mesh: Any, names: Sequence[str]) -> None:
    """Raises UserError when several processes cannot split the rows of a step of these training stages."""
    if row_share(mesh)[1] == 1:
        return
    parts = math.prod(mesh.shape[axis] for axis in BATCH)
    raise_for(
        (f"{name}.batch_size", f"{config[name].batch_size} rows cannot be split over {parts} devices of the mesh")
        for name in names
        if config[name].steps and config[name].batch_size % parts
    )


def run_stage(run: Run, stage: str, make: Callable[[Run], Figures] | None = None) -> None:
    """Runs one stage and writes its ``done.json``; a finished stage is left alone (the report is always made anew).

    make: what the stage does; default: that of ``STAGES``. Raises UserError when what the stage reads is no longer what
    was written.
    """
    mesh = run_mesh(run.config)
    with jax.set_mesh(mesh):
        done = stage != "report" and run.figures(stage) is not None
        wait_for_all(f"stage {stage}: begin")  # before one of them can be done with it
        if done:
            check_on_first(lambda: manifest.check(run, [stage], Depth.SIZES))
            logging.info("%s: already done", stage)
            return
        interruption.check()
        check_rows(run.config, mesh, [stage] if stage in TRAINING else [])
        before = manifest.reads(run, stage)
        unfinished = [name for name in before if run.figures(name) is None]
        if unfinished:
            raise UserError(f"{stage}: the stage {unfinished[0]} has not finished; run `mmprm {unfinished[0]}` first")
        run.folder(stage).mkdir(parents=True, exist_ok=True)
        check_on_first(lambda: manifest.begin(run, stage))
        started = time.monotonic()
        figures = (make or STAGES[stage])(run)
        if is_first():
            noted = {"seconds": round(time.monotonic() - started, 1), "environment": environment.describe()}
            manifest.finish(run, stage, figures | noted)
        wait_for_all(f"stage {stage}: end")


def force(run: Run, stage: str, command: str) -> None:
    """Moves aside what a stage made and what follows, for ``command`` to make anew. Raises UserError."""
    choose(STAGES, stage, "--force-stage")
    if command not in ("pipeline", stage):
        raise UserError(f"--force-stage={stage}: run it with `mmprm {stage}` or `mmprm pipeline`")
    if is_first():
        manifest.force(run, stage)
    wait_for_all("forced")


def pipeline(run: Run) -> None:
    """All stages that are needed, and the table of results."""
    check_rows(run.config, run_mesh(run.config), TRAINING)
    for stage in STAGES:
        if stage in ("report", *manifest.reads(run, "report")):
            run_stage(run, stage)
    if not is_first():
        return
    print(report_page.format_table(json.loads((run.folder("report") / "metrics.json").read_text())))
    print(f"\nreport: {run.folder('report') / 'index.html'}")
