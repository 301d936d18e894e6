"""Solutions in families: kπ + π/3 with k ∈ Z is the same set as nπ - 2π/3 with n ∈ Z."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from fractions import Fraction

from mmprm_jax.answers import numeric, relations, trees
from mmprm_jax.answers.trees import Tree
from mmprm_jax.answers.values import Equation, Family, Formula, Items, Quantity, Region, Relation, Value
from mmprm_jax.answers.verdict import Verdict, unequal, unknown

PARAMETERS = frozenset("nkm")
_WHOLE = 1e-50  # what two computations of a whole number may differ by


def as_family(value: Value, name: str, every: bool) -> Value:
    """The value as a family, or the values in it as one each; without the name it is what it is."""
    if isinstance(value, Items):
        if value.region and all(name in trees.variables(tree) for tree in _trees(value.region)):
            return Family(value.region, name, every)  # (kπ, kπ + 1); (kπ, 0) is a point
        return dataclasses.replace(value, values=tuple(as_family(v, name, every) for v in value.values))
    if isinstance(value, Equation):
        plain = value.name is not None and len(value.name) == 1  # a_n = 2n is one sequence, no set
        endless = plain and value.name != name or not every
        return dataclasses.replace(value, right=as_family(value.right, name, every)) if endless else value
    if isinstance(value, Relation):
        value = relations.between(value, name) or value
    if isinstance(value, Formula | Quantity | Region) and any(name in trees.variables(tree) for tree in _trees(value)):
        return Family(value, name, every)
    return value


def is_region(value: Value) -> bool:
    return isinstance(value, Family) and isinstance(value.value, Region)


def _trees(value: Formula | Quantity | Region) -> list[Tree]:
    if isinstance(value, Region):
        return [end.tree for part in value.parts for end in (part.low, part.high) if end]
    return [value.tree if isinstance(value, Formula) else value.number.tree]


def _mapped(value: Formula | Quantity | Region, change: Callable[[Tree], Tree]) -> Formula | Quantity | Region:
    """The value with each of its trees changed; other readings are left out."""
    if isinstance(value, Formula):
        return Formula(change(value.tree))
    if isinstance(value, Quantity):
        return Quantity(Formula(change(value.number.tree)), value.unit)
    parts = []
    for part in value.parts:
        low, high = (end and Formula(change(end.tree)) for end in (part.low, part.high))
        parts.append(dataclasses.replace(part, low=low, high=high))
    return Region(tuple(parts), value.variable)


def compare(gold: Value, prediction: Value, same: Callable[[Value, Value], Verdict]) -> Verdict:
    """Two values of which one is a family; the other may be one that does not say so. same: compares two values."""
    a, b = _family(gold, prediction), _family(prediction, gold)
    if a is None or b is None:
        return unequal("one is a family of values")
    if a.every != b.every:
        return unequal("families over different whole numbers")
    name: Tree = ("v", a.parameter)
    other = _mapped(b.value, lambda tree: trees.replaced(tree, ("v", b.parameter), name))
    first = same(a.value, other)
    if first or not a.every or a.parameter != b.parameter and a.parameter in trees.variables(_trees(b.value)[0]):
        return first
    found = first
    for by in _shifts(_trees(a.value)[0], _trees(other)[0], a.parameter):
        found = same(a.value, _mapped(other, functools.partial(trees.replaced, old=name, new=by)))
        if found:
            return found
    linear = [trees.linear(tree, a.parameter) for tree in (*_trees(a.value), *_trees(other))]
    return found if None not in linear else unknown("families that may be the same for other whole numbers")


def _family(value: Value, other: Value) -> Family | None:
    """A family that may not say that it is one: it does if the other one is."""
    if isinstance(value, Family):
        return value
    assert isinstance(other, Family)
    if not isinstance(value, Formula | Quantity | Region):
        return None
    names = frozenset().union(*map(trees.variables, _trees(value))) & (PARAMETERS | {other.parameter})
    return Family(value, next(iter(names)), other.every) if len(names) == 1 else None


def _shifts(a: Tree, b: Tree, name: str) -> list[Tree]:
    """What the whole number in b is, where b may run through the values of a: k + c or c - k."""
    left, right = trees.linear(a, name), trees.linear(b, name)
    if not left or not right:
        return []
    found = []
    for sign in (("v", name), ("-", ("v", name))):
        steps = numeric.constant(("/", ("+", left[0], ("-", right[0])), right[1]))
        if steps is not None and abs(steps - (whole := round(steps))) < _WHOLE:
            found.append(("+", sign, ("n", Fraction(int(whole)))))
    return found
