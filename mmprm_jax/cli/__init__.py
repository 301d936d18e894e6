"""The command line: ``mmprm COMMAND [options]``.

Each command is declared once, in one of the modules here (see ``command``), which the import below puts into the table.
None of it imports what is slow: help, and what is wrong with a command line, are shown at once.
"""

from __future__ import annotations

from collections.abc import Sequence

# In the order in which `mmprm --help` lists the commands of a group.
from mmprm_jax.cli import data, evaluate, machines, models, settings, stages  # noqa: F401, I001
from mmprm_jax.cli.command import FAMILIES, family_overview, find, overview, parse
from mmprm_jax.errors import UserError

_HELP = (["-h"], ["--help"], ["help"])


def resumes(words: Sequence[str]) -> bool:
    """Whether the command goes on where it was interrupted."""
    found = find(words)
    return found is not None and found.resumes


def run(words: Sequence[str]) -> int:
    """Runs a command line, without ``mmprm``. Returns the exit code. Raises UsageError, UserError, Interrupted."""
    words = list(words)
    if not words or words in _HELP:
        print(overview())
        return 0
    if words == ["--version"]:
        from importlib import metadata

        print(f"mmprm {metadata.version('mmprm_jax')}")
        return 0
    if words[0] in FAMILIES and words[1:] in _HELP:
        print(family_overview(FAMILIES[words[0]]))
        return 0
    command, args = parse(words)
    if args is None:
        print(command.parser().format_help(), end="")
        return 0
    try:
        return command.function(args) or 0
    except OSError as error:
        raise UserError(str(error)) from error
