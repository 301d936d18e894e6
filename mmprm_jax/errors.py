"""Errors that a user can fix, and the nearest name for a misspelt one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A failure that the user can fix. Shown as one line, without a traceback."""

    exit_code = 1


class UsageError(UserError):
    """A wrong command line; nothing has been done."""

    exit_code = 2


def nearest(name: str, names: Iterable[str]) -> str:
    """The words that name the nearest of ``names``."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0)
    return f"; did you mean {found[0]}?" if found else ""
