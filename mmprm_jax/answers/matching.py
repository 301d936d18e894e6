"""Two typed values: which rule compares them, where their kinds differ and one is converted, equations and words."""

from __future__ import annotations

import dataclasses
import re

from mmprm_jax.answers import arithmetic, families, lists, measures, trees, words
from mmprm_jax.answers.arithmetic import OPEN
from mmprm_jax.answers.parse import read
from mmprm_jax.answers.values import (
    Date,
    Equation,
    Family,
    Formula,
    Items,
    Nothing,
    Quantity,
    Ratio,
    Region,
    Relation,
    Text,
    Time,
    Value,
    all_of,
)
from mmprm_jax.answers.verdict import Verdict, equal, unequal, unknown


def compare(gold: Value, prediction: Value, precision: int | None = None) -> Verdict:
    """Two typed values; kinds that differ are converted where that is meant."""
    if isinstance(gold, Equation) or isinstance(prediction, Equation):
        return _equations(gold, prediction, precision)
    if isinstance(gold, Items) or isinstance(prediction, Items):
        return lists.compare(gold, prediction, lambda a, b: compare(a, b, precision))
    if isinstance(gold, Text) or isinstance(prediction, Text):
        return _words(gold, prediction, precision)
    if isinstance(gold, Family) or isinstance(prediction, Family):
        return families.compare(gold, prediction, lambda a, b: compare(a, b, precision))
    if isinstance(gold, Region | Relation) or isinstance(prediction, Region | Relation):
        return measures.ranges(gold, prediction)
    if isinstance(gold, Ratio | Time) or isinstance(prediction, Ratio | Time):
        return measures.ratios(gold, prediction, precision)
    if isinstance(gold, Date) or isinstance(prediction, Date):
        return measures.dates(gold, prediction)
    if isinstance(gold, Nothing) or isinstance(prediction, Nothing):
        same = all(
            isinstance(v, Nothing) or isinstance(v, Formula) and v.tree == ("v", "φ") for v in (gold, prediction)
        )
        return equal("both say that there is none") if same else unequal("one says that there is none")
    return measures.measures(gold, prediction, precision)


def _equations(gold: Value, prediction: Value, precision: int | None) -> Verdict:
    if isinstance(gold, Equation) and isinstance(prediction, Equation):
        if gold.name and prediction.name and _same_name(gold, prediction):
            return compare(gold.right, prediction.right, precision)
        return _two_equations(*_in_one_unit(gold, prediction), precision)
    if isinstance(gold, Equation):
        equation, other = gold, prediction
    else:
        assert isinstance(prediction, Equation)
        equation, other = prediction, gold
    if isinstance(other, Items) and other.kind != "tuple" and len(other.values) != 1:
        return lists.compare(gold, prediction, lambda a, b: compare(a, b, precision))
    if isinstance(other, Text) and not other.formula:
        return _words(gold, prediction, precision)
    pair: tuple[Value, Value] = (equation.right, other) if equation is gold else (other, equation.right)
    found = compare(*pair, precision)
    if found and isinstance(equation.right, Formula) and equation.right.tree[0] == "v":
        return unknown("one of two things that are said to be equal")  # AB = CD
    if found and equation is prediction and isinstance(other, Formula):
        number = not trees.variables(other.tree) and other.tree != trees.ZERO
        if number and _is_target_expression(equation.left):
            return found
    if found and not equation.name and equation.left is not None and not _says_a_value(equation):
        return unknown("the value that an equation's right side has")
    return found


def _two_equations(gold: Equation, prediction: Equation, precision: int | None) -> Verdict:
    """Two equations that do not say the value of one thing."""
    if _formulas(gold) and _formulas(prediction):
        called = [bool(e.name and "(" in e.name) for e in (gold, prediction)]
        if called[0] != called[1]:  # f(x) = 2x and y = 2x
            other = prediction if called[0] else gold
            return compare(gold.right, prediction.right) if other.name == "y" else unequal("different names")
        return arithmetic.equations(gold, prediction)
    if gold.left is None or prediction.left is None:
        found = compare(gold.right, prediction.right, precision)
        return unknown("equal values under different names") if found else found
    return unequal("different names")


def _in_one_unit(gold: Equation, prediction: Equation) -> tuple[Equation, Equation]:
    """∠1 + ∠2 = 180° and a + b = 5 cm with numbers on the right, if both have the same unit."""
    sides = [equation.right for equation in (gold, prediction)]
    if not all_of(sides, Quantity) or sides[0].unit != sides[1].unit:
        return gold, prediction
    bare = [arithmetic.radians(side) or side.number for side in sides]
    return dataclasses.replace(gold, right=bare[0]), dataclasses.replace(prediction, right=bare[1])


def _same_name(gold: Equation, prediction: Equation) -> bool:
    """x is x, and one of x_1 and x_2; an angle A is ∠A."""
    a, b = gold.name or "", prediction.name or ""
    if a.removeprefix("∠") == b.removeprefix("∠") and isinstance(gold.right, Quantity):
        return arithmetic.radians(gold.right) is not None
    return a == b or ("_" in a) != ("_" in b) and a.split("_")[0] == b.split("_")[0]


def _formulas(equation: Equation) -> bool:
    return equation.left is not None and isinstance(equation.right, Formula)


def _is_target_expression(left: trees.Tree | None) -> bool:
    """Whether a left side can be what a question asks for: a + b, xy; not 2x + 3, a step on the way to x."""
    if left is None or len(trees.variables(left)) < 2 or trees.variables(left) <= {"x", "y", "z"}:  # a line
        return False

    def bare(tree: trees.Tree) -> bool:
        if tree[0] == "^":
            return tree[1][0] == "v" and tree[2][0] == "n"
        return tree[0] == "v" or tree[0] in "+-*/" and all(bare(t) for t in tree[1:])

    return bare(left)


def _says_a_value(equation: Equation) -> bool:
    """Whether an equation says what something is: |AB| = 5, tan A = 2, 2 + 3 = 5; not 2x = 5."""
    assert equation.left is not None
    if equation.left[0] in ("v", "f"):
        return True
    if equation.left[0] in ("*", "/") and all(t[0] == "v" and re.match("[A-Z∠].", t[1]) for t in equation.left[1:]):
        return True  # AB / CD = 2
    return isinstance(equation.right, Formula | Quantity) and bool(
        measures.measures(Formula(equation.left), equation.right, None)
    )


def _words(gold: Value, prediction: Value, precision: int | None) -> Verdict:
    if not (isinstance(gold, Text) and isinstance(prediction, Text)):
        text, other = (gold, prediction) if isinstance(gold, Text) else (prediction, gold)
        assert isinstance(text, Text)
        if isinstance(other, Region | Relation) and (said := words.inequality(text.text)):
            found = read(said)
            return compare(found, other, precision) if text is gold else compare(other, found, precision)
        if text.formula and not isinstance(other, Text):
            formula = text.formula
            return compare(formula, other, precision) if text is gold else compare(other, formula, precision)
        if re.search(r"[\d\\^=]", text.text) or len(text.text.split()) > 3:
            return unknown(OPEN + f"{text.text[:60]!r} is not understood ({text.why or 'text'})")
        return unequal("one is a word")
    a, b = words.plain(gold.text), words.plain(prediction.text)
    same_letters = gold.text.casefold() == prediction.text.casefold()
    if a == b and same_letters and not words.equal_but_for_case(gold.text, prediction.text):
        return unequal("capital letters, and small ones")
    if a == b or words.symmetric_forms(a) == words.symmetric_forms(b):
        return equal("the same words")
    if words.states_answer(a, b) or words.states_answer(b, a):
        return equal("the same words, in a sentence")
    if words.equal_but_for_preposition(a, b):
        return equal("the same words but for a preposition")
    if re.sub("[ -]", "", a) == re.sub("[ -]", "", b):
        return equal("the same words but for spaces and hyphens")
    if gold.formula and prediction.formula and arithmetic.formulas(gold.formula, prediction.formula):
        return equal("the same product")
    if "\\" in gold.text + prediction.text:
        return unknown(OPEN + (gold.why or prediction.why or "text"))
    if max(len(a.split()), len(b.split())) > 3 or re.search(r"[\u4e00-\u9fff]{4}", a + b):
        return unknown("different words, which may still mean the same")
    return unequal("different words")
