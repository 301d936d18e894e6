"""Typed reading of one answer: normalised text -> a value of ``values``. Never fails: what nothing else is, is Text."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Literal

from mmprm_jax.answers import dates, families, numerals, relations, syntax, units, words
from mmprm_jax.answers.normalise import trim
from mmprm_jax.answers.split import split, surrounded
from mmprm_jax.answers.values import (
    Equation,
    Family,
    Formula,
    Interval,
    Items,
    Nothing,
    Quantity,
    Ratio,
    Region,
    Text,
    Time,
    Value,
)

MAX_ITEMS = 50

_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d+)?|\.\d+)")
_UNCOMPUTED = re.compile(r"(?!\(*[-+]? ?\d+\)*°?$)[-+*()\d °]+")
_NOTHING = frozenset(
    ["∅", "⦃⦄", "⦃ ⦄", "{}", "no solution", "no solutions", "no real solution", "no real solutions", "none",
     "empty set", "no answer", "there is no solution", "there are no solutions", "no such number exists",
     "does not exist", "dne", "the empty set", "no real roots", "no real root", "无解", "无实数解", "无实数根", "空集",
     "不存在", "无实根", "没有实数根"]
)  # fmt: skip
_HAS_NONE = re.compile(
    r"null set|(?:there (?:is|are) )?no (?:real |such |integer |positive ){0,3}(?:solutions?|roots?|numbers?|values?)"
    r"(?: exists?)?"
    r"|(?:the )?(?:equation|system|inequality)s? (?:has|have) no (?:real )?(?:solutions?|roots?)"
    r"|(?:原|该|此)?(?:方程|不等式)组?无(?:实数)?[解根]|没有(?:实数)?[解根]"
)
_WHERE = re.compile(
    r"\s*[,;(]?\s*(?:where\s+|for\s+)?\(?(?:([a-z])\s*(?:∈\s*([ZN])(_?\{?[+*]\}?|\^\{?[+*]\}?)?|is an(?:y)? integer"
    r"|[为是]整数)"
    r"|(?:any |every |some |all )?integers? ([a-z]))\)?$"
)
_NAMED = re.compile(  # the sum is 40
    r"(?:the )?(?!(?i:.*\b(?:no|not|none|neither|nor|if|when|which|let|assume|suppose|impossible)\b))"
    r"([A-Za-z][A-Za-z ∠△']{1,40}[A-Za-z']) (?:is|are|equals)(?: (?:therefore|thus|hence|then|exactly|equal to))? "
    r"(?=[-\d\\(\[⦃√∞π]|[b-zA-Z](?![A-Za-z])|a ?[-+*/^=<>≤≥≠\d])(.+)"
)
_LABELLED = re.compile(r"(?:the )?([A-Za-z][A-Za-z ]{1,30}[a-z](?: \d)?)\s*:\s*(?=[^\s:])([^:]+)")  # Area: 5
_OUTWARD = re.compile(r"([\[\]])([^\[\](),;]*[,;][^\[\](),;]*)([\[\]])")
_ALL = frozenset(
    ["all real numbers", "all reals", "any real number", "all real number", "全体实数", "一切实数", "任意实数", "x∈R",
     "x ∈ R", "the set of all real numbers", "every real number", "(-∞,∞)"]
)  # fmt: skip
_HALF_LINE = re.compile(r"(?:x ?∈ ?)?R ?[_^] ?\{?([+-])\}?( ?∪ ?⦃ ?0 ?⦄)?")  # R^+
_LEAD = re.compile(
    r"(?:(?:so|thus|hence|therefore),? )?(?:the )?(?:final |correct )?(?:answers?|result|value)(?: is| are| =|:)+:?\s*"
    r"|answer\s*[:.]\s*|answer\s+(?=[-+\d\\(])|答案\s*[是为:]*\s*|答\s*:\s*|(?:it|this) (?:is|equals) |≈|approximately "
    r"|approx\.? |about "
    r"|the (?:point|vector|set|interval|ordered pair) (?=[(\[⦃])"
    r"|in (?=\d{4}$)|(?:点|向量|区间|集合) ?(?=[(\[⦃])|约为?|大约|解得\s*|即\s*|共|there (?:is|are) |a total of ",
    re.IGNORECASE,
)
_CLOCK = re.compile(r"(\d{1,2}):([0-5]\d)(?::([0-5]\d))?\s*(a\.?m\.?|p\.?m\.?|o'clock)?", re.IGNORECASE)
_HOURS = re.compile(
    r"(\d{1,2})\s*(?:[时点]\s*(?:([0-5]?\d)\s*分)?|(?:o'clock\s*)?(a\.?m\.?|p\.?m\.?)|o'clock)", re.IGNORECASE
)


@functools.lru_cache(maxsize=8192)
def read(text: str) -> Value:
    """The value of a whole answer in normalised text, of one or several parts."""
    text = lead(text)
    if _NUMBER.fullmatch(text):
        return _number(text)
    text = re.sub(r"^l\s*:\s*(?=[^:]*=)", "", text)  # the line l
    text = re.sub(r"^(?:minus|negative) (?=[\d\\])", "-", text)
    if text[:1] == "]" or text[-1:] == "[":  # ]1, 3[ is (1, 3)
        text = _OUTWARD.sub(lambda m: m[1].replace("]", "(") + m[2] + m[3].replace("[", ")"), text)
    where = _WHERE.search(text)
    if where and (name := where[1] or where[4]) in text[: where.start()]:
        value = read(text[: where.start()])  # kπ, k ∈ Z
        return families.of(value, name, every=where[2] != "N" and not where[3])
    whole = _phrase(text)
    if whole is not None:
        return whole
    if (pieces := _pieces(text)) is not None:
        return pieces
    if text.endswith(")") and len(text) <= _MAX_CONDITION and (condition := _CONDITION.fullmatch(text)):
        text = f"{condition[1]}, {condition[2]}"  # y = x + 1 (x > 0)
    parts, kind = _several(text)
    if len(parts) < 2 or len(parts) > MAX_ITEMS:
        return item(text)
    if kind == "or" or kind == "and":
        return _joined([read(part) for part in parts], kind)
    whole = kind == "parts" or kind == "maybe" and _SOLUTION.search(text)
    values = tuple(value for part in parts for value in _flat(_solution(read(part)) if whole else item(part), kind))
    assigned = {v.name for v in values if isinstance(v, Equation)}
    if kind == "maybe" and len(assigned) == 1:
        kind = "list"  # x = 1; x = 2
    return Items(kind, values, formula=_one_number(text))


_MAX_CONDITION = 200  # characters of what is matched in quadratic time
_CONDITION = re.compile(r"([^()]*=(?:[^()]|\([^()]*\))*?) ?\( ?([^()=]*[<>≤≥≠][^()=]*) ?\)")
_SOLUTION = re.compile(r"^ ?[a-z] ?=[^=;,]*, ?[a-z] ?=[^=;,]*;")  # x = 1, y = 2; x = 2, y = 1
_SPACED = re.compile(r"-?[1-9]\d{0,2}(?: \d{3})+")
_DECIMAL_COMMA = re.compile(r"-?(?:0|[1-9]\d*),\d+")
_PIECE = re.compile(r"([^&\n]*?)[,& ]*(?:&|,| (?=if|for|when))\s*(?:if |for |when |, )*([^&\n,]*[<>≤≥≠=∈][^&\n]*)")


def _one_number(text: str) -> Formula | None:
    """Numbers that another country writes as one: 0,5 and 10 500."""
    if _SPACED.fullmatch(text):
        return _number(text.replace(" ", ""))
    return _number(text.replace(",", ".")) if _DECIMAL_COMMA.fullmatch(text) else None


def _pieces(text: str) -> Value | None:
    """f(x) = x for x ≥ 0 and -x for x < 0, in lines: the pairs of a formula and where it holds, in any order."""
    if "\n" not in text or max(map(len, text.split("\n"))) > _MAX_CONDITION:
        return None
    name, equals, body = text.partition("=")
    called = _FUNCTION_OF.fullmatch(name.strip()) or re.fullmatch("y|[a-z]_ ?n|[a-z]_ ?\\{n\\}", name.strip())
    lines = [line for line in (body if equals and called else text).split("\n") if line.strip()]
    found = [_PIECE.fullmatch(line.strip().strip(";.,")) for line in lines]
    if len(lines) < 2 or not all(found):
        return None
    pairs = [(_formula(piece[1]), item(piece[2])) for piece in found]
    if not all(isinstance(formula, Formula) for formula, _ in pairs):
        return None
    value = Items("set", tuple(Items("tuple", pair) for pair in pairs))
    if not (equals and called):
        return value
    variable = re.sub(r"[{}\s]", "", name)
    return Equation(variable, ("v", variable), value)


def _solution(value: Value) -> Value:
    """x = 1, y = 2 as one thing: a pair, in the order of the names."""
    if not isinstance(value, Items) or value.kind != "list":
        return value
    names = [v.name if isinstance(v, Equation) and v.name and len(v.name) == 1 else None for v in value.values]
    if None in names or len(set(names)) != len(names):
        return value
    return Items("tuple", tuple(v for _, v in sorted(zip(names, value.values, strict=True), key=lambda pair: pair[0])))


def lead(text: str) -> str:
    """Without "the answer is" and the like before an answer."""
    for _ in range(3):
        match = _LEAD.match(text)
        if not match or match.end() == len(text):
            break
        text = trim(text[match.end() :])
    return text


def _flat(value: Value, kind: str) -> tuple[Value, ...]:
    return value.values if isinstance(value, Items) and value.kind in ("list", "or") and kind == "list" else (value,)


def _several(text: str) -> tuple[list[str], Literal["parts", "maybe", "list", "or", "and", ""]]:
    """The parts of an answer and what joins them."""
    if re.fullmatch(r"\d(?:\.\d){2,}", text):
        return text.split("."), "list"  # 1.3.4: the numbers of statements
    if re.fullmatch(r"(?:\(\d{1,2}\)\s*(?:(?:,|and|和)\s*)?){2,}", text):
        return re.findall(r"\d+", text), "list"  # (1)(3)
    numbered = _numbered(text)
    if numbered:
        return numbered, "parts"
    rules: tuple[tuple[str, Literal["parts", "maybe", "list", "or", "and"]], ...] = (
        ("\n", "parts"), (";", "maybe"), ("→", "parts"), (" or |或", "or"), (",? and |和|且|与", "and"), (",", "list"),
    )  # fmt: skip
    for sign, kind in rules:
        if sign == "→" and not re.search(r"\)\s*→", text):
            continue
        parts = [trim(part) for part in split(text, sign)] if re.search(sign, text) else []
        if len(parts) > 1 and all(parts):
            return [re.sub("^(?:or|and) ", "", part) for part in parts], kind
    pieces = text.split(" ")
    if len(pieces) > 1 and all(_NUMBER.fullmatch(piece) for piece in pieces):
        return pieces, "parts"  # 16 12.5
    return [], ""


_ROMAN = "i ii iii iv v vi".split()
_MARKS = ([str(n) for n in range(1, MAX_ITEMS)], _ROMAN, [mark.upper() for mark in _ROMAN], list("abcdef"))


def _numbered(text: str) -> list[str]:
    """(1) … (2) …, (i) … (ii) …, (a) … (b) …: what follows each number."""
    marks = next((marks for marks in _MARKS if text.startswith(f"({marks[0]})")), None)
    if not marks:
        return []
    parts, i = [], len(marks[0]) + 2
    for mark in marks[1:]:
        end = text.find(f"({mark})", i)
        if end < 0:
            break
        parts.append(trim(text[i:end]))
        i = end + len(f"({mark})")
    parts.append(trim(text[i:]))
    return parts if len(parts) > 1 and all(parts) else []


def _joined(values: list[Value], word: str) -> Value:
    """Values joined by "or" or "and". Of inequalities: the union or what they have in common."""
    if any(isinstance(value, Region) for value in values):  # x = 1 or x ≥ 2
        values = [relations.point(value) or value for value in values]
    if all(isinstance(value, Region) and value.variable for value in values):
        joined = relations.union(values) if word == "or" else relations.intersection(values)
        if joined:
            return joined
    kind: Literal["or", "list"] = "or" if word == "or" else "list"
    values = [_solution(value) for value in values] if word == "or" else values
    return Items(kind, tuple(v for value in values for v in _flat(value, "list")))


def _phrase(text: str) -> Value | None:
    folded = text.casefold()
    if folded in _NOTHING or _HAS_NONE.fullmatch(folded):
        return Nothing()
    if text in _ALL or folded in _ALL:
        return Region((relations.EVERYTHING,), None)
    if half := _HALF_LINE.fullmatch(text):
        zero, closed = Formula(syntax.ZERO), bool(half[2])
        ends = (zero, None, closed, False) if half[1] == "+" else (None, zero, False, closed)
        return Region((Interval(*ends),), None)
    if date := dates.date(text):
        return date
    if found := numerals.number(text):
        return _formula(found)
    counted = numerals.leading(text)
    unit = counted and units.parse_unit(counted[1])
    return Quantity(_number(counted[0]), unit) if unit else None


def item(text: str) -> Value:
    """The value of an answer of one part."""
    text = text.strip()
    if _NUMBER.fullmatch(text):
        return _number(text)
    if len(text) > syntax.MAX_LENGTH:
        return Text(text, why="too long for a formula")
    named = _NAMED.fullmatch(text)
    if named:
        return Equation(words.name(named[1]), None, item(named[2]))
    labelled = _LABELLED.fullmatch(text)
    if labelled:
        return Equation(words.name(labelled[1]), None, item(labelled[2]))
    if text[:1] == "+" and surrounded(text[1:]):
        return item(text[1:])
    if text[:1] == "-" and surrounded(text[1:]) and isinstance(point := _brackets(text[1:]), Items):
        if point.kind == "tuple" and all(isinstance(v, Formula) for v in point.values):
            return Items("tuple", tuple(Formula(("-", v.tree)) for v in point.values))  # -(1, 2)
    if "±" in text or "∓" in text:
        plus, minus = text.replace("±", "+").replace("∓", "-"), text.replace("±", "-").replace("∓", "+")
        return Items("or", (item(plus), item(minus)))
    if re.search("[ıȷĸ]", text):
        return _vector(text)
    for rule in _RULES:
        found = rule(text)
        if found is not None:
            return found
    return _word(text)


def _vector(text: str) -> Value:
    """2ı - 3ȷ is (2, -3); i, j and k that stand for anything else are letters in bold."""
    other = item(text.translate(str.maketrans("ıȷĸ", "ijk")))
    formula = _formula(text)
    if not isinstance(formula, Formula) or text.replace(" ", "") == "ı" or not re.search("[ȷĸ]", text):
        return other
    names = "ıȷĸ" if "ĸ" in text else "ıȷ"
    parts = syntax.linear(formula.tree, names)
    if parts is None or parts[0] != syntax.ZERO:
        return other
    return Items("tuple", tuple(map(Formula, parts[1:])), formula=other if isinstance(other, Formula) else None)


def _number(text: str) -> Formula:
    if len(text) > syntax.MAX_DIGITS:
        return Formula(("v", text))
    _, point, decimals = text.partition(".")
    digits = len(text.lstrip("+-0.").replace(".", "")) if point else 0
    return Formula(("n", Fraction(text)), len(decimals) if point else None, digits)


def _word(text: str) -> Value:
    whole = _phrase(text)
    if whole is not None:
        return whole
    try:
        return Text(text, Formula(syntax.parse(text)))
    except syntax.SyntaxProblem as problem:
        return Text(text, why=str(problem))


def _time(text: str) -> Value | None:
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


def _ratio(text: str) -> Value | None:
    text = re.sub(r"^(\d+) to (\d+)$", r"\1:\2", text)
    if ":" not in text:
        return None
    parts = [_formula(part) for part in split(text, ":")]
    if len(parts) < 2 or not all(isinstance(part, Formula) for part in parts):
        return None
    return Ratio(tuple(part.tree for part in parts))


def _relation(text: str) -> Value | None:
    if "≈" in text:  # 9π ≈ 28.27 is 9π, x ≈ 28.27 is what x is
        exact, *rest = split(text, "≈")
        value = item(exact) if exact and rest else None
        if isinstance(value, Equation) or isinstance(value, Formula) and not syntax.variables(value.tree):
            return value
        text = text.replace("≈", "=")
    if not re.search("[=<>≤≥≠∈]", text):
        return None
    if "∈" in text:
        name, _, rest = text.partition("∈")
        value = read(rest.strip())
        region = value if isinstance(value, Region) else value.region if isinstance(value, Items) else None
        return dataclasses.replace(region, variable=name.strip()) if region else Text(text)
    parts, ops = split(text, "[=<>≤≥≠]", keep=True)
    if not ops:
        return None
    if set(ops) == {"="}:
        return _equation(parts)
    trees = [_side(part) if part else None for part in parts]
    if not all(isinstance(tree, Formula) or not part for tree, part in zip(trees, parts, strict=True)):
        return Text(text)
    return relations.read([tree if isinstance(tree, Formula) else None for tree in trees], ops) or Text(text)


def _side(text: str) -> Value | None:
    """One side of an inequality; f(x) is one thing there."""
    return Formula(("v", text.replace(" ", ""))) if _FUNCTION_OF.fullmatch(text) else _formula(text)


_FUNCTION_OF = re.compile(r"([fghFGPEDVS]'*)\s*\(\s*([^()=+*/^-]{1,6})\s*\)")


def _equation(parts: list[str]) -> Value | None:
    """a = b, or a = … = b of which the ends count."""
    left, right = parts[0], item(parts[-1])
    if not left or not parts[-1]:
        return None
    right = right.formula if isinstance(right, Text) and right.formula else right
    formula, called = _formula(left), _FUNCTION_OF.fullmatch(left)
    if called:
        return Equation(f"{called[1]}({called[2]})", ("v", called[0]), right)
    if not isinstance(formula, Formula):
        if isinstance(right, Items) and right.kind == "tuple" and surrounded(left):  # (a, b) = (1, 2)
            names = _brackets(left)
            same = isinstance(names, Items) and names.kind == "tuple" and len(names.values) == len(right.values)
            if same and all(isinstance(name, Formula) and name.tree[0] == "v" for name in names.values):
                pairs = zip(names.values, right.values, strict=True)
                return Items("tuple", tuple(Equation(name.tree[1], name.tree, value) for name, value in pairs))
        if ":" in left and isinstance(ratio := _ratio(left), Ratio) and not any(map(_is_number, ratio.trees)):
            return Equation(left.replace(" ", ""), None, right)  # A : B = 2 : 3
        letters = re.fullmatch(r"[A-Za-z△∠⊙\u4e00-\u9fff][\w△∠ {}'-]*", left)
        return Equation(words.name(left), None, right) if letters else None
    if left.strip() in ("max", "min"):
        return Equation(words.name(left), None, right)
    return Equation(formula.tree[1] if formula.tree[0] == "v" else None, formula.tree, right)


def _is_number(tree: syntax.Tree) -> bool:
    return not syntax.variables(tree)


def _brackets(text: str) -> Value | None:
    """Sets, intervals, tuples, and unions of intervals."""
    without = re.fullmatch(r"(?:R|\(-∞, ?\+?∞\))\s*\\(?:setminus|backslash)\s*[⦃{](.*)[⦄}]", text)
    if without:
        return read(" and ".join(f"x≠{part}" for part in split(without[1], ",")))
    union = split(text, "∪") if "∪" in text else []
    if len(union) > 1:
        parts = [_brackets(part) for part in union]
        if all(isinstance(p, Items) and p.kind == "set" for p in parts):
            return Items("set", tuple(v for p in parts for v in p.values))
        regions = [p.region if isinstance(p, Items) and p.kind != "set" else relations.point(p) or p for p in parts]
        return relations.union(regions) if all(isinstance(r, Region) for r in regions) else None
    common = split(text, "∩") if "∩" in text else []
    if len(common) > 1:
        parts = [_brackets(part) for part in common]
        regions = [p.region if isinstance(p, Items) else p for p in parts]
        return relations.intersection(regions) if all(isinstance(r, Region) for r in regions) else None
    if not surrounded(text):
        return _point(text)
    inner = text[1:-1].strip()
    if text[0] in "⦃{":
        if "|" in inner or ":" in inner and text[0] == "⦃":
            value = read(re.split(r"[|:]", inner, maxsplit=1)[1].strip())
            if isinstance(value, Items) and value.kind == "list" and all(isinstance(v, Region) for v in value.values):
                value = relations.intersection(value.values)
            if whole := _WHOLE.search(re.split(r"[|:]", inner, maxsplit=1)[0]):
                least = None if whole[1] == "Z" else 1 if whole[2] else 0
                return relations.integers(value, least) if isinstance(value, Region) else None
            if isinstance(value, Region):
                return dataclasses.replace(value, variable=None)  # whatever its name
            endless = value.right if isinstance(value, Equation) else value
            return endless if isinstance(endless, Family) else None
        parts = split(inner, ",")
        if text[0] == "{" and len(parts) < 2:
            return item(inner) if inner else None
        values = tuple(v for part in parts for v in _flat(item(part), "list"))
        return Items("set", values)
    parts = split(inner, "[,;]")
    if len(parts) < 2 or not all(part.strip() for part in parts) or len(parts) > MAX_ITEMS:
        return _nested(text, inner)
    values = tuple(item(part) for part in parts)
    region = relations.interval(values, text[0], text[-1]) if len(values) == 2 else None
    mixed = (text[0], text[-1]) not in (("(", ")"), ("[", "]"))
    return region if mixed or region and relations.unbounded(region) else Items("tuple", values, region)


_WHOLE = re.compile(r"∈ ?([ZN])([_^][{ ]*[+*][} ]*|\*)?")


def _point(text: str) -> Value | None:
    """P(2, 3): a tuple with a name."""
    if not re.match(r"[A-Z]'?\s*\(", text) or not text.endswith(")") or "," not in text:
        return None
    name, _, rest = text.partition("(")
    value = _brackets("(" + rest)
    return Equation(name.strip(), ("v", name.strip()), value) if isinstance(value, Items) else None


def _nested(text: str, inner: str) -> Value | None:
    """(x > 1), (5 cm): brackets around one thing that is no formula; a formula reads its own."""
    if (text[0], text[-1]) not in (("(", ")"), ("[", "]")) or not inner or len(text) > 200:
        return None
    return None if isinstance(_formula(text), Formula) else item(inner)


def _formula(text: str) -> Value | None:
    """A formula, or None."""
    text = text.strip()
    if _NUMBER.fullmatch(text):
        return _number(text)
    if text.endswith("%") and _NUMBER.fullmatch(hundredths := text[:-1].rstrip()):
        found = _number(hundredths)
        decimals = None if found.decimals is None else found.decimals + 2
        return dataclasses.replace(found, tree=("/", found.tree, ("n", Fraction(100))), decimals=decimals, percent=True)
    try:
        tree = syntax.parse(text)
    except syntax.SyntaxProblem:
        return None
    return Formula(tree, percent=text.endswith("%"), uncomputed=bool(_UNCOMPUTED.fullmatch(text)))


_FUNCTIONS = syntax.FUNCTIONS | {"pi"}


def _formula_or_quantity(text: str) -> Value | None:
    words = text.split()
    if all(word.isascii() and word.isalpha() for word in words) and _FUNCTIONS.isdisjoint(words):
        if any(len(word) > 1 for word in words):
            return None
    formula, quantity = _formula(text), _quantity(text)
    if formula and text.count("°") > 1:
        return formula  # 60° + k 360°
    if quantity and formula and quantity.unit.half_turns and syntax.has_function(quantity.number.tree):
        return formula  # the sine of 30°, not (sin 30)°
    if quantity is None or formula is None:
        return quantity or formula
    assert isinstance(formula, Formula)
    if quantity.unit.name in units.LETTERS and not re.search(r"[\s$€£][^\d\s]+$", text):
        return dataclasses.replace(formula, quantity=quantity)  # 2m: a variable, until the other side has a unit
    return dataclasses.replace(quantity, formula=formula)


_LETTER = re.compile(r"(?<![A-Za-z\\_∠→])[A-Za-zΩμ°'$€£¢\u4e00-\u9fff]")
_MULTIPLE = re.compile(
    rf"([-+]?\d+(?:\.\d+)?)\s*({'|'.join(sorted(units.MULTIPLES, key=len, reverse=True))})(.*)", re.S
)
_UNIT_BEHIND = re.compile(r"(.{1,80}?)\s*\(\s*([^()\d ]{2,20}(?:\^\{?\d\}?)?)\s*\)", re.S)  # 12 (cm)
_PRICE = re.compile(r"(-?)([$¥€£]|US\$|RMB)\s*(.+)", re.S)
_COMPOUND = re.compile(r"(\d+(?:\.\d+)?)\s*([^\d\s.]+)\s*(?:and\s*)?")


def _quantity(text: str) -> Quantity | None:
    price = _PRICE.fullmatch(text)
    if price:
        unit, number = (
            units.parse_unit({"¥": "元", "RMB": "元", "US$": "$"}.get(price[2], price[2])),
            _formula(price[3]),
        )
        return Quantity(_signed(number, price[1]), unit) if unit and isinstance(number, Formula) else None
    multiple = _MULTIPLE.fullmatch(text)
    if multiple and not multiple[3].startswith(("克", "米", "瓦", "焦")):
        number = Formula(("n", Fraction(multiple[1]) * units.MULTIPLES[multiple[2]]))
        rest = multiple[3].strip()
        unit = (units.parse_unit(rest) or units.parse_noun(rest)) if rest else units.parse_noun("个")
        return Quantity(number, unit) if unit else None
    behind = _UNIT_BEHIND.fullmatch(text)
    if behind and (unit := units.parse_unit(behind[2])) and isinstance(number := _formula(behind[1]), Formula):
        return Quantity(number, unit)
    if (words := numerals.leading(text)) and (unit := units.parse_unit(words[1]) or units.counter(words[1])):
        return Quantity(_number(words[0]), unit)
    found = _LETTER.finditer(text)
    for match in [m for _, m in zip(range(6), found, strict=False)]:
        number = _formula(text[: match.start()]) if match.start() else None
        if not isinstance(number, Formula):
            continue
        rest = text[match.start() :].strip()
        unit = units.parse_unit(rest)
        if unit is None and not syntax.variables(number.tree):
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


_RULES: tuple[Callable[[str], Value | None], ...] = (_time, _brackets, _relation, _ratio, _formula_or_quantity)
