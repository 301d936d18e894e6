"""Trees of formulas: what is in them, and trees made of them.

A tree is a tuple: ("n", Fraction), ("v", name), ("c", "π" | "e" | "i" | "∞"), ("+", a, b), ("*", a, b), ("/", a, b),
("^", a, b), ("-", a), ("!", a), ("f", name, argument[, base or index]).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

Tree = tuple[Any, ...]
ZERO: Tree = ("n", Fraction(0))
PER_DEGREE: Tree = ("/", ("c", "π"), ("n", Fraction(180)))


def linear(tree: Tree, names: Sequence[str]) -> list[Tree] | None:
    """A sum as what is in it without any of the names and the factor of each one; None: it is not linear in them."""
    kind = tree[0]
    if kind == "v" and tree[1] in names:
        return [ZERO, *(("n", Fraction(name == tree[1])) for name in names)]
    if not variables(tree) & set(names):
        return [tree, *[ZERO] * len(names)]
    if kind == "-":
        parts = linear(tree[1], names)
        return parts and [negative(part) for part in parts]
    if kind == "+":
        left, right = linear(tree[1], names), linear(tree[2], names)
        return (
            [a if b == ZERO else b if a == ZERO else ("+", a, b) for a, b in zip(left, right, strict=True)]
            if left and right
            else None
        )
    if kind not in ("*", "/"):
        return None
    first, second = tree[1:]
    if kind == "*" and variables(second) & set(names):
        first, second = second, first
    parts = None if variables(second) & set(names) else linear(first, names)
    return parts and [part if part == ZERO else (kind, part, second) for part in parts]


def negative(tree: Tree) -> Tree:
    return tree if tree == ZERO else ("-", tree)


def replaced(tree: Tree, old: Tree, new: Tree) -> Tree:
    """A tree with another one in the place of each ``old``."""
    if tree == old:
        return new
    return tuple(replaced(t, old, new) if isinstance(t, tuple) else t for t in tree)


def shape(tree: Tree) -> str:
    """A tree as a text that is the same in whatever order its terms and factors are; nothing is multiplied out."""
    kind = tree[0]
    if kind in ("n", "v", "c"):
        return f"{kind}{tree[1]}"
    if kind == "f":
        return f"{tree[1]}({', '.join(map(shape, tree[2:]))})"
    if kind in "+*" or _is_product(tree):
        joint = "*" if kind == "^" else kind
        return f"({joint.join(sorted(_operands(tree, joint)))})"
    return f"({kind}{','.join(map(shape, tree[1:]))})"


def _is_product(tree: Tree) -> bool:
    """a² and a³; of larger things, and of powers of powers, nothing is written out."""
    return tree[0] == "^" and tree[1][0] == "v" and tree[2] in (("n", 2), ("n", 3))


def _operands(tree: Tree, kind: str) -> list[str]:
    """The shapes of all terms of a sum, or factors of a product; a² is two factors a."""
    if tree[0] == kind:
        return [*_operands(tree[1], kind), *_operands(tree[2], kind)]
    if kind == "*" and _is_product(tree):
        return [shape(tree[1])] * int(tree[2][1])
    return [shape(tree)]


def variables(tree: Tree) -> frozenset[str]:
    """The names in a tree."""
    if tree[0] == "v":
        return frozenset((tree[1],))
    return frozenset().union(*(variables(t) for t in tree[1:] if isinstance(t, tuple)))


def without_degrees(tree: Tree) -> Tree:
    """A tree with x in the place of each x°."""
    if tree[0] == "*" and tree[2] == PER_DEGREE:
        return without_degrees(tree[1])
    return tuple(without_degrees(t) if isinstance(t, tuple) else t for t in tree)


def has_function(tree: Tree) -> bool:
    """Whether there is a function such as a sine in a tree; a root is none."""
    return tree[0] == "f" and tree[1] != "root" or any(has_function(t) for t in tree[1:] if isinstance(t, tuple))


def nodes(tree: Tree) -> int:
    return 1 + sum(nodes(t) for t in tree[1:] if isinstance(t, tuple))
