"""LaTeX arithmetic as the official scorings compute it, without evaluating code: a small grammar over mpmath.

Its readings are the official ones, not those of ``syntax``: log is ln, AB is A times B, 6:4 is 1.5, 1 1/2 is 1/2.

Numbers, symbols, ``+ - * / ^ !``, ``\\frac``, ``\\sqrt[n]{}``, π, e, trigonometry and logarithms, implicit products.
Time and memory are bounded by the limits on length, nesting, digits, exponents and factorials.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from typing import Any

import mpmath

from mmprm_jax.answers.numeric import context

MAX_LENGTH, MAX_TOKENS, MAX_DEPTH, MAX_DIGITS = 2000, 300, 40, 50
MAX_EXPONENT, MAX_FACTORIAL = 2000, 500
Node = tuple  # (operator, operands …)


class NotMaths(ValueError):
    """The text is no expression of the grammar."""


class TooBig(ValueError):
    """The expression is one, but its value is beyond the limits."""


_FUNCTIONS = {
    name: name for name in ("sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "exp", "ln", "log")
}
_COMPUTE = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "log": "ln"}
_WORDS = "|".join(sorted({*_FUNCTIONS, "sqrt", "pi"}, key=len, reverse=True))
_TOKEN = re.compile(rf"\d+(?:\.\d+)?|\.\d+|\\[A-Za-z]+|(?:{_WORDS})(?![A-Za-z])|[A-Za-zπ√]|[-+*/^_!(){{}}\[\]|×÷·−,':]")
_SKIP = re.compile(r"(?:\s|\\[,;:! ]|\\(?:left|right|displaystyle|quad|qquad|limits)(?![A-Za-z])|~)+")
_OPERATORS = {
    "\\cdot": "*",
    "\\times": "*",
    "×": "*",
    "·": "*",
    "\\div": "/",
    ":": "/",
    "÷": "/",
    "−": "-",
    "π": "pi",
    "√": "sqrt",
}
_CLOSING = {"(": ")", "{": "}", "[": "]"}
_FONTS = ("mathrm", "text", "mathbf", "operatorname", "mathit")
_STOPS = ("+", "-", "*", "/", ")", "}", "]", "|", "^", "_", "!", ",", "'")  # what ends an implicit product
_GREEK = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta lambda mu nu xi rho sigma tau phi varphi chi psi"
    " omega Gamma Delta Theta Lambda Omega Phi Psi Sigma hbar ell"
).split()


def _tokens(text: str) -> list[str]:
    if len(text) > MAX_LENGTH:
        raise TooBig(f"longer than {MAX_LENGTH} characters")
    out, at = [], 0
    while at < len(text):
        if skipped := _SKIP.match(text, at):
            at = skipped.end()
            continue
        found = _TOKEN.match(text, at)
        if not found:
            raise NotMaths(f"{text[at]!r} is no part of an expression")
        token = found[0]
        out.append(_OPERATORS.get(token, token.lstrip("\\") if len(token) > 1 else token))
        at = found.end()
    return out


class _Parser:
    def __init__(self, tokens: list[str], mixed: bool):
        self._tokens, self._mixed, self._at, self._depth = tokens, mixed, 0, 0

    def whole(self) -> Node:
        node = self.sum()
        if self._at < len(self._tokens):
            raise NotMaths(f"{self._tokens[self._at]!r} cannot stand there")
        return node

    def _peek(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _take(self, expected: str = "") -> str:
        token = self._peek()
        if not token or (expected and token != expected):
            raise NotMaths(f"{expected or 'something'} is missing")
        self._at += 1
        return token

    def sum(self) -> Node:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise TooBig(f"nested deeper than {MAX_DEPTH}")
        node = self._product()
        while self._peek() in ("+", "-"):
            node = (self._take(), node, self._product())
        self._depth -= 1
        return node

    def _product(self) -> Node:
        sign = 1
        while self._peek() in ("+", "-"):
            sign = -sign if self._take() == "-" else sign
        node = self._power()
        while True:
            token = self._peek()
            if token in ("*", "/"):
                self._take()
                negative = self._peek() == "-" and bool(self._take())
                factor = self._power()
                node = (token, node, ("neg", factor) if negative else factor)
            elif token and token not in _STOPS:
                node = ("*", node, self._power())
            else:
                return ("neg", node) if sign < 0 else node

    def _power(self) -> Node:
        node = self._atom()
        while self._peek() in ("^", "!", "_", "'"):
            token = self._take()
            if token == "!":
                node = ("!", node)
            elif token == "^":
                node = ("^", node, self._argument(digits=False))
            else:
                node = _renamed(node, "_" + self._subscript() if token == "_" else "'")
        return node

    def _subscript(self) -> str:
        """What stands behind _, as a part of a name."""
        if self._peek() != "{":
            return self._take()
        begin, depth = self._at, 0
        while depth or self._at == begin:
            depth += {"{": 1, "}": -1}.get(self._take(), 0)
        return "".join(t for t in self._tokens[begin : self._at] if t not in ("{", "}", *_FONTS))

    def _argument(self, digits: bool = True) -> Node:
        """What follows ^, \\frac or \\sqrt: a group or an atom, with a sign; digits: of a number the first one only."""
        token = self._peek()
        if token in ("-", "+"):
            self._take()
            return ("neg", self._argument(digits)) if token == "-" else self._argument(digits)
        if digits and re.fullmatch(r"\d{2,}", token):  # \frac12
            self._tokens[self._at] = token[1:]
            return ("number", token[0])
        return self._atom()

    def _group(self, opening: str) -> Node:
        node = self.sum()
        self._take(_CLOSING[opening])
        return node

    def _atom(self) -> Node:
        token = self._take()
        if token[0].isdigit() or token[0] == ".":
            if len(token) > MAX_DIGITS:
                raise TooBig(f"a number of {len(token)} digits")
            if self._mixed and self._peek() == "frac":  # 1\frac{1}{2}
                return ("+", ("number", token), self._atom())
            return ("number", token)
        if token in _CLOSING:
            return self._group(token)
        if token == "|":
            node = self.sum()
            self._take("|")
            return ("abs", node)
        if token in ("frac", "dfrac", "tfrac", "cfrac"):
            return ("/", self._argument(), self._argument())
        if token == "sqrt":
            root: Node = ("number", "2")
            if self._peek() == "[":
                self._take()
                root = self._group("[")
            return ("root", self._argument(), root)
        if token in _FUNCTIONS:
            return self._function(token)
        if token in _FONTS:
            return self._atom()
        if token == "pi" or re.fullmatch(r"[A-Za-z]", token) or token in _GREEK:
            return self._symbol(token)
        raise NotMaths(f"{token!r} cannot stand there")

    def _function(self, name: str) -> Node:
        power: Node | None = None
        base: Node | None = None
        while self._peek() in ("^", "_"):
            if self._take() == "^":
                power = self._argument()
            else:
                base = self._argument()
        bare = self._peek() != "("
        node = self._power()
        while bare and self._peek() and self._peek() not in (*_FUNCTIONS, *_STOPS):  # \sin 2x
            node = ("*", node, self._power())
        node = (name, node)
        if base is not None:
            node = ("/", node, (name, base))
        return node if power is None else ("^", node, power)

    def _symbol(self, name: str) -> Node:
        if name == "pi":
            return ("pi",)
        if name == "e" and self._peek() != "_":
            return ("e",)
        end = self._arguments()
        if end:  # f(x, y): a name as a whole
            name, self._at = name + "".join(self._tokens[self._at : end]), end
        return ("symbol", name)

    def _arguments(self) -> int:
        """Where the list of several arguments ends that begins here; 0: none does."""
        depth, commas = 0, 0
        for i in range(self._at, len(self._tokens) if self._peek() == "(" else 0):
            depth += {"(": 1, ")": -1}.get(self._tokens[i], 0)
            commas += self._tokens[i] == "," and depth == 1
            if depth == 0:
                return i + 1 if commas else 0
        return 0


def _renamed(node: Node, more: str) -> Node:
    """An unknown, or a power of one (v^2_0), with more to its name. Raises NotMaths for anything else."""
    if node[0] == "symbol":
        return ("symbol", node[1] + more)
    if node[0] == "e":
        return ("symbol", "e" + more)
    if node[0] == "^":
        return ("^", _renamed(node[1], more), node[2])
    raise NotMaths(f"{more!r} cannot stand there")


def parse(text: str, mixed: bool = False) -> Node:
    """The tree of an expression. Raises NotMaths or TooBig. mixed: a number before a fraction is added to it."""
    tokens = _tokens(text)
    if not tokens:
        raise NotMaths("nothing there")
    if len(tokens) > MAX_TOKENS:
        raise TooBig(f"more than {MAX_TOKENS} symbols")
    try:
        return _Parser(tokens, mixed).whole()
    except RecursionError:
        raise TooBig("nested too deep") from None


def symbols(node: Node) -> set[str]:
    """The names of the unknowns in a tree."""
    found, left = set(), [node]
    while left:
        part = left.pop()
        if part[0] == "symbol":
            found.add(part[1])
        left += [operand for operand in part[1:] if isinstance(operand, tuple)]
    return found


def value(node: Node, at: Mapping[str, Any] | None = None) -> Any:
    """The value of a tree, real or complex (mpmath). ``at``: numbers for its unknowns.

    Raises NotMaths where it has none (an unknown without a number, a division by zero), TooBig beyond the limits.
    """
    try:
        return _value(context(), node, at or {})
    except (ValueError, ZeroDivisionError, OverflowError, mpmath.libmp.NoConvergence) as error:
        if isinstance(error, (NotMaths, TooBig)):
            raise
        raise NotMaths(f"it has no value ({type(error).__name__})") from None


def _value(mp: Any, node: Node, at: Mapping[str, Any]) -> Any:
    kind = node[0]
    if kind == "number":
        return mp.mpf(node[1])
    if kind == "pi":
        return +mp.pi
    if kind == "e":
        return +mp.e
    if kind == "symbol":
        if node[1] not in at:
            raise NotMaths(f"{node[1]} has no value")
        return mp.mpf(at[node[1]])
    parts = [_value(mp, part, at) for part in node[1:]]
    if kind == "^" or kind == "root":
        return _power(mp, parts[0], parts[1] if kind == "^" else 1 / parts[1])
    if kind == "!":
        if abs(parts[0]) > MAX_FACTORIAL:
            raise TooBig(f"a factorial above {MAX_FACTORIAL}!")
        return mp.gamma(parts[0] + 1)
    if kind in _FUNCTIONS:
        if abs(parts[0]) > 10**6:
            raise TooBig(f"{kind} of a number above a million")
        return getattr(mp, _COMPUTE.get(kind, kind))(parts[0])
    if kind in ("neg", "abs"):
        return -parts[0] if kind == "neg" else abs(parts[0])
    a, b = parts
    return {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "/": lambda: a / b}[kind]()


def _power(mp: Any, base: Any, exponent: Any) -> Any:
    if abs(exponent) > MAX_EXPONENT or (base and abs(mp.mag(base)) > 10**5):
        raise TooBig(f"an exponent above {MAX_EXPONENT}, or of a number as large")
    if not mp.im(base) and mp.re(base) < 0 and abs(1 / exponent if exponent else 0) % 2 == 1:
        return -((-base) ** exponent)  # an odd root of a negative number is the real one
    return base**exponent


def probes(names: set[str], count: int = 5) -> list[dict[str, Any]]:
    """Numbers for unknowns, between 0.6 and 2.6: the same ones for the same names, always."""
    mp = context()
    return [{n: mp.mpf(600_001 + zlib.crc32(f"{n} {i}".encode()) % 2_000_000) / 10**6 for n in names}
            for i in range(count)]  # fmt: skip
