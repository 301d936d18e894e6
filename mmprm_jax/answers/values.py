"""What kind of thing an answer is: the types that ``parse.read`` finds and ``equivalence`` compares."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, TypeGuard, TypeVar

from mmprm_jax.answers.trees import Tree
from mmprm_jax.answers.units import Unit


@dataclasses.dataclass(frozen=True)
class Formula:
    """A number or an expression."""

    tree: Tree
    decimals: int | None = None  # digits behind the point, of a plain decimal such as 0.33
    digits: int = 0  # of a plain decimal, all of them
    percent: bool = False
    uncomputed: bool = False  # a sum or product of whole numbers, 2+3: the task, not its answer
    quantity: Quantity | None = None  # another reading: 2m as two metres


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A number and its unit or noun."""

    number: Formula
    unit: Unit
    formula: Formula | None = None  # another reading: 2 m as two times m


@dataclasses.dataclass(frozen=True)
class Interval:
    """Without an end (None) it is unbounded there."""

    low: Formula | None
    high: Formula | None
    low_closed: bool
    high_closed: bool


@dataclasses.dataclass(frozen=True)
class Region:
    """A union of intervals of the real line: an interval, or what an inequality in one variable says."""

    parts: tuple[Interval, ...]
    variable: str | None = None  # None: an interval


@dataclasses.dataclass(frozen=True)
class Relation:
    """trees[0] ops[0] trees[1] ops[1] …; every op is < or ≤, or every one is ≠ ."""

    ops: tuple[str, ...]
    trees: tuple[Tree, ...]


@dataclasses.dataclass(frozen=True)
class Equation:
    """left = right. With a ``name`` it says what that is: x = 3, f(x) = 2x, Area = 5 cm."""

    name: str | None
    left: Tree | None  # None: the name is no formula
    right: Value


@dataclasses.dataclass(frozen=True)
class Items:
    """Several things. ``kind``: tuple (ordered, in brackets), set (no order, no repetition), list (no order), or (a
    list of alternatives), parts (ordered: the blanks of a question), maybe (whether the order counts is not known)."""

    kind: Literal["tuple", "set", "list", "or", "parts", "maybe"]
    values: tuple[Value, ...]
    region: Region | None = None  # another reading of a pair: (1, 2)
    formula: Formula | None = None  # another reading of a sum of unit vectors: 2i + 3j


@dataclasses.dataclass(frozen=True)
class Family:
    """A value for each of infinitely many whole numbers, the variable ``parameter``: kπ with k ∈ Z."""

    value: Formula | Quantity | Region
    parameter: str
    every: bool  # of all whole numbers, not only those from 0 or 1 on


@dataclasses.dataclass(frozen=True)
class Ratio:
    trees: tuple[Tree, ...]
    clock: int | None = None  # another reading: 12:30 as seconds of the day


@dataclasses.dataclass(frozen=True)
class Time:
    """A time of the day that cannot be a ratio."""

    seconds: int
    half: bool  # a.m. or p.m. is said


@dataclasses.dataclass(frozen=True)
class Date:
    year: int | None  # None: it is not said
    month: int
    day: int


@dataclasses.dataclass(frozen=True)
class Nothing:
    """No solution, the empty set."""


@dataclasses.dataclass(frozen=True)
class Text:
    """Words, or what no rule understands. ``why``: what was wrong with it as a formula."""

    text: str
    formula: Formula | None = None  # another reading: ab as a times b
    why: str = ""


Value = Family | Formula | Quantity | Region | Relation | Equation | Items | Ratio | Time | Date | Nothing | Text
T = TypeVar("T")


def all_of(values: Sequence[object], kind: type[T]) -> TypeGuard[Sequence[T]]:
    return all(isinstance(value, kind) for value in values)
