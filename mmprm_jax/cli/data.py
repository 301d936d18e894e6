"""``mmprm prepare``, ``export`` and ``split``: data sets become the files that the stages read, and back."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import warnings
from pathlib import Path

from mmprm_jax.cli.command import DATA, argument, at_least, checking_usage, command, flag, number, option
from mmprm_jax.errors import UsageError

EXPORTS = ("trl", "mm_prm", "visualprm")


def _pair(text: str) -> tuple[float, float]:
    """Two numbers."""
    low, comma, high = text.partition(",")
    if not comma:
        raise argparse.ArgumentTypeError(f"expected two numbers, e.g. 0.125,0.875, got {text!r}")
    return number(0, 1)(low), number(0, 1)(high)


@command(
    "prepare",
    DATA,
    "turns a named data set into the files that the stages read",
    argument("source", "the data set's name; mmprm list sources shows them"),
    argument("path", "a file, a folder or a hub id (org/name@revision); default: its own id", nargs="?"),
    option("--output", "the folder for records and images", type=Path, metavar="FOLDER"),
    option("--split", "train, test, …", default="", unset="train, or a benchmark's first"),
    option("--name", "NAME.jsonl is written", default="", unset="the split, sft or labels"),
    option("--limit", "so many records at most", default=0, unset="all", type=at_least(0), metavar="N"),
    option(
        "--against",
        "folders of prepared benchmarks, whose problems are taken out",
        default="",
        unset="none",
        metavar="FOLDER,…",
    ),
    option("--image-root", "where the images lie whose paths in the rows are absolute, or of Windows", default=None,
           unset="such rows are refused", type=Path, metavar="FOLDER"),
    option(
        "--rewriter",
        "an OpenAI-compatible server that restructures demonstrations",
        default="",
        unset="rules do",
        metavar="URL",
    ),
    option("--model", "the rewriter's model", default="", unset="none"),
    option("--bis", "step labels: the share of each file's rows to keep, by Balanced-Information score", default=0.0,
           unset="all", type=number(0, 1), metavar="SHARE"),
    option("--bis-alpha", "of that score", default=0.05, type=number(0, math.inf), metavar="ALPHA"),
    option("--certain", "step labels: none for a step with LOW < k/n < HIGH, e.g. 0.125,0.875", default=None,
           unset="every label", type=_pair, metavar="LOW,HIGH"),
    option("--uncertain", "what is left out then: the step's label, or the whole row", default="step",
           choices=("step", "row")),
    example="mmprm prepare mm_k12 Cierra0506/MM-K12 --split=test --name=all --output=data/k12",
)  # fmt: skip
def prepare(args: argparse.Namespace) -> None:
    """Exit code 0 also when rows were refused: they are listed, and counted on stderr."""
    if bool(args.rewriter) != bool(args.model):
        raise UsageError("prepare: --rewriter=http://host:8000/v1 and --model=NAME go together")
    if any(c in args.name for c in "/\\"):
        raise UsageError(f"prepare: --name={args.name}: a name, not a path")
    if args.image_root and not args.image_root.is_dir():
        raise UsageError(f"prepare: --image-root={args.image_root}: no such folder")

    from mmprm_jax.data import prepare, sources
    from mmprm_jax.data.rewriter import Rewriter
    from mmprm_jax.data.selection import Selection
    from mmprm_jax.servers import check_reachable

    with checking_usage():
        source = sources.find(args.source)
        if args.rewriter and source.kind != "sft":
            raise UsageError(f"prepare: --rewriter is for demonstrations; {source.name} has {source.kind} records")
        rewriter = Rewriter(args.rewriter, args.model) if args.rewriter else None
        selection = Selection(args.bis, args.bis_alpha, args.certain, args.uncertain == "row")
        if selection and source.kind != "labels":
            raise UsageError(
                f"prepare: --bis and --certain are for step labels; {source.name} has {source.kind} records"
            )
        if not (args.path or source.hub):
            raise UsageError(f"prepare: {source.name} is published nowhere: name a file or a folder")
    check_reachable([args.rewriter] if args.rewriter else [])
    settings = prepare.Settings(
        source.name,
        args.path or source.hub,
        args.output,
        args.split or next(iter(source.files)),
        args.name,
        args.limit,
        tuple(Path(part) for part in args.against.split(",") if part),
        rewriter,
        selection,
        args.image_root,
    )
    with rewriter or contextlib.nullcontext(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")  # of sizes and palettes: our own limits decide
        summary = prepare.run(settings)
    done, *remarks = prepare.describe(settings, summary)
    print(done)
    for line in remarks:
        print(line, file=sys.stderr)


@command(
    "export",
    DATA,
    "writes trees or step labels as rows that other projects read",
    argument("source", "trees or step labels: a file, or a stage's folder such as runs/digits/annotate"),
    argument("target", "the file to write; images are copied to images/ beside it", type=Path, metavar="ROWS.jsonl"),
    option("--format", "trl: stepwise supervision; mm_prm, visualprm (raw): their training files", choices=EXPORTS),
    option("--images", "the folder that the images are relative to", default=None, type=Path,
           unset="the run's data, or the file's folder", metavar="FOLDER"),
    flag("--tags", "keep the tags around steps and answers, as models of our own read them"),
    option("--mode", "how trees are labelled, as train_prm.mode", default="default", choices=("default", "paper")),
    option("--max-paths", "solutions of a tree", default=16, type=at_least(1), metavar="N"),
    flag("--balance", "of a tree, as many solutions ending right as ending wrong"),
    option("--seed", "of the choice of a tree's solutions", default=0, type=at_least(0)),
    example="mmprm export runs/digits/annotate labels/trl.jsonl --format=trl",
)  # fmt: skip
def export(args: argparse.Namespace) -> None:
    """Exit code 0 also when examples were left out: they are counted on stderr."""
    if args.target.suffix != ".jsonl":
        raise UsageError(f"export: {args.target}: end the file's name in .jsonl")
    if args.balance and args.max_paths == 1:
        raise UsageError("export: --max-paths=1 with --balance, which needs at least 2")

    from mmprm_jax.data.export import describe
    from mmprm_jax.stages import export

    trees = export.Trees(args.mode, args.max_paths, args.balance, args.seed)
    written = export.export(args.source, args.target, args.format, args.images, args.tags, trees)
    print(f"{args.target}: {written.rows} rows ({args.format})")
    if written.left_out:
        print(describe(written.left_out), file=sys.stderr)


@command(
    "split",
    DATA,
    "holds problems out for development and test, where a data set has one file only",
    argument("file", "problems; {train,dev,test}.jsonl are written beside it", type=Path, metavar="PROBLEMS.jsonl"),
    option("--dev", "problems to choose the aggregator on", type=at_least(0), metavar="N"),
    option("--test", "problems to report on", type=at_least(0), metavar="N"),
    option("--seed", "another choice of problems", default=0, type=int),
    example="mmprm split data/k12/all.jsonl --dev=40 --test=60",
)
def split(args: argparse.Namespace) -> None:
    from mmprm_jax.data import split

    print(split.split_file(args.file, args.dev, args.test, args.seed))
