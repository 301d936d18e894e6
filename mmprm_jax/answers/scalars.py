"""Numbers, formulas, quantities, times and ratios: what is read without looking into brackets or lists."""

from __future__ import annotations

import dataclasses
import re
from fractions import Fraction

from mmprm_jax.answers import numerals, syntax, trees, units
from mmprm_jax.answers.split import split
from mmprm_jax.answers.values import Formula, Quantity, Ratio, Time, Value, all_of

NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d+)?|\.\d+)")
_UNCOMPUTED = re.compile(r"(?!\(*[-+]? ?\d+\)*°?$)[-+*()\d °]+")
_CLOCK = re.compile(r"(\d{1,2}):([0-5]\d)(?::([0-5]\d))?\s*(a\.?m\.?|p\.?m\.?|o'clock)?", re.IGNORECASE)
_HOURS = re.compile(
    r"(\d{1,2})\s*(?:[时点]\s*(?:([0-5]?\d)\s*分)?|(?:o'clock\s*)?(a\.?m\.?|p\.?m\.?)|o'clock)", re.IGNORECASE
)


def parse_number(text: str) -> Formula:
    """A plain number, which NUMBER matches; one of too many digits is only equal to itself."""
    if len(text) > syntax.MAX_DIGITS:
        return Formula(("v", text))
    _, point, decimals = text.partition(".")
    digits = len(text.lstrip("+-0.").replace(".", "")) if point else 0
    return Formula(("n", Fraction(text)), len(decimals) if point else None, digits)


def parse_time(text: str) -> Value | None:
    """9:05, 3 p.m., 3时20分; 12:30 may be a ratio as well. None: no time of the day."""
    match = _CLOCK.fullmatch(text) or _HOURS.fullmatch(text)
    if not match:
        return None
    hour, minute, half = int(match[1]), int(match[2] or 0), ""
    if match.re is _CLOCK:
        second, half = int(match[3] or 0), (match[4] or "").casefold()
    else:
        second, half = 0, (match[3] or "").casefold()
    if hour > 24:
        return None
    if half[:1] in ("a", "p"):
        hour = hour % 12 + 12 * (half[0] == "p")
    seconds = hour * 3600 + minute * 60 + second
    if match.re is _CLOCK and not half and minute >= 10:  # 9:05 is no ratio
        trees = tuple(("n", Fraction(part)) for part in text.split(":"))
        return Ratio(trees, clock=seconds)
    return Time(seconds, bool(half[:1] in ("a", "p")))


def parse_ratio(text: str) -> Value | None:
    """a : b : c, or None."""
    text = re.sub(r"^(\d+) to (\d+)$", r"\1:\2", text)
    if ":" not in text:
        return None
    parts = [parse_formula(part) for part in split(text, ":")]
    if len(parts) < 2 or not all_of(parts, Formula):
        return None
    return Ratio(tuple(part.tree for part in parts))


def parse_formula(text: str) -> Value | None:
    """A formula, or None."""
    text = text.strip()
    if NUMBER.fullmatch(text):
        return parse_number(text)
    if text.endswith("%") and NUMBER.fullmatch(hundredths := text[:-1].rstrip()):
        found = parse_number(hundredths)
        decimals = None if found.decimals is None else found.decimals + 2
        return dataclasses.replace(found, tree=("/", found.tree, ("n", Fraction(100))), decimals=decimals, percent=True)
    try:
        tree = syntax.parse(text)
    except syntax.SyntaxProblem:
        return None
    return Formula(tree, percent=text.endswith("%"), uncomputed=bool(_UNCOMPUTED.fullmatch(text)))


_FUNCTIONS = syntax.FUNCTIONS | {"pi"}


def parse_formula_or_quantity(text: str) -> Value | None:
    """The likelier one of both readings, with the other one in it; None: neither."""
    words = text.split()
    if all(word.isascii() and word.isalpha() for word in words) and _FUNCTIONS.isdisjoint(words):
        if any(len(word) > 1 for word in words):
            return None
    formula, quantity = parse_formula(text), _quantity(text)
    if formula and text.count("°") > 1:
        return formula  # 60° + k 360°
    if quantity and formula and quantity.unit.half_turns and trees.has_function(quantity.number.tree):
        return formula  # the sine of 30°, not (sin 30)°
    if quantity is None or formula is None:
        return quantity or formula
    assert isinstance(formula, Formula)
    if quantity.unit.name in units.LETTERS and not re.search(r"[\s$€£][^\d\s]+$", text):
        return dataclasses.replace(formula, quantity=quantity)  # 2m: a variable, until the other side has a unit
    return dataclasses.replace(quantity, formula=formula)


_LETTER = re.compile(r"(?<![A-Za-z\\_∠→])[A-Za-zÅΩμ°'$€£¢\u4e00-\u9fff]")
_MULTIPLE = re.compile(
    rf"([-+]?\d+(?:\.\d+)?)\s*({'|'.join(sorted(units.MULTIPLES, key=len, reverse=True))})(.*)", re.S
)
_UNIT_BEHIND = re.compile(r"(.{1,80}?)\s*\(\s*([^()\d ]{2,20}(?:\^\{?\d\}?)?)\s*\)", re.S)  # 12 (cm)
_BRACED = re.compile(r"(.{0,80}\d)\s*\{\s*([A-Za-z]{2,}(?: [A-Za-z]+)?)\s*\}", re.S)  # 45{degrees}
_PRICE = re.compile(r"(-?)([$¥€£]|US\$|RMB)\s*(.+)", re.S)
_COMPOUND = re.compile(r"(\d+(?:\.\d+)?)\s*([^\d\s.]+)\s*(?:and\s*)?")


def _quantity(text: str) -> Quantity | None:
    price = _PRICE.fullmatch(text)
    if price:
        unit, number = (
            units.parse_unit({"¥": "元", "RMB": "元", "US$": "$"}.get(price[2], price[2])),
            parse_formula(price[3]),
        )
        return Quantity(_signed(number, price[1]), unit) if unit and isinstance(number, Formula) else None
    multiple = _MULTIPLE.fullmatch(text)
    if multiple and not multiple[3].startswith(("克", "米", "瓦", "焦")):
        number = Formula(("n", Fraction(multiple[1]) * units.MULTIPLES[multiple[2]]))
        rest = multiple[3].strip()
        unit = (units.parse_unit(rest) or units.parse_noun(rest)) if rest else units.parse_noun("个")
        return Quantity(number, unit) if unit else None
    behind = _UNIT_BEHIND.fullmatch(text)
    if behind and (unit := units.parse_unit(behind[2])) and isinstance(number := parse_formula(behind[1]), Formula):
        return Quantity(number, unit)
    if (words := numerals.leading_number(text)) and (unit := units.parse_unit(words[1]) or units.counter(words[1])):
        return Quantity(parse_number(words[0]), unit)
    braced = _BRACED.fullmatch(text)
    if braced and (unit := units.parse_unit(braced[2])) and isinstance(number := parse_formula(braced[1]), Formula):
        return Quantity(number, unit)
    found = _LETTER.finditer(text)
    for match in [m for _, m in zip(range(6), found, strict=False)]:
        number = parse_formula(text[: match.start()]) if match.start() else None
        if not isinstance(number, Formula):
            continue
        rest = text[match.start() :].strip()
        unit = units.parse_unit(rest)
        if unit is None and not trees.variables(number.tree):
            unit = units.parse_noun(rest)
        if unit:
            return Quantity(number, unit)
    return _compound(text)


def _signed(number: Formula, sign: str) -> Formula:
    return dataclasses.replace(number, tree=("-", number.tree)) if sign else number


def _compound(text: str) -> Quantity | None:
    """1 h 30 min, 30°15', 1小时30分: a sum in the first one's unit."""
    total, first, end, previous = Fraction(0), None, 0, None
    for match in _COMPOUND.finditer(text):
        unit = units.parse_unit("分钟" if match[2] == "分" and first and first.dimensions == (("T", 1),) else match[2])
        if match.start() != end or not unit or first and unit.dimensions != first.dimensions:
            return None
        if previous and unit.factor >= previous.factor:
            return None
        first, previous, end = first or unit, unit, match.end()
        total += Fraction(match[1]) * unit.factor / first.factor
    return Quantity(Formula(("n", total)), first) if first and end == len(text) else None
