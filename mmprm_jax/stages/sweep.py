"""``mmprm sweep``: PRMs over a grid of settings, compared on one annotated set and one set of candidates.

    mmprm sweep --config=FILE --workdir=DIR --grid=train_prm.label=soft,hard,beta_binomial --grid=seed=0,1
        --grid=train_prm.optimizer.learning_rate=2e-3,4e-3 --grid=train_prm.max_paths=4,16

``DIR`` is a run whose annotation has finished; its policy, trees and candidates serve every cell and are made once. A
cell trains and scores in ``DIR/sweep/<settings>``, a work directory of its own, so that a sweep that was killed goes on
where it was. ``seed`` is that of the training and of the choice of paths; the problems, trees and candidates stay. The
tables are ``DIR/sweep/table.md`` and ``table.json``: every cell, and for each setting of the grid (and for N) its
values, averaged over all other settings, with the paired difference to the first one.

Two accuracies are given: with the aggregator chosen on dev, cell by cell, and with the mean of the step scores.
Intervals: 95 %, bootstrap; problems are resampled, and the seeds too where there are several (two or three of them tell
little of the spread between trainings: with one, an interval says nothing of it at all).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from mmprm_jax import config as configs
from mmprm_jax import io, manifest, records, stages
from mmprm_jax.evaluation import best_of_n, statistics
from mmprm_jax.manifest import Depth
from mmprm_jax.processes import check_on_first
from mmprm_jax.records import ScoredCandidate, UserError
from mmprm_jax.settings import Config
from mmprm_jax.stages import evaluate
from mmprm_jax.stages.run import Run

SEED = "seed"
N = "N"  # candidates per problem: the paper's path diversity; every cell has all of them
TITLES = {
    "train_prm.label": "Soft or hard labels",
    "train_prm.optimizer.learning_rate": "Learning rate",
    "train_prm.max_paths": "Paths per problem in training",
    N: "Path diversity: candidates per problem",
}
Grid = dict[str, list[str]]  # setting -> values as texts, in the order given


def parse(items: Sequence[str]) -> Grid:
    """``KEY=V1,V2`` texts. Raises UserError."""
    grid: Grid = {}
    for item in items:
        key, equals, text = item.partition("=")
        values = text.split(",")
        if not equals or not all(values):
            raise UserError(f"--grid={item}: write --grid=KEY=V1,V2, e.g. --grid=train_prm.label=soft,hard")
        if key != SEED and not key.startswith("train_prm."):
            raise UserError(f"--grid={item}: only seed and the settings of train_prm can vary in a sweep")
        if key in grid or len(set(values)) < len(values):
            raise UserError(f"--grid={item}: {'given twice' if key in grid else 'a value is there twice'}")
        grid[key] = values
    if not grid:
        raise UserError("--grid is missing, e.g. --grid=train_prm.label=soft,hard")
    return grid


@dataclasses.dataclass(frozen=True)
class Cell:
    """One combination of the grid's values."""

    values: dict[str, str]

    @property
    def name(self) -> str:
        """Its folder's name: the last part of each key and the value."""
        return ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in self.values.items())

    @property
    def overrides(self) -> list[str]:
        return [f"--config.{key}={value}" for key, value in self.values.items()]


def cells(grid: Grid) -> list[Cell]:
    """All combinations; the last setting varies fastest. Raises UserError where two would share a folder."""
    found = [Cell(dict(zip(grid, values, strict=True))) for values in itertools.product(*grid.values())]
    names = [cell.name for cell in found]
    bad = next((n for n in names if names.count(n) > 1 or any(c in n for c in "/\\\0") or len(n) > 200), None)
    if bad:
        raise UserError(f"--grid: {bad!r} cannot name the folder of one cell")
    return found


def cell_run(base: Run, config: Config, workdir: epath.Path) -> Run:
    """A cell's stages: training and scores are its own, everything else is the run's that it belongs to."""
    own = {stage: workdir / stage for stage in ("train_prm", "evaluate")}
    return Run(config, workdir, configs.to_text(config), base, own)


def _evaluation(base: Run, run: Run) -> evaluate.Inputs:
    """Of a cell: its PRM on what the run's policy sampled, without controls."""
    return dataclasses.replace(evaluate.make_inputs(run), sampled=base.folder("evaluate"), controls=False)


def run(base: Run, settings: Sequence[tuple[Cell, Config]], grid: Grid) -> str:
    """Trains and evaluates the cells that are missing, writes the tables and returns the Markdown.

    Raises UserError if the annotation has not finished and a cell needs its trees, or a cell's folder belongs to other
    settings; Interrupted.
    """
    if base.figures("annotate") is None and any(config.train_prm.trees for _, config in settings):
        raise UserError(f"{base.workdir}: its annotation has not finished; run `mmprm annotate` there first")
    check_on_first(lambda: manifest.check(base, ["data", "sft", "annotate"], Depth.ALL))
    folder = base.workdir / "sweep"
    runs = [cell_run(base, config, configs.guard_workdir(folder / cell.name, config)) for cell, config in settings]
    base.folder("evaluate").mkdir(parents=True, exist_ok=True)
    evaluate.sample(_evaluation(base, base))
    for number, ((cell, _), own) in enumerate(zip(settings, runs, strict=True), 1):
        print(f"cell {number} of {len(runs)}: {cell.name}", flush=True)
        stages.run_stage(own, "train_prm")
        stages.run_stage(own, "evaluate", lambda run: evaluate.evaluate(_evaluation(base, run)))
    results = [_result(cell, own) for (cell, _), own in zip(settings, runs, strict=True)]
    found = tables(grid, results)
    text = to_markdown(found)
    io.write_json(folder / "table.json", found)
    io.write(folder / "table.md", text)
    return f"{text}\n{folder / 'table.md'}"


# ------------------------------------------------------------------------------------------------- tables


@dataclasses.dataclass(frozen=True)
class Result:
    """Accuracies of a cell, float64 [P] in [0, 1], by N."""

    cell: Cell
    selected: str  # the aggregator chosen on dev
    chosen: Mapping[int, np.ndarray]  # of that aggregator
    mean: Mapping[int, np.ndarray]  # of the mean of the step scores
    majority: Mapping[int, np.ndarray]
    random: np.ndarray


def _result(cell: Cell, run: Run) -> Result:
    manifest.check(run, ["train_prm", "evaluate"], Depth.RECORDS)
    gradings = {p.id: p.grading for p in run.problems("test")}
    groups: dict[str, list[ScoredCandidate]] = {name: [] for name in gradings}
    for x in records.read(run.folder("evaluate") / "test_scored.jsonl", ScoredCandidate):
        groups[x.candidate.problem_id].append(x)
    problems, selected = list(groups.values()), run.finished("evaluate")["prm_selected"]
    key = best_of_n.equivalent(problems, gradings)
    each = {n: best_of_n.per_problem(problems, n, key) for n in best_of_n.sizes(problems)}
    return Result(
        cell, selected,
        chosen={n: x["prm"][selected] for n, x in each.items()},
        mean={n: x["prm"]["mean"] for n, x in each.items()},
        majority={n: x["majority"] for n, x in each.items()},
        random=next(iter(each.values()))["random"],
    )  # fmt: skip


def interval(values: np.ndarray, accuracy: bool = True) -> dict[str, Any]:
    """Mean of [seeds, P] values and its bootstrap interval: problems are resampled, and seeds if there are several."""
    seeds, problems = values.shape
    if accuracy and (np.all(values == 0) or statistics.all_right(values)):
        return {"value": float(values.mean()), "ci95": statistics.interval(values[0])}
    resampled = statistics.resampled_sums(values.T) / problems  # [resamples, seeds]
    if seeds == 1:
        resampled = resampled[:, 0]
    else:
        resampled = (resampled * statistics.draws(seeds, seed=1)[: len(resampled)]).sum(1) / seeds
    return {"value": float(values.mean()), "ci95": statistics.quantiles(resampled)}


def _by_seed(results: Sequence[Result], what: str, n: int) -> np.ndarray:
    """[seeds, P]: the mean over the results of each seed."""
    seeds = dict.fromkeys(r.cell.values.get(SEED, "") for r in results)
    same = [[getattr(r, what)[n] for r in results if r.cell.values.get(SEED, "") == seed] for seed in seeds]
    return np.array([np.mean(group, axis=0) for group in same])


def tables(grid: Grid, results: Sequence[Result]) -> dict[str, Any]:
    """{"n", "problems", "baselines", "cells", "settings": {key: [level, …]}}; accuracies as {"value", "ci95"}.

    A level has its value, chosen and mean (accuracies), and the differences of both to the first level.
    """
    sizes = list(results[0].chosen)
    top = sizes[-1]
    cells_table = [
        {"settings": r.cell.values, "selected": r.selected}
        | {what: interval(getattr(r, what)[top][None]) for what in ("chosen", "mean")}
        | {"by_n": {str(n): interval(r.chosen[n][None]) for n in sizes}}
        for r in results
    ]
    found: dict[str, Any] = {}
    for key, values in [*grid.items(), (N, [str(n) for n in sizes])]:
        if key == SEED or len(values) < 2:
            continue
        levels = []
        for value in values:
            chosen = results if key == N else [r for r in results if r.cell.values[key] == value]
            at = int(value) if key == N else top
            levels.append({what: _by_seed(chosen, what, at) for what in ("chosen", "mean")})
        found[key] = [
            {"value": value}
            | {what: interval(level[what]) for what in level}
            | {f"{what}_difference": interval(level[what] - levels[0][what], accuracy=False) for what in level}
            for value, level in zip(values, levels, strict=True)
        ]
    baselines = {"random": interval(results[0].random[None]), "majority": interval(results[0].majority[top][None])}
    return {
        "n": top,
        "problems": len(results[0].random),
        "baselines": baselines,
        "cells": cells_table,
        "settings": found,
    }


def to_markdown(found: Mapping[str, Any]) -> str:
    """The tables for people, accuracies in %."""

    def cell(x: Mapping[str, Any], sign: str = "") -> str:
        low, high = (100 * v for v in x["ci95"])
        return f"{100 * x['value']:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"

    base = ", ".join(f"{name} {cell(x)}" for name, x in found["baselines"].items())
    lines = [
        f"Best of {found['n']} on {found['problems']} problems, % with 95 % intervals; {base}.",
        "",
        "| cell | aggregator (dev) | accuracy | mean of the steps |",
        "|---|---|---:|---:|",
    ]
    for row in found["cells"]:
        name = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in row["settings"].items())
        lines.append(f"| {name} | {row['selected']} | {cell(row['chosen'])} | {cell(row['mean'])} |")
    for key, levels in found["settings"].items():
        first = levels[0]["value"]
        lines += [
            "",
            f"**{TITLES.get(key, key)}** (`{key}`), averaged over everything else",
            "",
            f"| {key} | accuracy | minus {first} | mean of the steps | minus {first} |",
            "|---|---:|---:|---:|---:|",
        ]
        for i, level in enumerate(levels):
            chosen, mean = (cell(level[f"{x}_difference"], "+") if i else "" for x in ("chosen", "mean"))
            lines.append(f"| {level['value']} | {cell(level['chosen'])} | {chosen} | {cell(level['mean'])} | {mean} |")
    return "\n".join(lines) + "\n"
