"""Inequalities and intervals: both are regions of the real line."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from mmprm_jax.answers import numeric, syntax
from mmprm_jax.answers.syntax import Tree
from mmprm_jax.answers.values import Formula, Interval, Region, Relation, Value

EVERYTHING = Interval(None, None, False, False)
_INFINITY: Tree = ("c", "∞")


def read(sides: Sequence[Formula | None], ops: Sequence[str]) -> Region | Relation | None:
    """a < b ≤ c …; a side that is missing (None) is the variable, as in "> 2". None: no chain of inequalities."""
    if set(ops) <= {">", "≥"}:
        sides, ops = sides[::-1], ["<" if op == ">" else "≤" for op in reversed(ops)]
    if not (set(ops) <= {"<", "≤"} or list(ops) == ["≠"]):
        return None
    variables = [i for i, side in enumerate(sides) if side is None or side.tree[0] == "v"]
    constant = all(side is None or side.tree[0] == "v" or not syntax.variables(side.tree) for side in sides)
    if len(variables) != 1 or not constant or len(sides) > 3:
        return Relation(tuple(ops), tuple(side.tree for side in sides if side)) if all(sides) else None
    at = variables[0]
    name = sides[at].tree[1] if sides[at] else None
    if ops[0] == "≠":
        other = sides[1 - at]
        return Region((Interval(None, other, False, False), Interval(other, None, False, False)), name)
    if len(sides) == 3 and at != 1:
        return None
    low, high = (sides[at - 1] if at else None), (sides[at + 1] if at + 1 < len(sides) else None)
    found = _interval(low, high, bool(at) and ops[at - 1] == "≤", at < len(ops) and ops[at] == "≤")
    return Region((found,), name)


def interval(values: Sequence[Value], opened: str, closed: str) -> Region | None:
    """The reading of a pair in brackets as an interval, or None."""
    low, high = values
    if not (isinstance(low, Formula) and isinstance(high, Formula)) or opened in "{⦃":
        return None
    return Region((_interval(low, high, opened == "[", closed == "]"),))


def _interval(low: Formula | None, high: Formula | None, low_closed: bool, high_closed: bool) -> Interval:
    low = None if low is not None and low.tree == ("-", _INFINITY) else low
    high = None if high is not None and high.tree == _INFINITY else high
    return Interval(low, high, low_closed and low is not None, high_closed and high is not None)


def unbounded(region: Region) -> bool:
    return any(part.low is None or part.high is None for part in region.parts)


def union(regions: Sequence[Region]) -> Region | None:
    """The parts of all of them, from left to right. None: in different variables."""
    names = {region.variable for region in regions}
    if len(names) > 1:
        return None
    parts = [part for region in regions for part in region.parts]
    keys = [numeric.real(part.low.tree) if part.low else float("-inf") for part in parts]
    if all(key is not None for key in keys):
        parts = [part for _, part in sorted(zip(keys, parts, strict=True), key=lambda item: item[0])]
    return Region(tuple(parts), names.pop())


def intersection(regions: Sequence[Region]) -> Region | None:
    """What two rays, x > 1 and x < 3, have in common. None: anything else."""
    if (
        len(regions) != 2
        or any(len(region.parts) != 1 for region in regions)
        or regions[0].variable != regions[1].variable
    ):
        return None
    a, b = (region.parts[0] for region in regions)
    if a.low is None:
        a, b = b, a
    if a.low is None or a.high is not None or b.low is not None or b.high is None:
        return None
    return Region((Interval(a.low, b.high, a.low_closed, b.high_closed),), regions[0].variable)


def as_relation(region: Region) -> Relation | None:
    """A region that says one thing of a variable, as a relation: x > 2."""
    if region.variable is None or len(region.parts) != 1:
        return None
    (part,) = region.parts
    sides: list[Tree] = [("v", region.variable)]
    ops = []
    if part.low is not None:
        sides, ops = [part.low.tree, *sides], ["≤" if part.low_closed else "<"]
    if part.high is not None:
        sides, ops = [*sides, part.high.tree], [*ops, "≤" if part.high_closed else "<"]
    return Relation(tuple(ops), tuple(sides)) if ops else None


def links(relation: Relation) -> list[tuple[str, Tree]]:
    """(op, right minus left) of each pair of neighbours."""
    pairs = itertools.pairwise(relation.trees)
    return [(op, ("+", b, ("-", a))) for op, (a, b) in zip(relation.ops, pairs, strict=True)]
