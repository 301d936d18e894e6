"""Formulas: normalised text -> a tree of ``trees``. A tokenizer and a recursive descent; nothing is run as code."""

from __future__ import annotations

import functools
import re
from fractions import Fraction

from mmprm_jax.answers.trees import PER_DEGREE, Tree, nodes, replaced, variables

MAX_LENGTH = 2000  # characters of a formula
MAX_DEPTH = 40  # brackets within brackets
MAX_DIGITS = 1000  # of one number
MAX_TERMS = 101  # of a sum that is written out
MAX_NODES = 400  # of such a sum

FUNCTIONS = frozenset(
    "sin cos tan cot sec csc asin acos atan arcsin arccos arctan sinh cosh tanh ln log lg exp sqrt abs".split()
)
_SERIES = {"\\sum": "+", "\\prod": "*"}
_ROUNDED = {"\\lfloor": "floor", "\\lceil": "ceil"}
_CLOSED = ("\\rfloor", "\\rceil")
_ALIASES = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "lg": "log"}
_TOKEN = re.compile(
    r"""\s*(?:
    (?P<mixed>\d{1,9}\s+\d{1,9}\s*/\s*\d{1,9}(?![\d.])|\d{1,9}\s*\\frac\s*(?:\{\s*\d{1,9}\s*\}\s*\{\s*\d{1,9}\s*\}|\d\d))
    |(?P<number>(?:\d+(?:\.\d+)?|\.\d+)(?:[eE](?:[+-]\d{1,3}|[2-9]|\d\d{1,2})(?![\d.]))?(?!\.\d))
    |(?P<command>\\[A-Za-z]+)
    |(?P<name>∠\s*(?:[A-Z]['′]?){1,3}(?!['A-Za-z])|∠\s*\d|→?(?:[A-Z]'*(?:_\d|_\{\d\})?){2,}(?![a-z'])|[A-Za-z]+|[α-ωΑ-Ωıȷĸ∞√])
    |(?P<sign>[-+*/^_!'°%()\[\]{}|,=])
    )""",
    re.VERBOSE,
)
_SUBSCRIPT = re.compile(r"\s*(?:[A-Za-z0-9]|\{\s*[A-Za-z0-9+, -]{1,12}\s*\})")
_OPEN = {"(": ")", "[": "]", "{": "}"}


class SyntaxProblem(ValueError):
    """A text is no formula that is understood here."""


class TooLarge(SyntaxProblem):
    """A formula is longer or deeper than anybody's answer."""


@functools.lru_cache(maxsize=4096)
def parse(text: str) -> Tree:
    """The tree of a formula. Raises SyntaxProblem."""
    if len(text) > MAX_LENGTH:
        raise TooLarge(f"over {MAX_LENGTH} characters")
    parser = _Parser(tokens(text))
    tree = parser.sum()
    if parser.peek() != ("end", ""):
        raise SyntaxProblem(f"{parser.peek()[1]!r} is not expected")
    return tree


def tokens(text: str) -> list[tuple[str, str]]:
    """(kind, text) of each token; subscripts and primes belong to their name. Raises SyntaxProblem."""
    found, i, text = [], 0, text.rstrip()
    while i < len(text):
        match = _TOKEN.match(text, i)
        if not match:
            raise SyntaxProblem(f"{text[i]!r} is not understood")
        kind, i = match.lastgroup or "", match.end()
        token = match[kind]
        if kind == "number" and len(token) > MAX_DIGITS:
            raise TooLarge(f"a number of over {MAX_DIGITS} digits")
        if kind == "name":
            names = _names(token)
            while text[i : i + 1] in ("_", "'"):
                subscript = _SUBSCRIPT.match(text, i + 1) if text[i] == "_" else None
                if text[i] == "_" and not subscript:
                    raise SyntaxProblem("a subscript is not understood")
                if token in ("log", "ln", "lg"):
                    break
                names[-1] += "_" + re.sub(r"[{}\s]", "", subscript[0]) if subscript else "'"
                i = subscript.end() if subscript else i + 1
            found += [("name", name) for name in names]
        else:
            found.append((kind, token))
    return found


def _names(token: str) -> list[str]:
    """A run of letters as functions and variables."""
    if token[0] == "∠":
        letters = re.findall(r"[A-Z]'?|\d", token)
        return ["∠" + "".join(min(letters, letters[::-1]))]
    if token[0] == "→":
        return [token.replace("{", "").replace("}", "")]
    if len(token) > 1 and token[0].isupper() and re.fullmatch(r"(?:[A-Z]'*(?:_\d|_\{\d\})?)+", token):
        letters = re.findall(r"[A-Z]'*(?:_\d)?", token.replace("{", "").replace("}", ""))
        return ["".join(sorted(letters) if len(letters) == 2 else letters)]  # a segment: AB is BA
    if token in FUNCTIONS or token == "pi":
        return ["π" if token == "pi" else token]
    for name in ("sin", "cos", "tan", "ln", "lg", "log"):
        if token.startswith(name) and len(token) == len(name) + 1:
            return [name, token[-1]]  # sinx
    if len(token) > 3:
        raise SyntaxProblem(f"{token!r} is a word")
    return list(token)


class _Parser:
    def __init__(self, found: list[tuple[str, str]]):
        self._tokens, self._i, self._depth = found, 0, 0

    def peek(self) -> tuple[str, str]:
        return self._tokens[self._i] if self._i < len(self._tokens) else ("end", "")

    def _take(self) -> tuple[str, str]:
        token = self.peek()
        self._i += 1
        return token

    def _accept(self, sign: str) -> bool:
        if self.peek() == ("sign", sign):
            self._i += 1
            return True
        return False

    def _expect(self, sign: str) -> None:
        if not self._accept(sign):
            raise SyntaxProblem(f"{sign!r} is missing")

    def sum(self) -> Tree:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise TooLarge(f"over {MAX_DEPTH} brackets within brackets")
        tree = self._signed()
        while self.peek() in (("sign", "+"), ("sign", "-")):
            minus = self._take()[1] == "-"
            minus ^= self._accept("-")  # 14.0 + -1.0i
            right = self._product()
            tree = ("+", tree, ("-", right) if minus else right)
        self._depth -= 1
        return tree

    def _signed(self) -> Tree:
        minus = False
        for _ in range(3):  # nobody writes more signs than that
            if self._accept("-"):
                minus = not minus
            elif not self._accept("+"):
                break
        tree = self._product()
        return ("-", tree) if minus else tree

    def _product(self) -> Tree:
        tree = self._power()
        while True:
            kind, text = self.peek()
            if self._accept("*") or self._accept("/"):
                right = ("-", self._power()) if self._accept("-") else self._power()
                tree = ("*" if text == "*" else "/", tree, right)
            elif (
                kind in ("name", "mixed")
                or (kind == "command" and text not in _CLOSED)
                or (kind == "sign" and text in "([{")
                or (kind == "number" and tree[0] == "^" and self._tokens[self._i - 1] == ("sign", "}"))  # 3^{n}2^{n}
            ):
                tree = ("*", tree, self._power())  # nothing between them: a product
            else:
                return tree

    def _power(self) -> Tree:
        kind, text = self._take()
        if kind == "name" and text in FUNCTIONS or kind == "command" and text[1:] in FUNCTIONS:
            return self._function(text.lstrip("\\"))
        return self._postfix(self._atom(kind, text))

    def _postfix(self, tree: Tree) -> Tree:
        while self.peek()[0] == "sign":
            if self._accept("^"):
                tree = ("^", tree, self._exponent())
            elif self._accept("!"):
                tree = ("!", tree)
            elif self._accept("°"):
                tree = ("*", tree, PER_DEGREE)
            elif self._accept("%"):
                tree = ("/", tree, ("n", Fraction(100)))
            else:
                break
        return tree

    def _exponent(self) -> Tree:
        """LaTeX's exponent is one group or one digit, but people write 2^10 and mean it."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise TooLarge("over 40 exponents of exponents")
        minus = self._accept("-")
        tree = self._atom(*self._take())
        if self._accept("^"):
            tree = ("^", tree, self._exponent())
        self._depth -= 1
        return ("-", tree) if minus else tree

    def _group(self, opened: str) -> Tree:
        tree = self.sum()
        self._expect(_OPEN[opened])
        return tree

    def _atom(self, kind: str, text: str) -> Tree:
        if kind == "number":
            return ("n", Fraction(text))
        if kind == "mixed":
            whole, top, bottom = _mixed(text)
            if not bottom:
                raise SyntaxProblem("a fraction over zero")
            return ("n", whole + Fraction(top, bottom))
        if kind == "name":
            if text == "√":
                self._depth += 1
                if self._depth > MAX_DEPTH:
                    raise TooLarge(f"over {MAX_DEPTH} roots of roots")
                tree = self._root(Fraction(2), self._postfixless())
                self._depth -= 1
                return tree
            return ("c", text) if text in ("π", "e", "i", "∞") else ("v", text)
        if kind == "sign" and text in _OPEN:
            return self._group(text)
        if (kind, text) == ("sign", "|"):
            tree = self.sum()
            self._expect("|")
            return ("f", "abs", tree)
        if kind == "command" and text in ("\\frac", "\\binom"):
            return self._command(text)
        if kind == "command" and text in _ROUNDED:
            return self._rounded(text)
        if kind == "command" and text in _SERIES:
            return self._series(_SERIES[text])
        raise SyntaxProblem(f"{text!r} is not understood" if text else "the formula breaks off")

    def _postfixless(self) -> Tree:
        return self._atom(*self._take())

    def _command(self, text: str) -> Tree:
        if text == "\\frac":
            top = self._argument()
            return ("/", top, self._argument())
        top = self._argument()
        return ("f", "binom", top, self._argument())

    def _rounded(self, opened: str) -> Tree:
        """⌊3.7⌋; of a number alone: at a few points two such functions may agree by chance."""
        tree = self.sum()
        if self._take() != ("command", opened.replace("l", "r", 1)):
            raise SyntaxProblem(f"{opened} is not closed")
        if variables(tree):
            raise SyntaxProblem("a function that rounds")
        return ("f", _ROUNDED[opened], tree)

    def _series(self, sign: str) -> Tree:
        """A sum or a product from one whole number to another, written out."""
        self._expect("_")
        self._expect("{")
        kind, name = self._take()
        self._expect("=")
        first = _whole(self.sum())
        self._expect("}")
        self._expect("^")
        last, body = _whole(self._exponent()), self._product()
        if kind != "name" or any(name in other.partition("_")[2] for other in variables(body)):  # a_k
            raise SyntaxProblem("a sum over what is no variable")
        if first is None or last is None or not 0 <= last - first < MAX_TERMS:
            raise SyntaxProblem("a sum without bounds, or a long one")
        if nodes(body) * (last - first) > MAX_NODES:
            raise TooLarge("a long sum")
        variable = ("c", "i") if name == "i" else ("v", name)
        terms = [replaced(body, variable, ("n", Fraction(n))) for n in range(first, last + 1)]
        return functools.reduce(lambda a, b: (sign, a, b), terms)

    def _argument(self) -> Tree:
        """A group, or a single digit or letter: \\frac12 is a half."""
        kind, text = self._take()
        if kind == "number" and len(text) > 1:
            if not text.isdigit():
                raise SyntaxProblem("a fraction without braces")
            self._i -= 1
            self._tokens[self._i] = ("number", text[1:])
            text = text[0]
        return self._atom(kind, text)

    def _root(self, index: Fraction | Tree, tree: Tree) -> Tree:
        return ("f", "root", tree, index if isinstance(index, tuple) else ("n", index))

    def _function(self, name: str) -> Tree:
        if name == "sqrt":
            index: Tree = ("n", Fraction(2))
            if self._accept("["):
                index = self._group("[")
            return self._postfix(self._root(index, self._argument()))
        name = _ALIASES.get(name, name)
        base, power = None, None
        for _ in range(2):
            if self._accept("_"):
                base = self._argument()
            elif self._accept("^"):
                power = self._exponent()
        if power == ("-", ("n", Fraction(1))):
            if name not in ("sin", "cos", "tan"):
                raise SyntaxProblem(f"{name}^-1 is not understood")
            name, power = "a" + name, None
        bracket = self.peek()[0] == "sign" and self.peek()[1] in "([{"
        argument = self._postfixless() if bracket else self._bare_argument()
        tree = ("f", name, argument, base) if base else ("f", name, argument)
        return ("^", tree, power) if power else self._postfix(tree) if bracket else tree

    def _bare_argument(self) -> Tree:
        """What follows sin without brackets: factors up to the next function."""
        tree = self._power()
        while True:
            kind, text = self.peek()
            functional = text.lstrip("\\") in FUNCTIONS and text != "\\sqrt"
            if self.peek() == ("sign", "/"):
                self._i += 1
                tree = ("/", tree, self._power())
            elif kind in ("name", "command") and not functional and text not in _CLOSED:
                tree = ("*", tree, self._power())
            else:
                return tree


def _whole(tree: Tree) -> int | None:
    """The whole number that a tree is, or None."""
    sign, tree = (-1, tree[1]) if tree[0] == "-" else (1, tree)
    return sign * int(tree[1]) if tree[0] == "n" and tree[1].denominator == 1 else None


def _mixed(text: str) -> tuple[int, int, int]:
    """1 1/2 and 1\\frac{1}{2}: the three numbers."""
    numbers = [int(n) for n in re.findall(r"\d+", text)]
    if len(numbers) == 2:  # 1\frac12
        numbers = [numbers[0], *divmod(numbers[1], 10)]
    return numbers[0], numbers[1], numbers[2]
