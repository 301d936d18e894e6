"""Answers of several things: tuples, sets, lists, alternatives, and the blanks of a question."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

from mmprm_jax.answers import arithmetic, measures, numeric, trees
from mmprm_jax.answers.arithmetic import OPEN, every
from mmprm_jax.answers.values import Equation, Formula, Items, Nothing, Region, Relation, Text, Value, all_of
from mmprm_jax.answers.verdict import Verdict, equal, unequal, unknown

Same = Callable[[Value, Value], Verdict]  # the verdict on two members

_MAX_MATCHED = 30  # items of a list without order


def compare(gold: Value, prediction: Value, same: Same) -> Verdict:
    """Two values of which one has several members. same: compares two members."""
    if isinstance(gold, Items) and isinstance(prediction, Items):
        return _two_items(gold, prediction, same)
    items, other = (gold, prediction) if isinstance(gold, Items) else (prediction, gold)
    assert isinstance(items, Items)
    if isinstance(other, Region) and items.region:
        return measures.ranges(*((items.region, other) if items is gold else (other, items.region)))
    if isinstance(other, Formula) and items.formula:
        found = arithmetic.formulas(*((items.formula, other) if items is gold else (other, items.formula)))
        if found and (items is gold and items.kind == "list" or items.kind == "parts"):
            return unknown("several numbers, or one with a comma or spaces in it")
        return found
    if len(items.values) == 1 and items.kind == "set" and not isinstance(items.values[0], Nothing):
        return same(*((items.values[0], other) if items is gold else (other, items.values[0])))
    if isinstance(other, Text):
        return unknown(OPEN + "the prediction is text" if items is gold else OPEN + "the gold answer is text")
    if isinstance(other, Formula) and trees.variables(other.tree) and all(map(_is_piece, items.values)):
        return unknown("a function in pieces, and one formula")
    if isinstance(other, Relation) and all_of(chains := items.values, Relation):  # a < b < c
        several, one = _links(chains), _links((other,))
        if len(several) != len(one):
            return unequal("different relations")
        return _matched(several, one, same) if items is gold else _matched(one, several, same)
    if items.kind == "or" and all(same(*((v, other) if items is gold else (other, v))) for v in items.values):
        return equal("the same value in several forms")
    if items is gold and items.kind in ("list", "or") and any(same(v, other) for v in items.values):
        return unequal("only a part of the gold answer")
    return unequal(f"one answer, and {len(items.values)}")


def _links(chains: Sequence[Relation]) -> list[Relation]:
    """Chains of inequalities as relations of two sides each."""
    return [
        Relation((op,), pair)
        for chain in chains
        for op, pair in zip(chain.ops, itertools.pairwise(chain.trees), strict=True)
    ]


def _is_piece(value: Value) -> bool:
    return isinstance(value, Items) and value.kind == "tuple" and isinstance(value.values[-1], Region | Relation)


def _two_items(gold: Items, prediction: Items, same: Same) -> Verdict:
    a, b = gold.values, prediction.values
    kinds = {gold.kind, prediction.kind}
    if len(a) != len(b) and kinds <= {"list", "parts", "maybe"} and len(flat := _flat(a)) == len(_flat(b)):
        together = every([same(x, y) for x, y in zip(flat, _flat(b), strict=True)])
        if together:
            return dataclasses.replace(together, reason="equal, one after the other")
    if "or" in kinds and kinds & {"parts", "tuple"}:
        return unequal("one or the other, and one after the other")
    if kinds == {"set", "tuple"} and len(a if gold.kind == "set" else b) == 1:  # {(1, 2)}
        return same(*((a[0], prediction) if gold.kind == "set" else (gold, b[0])))
    if gold.kind == "set" or prediction.kind == "set":
        a, b = _distinct(a, same), _distinct(b, same)
    if len(a) != len(b):
        return unequal(f"{len(a)} things, and {len(b)}")
    unlike = _unlike(gold.values) != _unlike(prediction.values)
    if unlike and len(a) > 1 and kinds & {"set", "or"}:
        return unequal("values of different things, and of one")  # a = 1, b = 2 is no {1, 2}
    a, b = (_by_name(a), b) if prediction.kind == "tuple" else (a, _by_name(b) if gold.kind == "tuple" else b)
    if kinds == {"set", "tuple"}:
        return unequal("a set, and an ordered tuple")
    if kinds == {"tuple"} and gold.region is None and prediction.region is None:
        return every(same(x, y) for x, y in zip(a, b, strict=True))
    ordered = every([same(x, y) for x, y in zip(a, b, strict=True)])
    if ordered and gold.region and prediction.region and not measures.ranges(gold.region, prediction.region):
        if _ascending(gold.region, closed=False):  # (1, 2) is no [1, 2]; a point is no interval
            return unequal("one is open where the other is closed")
    if ordered and _ascending(gold.region or prediction.region) and None in (gold.region, prediction.region):
        return unknown("an interval or a list in square brackets")
    if ordered or "tuple" in kinds or gold.kind == "parts" and not _same_names(gold, prediction):
        return ordered
    if _same_names(gold, prediction) and not unlike and not _unlike(gold.values):  # x_1 = 1, x_2 = 3
        by_name = every([same(x, y) for x, y in zip(_by_name(a), _by_name(b), strict=True)])
        if by_name:
            return by_name
        found = _matched([_right(v) for v in a], [_right(v) for v in b], same)
        return unknown("equal but for the names") if found else found
    if unlike or _same_names(gold, prediction):  # x = 2, y = 1 is no 1, 2
        return every([same(x, y) for x, y in zip(_by_name(a), _by_name(b), strict=True)])
    found = _matched(a, b, same)
    if found and ("maybe" in kinds or "parts" in kinds):
        return unknown("equal but for the order")
    return found


def _right(value: Value) -> Value:
    return value.right if isinstance(value, Equation) else value


def _ascending(region: Region | None, closed: bool = True) -> bool:
    """Whether a pair can only be an interval's ends; closed: in square brackets."""
    if region is None or closed and not region.parts[0].low_closed:
        return False
    ends = [numeric.real(end.tree) for end in (region.parts[0].low, region.parts[0].high) if end]
    return len(ends) == 2 and None not in ends and ends[0] < ends[1]


def _by_name(items: tuple[Value, ...]) -> tuple[Value, ...]:
    """y = 3, x = 2 in the order of their names, for a pair (2, 3)."""
    names = [item.name if isinstance(item, Equation) else None for item in items]
    if None in names or len(set(names)) != len(names):
        return items
    return tuple(item for _, item in sorted(zip(names, items, strict=True), key=lambda pair: str(pair[0])))


def _unlike(items: tuple[Value, ...]) -> bool:
    """Whether the items are values of different things, x and y; x_1 and x_2 are two of one."""
    names = [item.name.split("_")[0] if isinstance(item, Equation) and item.name else None for item in items]
    return None not in names and len(set(names)) == len(names)


def _same_names(a: Items, b: Items) -> bool:
    """Whether both say the values of the same different things, in whatever order."""
    names = [[v.name if isinstance(v, Equation) else None for v in items.values] for items in (a, b)]
    return None not in names[0] and len(set(names[0])) == len(names[0]) and set(names[0]) == set(names[1])


def _flat(items: Sequence[Value]) -> list[Value]:
    """The items, and those of what is itself a list."""
    return [v for item in items for v in (item.values if isinstance(item, Items) and item.kind in ("list", "parts")
                                          else (item,))]  # fmt: skip


def _distinct(items: tuple[Value, ...], same: Same) -> tuple[Value, ...]:
    found: list[Value] = []
    for item in items[:_MAX_MATCHED]:
        if not any(same(item, other) for other in found):
            found.append(item)
    return tuple(found)


def _matched(a: Sequence[Value], b: Sequence[Value], same: Same) -> Verdict:
    """Whether the items can be paired off; augmenting paths, because rounding makes equality no equivalence."""
    if len(a) > _MAX_MATCHED:
        return unknown(f"over {_MAX_MATCHED} things in any order")
    table = [[same(x, y) for y in b] for x in a]
    partner: dict[int, int] = {}

    def place(i: int, tried: set[int]) -> bool:
        for j, verdict in enumerate(table[i]):
            if verdict and j not in tried:
                tried.add(j)
                if j not in partner or place(partner[j], tried):
                    partner[j] = i
                    return True
        return False

    for i in range(len(a)):
        if not place(i, set()):
            open_ = next((v for v in table[i] if v.kind == "unknown"), None)
            return open_ or unequal(f"thing {i + 1} of the gold answer is missing")
    return equal("the same things in some order")
