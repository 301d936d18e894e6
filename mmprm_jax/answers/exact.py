"""Rational arithmetic on trees: fractions of whole numbers without rounding, for what is too large for a float.

10^100 and 10^100 + 1 agree to 100 digits; only here they differ. Variables are given rational values, so that a
difference between two formulas is proof, and agreement at several such points all but certain.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from fractions import Fraction

from mmprm_jax.answers.trees import Tree, nodes, variables

_POINTS = 4
_MAX_NODES = 500
_MAX_BITS = 200_000  # of a numerator or denominator
_MAX_FACTORIAL = 5000
_MAX_CHOSEN = 2000  # of a binomial coefficient


class Open(Exception):
    """Not decided by rational arithmetic: a root, π, a function, or a number beyond the bounds."""


class Undefined(Open):
    """Division by zero and the like."""


def same(a: Tree, b: Tree) -> bool:
    """Whether two formulas have the same value at every point where both have one.

    Raises Open; Undefined where there is no such point.
    """
    if nodes(a) > _MAX_NODES or nodes(b) > _MAX_NODES:
        raise Open("a long formula")
    names = variables(a) | variables(b)
    found = None
    for number in range(_POINTS if names else 1):
        at = {name: _point(name, number) for name in names}
        try:
            if value(a, at) != value(b, at):
                return False
            found = True
        except Undefined as problem:
            undefined = problem
    if found is None:
        raise undefined
    return True


def _point(name: str, number: int) -> Fraction:
    """The value of a variable at a point: no fraction that anybody writes, of either sign."""
    digest = hashlib.blake2b(f"{name}/{number}".encode(errors="replace"), digest_size=4).digest()
    size = Fraction(int.from_bytes(digest, "little") + 1, 2**31)
    return -size if number % 2 else size


def value(tree: Tree, at: Mapping[str, Fraction]) -> Fraction:
    """The value of a tree whose variables have the values ``at``. Raises Open."""
    kind = tree[0]
    if kind == "n":
        return tree[1]
    if kind == "v":
        return at[tree[1]]
    if kind == "c":
        raise Open(f"{tree[1]} is no fraction")
    if kind == "f":
        return _function(tree[1], [value(t, at) for t in tree[2:]])
    first, *rest = [value(t, at) for t in tree[1:]]
    if kind == "-":
        return -first
    if kind == "!":
        return Fraction(math.factorial(_whole(first, _MAX_FACTORIAL)))
    second = rest[0]
    if kind == "^":
        return _power(first, second)
    if kind == "/" and not second:
        raise Undefined("a division by zero")
    return _bounded({"+": Fraction.__add__, "*": Fraction.__mul__, "/": Fraction.__truediv__}[kind](first, second))


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise Open("a root")
    if not base and exponent < 0:
        raise Undefined("a division by zero")
    if _bits(base) * abs(exponent) > _MAX_BITS:
        raise Open("too many digits")
    return base ** int(exponent)


def _function(name: str, values: list[Fraction]) -> Fraction:
    if name == "abs":
        return abs(values[0])
    if name in ("floor", "ceil"):
        return Fraction({"floor": math.floor, "ceil": math.ceil}[name](values[0]))
    if name == "binom":
        n = _whole(values[0], _MAX_CHOSEN)
        return Fraction(math.comb(n, _whole(values[1], n)))
    raise Open(f"the function {name}")


def _whole(number: Fraction, maximum: int) -> int:
    if number.denominator != 1 or not 0 <= number <= maximum:
        raise Open("no whole number, or a large one")
    return int(number)


def _bits(number: Fraction) -> int:
    return max(number.numerator.bit_length(), number.denominator.bit_length())


def _bounded(number: Fraction) -> Fraction:
    if _bits(number) > _MAX_BITS:
        raise Open("too many digits")
    return number
