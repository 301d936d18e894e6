"""Equality of formulas and quantities: exact first, then numeric probes; tolerance only where the data ask for it."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

from mmprm_jax.answers import exact, numeric, relations, trees
from mmprm_jax.answers.trees import Tree
from mmprm_jax.answers.units import Unit
from mmprm_jax.answers.values import Equation, Formula, Quantity, Relation
from mmprm_jax.answers.verdict import Verdict, equal, unequal, unknown

OPEN = "no rule decides this: "  # a text that was not understood: another way to read it may be
_FLOAT_DIGITS = 17  # a decimal of more is meant as it is


def formulas(gold: Formula, prediction: Formula, precision: int | None = None) -> Verdict:
    """gold = prediction? A gold decimal, or ``precision`` (decimals), says to which place the prediction is rounded."""
    if gold.percent != prediction.percent and not trees.variables(gold.tree):
        return _percent(gold, prediction)
    decimals = gold.decimals if precision is None else precision
    exactly = _same(gold.tree, prediction.tree)
    if exactly:
        if prediction.uncomputed and not gold.uncomputed and _computed(gold.tree):
            return unknown("the prediction is a sum or product that was left uncomputed")
        return exactly
    if decimals is not None and not (precision is None and prediction.digits > _FLOAT_DIGITS):
        close = numeric.within(gold.tree, prediction.tree, decimals)
        if close is not None:
            places = f"{decimals} decimal{'s' * (decimals != 1)}"
            return equal(f"equal when rounded to {places}") if close else unequal(f"different at {places}")
    return exactly


def _computed(tree: Tree) -> bool:
    """Whether a number has no sum, power or function in it: 5, 2/3, 30°."""
    return tree[0] in "nc" or tree[0] in "-*/" and all(map(_computed, tree[1:]))


def _percent(gold: Formula, prediction: Formula) -> Verdict:
    plain = [dataclasses.replace(f, percent=False) for f in (gold, prediction)]
    found = formulas(plain[0], plain[1])
    if found or found.kind == "unknown":
        return found
    bare = [f if not f.percent else Formula(("*", f.tree, ("n", Fraction(100)))) for f in (gold, prediction)]
    if _same(bare[0].tree, bare[1].tree):
        return unknown("equal but for a per cent sign that only one of them has")
    return found


def _same(a: Tree, b: Tree) -> Verdict:
    if a[0] == "n" == b[0]:
        return equal("the same number") if a[1] == b[1] else unequal("different numbers")
    if a == b:
        return equal("the same formula")
    if ("c", "∞") in (a, b) or ("-", ("c", "∞")) in (a, b):
        return unequal("one is infinite")
    try:
        if exact.same(a, b):
            return equal("equal by exact arithmetic")
        return unequal("different by exact arithmetic")
    except exact.Undefined as problem:
        return unknown(f"{problem} has no value")
    except exact.Open:
        pass
    found = numeric.compare(a, b)
    if found == "equal":
        return equal("equal to 60 digits at every probe")
    if found == "unequal":
        return unequal("different at a probe")
    if found == "domain":
        return unknown("equal where both are real, but not where only one of them is")
    if found == "integers":
        return equal("equal for all of a dozen whole numbers")
    return unknown(OPEN + "no probe has a value")


def quantities(gold: Quantity, prediction: Quantity, precision: int | None = None) -> Verdict:
    """Two numbers with units, compared in the gold answer's unit."""
    a, b = gold.unit, prediction.unit
    if a.counts and b.counts:
        found = formulas(gold.number, prediction.number, precision)
        if not found or not a.name or not b.name or a.name in b.name or b.name in a.name:
            return found
        return unknown(f"equal numbers, but of {a.name} and of {b.name}")
    if a.counts or b.counts:
        found = formulas(gold.number, prediction.number, precision)
        return unknown(f"equal numbers, but of {a.name} and of {b.name}") if found else found
    if a.dimensions != b.dimensions:
        return unequal(f"{a.name} and {b.name} measure different things")
    if a.factor == b.factor and a.half_turns == b.half_turns:
        return formulas(gold.number, prediction.number, precision)
    found = formulas(gold.number, _scaled(prediction.number, b, a), precision)
    return dataclasses.replace(found, reason=f"{found.reason}, in {a.name}")


def _scaled(number: Formula, unit: Unit, into: Unit) -> Formula:
    tree: Tree = ("*", number.tree, ("n", unit.factor / into.factor))
    if unit.half_turns != into.half_turns:
        tree = ("*" if unit.half_turns else "/", tree, ("c", "π"))
    return Formula(tree)


def radians(quantity: Quantity) -> Formula | None:
    """An angle as the number of radians; None: no angle."""
    if quantity.unit.dimensions != (("angle", 1),):
        return None
    tree: Tree = ("*", quantity.number.tree, ("n", quantity.unit.factor))
    return Formula(("*", tree, ("c", "π")) if quantity.unit.half_turns else tree)


def equations(gold: Equation, prediction: Equation) -> Verdict:
    """Two equations between formulas, by their normal form: one is a constant multiple of the other."""
    sides = [_sides(equation) for equation in (gold, prediction)]
    a, b = (("+", left, ("-", right)) for left, right in sides)
    found = numeric.proportional(a, b)
    if found == "yes":
        return equal("the same equation up to a factor")
    if found == "no":
        return unequal("different equations")
    shapes = [{trees.shape(left), trees.shape(right)} for left, right in sides]
    if shapes[0] == shapes[1]:
        return equal("the same sides")
    return unknown("an equation that is always true or never" if found else OPEN + "no probe has a value")


def _sides(equation: Equation) -> tuple[Tree, Tree]:
    assert equation.left is not None and isinstance(equation.right, Formula)
    return equation.left, equation.right.tree


def chains(gold: Relation, prediction: Relation) -> Verdict:
    """Two chains of inequalities, neighbour by neighbour."""
    if gold.ops != prediction.ops:
        return unequal("different relations")
    return every(
        _inequality(a, b, op)
        for (op, a), (_, b) in zip(relations.links(gold), relations.links(prediction), strict=True)
    )


def _inequality(a: Tree, b: Tree, op: str) -> Verdict:
    """0 op a and 0 op b: the factor between them is positive, or any but 0 for ≠ ."""
    ratio = numeric.ratio(a, b)
    if ratio is None:
        return unknown(OPEN + "no probe has a value")
    if ratio == "positive" or ratio == "negative" and op == "≠":
        return equal("the same up to a factor")
    return unequal("different relations")


def every(verdicts: object) -> Verdict:
    """Equal when all are; unequal as soon as one is."""
    found = list(verdicts)  # type: ignore[call-overload]
    for kind in ("unequal", "unknown"):
        for i, verdict in enumerate(found, 1):
            if verdict.kind == kind:
                return Verdict(kind, f"part {i}: {verdict.reason}" if len(found) > 1 else verdict.reason)
    return found[0] if len(found) == 1 else equal("equal part by part")
