"""What the quick rules leave open: sympy's simplify, and Math-Verify where it can be trusted.

Both can take for ever, and much memory: this runs in the worker processes of ``workers``, which are ended when a pair
is over its time. Neither makes anything unequal. Math-Verify is known to be wrong on units, equations, percentages and
text (5 cm = 5 m, x = 3 = y = 3), so it only sees single expressions that the rules cannot read: sums, matrices, limits.
"""

from __future__ import annotations

import functools
import logging
import re
from typing import Any

from mmprm_jax.answers.arithmetic import OPEN
from mmprm_jax.answers.equivalence import NO_SETTINGS, Settings, compare
from mmprm_jax.answers.extract import committed
from mmprm_jax.answers.normalise import normalise
from mmprm_jax.answers.parse import read
from mmprm_jax.answers.syntax import Tree
from mmprm_jax.answers.values import Formula, Text
from mmprm_jax.answers.verdict import VERSION, Verdict, equal

_MAX_LENGTH = 300
# Numbers of over 15 digits, exponents of over 2, towers, factorials: what makes sympy compute for ever.
_COSTLY = re.compile(
    r"\d{16}|\^\s*\{?\s*-?\d{3}|\^\s*\{[^{}]*\^|\^\s*\w+\s*\^|!|\\binom[^\d]{0,9}\d{4}|(?:[({\[][^(){}\[\]]*){12}"
)
# Equations, lists, units, percentages, choices and words.
_NOT_TRUSTED = re.compile(
    r"[=<>≤≥≠,;:°%$±∪∩∈∠△→⦃⦄\n\"?]|\\(?:text|mathrm|mbox)|(?<![\\A-Za-z])[A-Za-z]{2,}|[\u4e00-\u9fff]"
)
_COMMANDS = re.compile(
    r"\\(?:sum|prod|int|lim|binom|sqrt|frac|lfloor|rfloor|lceil|rceil|max|min|gcd|log|ln|sin|cos|tan|cot|sec|csc|exp)"
    r"(?![A-Za-z])"
)


def decide(gold: str, prediction: str | None, settings: Settings = NO_SETTINGS) -> Verdict:
    """As ``equivalence.compare``, and then all that can be done about what that leaves open."""
    verdict = compare(gold, prediction, settings)
    if verdict.kind != "unknown" or OPEN not in verdict.reason or prediction is None:
        return verdict
    extracted = committed(prediction)
    texts = [normalise(text) for text in (gold, extracted.text if extracted else prediction)]
    if extracted and extracted.earlier or any(len(text) > _MAX_LENGTH or _COSTLY.search(text) for text in texts):
        return verdict
    return _settle(texts[0], texts[1], VERSION) or verdict


@functools.lru_cache(maxsize=4096)
def _settle(gold: str, prediction: str, version: int) -> Verdict | None:
    """equal, or None: it is still not known."""
    try:
        a, b = read(gold), read(prediction)
    except RecursionError:
        return None
    if isinstance(a, Formula) and isinstance(b, Formula):
        return equal("equal by sympy's simplify") if _simplified(a.tree, b.tree) else None
    if isinstance(a, Text) or isinstance(b, Text):
        trusted = _trusted(gold) and _trusted(prediction) and _COMMANDS.search(gold + prediction)
        return equal("equal by Math-Verify") if trusted and _math_verify(gold, prediction) else None
    return None


def _trusted(text: str) -> bool:
    """Whether a text is a single expression in LaTeX of which Math-Verify has been seen to be right."""
    rest = re.sub(r"(?<=[\s)}\w])d[a-z]\b", " ", text) if "\\int" in text else text
    rest = re.sub(r"_\s*\{[^{}=→]*[=→][^{}]*\}", " ", rest)  # the bounds of a sum or a limit
    rest = _COMMANDS.sub(" ", rest)
    return "\\" not in rest and not _NOT_TRUSTED.search(rest)


def _simplified(a: Tree, b: Tree) -> bool:
    import sympy

    try:
        return sympy.simplify(_sympy(a) - _sympy(b)) == 0
    except (KeyError, TypeError, ValueError, NotImplementedError, AttributeError, RecursionError):
        return False


def _sympy(tree: Tree) -> Any:
    """A tree as an object of sympy; n, k and m are whole numbers."""
    import sympy as sp

    kind = tree[0]
    if kind == "n":
        return sp.Rational(tree[1].numerator, tree[1].denominator)
    if kind == "v":
        return sp.Symbol(tree[1], integer=True) if tree[1][0] in "nkm" else sp.Symbol(tree[1], real=True)
    if kind == "c":
        return {"π": sp.pi, "e": sp.E, "i": sp.I, "∞": sp.oo}[tree[1]]
    values = [_sympy(t) for t in tree[1:] if isinstance(t, tuple)]
    if kind == "f":
        return {
            "root": lambda x, n: sp.real_root(x, n) if n.is_odd else sp.root(x, n),
            "ln": sp.log, "log": lambda x, *base: sp.log(x, *(base or [10])), "abs": sp.Abs, "binom": sp.binomial,
            "exp": sp.exp, "sin": sp.sin, "cos": sp.cos, "tan": sp.tan, "cot": sp.cot, "sec": sp.sec, "csc": sp.csc,
            "asin": sp.asin, "acos": sp.acos, "atan": sp.atan, "sinh": sp.sinh, "cosh": sp.cosh, "tanh": sp.tanh,
        }[tree[1]](*values)  # fmt: skip
    return {
        "+": lambda x, y: x + y, "*": lambda x, y: x * y, "/": lambda x, y: x / y, "^": lambda x, y: x**y,
        "-": lambda x: -x, "!": sp.factorial,
    }[kind](*values)  # fmt: skip


def _math_verify(gold: str, prediction: str) -> bool:
    """Whether Math-Verify reads both as one expression, and finds these equal."""
    import math_verify
    import sympy

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that it does not limit its time

    def parse(text: str) -> Any:
        text = text.replace("\n", r"\\").replace("π", r"\pi ").replace("∞", r"\infty ").replace("→", r"\to ")
        # Its own time limits are signals, which only work in a main thread; the process is what is limited here.
        found = math_verify.parse(
            f"${text}$", [math_verify.LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None
        )
        return found[0] if found and isinstance(found[0], sympy.Expr) else None

    a, b = parse(gold), parse(prediction)
    if a is None or b is None:
        return False
    return bool(math_verify.verify(a, b, float_rounding=25, numeric_precision=50, strict=True, timeout_seconds=None))
