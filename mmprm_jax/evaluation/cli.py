"""``mmprm bon``, ``mmprm detect``, ``mmprm sweep``, ``mmprm guide`` and ``mmprm benchmark``: their command lines."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import logging
from etils import epath

from mmprm_jax import config as configs
from mmprm_jax import io
from mmprm_jax.records import UserError

OpenRun = Callable[..., Any]  # (config, overrides, workdir, distributed=False) -> a stages.Run


def main(argv: Sequence[str], open_run: OpenRun) -> None:
    """Runs one of these commands. Raises UserError, also (at the end) if rows were bad."""
    logging.set_verbosity(logging.WARNING)
    command, rest = argv[0], argv[1:]
    try:
        if command in ("sweep", "guide", "benchmark"):
            {"sweep": _sweep, "guide": _guide, "benchmark": _benchmark}[command](rest, open_run)
        else:
            {"bon": _bon, "detect": _detect}[command](rest)
    except OSError as error:
        raise UserError(str(error)) from None


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"mmprm {command}", description=description, allow_abbrev=False)


def _run_options(parser: argparse.ArgumentParser, state: str) -> None:
    parser.add_argument("--config", required=True, help="the configuration of the run, FILE or FILE:ARG")
    parser.add_argument("--workdir", required=True, help=f"the run: its {state} must have finished")


def _json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="a file for all figures")


def _finish(figures: dict[str, Any], text: str, json: str | None, bad: Sequence[str]) -> None:
    print(text)
    if json:
        io.write_json(json, figures)
    if bad:
        for line in bad[:20]:
            print(f"mmprm: {line}", file=sys.stderr)
        more = f" ({len(bad) - 20} more are not shown)" if len(bad) > 20 else ""
        raise UserError(f"{len(bad)} bad rows were left out{more}; the figures are those of the others")


# ------------------------------------------------------------------------------------------------- bon


def _bon(argv: Sequence[str]) -> None:
    parser = _parser("bon", "Best-of-N from stored candidates and scores (mmprm evaluate's, or the original's files).")
    parser.add_argument("file", help="ScoredCandidate rows, or rows with labels and prm_scores; JSONL or a JSON list")
    parser.add_argument("--dev", metavar="FILE", help="held-out candidates to choose the aggregator on")
    parser.add_argument("--problems", metavar="FILE", help="JSONL rows with id and the category of each problem")
    parser.add_argument("--category", default="source", metavar="KEY", help="the category's key in --problems")
    parser.add_argument("--mode", choices=["default", "paper"], default="default", help="paper: as the original does")
    parser.add_argument("--output", metavar="FILE", help="write the candidates: .jsonl ours, .json as the original")
    _json_option(parser)
    args = parser.parse_args(argv)
    if args.mode == "paper" and (args.dev or args.problems):
        raise UserError("--mode=paper knows neither --dev nor --problems: it has every aggregator, over all problems")

    from mmprm_jax.evaluation import best_of_n, paper, statistics, stored
    from mmprm_jax.evaluation.stage import selectors
    from mmprm_jax.report.report import format_table

    found = stored.read(args.file)
    if args.output:
        if epath.Path(args.output).resolve() == epath.Path(args.file).resolve():
            raise UserError(f"{args.file}: would be replaced by the output; choose another --output")
        stored.write(args.output, found)
    if args.mode == "paper":
        figures = paper.evaluate(found.problems)
        _finish(figures, paper.format_table(figures), args.json, found.bad)
        return
    problems, bad = list(found.problems.values()), list(found.bad)
    n = max(map(len, problems), default=0) or 1
    figures, each = selectors(problems, n, without=found.without, key=best_of_n.equivalent(problems))
    if args.dev:
        held_out = stored.read(args.dev)
        bad += held_out.bad
        both = set(held_out.problems) & set(found.problems)
        if both:
            raise UserError(f"{args.dev}: {len(both)} problems are in {args.file} too, e.g. {sorted(both)[0]}")
        selected = best_of_n.select_aggregator(list(held_out.problems.values()), n)
        figures["prm_selected"] = selected
        others = {k: each[k] for k in ("random", "majority", "policy_logprob") if k in each}
        figures["paired"] = {k: statistics.paired(each["prm"][selected], v) for k, v in others.items()}
    if args.problems:
        categories = _categories(args.problems, args.category)
        missing = [name for name in found.problems if name not in categories]
        if missing:
            raise UserError(f"{args.problems}: {len(missing)} problems of {args.file} are missing, e.g. {missing[0]}")
        figures["by_category"] = best_of_n.by_group(each, [categories[name] for name in found.problems])
    if found.without:
        figures["left_out"] = found.without
    _finish(figures, format_table(figures) + _groups(figures) + _left_out(found), args.json, bad)


def _categories(path: str, key: str) -> dict[str, str]:
    from mmprm_jax.evaluation.stored import each_row

    found = {}
    for where, row in each_row(path):
        if not isinstance(row, dict) or "id" not in row or key not in row:
            raise UserError(f"{path}, {where}: expected an object with id and {key}")
        found[str(row["id"])] = str(row[key])
    return found


def _left_out(found: Any) -> str:
    from mmprm_jax.evaluation.stored import NEEDS

    lines = ((name, "not every" if found.told[NEEDS[name]] else "no", NEEDS[name]) for name in found.without)
    return "".join(f"\nleft out: {name} ({which} candidate has {need})" for name, which, need in lines)


def _groups(figures: dict[str, Any]) -> str:
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


def _detect(argv: Sequence[str]) -> None:
    parser = _parser(
        "detect", "First-error F1 (ProcessBench), step macro-F1 (VisualProcessBench) and calibration of step scores."
    )
    parser.add_argument("file", help="JSONL rows: id, source, scores, and label | labels | k and n")
    parser.add_argument("--labels", metavar="FILE", help="rows with all but the scores, joined by id")
    parser.add_argument("--dev", metavar="FILE", help="held-out rows to choose the threshold on")
    parser.add_argument("--threshold", type=float, help="a given threshold; nothing is held out")
    parser.add_argument("--dev_share", type=float, default=0.2, help="without --dev: share of the rows held out")
    parser.add_argument("--seed", type=int, default=0, help="of that share")
    _json_option(parser)
    args = parser.parse_args(argv)
    if args.dev and args.threshold is not None:
        raise UserError("--threshold and --dev: give one of them")
    if not 0 < args.dev_share < 1:
        raise UserError(f"--dev_share={args.dev_share}: expected a share between 0 and 1")
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold={args.threshold}: expected a number from 0 to 1")

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


# ------------------------------------------------------------------------------------------------- sweep


def _sweep(argv: Sequence[str], open_run: OpenRun) -> None:
    rest, overrides = configs.split_args(argv)
    parser = _parser("sweep", "PRMs over a grid of settings, on one annotated set and one set of candidates.")
    _run_options(parser, "annotation")
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="KEY=V1,V2,…",
        help="seed or a train_prm setting; may be repeated",
    )
    args = parser.parse_args(rest)

    from mmprm_jax import sweep

    grid = sweep.parse(args.grid)
    # every cell's settings are read before anything is trained
    settings = [(x, configs.load(args.config, [*overrides, *x.overrides])) for x in sweep.cells(grid)]
    print(sweep.run(open_run(args.config, overrides, args.workdir), settings, grid))


# ------------------------------------------------------------------------------------------------- guide


def _guide(argv: Sequence[str], open_run: OpenRun) -> None:
    rest, overrides = configs.split_args(argv)
    parser = _parser("guide", "Searches guided by the PRM on the test problems, against Best-of-N at equal tokens.")
    _run_options(parser, "evaluation")
    parser.add_argument("--search", default="beam,dvts,lookahead", metavar="NAME,…", help="default: all")
    _json_option(parser)
    args = parser.parse_args(rest)

    run = open_run(args.config, overrides, args.workdir)

    from mmprm_jax.evaluation import guided

    figures = guided.run(run, args.search.split(","))
    _finish(figures, guided.format_table(figures), args.json, ())


# ------------------------------------------------------------------------------------------------- benchmark


def _benchmark(argv: Sequence[str], open_run: OpenRun) -> None:
    rest, overrides = configs.split_args(argv)
    parser = _parser("benchmark", "The policy and the PRM of a run on a benchmark's problems, officially scored.")
    parser.add_argument("file", help="problems as `mmprm prepare` writes them, their images beside them")
    _run_options(parser, "evaluation")
    parser.add_argument("--distributed", action="store_true", help="one of several processes, as in mmprm evaluate")
    parser.add_argument("--scoring", default="", metavar="NAME", help="an official mode, or verifier; default: by row")
    _json_option(parser)
    args = parser.parse_args(rest)

    run = open_run(args.config, overrides, args.workdir, args.distributed)

    from mmprm_jax import processes
    from mmprm_jax.evaluation import benchmark
    from mmprm_jax.report.report import format_table

    figures = benchmark.run(run, args.file, args.scoring)
    if not processes.is_first():
        return
    said = "".join(f", {count} {kind}" for kind, count in sorted(figures.get("scoring", {}).items()))
    _finish(figures, format_table(figures) + _groups(figures) + (f"official verdicts{said}\n" if said else ""),
            args.json, ())  # fmt: skip
