"""Commands that compare: Best-of-N, step detection, verdicts, sweeps, guided search, benchmarks, several runs."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mmprm_jax.cli.command import (
    CONFIG,
    DISTRIBUTED,
    EVALUATE,
    JSON,
    SEARCH,
    TRAIN,
    WORKDIR,
    argument,
    at_least,
    checking_usage,
    command,
    number,
    option,
    repeated,
)
from mmprm_jax.cli.stages import open_run
from mmprm_jax.errors import UsageError, UserError, nearest


def _finish(figures: Mapping[str, Any], text: str, json: str | None, bad: Sequence[str]) -> None:
    print(text)
    if json:
        from mmprm_jax import io

        io.write_json(json, figures)
    if bad:
        for line in bad[:20]:
            print(f"mmprm: {line}", file=sys.stderr)
        more = f" ({len(bad) - 20} more are not shown)" if len(bad) > 20 else ""
        raise UserError(f"{len(bad)} bad rows were left out{more}; the figures are those of the others")


@command(
    "summary",
    EVALUATE,
    "compares finished runs, e.g. of several seeds",
    argument("workdirs", "folders of finished runs", nargs="+", metavar="WORKDIR"),
    example="mmprm summary runs/seed0 runs/seed1 runs/seed2",
)
def summary(args: argparse.Namespace) -> None:
    from mmprm_jax.report.summary import summarise

    print(summarise(args.workdirs))


# ------------------------------------------------------------------------------------------------- bon


@command(
    "bon",
    EVALUATE,
    "Best-of-N from stored candidates and scores",
    argument("file", "scored candidates, rows with labels and prm_scores, search-and-learn's, or mmprm score's"),
    option("--labels", "for the latter: the file that was scored, with labels or the answer, joined by id",
           default=None, unset="in the file", metavar="FILE"),
    option("--dev", "held-out candidates to choose the aggregator on", default=None, unset="none", metavar="FILE"),
    option("--problems", "JSONL rows with id, the category of each problem and, if any, its grading", default=None,
           unset="none", metavar="FILE"),
    option("--category", "the category's key in --problems", default="source", metavar="KEY"),
    option("--mode", "paper: as the original does", default="default", choices=("default", "paper")),
    option("--output", "write the candidates: .jsonl ours, .json as the original", default=None, unset="none",
           metavar="FILE"),
    JSON,
    example="mmprm bon candidates.jsonl --dev=dev.jsonl --json=figures.json",
)  # fmt: skip
def bon(args: argparse.Namespace) -> None:
    if args.mode == "paper" and (args.dev or args.problems):
        raise UsageError("--mode=paper knows neither --dev nor --problems: it has every aggregator, over all problems")

    from etils import epath

    from mmprm_jax.evaluation import best_of_n, paper, statistics, stored
    from mmprm_jax.evaluation.figures import selectors
    from mmprm_jax.report.report import format_table

    found = stored.read(args.file, args.labels)
    if args.output:
        if epath.Path(args.output).resolve() == epath.Path(args.file).resolve():
            raise UserError(f"{args.file}: would be replaced by the output; choose another --output")
        stored.write(args.output, found)
    if args.mode == "paper":
        figures = paper.evaluate(found.problems)
        _finish(figures, paper.format_table(figures) + _lines(found.unjudged), args.json, found.bad)
        return
    problems, bad = list(found.problems.values()), list(found.bad)
    categories, gradings = _categories_and_gradings(args.problems, args.category) if args.problems else ({}, {})
    n = max(map(len, problems), default=0) or 1
    figures, each = selectors(problems, n, without=found.without, key=best_of_n.equivalent(problems, gradings))
    if args.dev:
        held_out = stored.read(args.dev, args.labels)
        bad += held_out.bad
        both = set(held_out.problems) & set(found.problems)
        if both:
            raise UserError(f"{args.dev}: {len(both)} problems are in {args.file} too, e.g. {sorted(both)[0]}")
        selected = best_of_n.select_aggregator(list(held_out.problems.values()), n)
        figures["prm_selected"] = selected
        others = {k: each[k] for k in ("random", "majority", "policy_logprob") if k in each}
        figures["paired"] = {k: statistics.paired(each["prm"][selected], v) for k, v in others.items()}
    if args.problems:
        missing = [name for name in found.problems if name not in categories]
        if missing:
            raise UserError(f"{args.problems}: {len(missing)} problems of {args.file} are missing, e.g. {missing[0]}")
        figures["by_category"] = best_of_n.by_group(each, [categories[name] for name in found.problems])
    if found.without:
        figures["left_out"] = found.without
    _finish(figures, format_table(figures) + _groups(figures) + _left_out(found), args.json, bad)


def _categories_and_gradings(path: str, key: str) -> tuple[dict[str, str], dict[str, Any]]:
    """The category and the grading of each problem, by id."""
    from mmprm_jax.evaluation.stored import iter_rows
    from mmprm_jax.records import grading_of

    categories, gradings = {}, {}
    for where, row in iter_rows(path):
        if not isinstance(row, dict) or "id" not in row or key not in row:
            raise UserError(f"{path}, {where}: expected an object with id and {key}")
        name = str(row["id"])
        categories[name] = str(row[key])
        try:
            gradings[name] = grading_of(row.get("grading") or {})
        except ValueError as error:
            raise UserError(f"{path}, {where}: {error}") from None
    return categories, gradings


def _left_out(found: Any) -> str:
    from mmprm_jax.evaluation.stored import NEEDS

    lines = ((name, "not every" if found.field_counts[NEEDS[name]] else "no", NEEDS[name]) for name in found.without)
    left_out = "".join(f"\nleft out: {name} ({which} candidate has {need})" for name, which, need in lines)
    return left_out + _lines(found.unjudged)


def _lines(texts: Sequence[str]) -> str:
    return "".join(f"\n{text}" for text in texts)


def _groups(figures: Mapping[str, Any]) -> str:
    """The accuracies of each group at the largest N; of the PRM's those of the chosen aggregator, or of the mean."""
    lines = []
    for key in ("by_category", "by_length"):
        for name, row in figures.get(key, {}).items():
            selected = figures.get("prm_selected")
            shown = [k for k in row if "." not in k or k.endswith(f".{selected}" if selected else ".mean")]
            cells = ", ".join(f"{k} {100 * row[k]['accuracy']:.1f}" for k in shown if k != "n_problems")
            lines.append(f"{key} {name} ({row['n_problems']} problems): {cells}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------- detect


def _share(text: str) -> float:
    """A number between 0 and 1."""
    value = number(0, 1)(text)
    if value in (0, 1):
        raise argparse.ArgumentTypeError("expected a number between 0 and 1")
    return value


@command(
    "detect",
    EVALUATE,
    "finds wrong steps: F1 of ProcessBench and VisualProcessBench, calibration",
    argument("file", "JSONL rows: id, source, scores, and label | labels | k and n"),
    option("--labels", "rows with all but the scores, joined by id", default=None, unset="in the file", metavar="FILE"),
    option("--dev", "held-out rows to choose the threshold on", default=None, unset="a share of the rows",
           metavar="FILE"),
    option("--threshold", "a given one; nothing is held out", default=None, unset="chosen on held-out rows",
           type=number(0, 1)),
    option("--dev-share", "without --dev: share of the rows held out", default=0.2, type=_share),
    option("--seed", "of that share", default=0, type=int),
    JSON,
    example="mmprm detect scores.jsonl --labels=bench/vpb/test.jsonl",
)  # fmt: skip
def detect(args: argparse.Namespace) -> None:
    if args.dev and args.threshold is not None:
        raise UsageError("--threshold and --dev: give one of them")

    from mmprm_jax.evaluation import detection

    rows, bad = detection.read(args.file, args.labels)
    dev = None
    if args.dev:
        dev, more = detection.read(args.dev)
        bad += more
    figures = detection.evaluate(rows, dev, args.threshold, args.dev_share, args.seed)
    _finish(figures, _describe_detection(figures), args.json, bad)


def _describe_detection(figures: dict[str, Any]) -> str:
    lines = []
    titles = {"process_bench": "ProcessBench F1", "visual_process_bench": "VisualProcessBench macro-F1"}
    for key, title in titles.items():
        if key not in figures:
            continue
        found = figures[key]
        how = "given" if found["threshold_given"] else f"chosen on {found['held_out_rows']} other rows"
        mean = "mean of the sources" + (", by steps" if key == "visual_process_bench" else "")
        lines.append(f"{title}, {found['rows']} rows, threshold {found['threshold']:.4f} ({how})")
        lines += [f"  {'pooled':<30}{_f1(found['pooled'])}", f"  {mean:<30}{_f1(found['mean_of_sources'])}"]
        lines += [f"  {name or '(no source)':<30}{_f1(x)}  {x['rows']} rows" for name, x in found["sources"].items()]
    if found := figures.get("calibration"):
        lines += [
            f"Calibration, {found['steps']} steps, {found['rollouts']} rollouts",
            f"  ECE {found['ece']:.4f} (a perfect PRM: {found['ece_perfect']:.4f})",
            f"  Brier {found['brier']:.4f} (a perfect PRM: {found['brier_perfect']:.4f}),"
            f" squared error without the noise of k/n {found['squared_error']:.4f}",
        ]
    return "\n".join(lines)


def _f1(x: dict[str, Any]) -> str:
    if math.isnan(x["f1"]):
        return "undefined"
    low, high = (100 * v for v in x["ci95"])
    return f"{100 * x['f1']:5.1f} [{low:.1f}, {high:.1f}]"


# ------------------------------------------------------------------------------------------------- verify


@command(
    "verify",
    EVALUATE,
    "says of each pair of gold answer and prediction whether they are equal, and why",
    argument("file", "rows with gold, prediction and, if known, options, unit, precision, question",
             metavar="PAIRS.jsonl"),
    option("--mode", "a benchmark's official rules instead of our own", default="default"),
    option("--jobs", "processes", default=0, unset="one for each CPU, at most 8", type=at_least(0), metavar="N"),
    option("--output", "the file to write", default=None, unset="stdout", metavar="FILE"),
    option("--judge", "an OpenAI-compatible server to ask about the unknown pairs", default=None, unset="none",
           metavar="URL"),
    option("--judge-model", "the name of the judge's model", default=None, unset="none", metavar="NAME"),
    example="mmprm verify pairs.jsonl --output=verdicts.jsonl",
)  # fmt: skip
def verify(args: argparse.Namespace) -> int:
    """Exit code 1 when a row was bad."""
    if bool(args.judge) != bool(args.judge_model):
        raise UsageError("a judge needs both --judge=http://host:8000/v1 and --judge-model=NAME")

    from mmprm_jax.answers import audit
    from mmprm_jax.servers import check_reachable

    with checking_usage():
        audit.find_mode(args.mode)
    check_reachable([args.judge] if args.judge else [])
    with contextlib.ExitStack() as stack:
        judge = stack.enter_context(audit.Judge(args.judge, args.judge_model)) if args.judge else None
        said, good = audit.verify_file(args.file, args.output, args.mode, args.jobs, judge)
    print(said, file=sys.stderr)
    return 0 if good else 1


# ------------------------------------------------------------------------------------------------- sweep


@command(
    "sweep",
    TRAIN,
    "trains and compares PRMs over a grid of settings, on one annotated set",
    CONFIG,
    WORKDIR,
    repeated("--grid", "seed or a train_prm setting and its values", metavar="KEY=V1,V2,…"),
    example="mmprm sweep --config=configs/digits.py --workdir=runs/digits --grid=train_prm.label=soft,hard",
    resumes=True,
)
def sweep(args: argparse.Namespace) -> None:
    if not args.grid:
        raise UsageError("sweep: --grid is missing, e.g. --grid=train_prm.label=soft,hard")

    from mmprm_jax import config as configs
    from mmprm_jax.stages import sweep

    with checking_usage():
        grid = sweep.parse(args.grid)
        cells = sweep.cells(grid)
    # every cell's settings are read before anything is trained
    settings = [(cell, configs.load(args.config, [*args.overrides, *cell.overrides])) for cell in cells]
    print(sweep.run(open_run(args), settings, grid))


# ------------------------------------------------------------------------------------------------- guide


@command(
    "guide",
    SEARCH,
    "searches guided by the PRM on the test problems of a finished run, against Best-of-N",
    CONFIG,
    WORKDIR,
    option("--search", "which ones", default="beam,dvts,lookahead", metavar="NAME,…"),
    JSON,
    example="mmprm guide --config=configs/digits.py --workdir=runs/digits --search=dvts",
    resumes=True,
)
def guide(args: argparse.Namespace) -> None:
    from mmprm_jax.evaluation import guided
    from mmprm_jax.stages import guide

    names = args.search.split(",")
    for name in names:
        if name not in guided.METHODS:
            raise UsageError(f"--search: {name!r} is no such search{nearest(name, guided.METHODS)}")
    figures = guide.run(open_run(args), names)
    _finish(figures, guided.format_table(figures), args.json, ())


# ------------------------------------------------------------------------------------------------- benchmark


@command(
    "benchmark",
    EVALUATE,
    "takes the policy and the PRM of a finished run to a benchmark, officially scored",
    argument("file", "problems as mmprm prepare writes them, their images beside them", metavar="PROBLEMS.jsonl"),
    CONFIG,
    WORKDIR,
    DISTRIBUTED,
    option("--scoring", "an official mode, or verifier", default="", unset="by row", metavar="NAME"),
    JSON,
    example="mmprm benchmark bench/mathvista/testmini.jsonl --config=configs/mm_prm.py --workdir=runs/mine",
    resumes=True,
)
def benchmark(args: argparse.Namespace) -> None:
    from mmprm_jax.answers.official import MODES

    allowed = ("", "verifier", *MODES)
    if args.scoring not in allowed:
        raise UsageError(
            f"--scoring: {args.scoring!r} is no such scoring{nearest(args.scoring, filter(None, allowed))}"
        )
    run = open_run(args)

    from mmprm_jax import processes
    from mmprm_jax.report.report import format_table
    from mmprm_jax.stages import benchmark

    figures = benchmark.run(run, args.file, args.scoring)
    if not processes.is_first():
        return
    said = "".join(f", {count} {kind}" for kind, count in sorted(figures.get("scoring", {}).items()))
    official = f"official verdicts{said}\n" if said else ""
    _finish(figures, format_table(figures) + _groups(figures) + official, args.json, ())
