"""``mmprm config``, ``mmprm list`` and ``mmprm env``: what there is to choose from, and what is installed."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterable, Sequence
from pathlib import Path

from mmprm_jax.cli.command import CONFIG, SETTINGS, command, family, flag, option
from mmprm_jax.errors import UserError

family("list", SETTINGS, "shows what there is")


@command(
    "config",
    SETTINGS,
    "prints every setting: value, default, meaning",
    CONFIG,
    flag("--check", "only say whether all settings are allowed"),
    example="mmprm config --config=configs/digits.py --config.sft.steps=100 --check",
)
def config(args: argparse.Namespace) -> None:
    from mmprm_jax import config as configs
    from mmprm_jax import schema

    found = configs.load(args.config, args.overrides)
    if args.check:
        print(f"{args.config}: all {len(list(schema.leaves(found)))} settings are allowed")
    else:
        print(schema.describe(found))


@command("list sources", SETTINGS, "the data sets that mmprm prepare knows", example="mmprm list sources")
def list_sources(args: argparse.Namespace) -> None:
    from mmprm_jax.data import sources

    _show(
        ("name", "records", "splits", "hub id"),
        ((x.name, x.kind, ", ".join(x.files), x.hub) for x in sources.SOURCES.values()),
    )


@command("list benchmarks", SETTINGS, "those of them that are benchmarks", example="mmprm list benchmarks")
def list_benchmarks(args: argparse.Namespace) -> None:
    from mmprm_jax.answers.official import MODES
    from mmprm_jax.data.benchmarks import BENCHMARKS

    _show(
        ("name", "official scoring", "splits", "hub id"),
        (
            (x.name, x.name if x.name in MODES else "mmprm detect", ", ".join(x.files), x.hub)
            for x in BENCHMARKS.values()
        ),
    )


@command("list models", SETTINGS, "the models whose sizes are known by name (mmprm fit)", example="mmprm list models")
def list_models(args: argparse.Namespace) -> None:
    from mmprm_jax.models.released import RELEASED

    _show(
        ("name", "decoder layers", "hidden units", "vision layers"),
        (
            (name, str(decoder.num_layers), str(decoder.hidden_size), str(vision.num_layers))
            for name, (vision, decoder) in RELEASED.items()
        ),
    )


@command(
    "list configs",
    SETTINGS,
    "the config files that come with the package",
    option(
        "--copy", "copy them into a folder, to be changed; FOLDER: configs", default=None, unset="only list them",
        nargs="?", const=Path("configs"), type=Path, metavar="FOLDER",
    ),
    example="mmprm list configs --copy=configs",
)  # fmt: skip
def list_configs(args: argparse.Namespace) -> None:
    from mmprm_jax import config as configs

    files = configs.examples()
    if args.copy:
        files = [_copy(file, args.copy) for file in files]
    _show(("file", "what for"), ((str(file), _first_line(file)) for file in files))


def _copy(file: Path, folder: Path) -> Path:
    """Raises UserError rather than to replace a file that is another one."""
    target = folder / file.name
    if target.exists() and target.read_bytes() != file.read_bytes():
        raise UserError(f"{target}: is there and differs from the example; choose another folder, --copy=FOLDER")
    folder.mkdir(parents=True, exist_ok=True)
    target.write_bytes(file.read_bytes())
    return target


def _first_line(file: Path) -> str:
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0].replace("``", "")


def _show(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints columns."""
    table = [titles, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(titles))]
    for row in table:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


@command("env", SETTINGS, "shows what to paste into a bug report: versions, machine, devices", example="mmprm env")
def env(args: argparse.Namespace) -> None:
    from mmprm_jax import environment

    for name, value in environment.report().items():
        print(f"{name}: {value}")
