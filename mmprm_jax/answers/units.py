"""Units by their dimensions: what 5 cm is in metres, and what it is not."""

from __future__ import annotations

import dataclasses
import re
from fractions import Fraction

_Dimensions = tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True)
class Unit:
    """``factor`` base units. The degree is π/180, a factor that is no fraction: ``half_turns`` says 1/180."""

    name: str  # as written, singular
    factor: Fraction
    dimensions: _Dimensions  # base dimension -> exponent, sorted
    half_turns: bool = False  # the factor is to be multiplied by π

    @property
    def counts(self) -> bool:
        """A noun of which one can say how many: apples, or a unit not known here."""
        return not self.dimensions


_LENGTH, _MASS, _TIME = (("L", 1),), (("M", 1),), (("T", 1),)
_AREA, _VOLUME, _SPEED = (("L", 2),), (("L", 3),), (("L", 1), ("T", -1))
_FORCE, _ENERGY = (("L", 1), ("M", 1), ("T", -2)), (("L", 2), ("M", 1), ("T", -2))
_POWER = (("L", 2), ("M", 1), ("T", -3))
_MONEY = (("¥", 1),)

_TABLE: list[tuple[str, str | Fraction, _Dimensions]] = [
    ("m meter metre 米", "1", _LENGTH), ("cm centimeter centimetre 厘米", "0.01", _LENGTH),
    ("mm millimeter millimetre 毫米", "0.001", _LENGTH), ("dm decimeter decimetre 分米", "0.1", _LENGTH),
    ("km kilometer kilometre 千米 公里", "1000", _LENGTH), ("nm nanometer 纳米", Fraction(1, 10**9), _LENGTH),
    ("μm um micrometer 微米", Fraction(1, 10**6), _LENGTH), ("里", "500", _LENGTH),
    ("Å angstrom ångström", Fraction(1, 10**10), _LENGTH),
    ("inch in inche", "0.0254", _LENGTH), ("ft foot feet", "0.3048", _LENGTH), ("yard yd", "0.9144", _LENGTH),
    ("mile mi", "1609.344", _LENGTH), ("尺", Fraction(1, 3), _LENGTH),
    ("kg kilogram 千克 公斤", "1", _MASS), ("g gram 克", "0.001", _MASS),
    ("mg milligram 毫克", Fraction(1, 10**6), _MASS),
    ("t ton tonne 吨", "1000", _MASS), ("斤", "0.5", _MASS), ("lb pound", "0.45359237", _MASS),
    ("oz ounce", "0.028349523125", _MASS),
    ("s sec second 秒 秒钟", "1", _TIME), ("min minute 分钟", "60", _TIME), ("h hr hour 小时 时", "3600", _TIME),
    ("ms millisecond 毫秒", "0.001", _TIME), ("day 天 日", "86400", _TIME), ("week 周 星期", "604800", _TIME),
    ("month 个月", "1", (("month", 1),)), ("year yr 年", "12", (("month", 1),)),
    ("L l liter litre 升", "0.001", _VOLUME), ("mL ml milliliter millilitre 毫升 cc", Fraction(1, 10**6), _VOLUME),
    ("hectare ha 公顷", "10000", _AREA), ("亩", Fraction(2000, 3), _AREA), ("acre", "4046.8564224", _AREA),
    ("kph kmh", Fraction(5, 18), _SPEED), ("mph", "0.44704", _SPEED),
    ("N newton 牛 牛顿", "1", _FORCE), ("kN", "1000", _FORCE), ("J joule 焦 焦耳", "1", _ENERGY),
    ("kJ kilojoule 千焦", "1000", _ENERGY),
    ("MJ megajoule 兆焦", "1000000", _ENERGY), ("kWh 千瓦时", "3600000", _ENERGY), ("eV", "1.602176634e-19", _ENERGY),
    ("W watt 瓦", "1", _POWER), ("kW kilowatt 千瓦", "1000", _POWER),
    ("MW megawatt 兆瓦", "1000000", _POWER),
    ("Pa pascal 帕", "1", (("L", -1), ("M", 1), ("T", -2))), ("kPa", "1000", (("L", -1), ("M", 1), ("T", -2))),
    ("V volt 伏", "1", (("V", 1),)), ("A ampere amp 安", "1", (("A", 1),)), ("mA", "0.001", (("A", 1),)),
    ("Ω ohm 欧", "1", (("Ω", 1),)), ("kΩ", "1000", (("Ω", 1),)), ("Hz hertz 赫兹", "1", (("T", -1),)),
    ("mol 摩尔", "1", (("mol", 1),)), ("K kelvin", "1", (("K", 1),)), ("°C", "1", (("°C", 1),)),
    ("°F", "1", (("°F", 1),)),
    ("元 yuan rmb", "1", _MONEY), ("角", "0.1", _MONEY), ("$ dollar usd", "1", (("$", 1),)),
    ("cent ¢", "0.01", (("$", 1),)), ("€ euro", "1", (("€", 1),)), ("£", "1", (("£", 1),)),
    ("rad radian 弧度", "1", (("angle", 1),)), ("unit", "1", (("unit", 1),)),
]  # fmt: skip

_UNITS: dict[str, Unit] = {}
for _names, _factor, _dimensions in _TABLE:
    _first = _names.split()[0]
    for _name in _names.split():
        _UNITS[_name] = Unit(_first, Fraction(_factor), _dimensions)
DEGREE = Unit("°", Fraction(1, 180), (("angle", 1),), half_turns=True)
for _name in ("°", "degree", "deg", "度"):
    _UNITS[_name] = DEGREE
_UNITS["'"] = dataclasses.replace(DEGREE, name="'", factor=Fraction(1, 180 * 60))
_UNITS["''"] = dataclasses.replace(DEGREE, name="''", factor=Fraction(1, 180 * 3600))
MULTIPLES = {"百": 10**2, "千": 10**3, "万": 10**4, "百万": 10**6, "亿": 10**8, "million": 10**6, "billion": 10**9,
             "thousand": 10**3, "hundred": 10**2}  # fmt: skip
COUNTERS = frozenset("个只本人名位条张件次种辆台支块棵根颗页道题户组份岁层步倍对间头双把")
_WORDS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3, "平方": 2, "立方": 3}
# One letter directly behind a number is a variable unless the other side has a unit: 2m.
LETTERS = frozenset(name for name in _UNITS if len(name) == 1 and name.isascii() and name.isalpha())
GLUED = LETTERS & set("msgLNVWJ")  # of these, fewer stand for an unknown: 160m, 30s

_ALTERNATIVES = "|".join(map(re.escape, sorted(_UNITS, key=len, reverse=True)))
_POWER_OF = r"(?:\s*\^\s*(?:\{\s*(-?\d)\s*\}|(-?\d)))?"
_FACTOR = re.compile(
    rf"\s*(?:(square|sq|cubic|cu|平方|立方)\.?\s*)?({_ALTERNATIVES})(?:(?<=[a-z])(e?s)(?![A-Za-z]))?(?![A-Za-z]){_POWER_OF}\s*"
)
_PER = re.compile(r"\s*(?:/|\bper\b|每|\*)?\s*")


def parse_unit(text: str) -> Unit | None:
    """The unit that a text is, such as cm^{2}, km/h, square meters, 平方厘米; None: no unit known here."""
    dimensions: dict[str, int] = {}
    names: list[str] = []
    factor, half_turns, i, sign = Fraction(1), False, 0, 1
    text = text.strip()
    if len(text) > 40:
        return None
    while i < len(text):
        match = _FACTOR.match(text, i)
        if not match or len(names) > 4:
            return None
        unit = _UNITS[match[2]]
        power = sign * int(match[4] or match[5] or 1) * _WORDS.get(match[1] or "", 1)
        for name, exponent in unit.dimensions:
            dimensions[name] = dimensions.get(name, 0) + exponent * power
        factor *= unit.factor**power
        half_turns |= unit.half_turns
        names.append(f"{unit.name}^{power}" if power != 1 else unit.name)
        i = match.end()
        if i < len(text):
            link = _PER.match(text, i)
            sign = -1 if link and ("/" in link[0] or "per" in link[0] or "每" in link[0]) else sign
            i = link.end() if link else i
    if not names or half_turns and len(names) > 1:
        return None
    return Unit(" ".join(names), factor, tuple(sorted((n, e) for n, e in dimensions.items() if e)), half_turns)


_NOUN = re.compile(r"(?:[A-Za-z][a-z-]{2,}|[A-Z]{3,})(?: [A-Za-z][A-Za-z-]*){0,3}|[\u4e00-\u9fff]{1,6}")
_NO_NOUNS = frozenset("or and to if when for is are not no between from than where with".split())


def counter(text: str) -> Unit | None:
    """A Chinese counter: 个."""
    return Unit("", Fraction(1), ()) if text in COUNTERS else None


def parse_noun(text: str) -> Unit | None:
    """Things that are counted: apples, 个, students per class."""
    text = text.strip()
    if not _NOUN.fullmatch(text) or _NO_NOUNS & set(text.casefold().split()):
        return None
    return counter(text) or Unit(text.casefold().removesuffix("s"), Fraction(1), ())
