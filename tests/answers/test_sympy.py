"""Expressions that sympy writes: another way to write one is never unequal to it, another value never equal."""

import random

import sympy

from mmprm_jax.answers import equal

X, Y = sympy.symbols("x y")


def number(rng):
    """An exact real number, of at most three operations."""
    value = sympy.Integer(rng.randint(1, 12))
    for _ in range(rng.randint(0, 3)):
        other = sympy.Rational(rng.randint(1, 12), rng.randint(1, 6))
        kind = rng.randrange(5)
        if kind == 0:
            value += other
        elif kind == 1:
            value -= sympy.sqrt(rng.randint(2, 12))
        elif kind == 2:
            value *= other
        elif kind == 3:
            value /= 1 + sympy.sqrt(rng.choice([2, 3, 5, 7]))
        else:
            value *= rng.choice([sympy.pi, sympy.sqrt(3)])
    return value


def polynomial(rng):
    """Up to three factors in x and y with small whole numbers."""
    factors = [rng.randint(1, 4) * X + rng.randint(-5, 5) + rng.choice([0, Y]) for _ in range(rng.randint(1, 3))]
    return sympy.Mul(*factors)


def written(value):
    return f"${sympy.latex(value)}$"


def check_equal(pairs):
    """None is unequal, and nearly all are found equal."""
    kinds = {(written(a), written(b)): equal(written(a), written(b)).kind for a, b in pairs}
    assert not [pair for pair, kind in kinds.items() if kind == "unequal"]
    assert list(kinds.values()).count("equal") > 0.95 * len(kinds)


def test_numbers_written_otherwise():
    rng = random.Random(0)
    values = [number(rng) for _ in range(150)]
    check_equal((x, form(x)) for x in values for form in (sympy.radsimp, sympy.expand, sympy.together))


def test_polynomials_written_otherwise():
    rng = random.Random(1)
    values = [polynomial(rng) for _ in range(100)]
    check_equal((x, form(sympy.expand(x))) for x in values for form in (sympy.expand, sympy.horner))


def test_other_values_are_not_equal():
    rng, wrong, told = random.Random(2), [], 0
    for make in (number, polynomial):
        for _ in range(150):
            value = make(rng)
            if sympy.expand(value) == 0:
                continue
            for other in (value + sympy.Rational(1, rng.randint(1, 50)), 2 * value, -value):
                verdict = equal(written(value), written(sympy.expand(other)))
                told += verdict.kind == "unequal"
                if verdict:
                    wrong.append((written(value), written(sympy.expand(other))))
    assert not wrong
    assert told > 0.95 * 900
