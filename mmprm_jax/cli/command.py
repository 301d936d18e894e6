"""What a command of ``mmprm`` is. One declaration says its name, place in the help, options, example and function:

    @command(
        "split",
        DATA,
        "holds problems out for development and test",
        argument("file", "problems; the three files are written beside it", metavar="PROBLEMS.jsonl"),
        option("--dev", "problems to choose the aggregator on", type=at_least(1)),
        example="mmprm split data/all.jsonl --dev=50 --test=200",
    )
    def split(args: argparse.Namespace) -> None:
        from mmprm_jax.data import split  # what is slow to import only now: help and mistakes are shown at once
        ...

An option without a default is required. Options are written with hyphens; ``--max_tiles`` is ``--max-tiles``, too.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from mmprm_jax.errors import UsageError, UserError, nearest

# The headings of `mmprm --help`, in the order in which work is done.
PIPELINE = "all stages"
DATA = "data"
TRAIN = "train"
SEARCH = "search"
EVALUATE = "evaluate"
MODELS = "models"
MACHINES = "machines"
SETTINGS = "settings"
GROUPS = (PIPELINE, DATA, TRAIN, SEARCH, EVALUATE, MODELS, MACHINES, SETTINGS)

OVERRIDE = "--config."
_REQUIRED: Any = object()
_NUMBER = re.compile(r"-\.?\d.*")

Function = Callable[[argparse.Namespace], int | None]  # returns the exit code, None for 0


@dataclasses.dataclass(frozen=True)
class Option:
    """``--name`` or the name of a positional argument, and what ``ArgumentParser.add_argument`` takes beside it."""

    name: str
    settings: Mapping[str, Any]


def _described(meaning: str, note: str) -> str:
    return f"{meaning} ({note})".replace("%", "%%")


def option(name: str, meaning: str, default: Any = _REQUIRED, unset: str = "", **settings: Any) -> Option:
    """An option with a value. unset: what its default stands for, where that says nothing by itself."""
    required = default is _REQUIRED
    note = "required" if required else f"default: {unset or default}"
    more = {"required": True} if required else {"default": default}
    return Option(name, {"help": _described(meaning, note), **more, **settings})


def flag(name: str, meaning: str) -> Option:
    """An option without a value."""
    return Option(name, {"help": _described(meaning, "default: no"), "action": "store_true"})


def repeated(name: str, meaning: str, **settings: Any) -> Option:
    """An option that may be given several times; its value is a list."""
    help = _described(meaning, "default: none; may be repeated")
    return Option(name, {"help": help, "action": "append", "default": [], **settings})


def argument(name: str, meaning: str, **settings: Any) -> Option:
    """A positional argument."""
    return Option(name, {"help": meaning.replace("%", "%%"), **settings})


def at_least(low: int) -> Callable[[str], int]:
    """The type of an option that takes a whole number."""

    def whole(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
        if value < low:
            raise argparse.ArgumentTypeError(f"{value} is not allowed; at least {low}")
        return value

    return whole


def number(low: float, high: float) -> Callable[[str], float]:
    """The type of an option that takes a finite number in a range."""

    def parsed(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)):
            allowed = f"a number from {low:g} to {high:g}" if math.isfinite(high) else f"a number of at least {low:g}"
            raise argparse.ArgumentTypeError(f"expected {allowed}, got {text!r}")
        return value

    return parsed


JSON = option("--json", "a file for all figures", default=None, unset="none", metavar="FILE")
CONFIG = option(
    "--config", f"the settings; {OVERRIDE}KEY=VALUE changes one, mmprm config lists them", metavar="FILE[:ARG]"
)
WORKDIR = option("--workdir", "the folder of the run, local or gs://", metavar="DIR")
DISTRIBUTED = flag(
    "--distributed",
    "one of several processes; on TPU pods and under Slurm they find each other, elsewhere the variables"
    " JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID say it",
)
_COMMON = (flag("--debug", "show the traceback of an error"),)


@dataclasses.dataclass(frozen=True)
class Command:
    """``resumes``: the same command goes on where it was interrupted. ``wraps``: behind ``--`` is another command."""

    name: str
    group: str
    summary: str
    options: tuple[Option, ...]
    example: str
    function: Function
    resumes: bool
    wraps: bool

    def takes(self, name: str) -> bool:
        """Whether it has that option."""
        return name in ("-h", "--help") or any(name == option.name for option in (*self.options, *_COMMON))

    def parser(self) -> argparse.ArgumentParser:
        usage = f"mmprm {self.name} [options]"
        for each in self.options:
            if not each.name.startswith("-"):
                shown = each.settings.get("metavar", each.name)
                usage += f" [{shown}]" if each.settings.get("nargs") in ("?", "*") else f" {shown}"
        parser = _Parser(
            self.name,
            usage=usage + " -- COMMAND …" * self.wraps,
            description=f"{self.summary[0].upper()}{self.summary[1:]}.",
            epilog=f"example:\n  {self.example}",
            formatter_class=_Formatter,
            allow_abbrev=False,
        )
        for each in (*self.options, *_COMMON):
            parser.add_argument(each.name, **each.settings)
        return parser


@dataclasses.dataclass(frozen=True)
class Family:
    """Commands whose names begin alike, such as ``launch tpu`` and ``launch gke``: one line in the list of commands."""

    name: str
    group: str
    summary: str

    def members(self) -> list[Command]:
        return [command for name, command in TABLE.items() if name.startswith(f"{self.name} ")]


TABLE: dict[str, Command] = {}
FAMILIES: dict[str, Family] = {}


def command(
    name: str, group: str, summary: str, *options: Option, example: str, resumes: bool = False, wraps: bool = False
) -> Callable[[Function], Function]:
    """Puts a command into the table. ``name`` may have two words, of which the first one is a family."""

    def declare(function: Function) -> Function:
        TABLE[name] = Command(name, group, summary, options, example, function, resumes, wraps)
        return function

    return declare


def family(name: str, group: str, summary: str) -> None:
    """Puts the first word of several commands into the table."""
    FAMILIES[name] = Family(name, group, summary)


@contextlib.contextmanager
def checking_usage() -> Iterator[None]:
    """Inside, a UserError is an error of the command line."""
    try:
        yield
    except UserError as error:
        raise UsageError(str(error)) from error


# ------------------------------------------------------------------------------------------------- parsing


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=26)


class _Parser(argparse.ArgumentParser):
    def __init__(self, name: str, **settings: Any):
        super().__init__(prog=f"mmprm {name}", **settings)
        self._name = name

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self._name}: {message.removeprefix('argument ')} (mmprm {self._name} --help)")


def find(words: Sequence[str]) -> Command | None:
    """The command that a command line names; None: none."""
    return TABLE.get(" ".join(words[:2])) or TABLE.get(" ".join(words[:1]))


def parse(words: Sequence[str]) -> tuple[Command, argparse.Namespace | None]:
    """The command and its options; None: help is asked for.

    Beside the options the result has ``overrides``, the ``--config.key=value`` texts, and ``rest``, the words behind
    ``--`` of a command that wraps another. Raises UsageError.
    """
    found = find(words)
    if found is None:
        raise UsageError(_no_command(words))
    words = words[len(found.name.split()) :]
    end = words.index("--") if "--" in words else len(words)
    own, overrides = _split(found, words[:end])
    if "-h" in own or "--help" in own:
        return found, None
    own += [] if found.wraps else words[end:]
    args = found.parser().parse_intermixed_args(own)
    args.overrides, args.rest = overrides, list(words[end + 1 :])
    return found, args


def _no_command(words: Sequence[str]) -> str:
    first = words[0] if words else ""
    if first.startswith("-"):
        return f"{first}: the command comes first, e.g. mmprm pipeline --config=FILE --workdir=DIR (mmprm --help)"
    if first in FAMILIES:
        names = [member.name for member in FAMILIES[first].members()]
        if len(words) < 2 or words[1].startswith("-"):
            return f"{first}: say which, {' or '.join(f'mmprm {name}' for name in names)}"
        return f"{first} {words[1]}: no such command{nearest(f'{first} {words[1]}', names)} (mmprm {first} --help)"
    names = [name for name in TABLE if " " not in name]
    return f"{first}: no such command{nearest(first, [*names, *FAMILIES])} (mmprm --help)"


def _split(command: Command, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the words for argparse, the overrides as ``--config.key=value``). Raises UsageError for an unknown option."""
    own: list[str] = []
    overrides: list[str] = []
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        name, equals, value = word.partition("=")
        if name.startswith(OVERRIDE) and command.takes("--config"):
            if not equals and waiting and not waiting[0].startswith("--"):
                word = f"{word}={waiting.pop(0)}"
            overrides.append(word)
            continue
        if word.startswith("-") and word != "-" and not _NUMBER.fullmatch(word):
            name = name.replace("_", "-")
            if not command.takes(name):
                raise UsageError(_no_option(command, name))
            word = f"{name}{equals}{value}"
        own.append(word)
    return own, overrides


def _no_option(command: Command, name: str) -> str:
    """Says whose option it is, and which one may be meant."""
    others = [other.name for other in TABLE.values() if other.takes(name)]
    whose = f", which is one of {', '.join(others)}" if others else ""
    names = [option.name for option in (*command.options, *_COMMON) if option.name.startswith("-")]
    meant = _settings_called(command, name.removeprefix("--").replace("-", "_")) or names
    return f"{command.name}: no option {name}{whose}{nearest(name, meant)} (mmprm {command.name} --help)"


def _settings_called(command: Command, name: str) -> list[str]:
    """The options that change the settings of that name: of the command's section, else of all."""
    if not command.takes("--config"):
        return []
    from mmprm_jax.schema import leaves
    from mmprm_jax.settings import Config

    keys = [key for key, *_ in leaves(Config()) if key.rpartition(".")[2] == name]
    own = [key for key in keys if key.startswith(f"{command.name}.")]
    return [f"{OVERRIDE}{key}" for key in own or keys]


# ------------------------------------------------------------------------------------------------- help


def overview() -> str:
    """What ``mmprm --help`` prints: a line for each command, by group."""
    lines = ["usage: mmprm COMMAND [options]", ""]
    for group in GROUPS:
        lines.append(f"{group}:")
        for name, summary in _entries(group).items():
            lines.append(f"  {name:<12}{summary}")
        lines.append("")
    lines += [
        "mmprm COMMAND --help shows the options of a command, with their defaults and an example.",
        "mmprm --version; --debug, with any command, shows the traceback of an error.",
    ]
    return "\n".join(lines)


def _entries(group: str) -> dict[str, str]:
    """The summaries of a group's commands, a family's in the place of its first member."""
    found: dict[str, str] = {}
    for command in TABLE.values():
        each = FAMILIES.get(command.name.split()[0])
        if each and each.group == group:
            members = ", ".join(member.name.split()[1] for member in each.members())
            found[each.name] = f"{each.summary}: {members}"
        elif command.group == group:
            found[command.name] = command.summary
    return found


def family_overview(each: Family) -> str:
    """What ``mmprm launch --help`` prints."""
    width = max(len(member.name) for member in each.members()) + 2
    lines = [f"  {member.name:<{width}}{member.summary}" for member in each.members()]
    return "\n".join([f"usage: mmprm {each.name} … [options]", "", *lines])
