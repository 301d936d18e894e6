"""Sums of tuples and matrices: (1, 2) + t(3, 4) is (1 + 3t, 2 + 4t)."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence

from mmprm_jax.answers import trees
from mmprm_jax.answers.scalars import parse_formula
from mmprm_jax.answers.split import split_with_signs
from mmprm_jax.answers.values import Formula, Items, Value

_MAX_SUMMANDS = 6
_MAX_TERM = 300  # characters
_CALLED = re.compile(r"[A-Za-z]{2}|[A-Z]")  # P_1(1, 2) is a point, max(1, 2) a number
_SCALED = re.compile(r"((?:[^()\[\],]|\([^()\[\],]*\))*?)([(\[].*,.*[)\]])")


def tuple_sum(text: str, read: Callable[[str], Value | None]) -> Items | None:
    """A sum of tuples, or of matrices, which are tuples of their rows; None: no such sum. read: reads a tuple."""
    # Most texts are none; only those with a bracket behind or before something else are taken apart.
    if "," not in text or not re.search(r"[)\]]\s*[-+]|[^\s(\[,]\s*[(\[]", text):
        return None
    terms, signs = split_with_signs(text, "[-+]")
    if not terms[0]:  # a sign before the first one
        terms = terms[1:]
    else:
        signs = ["+", *signs]
    if len(signs) != len(terms) or len(terms) > _MAX_SUMMANDS or max(map(len, terms)) > _MAX_TERM:
        return None
    total = None
    for sign, term in zip(signs, terms, strict=True):
        match = _SCALED.fullmatch(term)
        if not match or _CALLED.search(re.sub(r"\\[a-z]+", "", match[1])):
            return None
        scale = parse_formula(match[1].strip(" *") or "1")
        vector = read(match[2])
        if not isinstance(scale, Formula) or not isinstance(vector, Items) or vector.kind != "tuple":
            return None
        if len(terms) == 1 and trees.variables(scale.tree):
            return None  # f(1, 2)
        factor = ("-", scale.tree) if sign == "-" else scale.tree
        scaled = _mapped(vector, functools.partial(_product, factor))
        total = scaled if total is None else _added(total, scaled)
        if total is None:
            return None
    return total


def _product(factor: trees.Tree, tree: trees.Tree) -> trees.Tree:
    return ("*", factor, tree)


def _mapped(vector: Items, change: Callable[[trees.Tree], trees.Tree]) -> Items | None:
    """A tuple with each of its formulas changed, in the tuples in it, too; None: there are other things in it."""
    values: list[Value | None] = []
    for value in vector.values:
        if isinstance(value, Items) and value.kind == "tuple":
            values.append(_mapped(value, change))
        elif isinstance(value, Formula):
            values.append(Formula(change(value.tree), uncomputed=not trees.variables(value.tree)))
        else:
            return None
    return _tuple(values)


def _tuple(values: Sequence[Value | None]) -> Items | None:
    known = tuple(value for value in values if value is not None)
    return Items("tuple", known) if len(known) == len(values) else None


def _added(a: Items, b: Items | None) -> Items | None:
    """The sum of two tuples of formulas, or of tuples of these; None: they are not alike."""
    if b is None or len(a.values) != len(b.values):
        return None
    values: list[Value | None] = []
    for x, y in zip(a.values, b.values, strict=True):
        if isinstance(x, Items) and isinstance(y, Items):
            values.append(_added(x, y))
        elif isinstance(x, Formula) and isinstance(y, Formula):
            tree = ("+", x.tree, y.tree)
            values.append(Formula(tree, uncomputed=not trees.variables(tree)))
        else:
            return None
    return _tuple(values)
