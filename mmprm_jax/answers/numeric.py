"""Numeric probes: two formulas at fixed points, to many digits. A difference is proof, agreement all but certain."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, Literal

import mpmath

from mmprm_jax.answers.trees import ZERO, Tree, nodes, variables

DIGITS = 90  # of the computation
_AGREE = 60  # digits
_ZERO = 75  # a value under 10^-75 may be a zero
POINTS = 6  # three positive, two negative, one of integers
_NEEDED = 3  # points at which both formulas have a value
MAX_NODES = 500
_MAX_EXPONENT = 10**15  # a power above it is Huge
_MAX_ARGUMENT = 10**9  # of a function
_MAX_POWER = 6  # of a variable by which two equations differ

_local = threading.local()


class Undecided(Exception):
    """A formula has no value here."""


class Huge(Undecided):
    """A number with more digits than can be counted: larger than every other one that is computed."""


def context() -> Any:
    """This thread's arithmetic: an mpmath context changes its precision while it computes."""
    if not hasattr(_local, "mp"):
        _local.mp = mpmath.MPContext()
        _local.mp.dps = DIGITS
    return _local.mp


def point(name: str, number: int) -> Any:
    """The value of a variable at a probe. A function of the two alone."""
    mp = context()
    if number == POINTS - 1:
        return mp.mpf(2 + hashlib.blake2b(name.encode(), digest_size=1).digest()[0] % 7)
    digest = hashlib.blake2b(f"{name}/{number}".encode(errors="replace"), digest_size=8).digest()
    size = mp.mpf(3) / 10 + 2 * mp.mpf(int.from_bytes(digest, "little")) / 2**64
    return -size if number in (3, 4) else size


def evaluate(tree: Tree, at: Mapping[str, Any]) -> Any:
    """The value of a tree as a number of mpmath. Raises Undecided."""
    mp, kind = context(), tree[0]
    if kind == "n":
        return mp.mpf(tree[1].numerator) / tree[1].denominator
    if kind == "v":
        return at[tree[1]]
    if kind == "c":
        if tree[1] == "∞":
            raise Undecided("infinity is no number")
        return {"π": mp.pi, "e": mp.e, "i": mp.j}[tree[1]] * 1
    values = [evaluate(t, at) for t in tree[1:] if isinstance(t, tuple)]
    if kind == "^" and (odd := _odd_root(tree[2])) and not mp.im(values[0]) and values[0] < 0:
        return (-1) ** (odd.numerator % 2) * _power(mp, -values[0], values[1])  # as for roots of numbers: it is real
    try:
        return _apply(mp, kind, tree[1], values)
    except (ZeroDivisionError, ValueError, OverflowError, TypeError, mpmath.libmp.NoConvergence) as error:
        raise Undecided(f"no value ({type(error).__name__})") from None


def _apply(mp: Any, kind: str, name: Any, values: list[Any]) -> Any:
    first = values[0]
    second: Any = values[1] if len(values) > 1 else None
    if kind == "+":
        return first + second
    if kind == "*":
        return first * second
    if kind == "/":
        return first / second
    if kind == "-":
        return -first
    if kind == "^":
        return _power(mp, first, second)
    if kind == "!":
        _bounded(mp, first, 10_000)
        return mp.factorial(first)
    if name == "root":
        if not mp.im(first) and first < 0 and second == mp.floor(second) and second % 2 == 1:
            return -((-first) ** (1 / second))
        return _power(mp, first, 1 / second)
    if name == "binom":
        _bounded(mp, first, 10_000)
        return mp.binomial(first, second)
    if name == "log":
        return mp.log(first, 10 if second is None else second)
    _bounded(mp, first, _MAX_ARGUMENT)
    if name in ("floor", "ceil") and _tiny(first - mp.nint(first)):
        return mp.nint(first)  # a whole number but for the last digits
    return abs(first) if name == "abs" else getattr(mp, name)(first)


def _odd_root(exponent: Tree) -> Fraction | None:
    """An exponent such as 2/3, whose power of a negative number is real."""
    if exponent[0] == "-":
        found = _odd_root(exponent[1])
        return found and -found
    if exponent[0] == "/" and exponent[1][0] == exponent[2][0] == "n" and exponent[2][1]:
        found = exponent[1][1] / exponent[2][1]
        return found if found.denominator > 1 and found.denominator % 2 else None
    return None


def _bounded(mp: Any, value: Any, limit: int) -> None:
    if abs(value) > limit:
        raise Undecided("an argument too large to compute")


def _power(mp: Any, base: Any, exponent: Any) -> Any:
    if abs(exponent) > 2 and base and abs(mp.log(abs(base)) * exponent) > _MAX_EXPONENT:
        grows = (abs(base) > 1) == (mp.re(exponent) > 0)
        raise Huge("a power too large to compute") if grows else Undecided("a power too small to compute")
    return base**exponent


def _value(tree: Tree, at: Mapping[str, Any]) -> Any:
    """As ``evaluate``; "huge" for a power, or a product with one, that is too large."""
    try:
        return evaluate(tree, at)
    except Huge:
        if tree[0] == "^":
            return "huge"
        raise


def compare(a: Tree, b: Tree) -> Literal["equal", "unequal", "open", "integers", "domain"]:
    """What the probes say of a = b. "integers": they agree there and only there; "domain": where both are real."""
    if nodes(a) > MAX_NODES or nodes(b) > MAX_NODES:
        return "open"
    mp, names = context(), variables(a) | variables(b)
    agreed = integers = differ = outside = nowhere = 0
    real_ = names and not (_complex(a) or _complex(b))
    whole = names and all(name[0] in "nkm" for name in names)
    for number in range(POINTS if names else 1):
        at = {name: point(name, number) for name in names}
        try:
            left, right = _value(a, at), _value(b, at)
        except Undecided:
            continue
        if "huge" in (left, right):
            if left != right and not names:
                return "unequal"
            continue
        if max(abs(left), abs(right)) < mp.mpf(10) ** -_ZERO:
            if not (_is_zero(a, at) and _is_zero(b, at)):
                continue  # numbers too small to tell from zeros
            left = right = mp.mpf(1)
        if abs(left - right) > mp.mpf(10) ** -_AGREE * max(abs(left), abs(right)):
            beyond = sum(abs(mp.im(side)) > mp.mpf(10) ** -_AGREE for side in (left, right)) if real_ else 0
            differ, outside, nowhere = differ + (beyond == 0), outside + (beyond == 1), nowhere + (beyond == 2)
            if differ and not whole:
                return "unequal"
        else:
            agreed += 1
            integers += number == POINTS - 1
    if (differ or outside) and integers and whole:
        return "integers" if all(_agree_at(a, b, names, more) for more in range(1, 12)) else "unequal"
    if differ:
        return "unequal"
    enough = agreed >= (_NEEDED if names else 1)
    if enough:
        return "domain" if outside else "equal"
    return "unequal" if outside or nowhere else "open"


def _is_zero(tree: Tree, at: Mapping[str, Any]) -> bool:
    """Whether a value that is nearly nothing is a zero: with twice the digits it shrinks, a tiny number stays."""
    mp = context()
    coarse = abs(evaluate(tree, at))
    with mp.workdps(2 * DIGITS):
        fine = abs(evaluate(tree, at))
    return bool(fine <= coarse * mp.mpf(10) ** -(DIGITS // 2))


def _agree_at(a: Tree, b: Tree, names: frozenset[str], more: int) -> bool:
    """Whether two formulas agree at the whole numbers of the last probe plus ``more``; True where one has no value."""
    at = {name: point(name, POINTS - 1) + more for name in names}
    try:
        left, right = evaluate(a, at), evaluate(b, at)
    except Undecided:
        return True
    return bool(abs(left - right) <= context().mpf(10) ** -_AGREE * max(abs(left), abs(right)))


def _complex(tree: Tree) -> bool:
    return tree == ("c", "i") or any(_complex(t) for t in tree[1:] if isinstance(t, tuple))


def real(tree: Tree) -> Any:
    """The value of a formula without variables as a real number of mpmath, or None."""
    if variables(tree):
        return None
    try:
        found = evaluate(tree, {})
    except Undecided:
        return None
    mp = context()
    return mp.re(found) if _tiny(mp.im(found)) else None


def ratio(a: Tree, b: Tree) -> Literal["positive", "negative", "none"] | None:
    """The sign of the constant c in a = c b; "none": there is no such c. None: not enough probes have a value."""
    found = [left / right for _, left, right in _pairs(a, b) if not _tiny(right)]
    if len(found) < _NEEDED:
        return None
    if not _constant(found) or not found[0] or not _tiny(context().im(found[0])):
        return "none"
    return "positive" if context().re(found[0]) > 0 else "negative"


def proportional(a: Tree, b: Tree) -> Literal["yes", "no", "zero"] | None:
    """Whether a = c b for a constant c, or c x^n b where x is in a denominator: a = 0 then says what b = 0 says.

    "zero": one of them is zero everywhere. None: not enough probes have a value.
    """
    usable, zeros, powers = [], 0, {}
    for at, left, right in _pairs(a, b):
        if _tiny(left) or _tiny(right):
            zeros += 1
            continue
        usable.append((at, left / right))
        if len(usable) == 2 and not _constant([quotient for _, quotient in usable]):
            powers = _common_powers(a, b, *usable[0])
            if not powers:
                return "no"  # most are: the other probes are spared
    if zeros >= _NEEDED:
        return "zero"
    if len(usable) < _NEEDED:
        return None
    if not variables(a) | variables(b):
        return "no"  # √2 = 1.41 and √3 = 1.73
    return "yes" if _constant([quotient / _monomial(powers, at) for at, quotient in usable]) else "no"


def _common_powers(a: Tree, b: Tree, at: Mapping[str, Any], quotient: Any) -> dict[str, int]:
    """The powers of variables by which a and b differ, if each is in a denominator: x^2 = x says less than x = 1."""
    powers = _powers(("/", a, b), at, quotient)
    return {} if any(_has_value(a, at, name) and _has_value(b, at, name) for name in powers) else powers


def _has_value(tree: Tree, at: Mapping[str, Any], name: str) -> bool:
    """Whether a formula has a value where a variable is zero."""
    try:
        evaluate(tree, {**at, name: context().zero})
    except Undecided:
        return False
    return True


def _pairs(a: Tree, b: Tree) -> Iterator[tuple[Mapping[str, Any], Any, Any]]:
    """The probes at which both have a value, with these; of numbers, as many times the same."""
    if nodes(a) > MAX_NODES or nodes(b) > MAX_NODES:
        return
    names = variables(a) | variables(b)
    for number in range(POINTS if names else 1):
        at = {name: point(name, number) for name in names}
        try:
            found = (at, evaluate(a, at), evaluate(b, at))
        except Undecided:
            continue
        yield from [found] if names else [found] * POINTS


def _tiny(value: Any) -> bool:
    return bool(abs(value) <= context().mpf(10) ** -_AGREE)


def _constant(values: list[Any]) -> bool:
    return all(_tiny((value - values[0]) / max(1, abs(values[0]))) for value in values)


def _monomial(powers: Mapping[str, int], at: Mapping[str, Any]) -> Any:
    return context().fprod(at[name] ** n for name, n in powers.items())


def _powers(tree: Tree, at: Mapping[str, Any], value: Any) -> dict[str, int]:
    """The powers of the variables, if a tree is a product of such: by what doubling each of them makes of it."""
    mp, found = context(), {}
    for name in at:
        try:
            factor = evaluate(tree, {**at, name: 2 * at[name]}) / value
        except (Undecided, ZeroDivisionError):
            return {}
        exponent = mp.log(abs(factor), 2) if factor else mp.inf
        if abs(exponent) > _MAX_POWER or not _tiny(exponent - mp.nint(exponent)):
            return {}
        if mp.nint(exponent):
            found[name] = int(mp.nint(exponent))
    return found


def constant(tree: Tree) -> Any:
    """The value of a formula that is the same real number at every probe, or None."""
    values = [value for _, value, _ in _pairs(tree, ZERO)]
    real_ = len(values) >= _NEEDED and _constant(values) and _tiny(context().im(values[0]))
    return context().re(values[0]) if real_ else None


def within(gold: Tree, prediction: Tree, decimals: int) -> bool | None:
    """Whether two numbers are the same at that many decimals; halves may go either way. None: one is no real number."""
    a, b = real(gold), real(prediction)
    if a is None or b is None or not 0 <= decimals <= DIGITS // 2:
        return None
    mp = context()
    slack = mp.mpf(10) ** -_AGREE * max(1, abs(a))  # what is exactly a half must not depend on the last bit
    return bool(abs(a - b) <= mp.mpf(10) ** -decimals / 2 + slack)
