"""What the verifier says about an answer."""

from __future__ import annotations

import dataclasses
from typing import Literal

VERSION = 6  # of the rules: raised whenever a verdict may change; part of every cache's key


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a prediction equals the gold answer, and why it is thought so. True (``bool``) only when it is equal."""

    kind: Literal["equal", "unequal", "unknown"]  # unknown: nothing here can tell; a person or a judge might
    reason: str  # one line, for people

    def __bool__(self) -> bool:
        return self.kind == "equal"


def equal(reason: str) -> Verdict:
    return Verdict("equal", reason)


def unequal(reason: str) -> Verdict:
    return Verdict("unequal", reason)


def unknown(reason: str) -> Verdict:
    return Verdict("unknown", reason)
