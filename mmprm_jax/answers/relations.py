"""Inequalities and intervals: both are regions of the real line."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction

from mmprm_jax.answers import numeric, trees
from mmprm_jax.answers.trees import Tree
from mmprm_jax.answers.values import Equation, Formula, Interval, Items, Quantity, Region, Relation, Value, all_of

EVERYTHING = Interval(None, None, False, False)
_MAX_INTEGERS = 100
_INFINITY: Tree = ("c", "∞")


def read(sides: Sequence[Formula | None], ops: Sequence[str]) -> Region | Relation | None:
    """a < b ≤ c …; a side that is missing (None) is the variable, as in "> 2". None: no chain of inequalities."""
    if set(ops) <= {">", "≥"}:
        sides, ops = sides[::-1], ["<" if op == ">" else "≤" for op in reversed(ops)]
    if not (set(ops) <= {"<", "≤"} or list(ops) == ["≠"]):
        return None
    if found := _absolute(sides, ops):
        return found
    variables = [i for i, side in enumerate(sides) if side is None or side.tree[0] == "v"]
    constant = all(side is None or side.tree[0] == "v" or not trees.variables(side.tree) for side in sides)
    if len(variables) != 1 or not constant or len(sides) > 3:
        return Relation(tuple(ops), tuple(side.tree for side in sides if side)) if all(sides) else None
    at = variables[0]
    variable = sides[at]
    name = variable.tree[1] if variable else None
    if ops[0] == "≠":
        other = sides[1 - at]
        return Region((Interval(None, other, False, False), Interval(other, None, False, False)), name)
    if len(sides) == 3 and at != 1:
        return None
    low, high = (sides[at - 1] if at else None), (sides[at + 1] if at + 1 < len(sides) else None)
    whole = _interval(low, high, bool(at) and ops[at - 1] == "≤", at < len(ops) and ops[at] == "≤")
    return Region((whole,), name)


def _absolute(sides: Sequence[Formula | None], ops: Sequence[str]) -> Region | None:
    """|ax + b| < c, c < |ax + b| and c < |ax + b| < d; None: anything else."""
    at = next((i for i, side in enumerate(sides) if side and side.tree[:2] == ("f", "abs")), None)
    if at is None or not all_of(sides, Formula) or "≠" in ops or len(sides) > 3 or len(sides) == 3 and at != 1:
        return None
    inside = sides[at].tree[2]
    bounds = [side for i, side in enumerate(sides) if i != at]
    names = trees.variables(inside)
    if len(names) != 1 or any(not (numeric.real(bound.tree) or 0) > 0 for bound in bounds):
        return None
    (name,) = names
    shift, factor = trees.linear(inside, [name]) or (None, None)
    scale = numeric.real(factor) if factor else None
    if not scale:
        return None

    def end(bound: Formula, sign: int) -> Formula:
        """Where ax + b is the bound, or minus the bound."""
        if inside == ("v", name):
            return bound if sign > 0 else Formula(("-", bound.tree))
        tree = bound.tree if sign > 0 else ("-", bound.tree)
        return Formula(("/", ("+", tree, ("-", shift)), factor))

    right, left = (1, -1) if scale > 0 else (-1, 1)
    low, high = (sides[at - 1] if at else None), (sides[at + 1] if at + 1 < len(sides) else None)
    low_closed, high_closed = bool(at) and ops[at - 1] == "≤", at < len(ops) and ops[at] == "≤"
    if low is None:
        (bound,) = bounds
        return Region((Interval(end(bound, left), end(bound, right), high_closed, high_closed),), name)
    if high is not None and not numeric.real(low.tree) < numeric.real(high.tree):
        return None
    below = Interval(end(high, left) if high else None, end(low, left), high_closed, low_closed)
    above = Interval(end(low, right), end(high, right) if high else None, low_closed, high_closed)
    return Region((below, above), name)


def interval(values: Sequence[Value], opened: str, closed: str) -> Region | None:
    """The reading of a pair in brackets as an interval, or None."""
    low, high = (v.formula if isinstance(v, Quantity) and v.unit.half_turns and v.formula else v for v in values)
    if not (isinstance(low, Formula) and isinstance(high, Formula)) or opened in "{⦃":
        return None
    return Region((_interval(low, high, opened == "[", closed == "]"),))


def _interval(low: Formula | None, high: Formula | None, low_closed: bool, high_closed: bool) -> Interval:
    low = None if low is not None and low.tree == ("-", _INFINITY) else low
    high = None if high is not None and high.tree == _INFINITY else high
    return Interval(low, high, low_closed and low is not None, high_closed and high is not None)


def between(relation: Relation, parameter: str) -> Region | None:
    """a < x < b of which only the ends depend on the parameter, as an interval; None: anything else."""
    if len(relation.trees) != 3 or "≠" in relation.ops:
        return None
    low, middle, high = relation.trees
    if middle[0] != "v" or middle[1] == parameter or (trees.variables(low) | trees.variables(high)) != {parameter}:
        return None
    closed = [op == "≤" for op in relation.ops]
    return Region((Interval(Formula(low), Formula(high), *closed),), middle[1])


def point(value: Value | None) -> Region | None:
    """{2} and x = 2 as an interval from 2 to 2; None: no single number."""
    if isinstance(value, Items) and value.kind == "set" and len(value.values) == 1:
        number, name = value.values[0], None
    elif isinstance(value, Equation) and value.name and value.left and value.left[0] == "v":
        number, name = value.right, value.name
    else:
        return None
    if not isinstance(number, Formula) or trees.variables(number.tree):
        return None
    return Region((Interval(number, number, True, True),), name)


def integers(region: Region, least: int | None) -> Items | None:
    """The whole numbers in a bounded region, from ``least`` on; None: none, too many, or not known."""
    found: list[int] = []
    for part in region.parts:
        low = numeric.real(part.low.tree) if part.low else None
        high = numeric.real(part.high.tree) if part.high else None
        low = least if low is None else low
        if low is None or high is None or high - low > _MAX_INTEGERS:
            return None
        first, last = int(numeric.context().ceil(low)), int(numeric.context().floor(high))
        first += part.low is not None and not part.low_closed and first == low
        last -= not part.high_closed and last == high
        found += range(first if least is None else max(first, least), last + 1)
    return Items("set", tuple(Formula(("n", Fraction(n))) for n in found)) if found else None


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
    """What all of them have in common. None: in different variables, nothing, or not known."""
    found = regions[0]
    for region in regions[1:]:
        parts = [_common(a, b) for a in found.parts for b in region.parts]
        if region.variable != found.variable or None in parts:
            return None
        found = Region(tuple(part for part in parts if isinstance(part, Interval)), found.variable)
    return found if found.parts else None


def _common(a: Interval, b: Interval) -> Interval | bool | None:
    """What two intervals have in common; False: nothing. None: an end is no number."""
    lows = [(part.low, part.low_closed) for part in (a, b) if part.low is not None]
    highs = [(part.high, part.high_closed) for part in (a, b) if part.high is not None]
    values = {id(end): numeric.real(end.tree) for end, _ in (*lows, *highs)}
    if None in values.values():
        return None
    low, low_closed = max(lows, key=lambda end: (values[id(end[0])], not end[1]), default=(None, False))
    high, high_closed = min(highs, key=lambda end: (values[id(end[0])], end[1]), default=(None, False))
    if low and high:
        if (
            values[id(low)] > values[id(high)]
            or values[id(low)] == values[id(high)]
            and not (low_closed and high_closed)
        ):
            return False
    return Interval(low, high, low_closed, high_closed)


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
