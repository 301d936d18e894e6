"""Exact values: fractions of polynomials over Q with roots of integers, π, i and variables as generators.

A polynomial is a dict {monomial: coefficient}; a monomial is a sorted tuple of (generator, exponent). Generators are
primes (exponent in (0, 1): a root), "π", "i" (exponent 1) and names. Different monomials are linearly independent over
Q, so two values are equal exactly when their cross products are the same dict.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from mmprm_jax.answers.syntax import Tree

Monomial = tuple[tuple[Any, Fraction], ...]
Polynomial = dict[Monomial, Fraction]
Value = tuple[Polynomial, Polynomial]  # numerator, denominator

MAX_TERMS = 300
MAX_BITS = 200_000  # of a coefficient
MAX_FACTORIAL = 5000
MAX_EXPONENT = 100_000
_MAX_FACTORED = 10**12  # trial division up to its square root takes milliseconds

ONE: Polynomial = {(): Fraction(1)}


class Open(Exception):
    """Not decided by exact arithmetic: a function without a closed form here, or a value beyond the bounds."""


class Undefined(Open):
    """Division by zero and the like."""


def multiply(a: Polynomial, b: Polynomial) -> Polynomial:
    if len(a) * len(b) > MAX_TERMS * 4:
        raise Open("too many terms")
    found: Polynomial = {}
    for m, p in a.items():
        for n, q in b.items():
            monomial, factor = _monomial(m, n)
            found[monomial] = found.get(monomial, Fraction(0)) + p * q * factor
    found = {m: c for m, c in found.items() if c}
    _check(found)
    return found


def add(a: Polynomial, b: Polynomial) -> Polynomial:
    found = dict(a)
    for m, c in b.items():
        found[m] = found.get(m, Fraction(0)) + c
    return {m: c for m, c in found.items() if c}


def _check(a: Polynomial) -> None:
    if len(a) > MAX_TERMS:
        raise Open("too many terms")
    for c in a.values():
        if c.numerator.bit_length() + c.denominator.bit_length() > MAX_BITS:
            raise Open("too many digits")


def _monomial(a: Monomial, b: Monomial) -> tuple[Monomial, Fraction]:
    """The product of two monomials, and the rational number that comes out of their roots."""
    if not a or not b:
        return a or b, Fraction(1)
    found, factor = dict(a), Fraction(1)
    for generator, exponent in b:
        exponent += found.pop(generator, 0)
        if isinstance(generator, int):  # a prime
            whole = math.floor(exponent)
            exponent -= whole
            factor *= Fraction(generator) ** whole
        elif generator == "i":
            factor *= (-1) ** (int(exponent) // 2)
            exponent %= 2
        if exponent:
            found[generator] = exponent
    return tuple(sorted(found.items(), key=lambda item: str(item[0]))), factor


def generator(name: Any, exponent: Fraction = Fraction(1)) -> Polynomial:
    return {((name, exponent),): Fraction(1)}


def times(a: Value, b: Value) -> Value:
    return multiply(a[0], b[0]), multiply(a[1], b[1])


def plus(a: Value, b: Value) -> Value:
    if a[1] == b[1]:
        return add(a[0], b[0]), a[1]
    return add(multiply(a[0], b[1]), multiply(b[0], a[1])), multiply(a[1], b[1])


def negative(a: Value) -> Value:
    return {m: -c for m, c in a[0].items()}, a[1]


def inverse(a: Value) -> Value:
    if not a[0]:
        raise Undefined("a division by zero")
    if len(a[0]) == 1:  # 1/√2 is √2/2
        ((monomial, c),) = a[0].items()
        if all(isinstance(g, int) or g == "i" for g, _ in monomial):
            top, factor = _monomial(monomial, tuple((g, Fraction(1) if g == "i" else 1 - e) for g, e in monomial))
            rest = tuple((g, Fraction(1) if g == "i" else 1 - e) for g, e in monomial)
            assert top == ()
            return multiply(a[1], {rest: 1 / (c * factor)}), ONE
    return a[1], a[0]


def rational(a: Value) -> Fraction | None:
    """The number, if a value is one that needs no generator."""
    top, bottom = a
    if not top:
        return Fraction(0)
    monomial = next(iter(top))
    if top.keys() == bottom.keys():
        ratio = top[monomial] / bottom[monomial]
        if all(c == ratio * bottom[m] for m, c in top.items()):
            return ratio
    return None


def same(a: Value, b: Value) -> bool:
    """Whether two values are equal. Raises Open when that is too long a computation."""
    if a[1] == b[1]:
        return a[0] == b[0]
    return multiply(a[0], b[1]) == multiply(b[0], a[1])


def proportional(a: Polynomial, b: Polynomial) -> bool:
    """Whether one is a constant multiple of the other; neither is zero."""
    if not a or not b:
        return False

    def split(p: Polynomial) -> dict[Monomial, Polynomial]:
        """By what depends on variables: the constant factor of each."""
        found: dict[Monomial, Polynomial] = {}
        for monomial, c in p.items():
            names = tuple(item for item in monomial if _is_name(item[0]))
            rest = tuple(item for item in monomial if not _is_name(item[0]))
            found.setdefault(names, {})[rest] = c
        return found

    left, right = split(a), split(b)
    if left.keys() != right.keys() or left.keys() == {()}:
        return False
    first = next(iter(left))
    return all(multiply(left[m], right[first]) == multiply(right[m], left[first]) for m in left)


def _is_name(g: Any) -> bool:
    return isinstance(g, str) and g not in ("π", "i")


def without_common_variables(p: Polynomial) -> Polynomial:
    """Divided by the variables that are in every term."""
    common = None
    for monomial in p:
        powers = {g: e for g, e in monomial if _is_name(g)}
        common = powers if common is None else {g: min(e, powers[g]) for g, e in common.items() if g in powers}
    if not common:
        return p
    return {
        tuple((g, e - common.get(g, 0)) for g, e in monomial if e - common.get(g, 0)): c for monomial, c in p.items()
    }


@functools.lru_cache(maxsize=1024)
def _factors(n: int) -> tuple[tuple[int, int], ...]:
    """Prime factors of n >= 1 with multiplicities."""
    if n > _MAX_FACTORED:
        raise Open("a root of a large number")
    found, p = [], 2
    while p * p <= n:
        k = 0
        while n % p == 0:
            n, k = n // p, k + 1
        if k:
            found.append((p, k))
        p += 1 + (p > 2)
    return (*found, (n, 1)) if n > 1 else tuple(found)


def root(number: Fraction, power: Fraction) -> Polynomial:
    """number ** power, the principal value; odd roots of negative numbers are real. Raises Open."""
    if number == 0:
        if power <= 0:
            raise Undefined("a power of zero")
        return {}
    found: Polynomial = ONE
    if number < 0:
        if power.denominator == 2:
            found = multiply({(): Fraction((-1) ** (power.numerator // 2))}, generator("i"))
        elif power.denominator % 2 == 0:
            raise Open("a complex root")
        else:
            found = {(): Fraction((-1) ** (power.numerator % 2))}
    coefficient, powers = Fraction(1), []
    for base, sign in ((abs(number.numerator), 1), (number.denominator, -1)):
        for prime, k in _factors(base):
            exponent = power * k * sign
            whole = math.floor(exponent)
            coefficient *= _integer_power(Fraction(prime), whole)
            if exponent != whole:
                powers.append((prime, exponent - whole))
    return multiply(found, {tuple(sorted(powers, key=lambda item: str(item[0]))): coefficient})


def _integer_power(base: Fraction, exponent: int) -> Fraction:
    if abs(exponent) > MAX_EXPONENT:
        raise Open("a large exponent")
    if max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(exponent) > MAX_BITS:
        raise Open("too many digits")
    if not base and exponent < 0:
        raise Undefined("a division by zero")
    return base**exponent


def _power(base: Value, exponent: Value) -> Value:
    power, number = rational(exponent), rational(base)
    if power is None:
        if number == 1:
            return base
        raise Open("an exponent that is no number")
    if number is not None:
        if power.denominator == 1:
            return {(): value} if (value := _integer_power(number, int(power))) else {}, ONE
        return root(number, power), ONE
    if power.denominator != 1:
        raise Open("a root of a sum")
    if abs(power) > 60:
        raise Open("a large exponent")
    found, square, n = (ONE, ONE), base if power > 0 else inverse(base), abs(int(power))
    while n:
        if n & 1:
            found = times(found, square)
        n >>= 1
        if n:
            square = times(square, square)
    return found


def _function(name: str, values: list[Value]) -> Value:
    first = rational(values[0])
    if name == "root":
        index = rational(values[1])
        if not index or index.denominator != 1 or abs(index) > 1000:
            raise Open("a root of that kind")
        return _power(values[0], ({(): 1 / index}, ONE))
    if name == "abs" and first is not None:
        return {(): abs(first)} if first else {}, ONE
    if name == "binom":
        k = rational(values[1])
        if first is None or k is None or first.denominator != 1 or k.denominator != 1 or not 0 <= k <= first <= 2000:
            raise Open("a binomial coefficient")
        return {(): Fraction(math.comb(int(first), int(k)))}, ONE
    raise Open(f"the function {name}")


def _factorial(value: Value) -> Value:
    n = rational(value)
    if n is None or n.denominator != 1 or not 0 <= n <= MAX_FACTORIAL:
        raise Open("a factorial")
    return {(): Fraction(math.factorial(int(n)))}, ONE


_BINARY: dict[str, Callable[[Value, Value], Value]] = {
    "+": plus, "*": times, "^": _power, "/": lambda a, b: times(a, inverse(b)),
}  # fmt: skip


def value(tree: Tree) -> Value:
    """The exact value of a tree. Raises Open."""
    kind = tree[0]
    if kind == "n":
        return {(): tree[1]} if tree[1] else {}, ONE
    if kind == "v" or kind == "c" and tree[1] in ("π", "i"):
        return generator(tree[1]), ONE
    if kind in _BINARY:
        return _BINARY[kind](value(tree[1]), value(tree[2]))
    if kind == "-":
        return negative(value(tree[1]))
    if kind == "!":
        return _factorial(value(tree[1]))
    if kind == "f":
        return _function(tree[1], [value(t) for t in tree[2:]])
    raise Open(f"{tree[1]} has no exact value here")
