"""Typed reading of one answer: normalised text -> a value of ``values``. Never fails: what nothing else is, is Text."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Literal

from mmprm_jax.answers import families, relations, syntax, trees, words
from mmprm_jax.answers.parts import MAX_ITEMS, one_number, split_parts, strip_lead_in
from mmprm_jax.answers.phrases import parse_phrase
from mmprm_jax.answers.scalars import (
    NUMBER,
    parse_formula,
    parse_formula_or_quantity,
    parse_number,
    parse_ratio,
    parse_time,
)
from mmprm_jax.answers.split import is_bracketed, split, split_with_signs
from mmprm_jax.answers.sums import tuple_sum
from mmprm_jax.answers.values import (
    Equation,
    Family,
    Formula,
    Items,
    Ratio,
    Region,
    Text,
    Value,
    all_of,
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


@functools.lru_cache(maxsize=8192)
def read(text: str) -> Value:
    """The value of a whole answer in normalised text, of one or several parts."""
    text = strip_lead_in(text)
    if NUMBER.fullmatch(text):
        return parse_number(text)
    text = re.sub(r"^l\s*:\s*(?=[^:]*=)", "", text)  # the line l
    text = re.sub(r"^(?:minus|negative) (?=[\d\\])", "-", text)
    if text[:1] == "]" or text[-1:] == "[":  # ]1, 3[ is (1, 3)
        text = _OUTWARD.sub(lambda m: m[1].replace("]", "(") + m[2] + m[3].replace("[", ")"), text)
    where = _WHERE.search(text)
    if where and (name := where[1] or where[4]) in text[: where.start()]:
        value = read(text[: where.start()])  # kπ, k ∈ Z
        return families.as_family(value, name, every=where[2] != "N" and not where[3])
    whole = parse_phrase(text)
    if whole is not None:
        return whole
    if (pieces := _pieces(text)) is not None:
        return pieces
    if text.endswith(")") and len(text) <= _MAX_CONDITION and (condition := _CONDITION.fullmatch(text)):
        text = f"{condition[1]}, {condition[2]}"  # y = x + 1 (x > 0)
    parts, kind = split_parts(text)
    if not kind or len(parts) < 2 or len(parts) > MAX_ITEMS:
        return item(text)
    if kind == "or" or kind == "and":
        return _joined([read(part) for part in parts], kind)
    solutions = kind == "parts" or kind == "maybe" and _SOLUTION.search(text)
    values = tuple(
        value for part in parts for value in _flat(_solution(read(part)) if solutions else item(part), kind)
    )
    assigned = {v.name for v in values if isinstance(v, Equation)}
    if kind == "maybe" and len(assigned) == 1:
        kind = "list"  # x = 1; x = 2
    return Items(kind, values, formula=one_number(text))


_MAX_CONDITION = 200  # characters of what is matched in quadratic time
_CONDITION = re.compile(r"([^()]*=(?:[^()]|\([^()]*\))*?) ?\( ?([^()=]*[<>≤≥≠][^()=]*) ?\)")
_SOLUTION = re.compile(r"^ ?[a-z] ?=[^=;,]*, ?[a-z] ?=[^=;,]*;")  # x = 1, y = 2; x = 2, y = 1
_PIECE = re.compile(r"([^&\n]*?)[,& ]*(?:&|,| (?=if|for|when))\s*(?:if |for |when |, )*([^&\n,]*[<>≤≥≠=∈][^&\n]*)")


def _pieces(text: str) -> Value | None:
    """f(x) = x for x ≥ 0 and -x for x < 0, in lines: the pairs of a formula and where it holds, in any order."""
    if "\n" not in text or max(map(len, text.split("\n"))) > _MAX_CONDITION:
        return None
    name, equals, body = text.partition("=")
    called = _FUNCTION_OF.fullmatch(name.strip()) or re.fullmatch("y|[a-z]_ ?n|[a-z]_ ?\\{n\\}", name.strip())
    lines = [line for line in (body if equals and called else text).split("\n") if line.strip()]
    found = [_PIECE.fullmatch(line.strip().strip(";.,")) for line in lines]
    pieces = [piece for piece in found if piece]
    if len(lines) < 2 or len(pieces) < len(lines):
        return None
    formulas = [parse_formula(piece[1]) for piece in pieces]
    if not all_of(formulas, Formula):
        return None
    conditions = [item(piece[2]) for piece in pieces]
    value = Items("set", tuple(Items("tuple", pair) for pair in zip(formulas, conditions, strict=True)))
    if not (equals and called):
        return value
    variable = re.sub(r"[{}\s]", "", name)
    return Equation(variable, ("v", variable), value)


def _solution(value: Value) -> Value:
    """x = 1, y = 2 as one thing: a pair, in the order of the names."""
    if not isinstance(value, Items) or value.kind != "list":
        return value
    named = {v.name: v for v in value.values if isinstance(v, Equation) and v.name and len(v.name) == 1}
    if len(named) < len(value.values):
        return value
    return Items("tuple", tuple(named[name] for name in sorted(named)))


def _flat(value: Value, kind: str) -> tuple[Value, ...]:
    return value.values if isinstance(value, Items) and value.kind in ("list", "or") and kind == "list" else (value,)


def _joined(values: list[Value], word: str) -> Value:
    """Values joined by "or" or "and". Of inequalities: the union or what they have in common."""
    if any(isinstance(value, Region) for value in values):  # x = 1 or x ≥ 2
        values = [relations.point(value) or value for value in values]
    if all_of(values, Region) and all(value.variable for value in values):
        joined = relations.union(values) if word == "or" else relations.intersection(values)
        if joined:
            return joined
    kind: Literal["or", "list"] = "or" if word == "or" else "list"
    values = [_solution(value) for value in values] if word == "or" else values
    return Items(kind, tuple(v for value in values for v in _flat(value, "list")))


def item(text: str) -> Value:
    """The value of an answer of one part."""
    text = text.strip()
    if NUMBER.fullmatch(text):
        return parse_number(text)
    if len(text) > syntax.MAX_LENGTH:
        return Text(text, why="too long for a formula")
    named = _NAMED.fullmatch(text)
    if named:
        return Equation(words.name(named[1]), None, item(named[2]))
    labelled = _LABELLED.fullmatch(text)
    if labelled:
        return Equation(words.name(labelled[1]), None, item(labelled[2]))
    if text[:1] == "+" and is_bracketed(text[1:]):
        return item(text[1:])
    if text[:1] == "-" and is_bracketed(text[1:]) and isinstance(point := _brackets(text[1:]), Items):
        coordinates = point.values
        if point.kind == "tuple" and all_of(coordinates, Formula):
            return Items("tuple", tuple(Formula(("-", v.tree)) for v in coordinates))  # -(1, 2)
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
    formula = parse_formula(text)
    if not isinstance(formula, Formula) or text.replace(" ", "") == "ı" or not re.search("[ȷĸ]", text):
        return other
    names = "ıȷĸ" if "ĸ" in text else "ıȷ"
    parts = trees.linear(formula.tree, names)
    if parts is None or parts[0] != trees.ZERO:
        return other
    return Items("tuple", tuple(map(Formula, parts[1:])), formula=other if isinstance(other, Formula) else None)


def _word(text: str) -> Value:
    whole = parse_phrase(text)
    if whole is not None:
        return whole
    try:
        return Text(text, Formula(syntax.parse(text)))
    except syntax.SyntaxProblem as problem:
        return Text(text, why=str(problem))


def _relation(text: str) -> Value | None:
    if "≈" in text:  # 9π ≈ 28.27 is 9π, x ≈ 28.27 is what x is
        exact, *rest = split(text, "≈")
        value = item(exact) if exact and rest else None
        if isinstance(value, Equation) or isinstance(value, Formula) and not trees.variables(value.tree):
            return value
        text = text.replace("≈", "=")
    if not re.search("[=<>≤≥≠∈]", text):
        return None
    if "∈" in text:
        name, _, values = text.partition("∈")
        value = read(values.strip())
        region = value if isinstance(value, Region) else value.region if isinstance(value, Items) else None
        return dataclasses.replace(region, variable=name.strip()) if region else Text(text)
    parts, ops = split_with_signs(text, "[=<>≤≥≠]")
    if not ops:
        return None
    if set(ops) == {"="}:
        return _equation(parts)
    sides = [_side(part) if part else None for part in parts]
    if not all(isinstance(side, Formula) or not part for side, part in zip(sides, parts, strict=True)):
        return Text(text)
    return relations.read([side if isinstance(side, Formula) else None for side in sides], ops) or Text(text)


def _side(text: str) -> Value | None:
    """One side of an inequality; f(x) is one thing there."""
    return Formula(("v", text.replace(" ", ""))) if _FUNCTION_OF.fullmatch(text) else parse_formula(text)


_FUNCTION_OF = re.compile(r"([fghFGPEDVS]'*)\s*\(\s*([^()=+*/^-]{1,6})\s*\)")


def _equation(parts: list[str]) -> Value | None:
    """a = b, or a = … = b of which the ends count."""
    left, right = parts[0], item(parts[-1])
    if not left or not parts[-1]:
        return None
    right = right.formula if isinstance(right, Text) and right.formula else right
    formula, called = parse_formula(left), _FUNCTION_OF.fullmatch(left)
    if called:
        return Equation(f"{called[1]}({called[2]})", ("v", called[0]), right)
    if not isinstance(formula, Formula):
        if isinstance(right, Items) and right.kind == "tuple" and is_bracketed(left):  # (a, b) = (1, 2)
            names = _brackets(left)
            letters = names.values if isinstance(names, Items) and names.kind == "tuple" else ()
            same = len(letters) == len(right.values)
            if same and all_of(letters, Formula) and all(name.tree[0] == "v" for name in letters):
                pairs = zip(letters, right.values, strict=True)
                return Items("tuple", tuple(Equation(name.tree[1], name.tree, value) for name, value in pairs))
        if ":" in left and isinstance(ratio := parse_ratio(left), Ratio) and not any(map(_is_number, ratio.trees)):
            return Equation(left.replace(" ", ""), None, right)  # A : B = 2 : 3
        named = re.fullmatch(r"[A-Za-z△∠⊙\u4e00-\u9fff][\w△∠ {}'-]*", left)
        return Equation(words.name(left), None, right) if named else None
    if left.strip() in ("max", "min"):
        return Equation(words.name(left), None, right)
    return Equation(formula.tree[1] if formula.tree[0] == "v" else None, formula.tree, right)


def _is_number(tree: trees.Tree) -> bool:
    return not trees.variables(tree)


def _brackets(text: str) -> Value | None:
    """Sets, intervals, tuples, and unions of intervals."""
    without = re.fullmatch(r"(?:R|\(-∞, ?\+?∞\))\s*\\(?:setminus|backslash)\s*[⦃{](.*)[⦄}]", text)
    if without:
        return read(" and ".join(f"x≠{part}" for part in split(without[1], ",")))
    union = split(text, "∪") if "∪" in text else []
    if len(union) > 1:
        sets = [_brackets(part) for part in union]
        if all_of(sets, Items) and all(s.kind == "set" for s in sets):
            return Items("set", tuple(v for s in sets for v in s.values))
        regions = [s.region if isinstance(s, Items) and s.kind != "set" else relations.point(s) or s for s in sets]
        return relations.union(regions) if all_of(regions, Region) else None
    common = split(text, "∩") if "∩" in text else []
    if len(common) > 1:
        sets = [_brackets(part) for part in common]
        regions = [s.region if isinstance(s, Items) else s for s in sets]
        return relations.intersection(regions) if all_of(regions, Region) else None
    if not is_bracketed(text):
        return _point(text)
    inner = text[1:-1].strip()
    if text[0] in "⦃{":
        if "|" in inner or ":" in inner and text[0] == "⦃":
            value: Value | None = read(re.split(r"[|:]", inner, maxsplit=1)[1].strip())
            if isinstance(value, Items) and value.kind == "list" and all_of(conditions := value.values, Region):
                value = relations.intersection(conditions)
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
    return None if isinstance(parse_formula(text), Formula) else item(inner)


_RULES: tuple[Callable[[str], Value | None], ...] = (
    parse_time, _brackets, _relation, parse_ratio, parse_formula_or_quantity, lambda text: tuple_sum(text, _brackets),
)  # fmt: skip
