"""Does a prediction equal the gold answer? equal, unequal, or unknown with a reason.

The rules here are exact and quick, and need no other process: types must agree or have a stated conversion. The two
sides are not alike: a gold decimal sets the place to which the prediction is rounded, and of a response the last
committed answer counts. What no rule decides goes to Math-Verify and sympy in ``heavy``, in a worker process.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Mapping, Sequence

from mmprm_jax.answers import arithmetic, choice, extract, families, numeric, relations, remarks, syntax, units, words
from mmprm_jax.answers.arithmetic import OPEN, every
from mmprm_jax.answers.normalise import MAX_LENGTH, normalise
from mmprm_jax.answers.parse import read
from mmprm_jax.answers.values import (
    Date,
    Equation,
    Family,
    Formula,
    Items,
    Nothing,
    Quantity,
    Ratio,
    Region,
    Relation,
    Text,
    Time,
    Value,
)  # fmt: skip
from mmprm_jax.answers.verdict import VERSION, Verdict, equal, unequal, unknown

Options = Sequence[str] | Mapping[str, str]

_STRANGE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
_MAX_REASON = 300  # characters; parts within parts have long ones
_BESIDE = re.compile(r" ?([^\w\s.]) ?")
_WORD = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{2,}|[\u4e00-\u9fff]")
_FIGURE = re.compile(
    r"(?:the )?(?:points?|lines?|(?:line )?segments?|rays?|edges?|sides?|planes?) ([A-Z](?:[A-Z_'\d]|, ?)*)"
)
_SENTENCES = 20  # words: more than an answer has
_MAX_MATCHED = 30  # items of a list without order


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a data set says about one gold answer."""

    options: tuple[tuple[str, str], ...] = ()  # letter, text
    unit: str = ""  # of a gold answer that is a bare number
    precision: int | None = None  # decimals to which both sides are rounded


NO_SETTINGS = Settings()


def settings_of(options: Options | None = None, unit: str | None = None, precision: float | None = None) -> Settings:
    """Raises ValueError for a precision that is no number of decimals."""
    if precision is not None and not (float(precision).is_integer() and 0 <= precision <= 40):
        raise ValueError(f"precision {precision!r} is no number of decimals")
    found = choice.options_of(options) if options else {}
    return Settings(tuple(found.items()), normalise(unit or ""), None if precision is None else int(precision))


def compare(gold: str, prediction: str | None, settings: Settings = NO_SETTINGS) -> Verdict:
    """Whether ``prediction``, an answer or a whole response, equals ``gold``. Bounded in time and memory."""
    if prediction is None:
        return unequal("there is no prediction")
    if len(gold) > MAX_LENGTH:
        return unknown(f"the gold answer has over {MAX_LENGTH} characters")
    if len(prediction) > MAX_LENGTH:
        found = extract.committed(prediction)
        answers = (*found.earlier, found.text) if found else ()
        prediction = answers[0] if len(answers) == 1 else "\n".join(f"\\boxed{{{answer}}}" for answer in answers)
        if not answers or len(prediction) > MAX_LENGTH:
            return unknown(f"the prediction has over {MAX_LENGTH} characters")
    return _cached(gold, prediction, settings, VERSION)


@functools.lru_cache(maxsize=4096)
def _cached(gold: str, prediction: str, settings: Settings, version: int) -> Verdict:
    if not gold.strip():
        return unknown("the gold answer is empty")
    if not prediction.strip():
        return unequal("the prediction is empty")
    for name, text in (("gold answer", gold), ("prediction", prediction)):
        if strange := _STRANGE.search(text):
            return unknown(f"the {name} holds the character {strange[0]!a}")
    try:
        verdict = _compare(gold, prediction, settings)
        return dataclasses.replace(verdict, reason=verdict.reason[:_MAX_REASON])
    except RecursionError:
        return unknown("brackets within brackets, too deep")


def _compare(gold: str, prediction: str, settings: Settings) -> Verdict:
    """The prediction as a whole answer, then the answer it commits to."""
    found = extract.committed(prediction)
    source = extract.committed(gold)
    gold = ", ".join((*source.earlier, source.text)) if source else gold
    if not (found and found.earlier) and _compact(gold) == _compact(found.text if found else prediction):
        return equal("the same text")
    golds = _alternatives(gold)
    if found is None:
        return _uncommitted(golds, prediction, settings)
    verdict = _any(golds, found.text, settings)
    if not verdict and OPEN in verdict.reason and (said := extract.stated(found.text)):
        verdict = _any(golds, said, settings) or verdict
    if found.earlier:
        together = _any(golds, "\n".join((*reversed(found.earlier), found.text)), settings)
        listed = _any(golds, ", ".join((*found.earlier, found.text)), settings)
        if together or listed:
            return together or listed
        if verdict:
            return unknown("several different boxed answers, of which the last one is right")
    return verdict


def _uncommitted(golds: tuple[tuple[str, ...], bool], prediction: str, settings: Settings) -> Verdict:
    """A prediction that is the answer itself, or one sentence that says it."""
    verdict = _any(golds, prediction, settings)
    count = len(_WORD.findall(prediction))
    short = max(len(_WORD.findall(gold)) for gold in golds[0]) < 3  # two sentences are about the same thing, or not
    if verdict or not (count > 1 and short and verdict.kind == "unequal" or OPEN in verdict.reason):
        return verdict
    for text in (f(prediction.strip()) for f in (extract.only_formula, extract.stated, extract.therefore)):
        if text and (found := _any(golds, text, settings)):
            return found
    if verdict.kind == "unequal" and count > _SENTENCES:
        return unknown("sentences that commit to no answer")
    return verdict


def _compact(text: str) -> str:
    """Normalised, without the spaces beside a sign and with parts side by side: shows that a text is the same."""
    return _BESIDE.sub(r"\1", normalise(text).replace("\n", " "))


@functools.lru_cache(maxsize=4096)
def _alternatives(gold: str) -> tuple[tuple[str, ...], bool]:
    """The normalised gold answers any of which is right, and whether others may be right as well."""
    text = normalise(gold)
    return remarks.forms(remarks.without_note(text)), remarks.has_note(text)


def _any(golds: tuple[tuple[str, ...], bool], prediction: str, settings: Settings) -> Verdict:
    prediction = remarks.without_note(normalise(prediction))
    verdicts = [_remarked(gold, prediction, settings) for gold in golds[0]]
    both = remarks.forms(prediction)
    if len(both) > 1 and not any(verdicts):
        verdicts += [every([_texts(gold, text, settings) for text in both]) for gold in golds[0]]
    best = next((v for kind in ("equal", "unknown", "unequal") for v in verdicts if v.kind == kind), verdicts[0])
    if best.kind == "unequal" and golds[1]:
        return unknown("the gold answer says that others are right as well")
    return best


def _remarked(gold: str, prediction: str, settings: Settings) -> Verdict:
    """Two normalised answers; what a remark behind one of them says counts only if both have one."""
    verdict = _texts(gold, prediction, settings)
    if verdict or ")" not in (gold[-1:], prediction[-1:]):
        return verdict
    plain = [remarks.answer(gold), remarks.answer(prediction)]
    if (plain[0] is None) == (plain[1] is None):
        return verdict
    found = _texts(plain[0] or gold, plain[1] or prediction, settings)
    return found if found or verdict.kind == "unknown" else verdict


def _texts(gold: str, prediction: str, settings: Settings) -> Verdict:
    """Two normalised answers."""
    if gold == prediction and gold:
        return equal("the same text")
    if gold.replace(" ", "").isalpha() and words.letters(gold, prediction):
        return equal("the same words")
    if (said := words.answered(gold, prediction)) is not None:
        return equal("the same answer, and a reason") if said else unequal("the other answer, and a reason")
    plain = dataclasses.replace(settings, options=())
    chosen = choice.compare(gold, prediction, dict(settings.options), lambda a, b: _texts(a, b, plain))
    if chosen is not None:
        return chosen
    figures = [_FIGURE.fullmatch(text) for text in (gold, prediction)]
    if (figures[0] is None) != (figures[1] is None):  # point C is C
        gold, prediction = (f[1] if f else text for f, text in zip(figures, (gold, prediction), strict=True))
    given = choice.chosen(prediction) if settings.options else None
    if given and len(given.letters) == 1 and (text := dict(settings.options).get(min(given.letters))):
        return _texts(gold, text, plain)
    a, b = read(gold), read(prediction)
    if settings.unit and isinstance(a, Formula):
        unit = units.parse_unit(settings.unit) or units.parse_noun(settings.unit)
        a = Quantity(a, unit) if unit else a
    verdict = values(a, b, settings.precision)
    if verdict or not isinstance(a, Text) and not isinstance(b, Text):
        return verdict
    return _concluded(gold, prediction, settings) or verdict


def _concluded(gold: str, prediction: str, settings: Settings) -> Verdict | None:
    """A gold answer that is a whole explanation: what its last sentence leads to."""
    end = extract.concluded(gold.rsplit("\n", 1)[-1]) if len(gold) > 40 else None
    if not end:
        return None
    verdict = values(read(normalise(end)), read(prediction), settings.precision)
    return dataclasses.replace(verdict, reason=f"{verdict.reason}; the gold answer concludes {end!r}")


def values(gold: Value, prediction: Value, precision: int | None = None) -> Verdict:
    """Two typed values; kinds that differ are converted where that is meant."""
    if isinstance(gold, Equation) or isinstance(prediction, Equation):
        return _equations(gold, prediction, precision)
    if isinstance(gold, Items) or isinstance(prediction, Items):
        return _items(gold, prediction, precision)
    if isinstance(gold, Text) or isinstance(prediction, Text):
        return _words(gold, prediction, precision)
    if isinstance(gold, Family) or isinstance(prediction, Family):
        return families.compare(gold, prediction, lambda a, b: values(a, b, precision))
    if isinstance(gold, Region | Relation) or isinstance(prediction, Region | Relation):
        return _ranges(gold, prediction)
    if isinstance(gold, Ratio | Time) or isinstance(prediction, Ratio | Time):
        return _ratios(gold, prediction, precision)
    if isinstance(gold, Date) or isinstance(prediction, Date):
        return _dates(gold, prediction)
    if isinstance(gold, Nothing) or isinstance(prediction, Nothing):
        same = all(
            isinstance(v, Nothing) or isinstance(v, Formula) and v.tree == ("v", "φ") for v in (gold, prediction)
        )
        return equal("both say that there is none") if same else unequal("one says that there is none")
    return _measures(gold, prediction, precision)


def _degrees_left_out(gold: Formula, prediction: Formula) -> Verdict | None:
    """180° - 2α and 180 - 2α; None: no such pair."""
    trees = [syntax.without_degrees(side.tree) for side in (gold, prediction)]
    marked = [bare != side.tree for bare, side in zip(trees, (gold, prediction), strict=True)]
    if marked[0] == marked[1] or not all(syntax.variables(tree) for tree in trees):
        return None
    if any(syntax.has_function(tree) or "π" in syntax.shape(tree) for tree in trees):
        return None
    found = arithmetic.formulas(*map(Formula, trees))
    return equal(f"{found.reason}, the degree sign left out") if found else None


def _dates(gold: Value, prediction: Value) -> Verdict:
    if not (isinstance(gold, Date) and isinstance(prediction, Date)):
        return unequal("one is a date")
    if (gold.month, gold.day) != (prediction.month, prediction.day):
        return unequal("different dates")
    if None in (gold.year, prediction.year) and gold != prediction:
        return unknown("the same day of which only one has a year")
    return equal("the same date") if gold == prediction else unequal("different years")


def _measures(gold: Value, prediction: Value, precision: int | None) -> Verdict:
    """Formulas and quantities; a unit may be left out."""
    if isinstance(gold, Quantity) and isinstance(prediction, Quantity):
        return arithmetic.quantities(gold, prediction, precision)
    if isinstance(gold, Formula) and isinstance(prediction, Formula):
        found = arithmetic.formulas(gold, prediction, precision)
        return found or _degrees_left_out(gold, prediction) or found
    quantity, bare = (gold, prediction) if isinstance(gold, Quantity) else (prediction, gold)
    assert isinstance(quantity, Quantity) and isinstance(bare, Formula)
    pairs = [(quantity.number, bare, "the unit left out")]
    if bare.quantity:  # 2m against 2 metres
        found = (bare.quantity, quantity) if quantity is prediction else (quantity, bare.quantity)
        if verdict := arithmetic.quantities(*found, precision):
            return verdict
        pairs = []
    if quantity.formula:
        pairs.append((quantity.formula, bare, "a formula"))
    if angle := arithmetic.radians(quantity):
        pairs.append((angle, bare, "in radians"))
    verdict = unequal("different quantities")
    for first, second, how in pairs:
        if bare.quantity is None and how == "the unit left out" and quantity.unit.name.isdigit():
            continue
        sides = (first, second) if quantity is gold else (second, first)
        found = arithmetic.formulas(*sides, precision)
        if found:
            return dataclasses.replace(found, reason=f"{found.reason}, {how}")
        verdict = found if verdict.kind == "unequal" else verdict
    return verdict


def _equations(gold: Value, prediction: Value, precision: int | None) -> Verdict:
    if isinstance(gold, Equation) and isinstance(prediction, Equation):
        if gold.name and prediction.name and _same_name(gold, prediction):
            return values(gold.right, prediction.right, precision)
        gold, prediction = _in_one_unit(gold, prediction)
        if _formulas(gold) and _formulas(prediction):
            called = [bool(e.name and "(" in e.name) for e in (gold, prediction)]
            if called[0] != called[1]:  # f(x) = 2x and y = 2x
                other = prediction if called[0] else gold
                return values(gold.right, prediction.right) if other.name == "y" else unequal("different names")
            return arithmetic.equations(gold, prediction)
        if gold.left is None or prediction.left is None:
            found = values(gold.right, prediction.right, precision)
            return unknown("equal values under different names") if found else found
        return unequal("different names")
    equation, other = (gold, prediction) if isinstance(gold, Equation) else (prediction, gold)
    assert isinstance(equation, Equation)
    if isinstance(other, Items) and other.kind != "tuple" and len(other.values) != 1:
        return _items(gold, prediction, precision)
    if isinstance(other, Text) and not other.formula:
        return _words(gold, prediction, precision)
    pair = (equation.right, other) if equation is gold else (other, equation.right)
    found = values(*pair, precision)
    if found and isinstance(equation.right, Formula) and equation.right.tree[0] == "v":
        return unknown("one of two things that are said to be equal")  # AB = CD
    asked = equation is prediction and isinstance(other, Formula) and not syntax.variables(other.tree)
    if found and asked and other.tree != syntax.ZERO and _is_asked(equation.left):
        return found
    if found and not equation.name and equation.left is not None and not _says_a_value(equation):
        return unknown("the value that an equation's right side has")
    return found


def _in_one_unit(*equations: Equation) -> tuple[Equation, ...]:
    """∠1 + ∠2 = 180° and a + b = 5 cm with numbers on the right, if both have the same unit."""
    sides = [equation.right for equation in equations]
    if not all(isinstance(side, Quantity) for side in sides) or sides[0].unit != sides[1].unit:
        return equations
    return tuple(dataclasses.replace(e, right=arithmetic.radians(e.right) or e.right.number) for e in equations)


def _same_name(gold: Equation, prediction: Equation) -> bool:
    """x is x, and one of x_1 and x_2; an angle A is ∠A."""
    a, b = gold.name or "", prediction.name or ""
    if a.removeprefix("∠") == b.removeprefix("∠") and isinstance(gold.right, Quantity):
        return arithmetic.radians(gold.right) is not None
    return a == b or ("_" in a) != ("_" in b) and a.split("_")[0] == b.split("_")[0]


def _formulas(equation: Equation) -> bool:
    return equation.left is not None and isinstance(equation.right, Formula)


def _is_asked(left: syntax.Tree | None) -> bool:
    """Whether a left side can be what a question asks for: a + b, xy; not 2x + 3, a step on the way to x."""
    if left is None or len(syntax.variables(left)) < 2 or syntax.variables(left) <= {"x", "y", "z"}:  # a line
        return False

    def bare(tree: syntax.Tree) -> bool:
        if tree[0] == "^":
            return tree[1][0] == "v" and tree[2][0] == "n"
        return tree[0] == "v" or tree[0] in "+-*/" and all(bare(t) for t in tree[1:])

    return bare(left)


def _says_a_value(equation: Equation) -> bool:
    """Whether an equation says what something is: |AB| = 5, tan A = 2, 2 + 3 = 5; not 2x = 5."""
    assert equation.left is not None
    if equation.left[0] in ("v", "f"):
        return True
    if equation.left[0] in ("*", "/") and all(t[0] == "v" and re.match("[A-Z∠].", t[1]) for t in equation.left[1:]):
        return True  # AB / CD = 2
    return isinstance(equation.right, Formula | Quantity) and bool(
        _measures(Formula(equation.left), equation.right, None)
    )


def _items(gold: Value, prediction: Value, precision: int | None) -> Verdict:
    if isinstance(gold, Items) and isinstance(prediction, Items):
        return _two_items(gold, prediction, precision)
    items, other = (gold, prediction) if isinstance(gold, Items) else (prediction, gold)
    assert isinstance(items, Items)
    if isinstance(other, Region) and items.region:
        return _ranges(*((items.region, other) if items is gold else (other, items.region)))
    if isinstance(other, Formula) and items.formula:
        found = arithmetic.formulas(*((items.formula, other) if items is gold else (other, items.formula)))
        if found and (items is gold and items.kind == "list" or items.kind == "parts"):
            return unknown("several numbers, or one with a comma or spaces in it")
        return found
    if len(items.values) == 1 and items.kind == "set" and not isinstance(items.values[0], Nothing):
        return values(*((items.values[0], other) if items is gold else (other, items.values[0])), precision)
    if isinstance(other, Text):
        return unknown(OPEN + "the prediction is text" if items is gold else OPEN + "the gold answer is text")
    if isinstance(other, Formula) and syntax.variables(other.tree) and all(map(_is_piece, items.values)):
        return unknown("a function in pieces, and one formula")
    if isinstance(other, Relation) and all(isinstance(v, Relation) for v in items.values):  # a < b < c
        sides = [
            [Relation((op,), pair) for v in side for op, pair in zip(v.ops, itertools.pairwise(v.trees), strict=True)]
            for side in ((items.values, (other,)) if items is gold else ((other,), items.values))
        ]
        return _matched(*sides, precision) if len(sides[0]) == len(sides[1]) else unequal("different relations")
    if items.kind == "or" and all(
        values(*((v, other) if items is gold else (other, v)), precision) for v in items.values
    ):
        return equal("the same value in several forms")
    if items is gold and items.kind in ("list", "or") and any(values(v, other, precision) for v in items.values):
        return unequal("only a part of the gold answer")
    return unequal(f"one answer, and {len(items.values)}")


def _is_piece(value: Value) -> bool:
    return isinstance(value, Items) and value.kind == "tuple" and isinstance(value.values[-1], Region | Relation)


def _two_items(gold: Items, prediction: Items, precision: int | None) -> Verdict:
    a, b = gold.values, prediction.values
    kinds = {gold.kind, prediction.kind}
    if len(a) != len(b) and kinds <= {"list", "parts", "maybe"} and len(flat := _flat(a)) == len(_flat(b)):
        together = every([values(x, y, precision) for x, y in zip(flat, _flat(b), strict=True)])
        if together:
            return dataclasses.replace(together, reason="equal, one after the other")
    if "or" in kinds and kinds & {"parts", "tuple"}:
        return unequal("one or the other, and one after the other")
    if kinds == {"set", "tuple"} and len(a if gold.kind == "set" else b) == 1:  # {(1, 2)}
        return values(*((a[0], prediction) if gold.kind == "set" else (gold, b[0])), precision)
    if gold.kind == "set" or prediction.kind == "set":
        a, b = _distinct(a), _distinct(b)
    if len(a) != len(b):
        return unequal(f"{len(a)} things, and {len(b)}")
    unlike = _unlike(gold.values) != _unlike(prediction.values)
    if unlike and len(a) > 1 and kinds & {"set", "or"}:
        return unequal("values of different things, and of one")  # a = 1, b = 2 is no {1, 2}
    a, b = (_by_name(a), b) if prediction.kind == "tuple" else (a, _by_name(b) if gold.kind == "tuple" else b)
    if kinds == {"set", "tuple"}:
        return unequal("a set, and an ordered tuple")
    if kinds == {"tuple"} and gold.region is None and prediction.region is None:
        return every(values(x, y, precision) for x, y in zip(a, b, strict=True))
    ordered = every([values(x, y, precision) for x, y in zip(a, b, strict=True)])
    if ordered and gold.region and prediction.region and not _ranges(gold.region, prediction.region):
        if _ascending(gold.region, closed=False):  # (1, 2) is no [1, 2]; a point is no interval
            return unequal("one is open where the other is closed")
    if ordered and _ascending(gold.region or prediction.region) and None in (gold.region, prediction.region):
        return unknown("an interval or a list in square brackets")
    if ordered or "tuple" in kinds or gold.kind == "parts" and not _same_names(gold, prediction):
        return ordered
    if _same_names(gold, prediction) and not unlike and not _unlike(gold.values):  # x_1 = 1, x_2 = 3
        by_name = every([values(x, y, precision) for x, y in zip(_by_name(a), _by_name(b), strict=True)])
        if by_name:
            return by_name
        found = _matched([v.right for v in a], [v.right for v in b], precision)
        return unknown("equal but for the names") if found else found
    if unlike or _same_names(gold, prediction):  # x = 2, y = 1 is no 1, 2
        return every([values(x, y, precision) for x, y in zip(_by_name(a), _by_name(b), strict=True)])
    found = _matched(a, b, precision)
    if found and ("maybe" in kinds or "parts" in kinds):
        return unknown("equal but for the order")
    return found


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


def _distinct(items: tuple[Value, ...]) -> tuple[Value, ...]:
    found: list[Value] = []
    for item in items[:_MAX_MATCHED]:
        if not any(values(item, other) for other in found):
            found.append(item)
    return tuple(found)


def _matched(a: Sequence[Value], b: Sequence[Value], precision: int | None) -> Verdict:
    """Whether the items can be paired off; augmenting paths, because rounding makes equality no equivalence."""
    if len(a) > _MAX_MATCHED:
        return unknown(f"over {_MAX_MATCHED} things in any order")
    table = [[values(x, y, precision) for y in b] for x in a]
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


def _words(gold: Value, prediction: Value, precision: int | None) -> Verdict:
    if not (isinstance(gold, Text) and isinstance(prediction, Text)):
        text, other = (gold, prediction) if isinstance(gold, Text) else (prediction, gold)
        assert isinstance(text, Text)
        if isinstance(other, Region | Relation) and (said := words.inequality(text.text)):
            found = read(said)
            return values(*((found, other) if text is gold else (other, found)), precision)
        if text.formula and not isinstance(other, Text):
            pair = (text.formula, other) if text is gold else (other, text.formula)
            return values(*pair, precision)
        if re.search(r"[\d\\^=]", text.text) or len(text.text.split()) > 3:
            return unknown(OPEN + f"{text.text[:60]!r} is not understood ({text.why or 'text'})")
        return unequal("one is a word")
    a, b = words.plain(gold.text), words.plain(prediction.text)
    if a == b and gold.text.casefold() == prediction.text.casefold() and not words.letters(gold.text, prediction.text):
        return unequal("capital letters, and small ones")
    if a == b or words.turned(a) == words.turned(b):
        return equal("the same words")
    if words.stated(a, b) or words.stated(b, a):
        return equal("the same words, in a sentence")
    if words.placed(a, b):
        return equal("the same words but for a preposition")
    if re.sub("[ -]", "", a) == re.sub("[ -]", "", b):
        return equal("the same words but for spaces and hyphens")
    if gold.formula and prediction.formula and arithmetic.formulas(gold.formula, prediction.formula):
        return equal("the same product")
    if "\\" in gold.text + prediction.text:
        return unknown(OPEN + (gold.why or prediction.why or "text"))
    if max(len(a.split()), len(b.split())) > 3 or re.search(r"[\u4e00-\u9fff]{4}", a + b):
        return unknown("different words, which may still mean the same")
    return unequal("different words")


def _ranges(gold: Value, prediction: Value) -> Verdict:
    if ("v", "R") in (getattr(gold, "tree", None), getattr(prediction, "tree", None)):  # the real numbers
        gold, prediction = (
            Region((relations.EVERYTHING,)) if isinstance(v, Formula) else v for v in (gold, prediction)
        )
    if isinstance(gold, Region) and isinstance(prediction, Region):
        if gold.variable and prediction.variable and gold.variable != prediction.variable:
            return unequal("of different variables")
        if len(gold.parts) != len(prediction.parts):
            return unequal("different intervals")
        return every([_intervals(a, b) for a, b in zip(gold.parts, prediction.parts, strict=True)])
    sides = [relations.as_relation(s) if isinstance(s, Region) else s for s in (gold, prediction)]
    if isinstance(sides[0], Relation) and isinstance(sides[1], Relation):
        return arithmetic.chains(sides[0], sides[1])
    return unequal("one is an interval or inequality")


def _intervals(a: relations.Interval, b: relations.Interval) -> Verdict:
    if (a.low_closed, a.high_closed) != (b.low_closed, b.high_closed):
        return unequal("one is open where the other is closed")
    ends = [(a.low, b.low), (a.high, b.high)]
    if any((x is None) != (y is None) for x, y in ends):
        return unequal("one is bounded where the other is not")
    return every([arithmetic.formulas(x, y) for x, y in ends if x and y] or [equal("the whole line")])


def _ratios(gold: Value, prediction: Value, precision: int | None) -> Verdict:
    if isinstance(gold, Ratio) and isinstance(prediction, Ratio):
        if gold.clock is not None and prediction.clock is not None:
            if gold.clock == prediction.clock:
                return equal("the same time or ratio")
            same = _proportional(gold, prediction)
            return unknown("different times, but equal as ratios") if same else unequal("different times or ratios")
        return _proportional(gold, prediction)
    times = [side.clock if isinstance(side, Ratio) else side.seconds if isinstance(side, Time) else None
             for side in (gold, prediction)]  # fmt: skip
    if isinstance(gold, Time) or isinstance(prediction, Time):
        if None in times:
            return unequal("one is a time of the day")
        if abs(times[0] - times[1]) == 12 * 3600:
            halves = [isinstance(side, Time) and side.half for side in (gold, prediction)]
            hour = times[halves.index(False)] // 3600 if halves[0] != halves[1] else 24
            if hour <= 12:
                return equal("the same time, a.m. or p.m. left out")
            return unequal("twelve hours apart")
        return equal("the same time") if times[0] == times[1] else unequal("different times")
    ratio, other = (gold, prediction) if isinstance(gold, Ratio) else (prediction, gold)
    assert isinstance(ratio, Ratio)
    if len(ratio.trees) != 2 or not isinstance(other, Formula):
        return unequal("one is a ratio")
    quotient = Formula(("/", *ratio.trees))
    found = arithmetic.formulas(*((quotient, other) if ratio is gold else (other, quotient)), precision)
    if not found or ratio.clock is None or other.tree == quotient.tree:  # 9:10 and 9/10
        return found
    return unknown("a ratio or a time of the day")


def _proportional(gold: Ratio, prediction: Ratio) -> Verdict:
    """a : b : c = d : e : f, by the cross products with the first terms."""
    if len(gold.trees) != len(prediction.trees):
        return unequal("ratios of different length")
    a, b = gold.trees[0], prediction.trees[0]
    return every(
        [
            arithmetic.formulas(Formula(("*", a, y)), Formula(("*", b, x)))
            for x, y in zip(gold.trees[1:], prediction.trees[1:], strict=True)
        ]
    )
