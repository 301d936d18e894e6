"""Measures of one kind against another: quantities, dates, ratios, times and intervals."""

from __future__ import annotations

import dataclasses

from mmprm_jax.answers import arithmetic, relations, trees, units
from mmprm_jax.answers.arithmetic import every
from mmprm_jax.answers.values import Date, Formula, Quantity, Ratio, Region, Relation, Time, Value, all_of
from mmprm_jax.answers.verdict import Verdict, equal, unequal, unknown


def _degrees_left_out(gold: Formula, prediction: Formula) -> Verdict | None:
    """180° - 2α and 180 - 2α; None: no such pair."""
    bare = [trees.without_degrees(side.tree) for side in (gold, prediction)]
    marked = [tree != side.tree for tree, side in zip(bare, (gold, prediction), strict=True)]
    if marked[0] == marked[1] or not all(trees.variables(tree) for tree in bare):
        return None
    if any(trees.has_function(tree) or "π" in trees.shape(tree) for tree in bare):
        return None
    found = arithmetic.formulas(Formula(bare[0]), Formula(bare[1]))
    return equal(f"{found.reason}, the degree sign left out") if found else None


def _glued(gold: Formula, prediction: Formula, precision: int | None) -> Verdict | None:
    """160 and 160m, of which only the number can be meant; 2m is two times m. None: no such pair."""
    sides = [side.quantity for side in (gold, prediction)]
    quantity = sides[0] or sides[1]
    other = prediction if sides[0] else gold
    if None not in sides or not quantity or quantity.unit.name not in units.GLUED or trees.variables(other.tree):
        return None
    number = quantity.number
    if number.tree[0] != "n" or number.tree[1] < 10 and number.decimals is None:
        return None
    found = arithmetic.formulas(*((number, other) if sides[0] else (other, number)), precision)
    return dataclasses.replace(found, reason=f"{found.reason}, the unit left out")


def dates(gold: Value, prediction: Value) -> Verdict:
    """Two values of which one is a date."""
    if not (isinstance(gold, Date) and isinstance(prediction, Date)):
        return unequal("one is a date")
    if (gold.month, gold.day) != (prediction.month, prediction.day):
        return unequal("different dates")
    if None in (gold.year, prediction.year) and gold != prediction:
        return unknown("the same day of which only one has a year")
    return equal("the same date") if gold == prediction else unequal("different years")


def measures(gold: Value, prediction: Value, precision: int | None) -> Verdict:
    """Formulas and quantities; a unit may be left out."""
    if isinstance(gold, Quantity) and isinstance(prediction, Quantity):
        return arithmetic.quantities(gold, prediction, precision)
    if isinstance(gold, Formula) and isinstance(prediction, Formula):
        found = arithmetic.formulas(gold, prediction, precision)
        return found or _degrees_left_out(gold, prediction) or _glued(gold, prediction, precision) or found
    quantity, bare = (gold, prediction) if isinstance(gold, Quantity) else (prediction, gold)
    assert isinstance(quantity, Quantity) and isinstance(bare, Formula)
    pairs = [(quantity.number, bare, "the unit left out")]
    if bare.quantity:  # 2m against 2 metres
        both = (bare.quantity, quantity) if quantity is prediction else (quantity, bare.quantity)
        if verdict := arithmetic.quantities(both[0], both[1], precision):
            return verdict
        pairs = []
    if quantity.formula:
        pairs.append((quantity.formula, bare, "a formula"))
    if angle := arithmetic.radians(quantity):
        pairs.append((angle, bare, "in radians"))
    verdict = unequal("different quantities")
    for first, second, how in pairs:
        if bare.quantity is None and how == "the unit left out" and quantity.unit.name.isdigit():
            continue
        sides = (first, second) if quantity is gold else (second, first)
        found = arithmetic.formulas(sides[0], sides[1], precision)
        if found:
            return dataclasses.replace(found, reason=f"{found.reason}, {how}")
        verdict = found if verdict.kind == "unequal" else verdict
    return verdict


def ranges(gold: Value, prediction: Value) -> Verdict:
    """Two values of which one is an interval or an inequality."""
    if ("v", "R") in (getattr(gold, "tree", None), getattr(prediction, "tree", None)):  # the real numbers
        gold, prediction = (
            Region((relations.EVERYTHING,)) if isinstance(v, Formula) else v for v in (gold, prediction)
        )
    if isinstance(gold, Region) and isinstance(prediction, Region):
        if gold.variable and prediction.variable and gold.variable != prediction.variable:
            return unequal("of different variables")
        if len(gold.parts) != len(prediction.parts):
            return unequal("different intervals")
        return every([_intervals(a, b) for a, b in zip(gold.parts, prediction.parts, strict=True)])
    sides = [relations.as_relation(s) if isinstance(s, Region) else s for s in (gold, prediction)]
    if isinstance(sides[0], Relation) and isinstance(sides[1], Relation):
        return arithmetic.chains(sides[0], sides[1])
    return unequal("one is an interval or inequality")


def _intervals(a: relations.Interval, b: relations.Interval) -> Verdict:
    if (a.low_closed, a.high_closed) != (b.low_closed, b.high_closed):
        return unequal("one is open where the other is closed")
    ends = [(a.low, b.low), (a.high, b.high)]
    if any((x is None) != (y is None) for x, y in ends):
        return unequal("one is bounded where the other is not")
    return every([arithmetic.formulas(x, y) for x, y in ends if x and y] or [equal("the whole line")])


def ratios(gold: Value, prediction: Value, precision: int | None) -> Verdict:
    """Two values of which one is a ratio or a time of the day."""
    if isinstance(gold, Ratio) and isinstance(prediction, Ratio):
        if gold.clock is not None and prediction.clock is not None:
            if gold.clock == prediction.clock:
                return equal("the same time or ratio")
            same = _proportional(gold, prediction)
            return unknown("different times, but equal as ratios") if same else unequal("different times or ratios")
        return _proportional(gold, prediction)
    times = [side.clock if isinstance(side, Ratio) else side.seconds if isinstance(side, Time) else None
             for side in (gold, prediction)]  # fmt: skip
    if isinstance(gold, Time) or isinstance(prediction, Time):
        if not all_of(times, int):
            return unequal("one is a time of the day")
        if abs(times[0] - times[1]) == 12 * 3600:
            halves = [isinstance(side, Time) and side.half for side in (gold, prediction)]
            hour = times[halves.index(False)] // 3600 if halves[0] != halves[1] else 24
            if hour <= 12:
                return equal("the same time, a.m. or p.m. left out")
            return unequal("twelve hours apart")
        return equal("the same time") if times[0] == times[1] else unequal("different times")
    ratio, other = (gold, prediction) if isinstance(gold, Ratio) else (prediction, gold)
    assert isinstance(ratio, Ratio)
    if len(ratio.trees) != 2 or not isinstance(other, Formula):
        return unequal("one is a ratio")
    quotient = Formula(("/", *ratio.trees))
    found = arithmetic.formulas(*((quotient, other) if ratio is gold else (other, quotient)), precision)
    if not found or ratio.clock is None or other.tree == quotient.tree:  # 9:10 and 9/10
        return found
    return unknown("a ratio or a time of the day")


def _proportional(gold: Ratio, prediction: Ratio) -> Verdict:
    """a : b : c = d : e : f, by the cross products with the first terms."""
    if len(gold.trees) != len(prediction.trees):
        return unequal("ratios of different length")
    a, b = gold.trees[0], prediction.trees[0]
    return every(
        [
            arithmetic.formulas(Formula(("*", a, y)), Formula(("*", b, x)))
            for x, y in zip(gold.trees[1:], prediction.trees[1:], strict=True)
        ]
    )
