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


def test_numbers_written_otherwise():
    rng, found, missed = random.Random(0), 0, []
    for _ in range(150):
        value = number(rng)
        for other in (sympy.radsimp(value), sympy.expand(value), sympy.together(value)):
            verdict = equal(written(value), written(other))
            found += verdict.kind == "equal"
            if verdict.kind == "unequal":
                missed.append((written(value), written(other)))
    assert not missed
    assert found > 0.95 * 450


def test_polynomials_written_otherwise():
    rng, found, missed = random.Random(1), 0, []
    for _ in range(100):
        value = polynomial(rng)
        for other in (sympy.expand(value), sympy.horner(sympy.expand(value), X)):
            verdict = equal(written(value), written(other))
            found += verdict.kind == "equal"
            if verdict.kind == "unequal":
                missed.append((written(value), written(other)))
    assert not missed
    assert found > 0.95 * 200


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
