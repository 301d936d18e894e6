"""One spelling for what people write in many: Unicode, Chinese punctuation, Markdown and LaTeX's typography.

What is left is plain text in a small alphabet: ``+ - * / ^ _ ! = < > ≤ ≥ ≠ ± ∪ ∩ ∈ ∞ ° % : , ; ( ) [ ] { } ⦃ ⦄ | √ ∠ △
∅ →``, the unit vectors ``ı ȷ ĸ``, Greek letters, words, digits and the LaTeX commands that carry meaning. ``⦃ ⦄`` are a
set's braces, ``{ }`` those of LaTeX, a line feed ends a part of an answer that has several. Every pass is linear or
works on at most MAX_LENGTH.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Mapping

MAX_LENGTH = 10_000  # characters of an answer; nobody reads a longer one

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))  # NFKC would make 22 of 2²
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉ₙ", "0123456789n", strict=True))
_FRACTIONS = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5",
              "⅘": "4/5", "⅙": "1/6", "⅚": "5/6", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8"}  # fmt: skip
_CIRCLED = {chr(0x2460 + i): f"({i + 1})" for i in range(20)}  # ①
_BEFORE_NFKC = str.maketrans(
    {k: f" {v}" for k, v in _FRACTIONS.items()}
    | _CIRCLED
    | {"㎡": "m^2", "㎠": "cm^2", "㎟": "mm^2", "㎢": "km^2", "㎥": "m^3", "㎤": "cm^3", "㎣": "mm^3"}
    | {"，": ", ", "º": "°", "˚": "°", "℃": "°C", "℉": "°F", "′": "'", "″": "''", "…": "..."}
)
_AFTER_NFKC = str.maketrans(
    {"−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "×": "*", "✕": "*", "·": "*", "⋅": "*", "∙": "*", "•": "*",
     "÷": "/", "⁄": "/", "∕": "/", "。": ".", "、": ",", "≦": "≤", "⩽": "≤", "≧": "≥", "⩾": "≥", "∶": ":",
     "“": '"', "”": '"', "‘": "'", "’": "'", "∆": "△", "⌀": "∅", "Ø": "∅", "ϕ": "φ", "ɑ": "α", "\u200b": "",
     "\ufeff": "", "【": "[", "】": "]", "《": "", "》": "", "∨": " or ", "∧": " and ", "〉": ")", "〈": "(",
     "≌": "≅", "∽": "~", "∼": "~", "⟂": "⊥", "⫽": "∥"}
)  # fmt: skip

GREEK = {"alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "epsilon": "ε", "varepsilon": "ε", "zeta": "ζ",
         "eta": "η", "theta": "θ", "vartheta": "θ", "iota": "ι", "kappa": "κ", "lambda": "λ", "mu": "μ", "nu": "ν",
         "xi": "ξ", "pi": "π", "rho": "ρ", "sigma": "σ", "tau": "τ", "phi": "φ", "varphi": "φ", "chi": "χ",
         "psi": "ψ", "omega": "ω", "Delta": "Δ", "Gamma": "Γ", "Omega": "Ω", "Sigma": "Σ", "Phi": "Φ",
         "Theta": "Θ", "Lambda": "Λ"}  # fmt: skip
_SYMBOLS = GREEK | {
    "cdot": "*", "times": "*", "ast": "*", "div": "/", "le": "≤", "leq": "≤", "leqslant": "≤", "leqq": "≤",
    "ge": "≥", "geq": "≥", "geqslant": "≥", "geqq": "≥", "lt": "<", "gt": ">", "ne": "≠", "neq": "≠", "pm": "±",
    "mp": "∓", "cup": "∪", "cap": "∩", "in": "∈", "infty": "∞", "infin": "∞", "angle": "∠", "triangle": "△",
    "vartriangle": "△", "varnothing": "∅", "emptyset": "∅", "to": "→", "rightarrow": "→", "Rightarrow": "→",
    "circ": "°", "degree": "°", "textdegree": "°", "colon": ":", "mid": "|", "vert": "|", "lvert": "|", "rvert": "|",
    "or": " or ", "lor": " or ", "and": " and ", "land": " and ", "approx": "≈", "perp": "⊥", "parallel": "∥",
    "because": " ", "therefore": " ", "prime": "'", "lbrace": "⦃", "rbrace": "⦄", "lbrack": "[", "rbrack": "]",
    "langle": "(", "rangle": ")", "cong": "≅", "sim": "~", "backsim": "~", "dots": "...", "ldots": "...",
    "cdots": "...", "celsius": "°C", "odot": "⊙", "bigodot": "⊙",
    "dfrac": "\\frac", "tfrac": "\\frac", "cfrac": "\\frac",
    "arcsin": "\\asin", "arccos": "\\acos", "arctan": "\\atan", "tg": "\\tan",
}  # fmt: skip
_NOTHING = frozenset(
    "left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr displaystyle textstyle limits rm bf it mathop".split()
)
_SPACE = frozenset("quad qquad space thinspace enspace hfill".split())
_CONTENT = frozenset(  # of these only what is in the braces counts
    "mathbf mathit mathsf mathbb mathcal boldsymbol bm hat widehat bar vec emph underline tilde pmb".split()
)
_VECTORS = {"i": "ı", "j": "ȷ", "k": "ĸ", "\\imath": "ı", "\\jmath": "ȷ"}  # \vec{i}
_WORDS = frozenset("text mathrm textbf textit textrm textsf textnormal mbox hbox operatorname unit si textup".split())
_TWO = {"quantity", "qty", "SI"}  # {18}{cm}
_COMMAND = re.compile(r"\\([A-Za-z]+)\*?")
_DOLLARS = re.compile(r"\$+")
_DEGREE = re.compile(r"(?:\{\s*\})?\^\s*(?:\{\s*°\s*\}|°)|\\?textdegree")
_BOLD = re.compile(r"(?<![\w*])(\*\*|__)(?=\S)([^*_\n]+)(?<=\S)\1(?![\w*])")
_ESCAPED = re.compile(  # a text that was escaped twice: \\frac
    r"(?<!\\)\\\\(?=(?:[dt]?frac|sqrt|leq?|geq?|leqslant|geqslant|pi|text|left|right|cdot|times|infty|cup|cap|in|pm|mathrm"
    r"|mathbb|boxed|angle|triangle|circ|sin|cos|tan|log|ln|alpha|beta|theta|neq?|begin|end|overline|vec|quad)(?![A-Za-z]))"
)
_MAX_NESTED = 9  # \text in \text
_MARK = "\uf8ff"  # a private character: the dollar of a price


_REPEATING = re.compile(
    r"(?<![\d.])(\d{1,9})\.(\d{0,9})(?:\\dot\s*\{?(\d)\}?(\d{0,6})\\dot\s*\{?(\d)\}?(?![\d\\])"
    r"|(?:\\overline|\\dot)\s*\{?(\d{1,9})\}?(?![\d\\])|(\d{1,6}?)\7{2,}\.\.\.|\((\d{1,9})\))"
)


def _fraction(repeating: re.Match[str]) -> str:
    """0.1\\overline{6}, 0.1\\dot{6} and 0.1666... are (15/90)."""
    whole, fixed = repeating.groups()[:2]
    if fixed and repeating[8]:
        return repeating[0]  # 0.1(6) may be a product
    period = "".join(group for group in repeating.groups()[2:] if group)
    top = int(whole + fixed + period) - int(whole + fixed)
    return f"({top}/{'9' * len(period)}{'0' * len(fixed)})"


_LISTS = re.compile(r"\[ ?\[[^\[\]()]+\](?: ?, ?\[[^\[\]()]+\])* ?\]")  # a matrix as lists: [[1, 2], [3, 4]]
_ROUND = str.maketrans("[]", "()")
_REWRITTEN = tuple(  # where the first is in a text, the pattern, and what is put in its place
    (sign, re.compile(pattern), new)
    for sign, pattern, new in (
        ("°", r"(?<=\d) ?° +([CF])(?![\w'])", r"°\1"),
        ("∠", r"(?<![A-Za-z0-9_])m ?(?=∠)", ""),  # the measure of an angle
        ("//", r"(?<=[A-Z']) ?// ?(?=[A-Z])", "∥"),
        ("百分之", r"百分之\s*(\d+(?:\.\d+)?)", r"\1%"),
        ("per", r"\s?\bper ?cent\b|(?<=\d)\s?percentage\b(?! points?)", "%"),
        ("‰", r"(?<=\d) ?‰", "/1000"),
        ("pct", r"(?<=\d)\s?pct\b", "%"),
        ("or", r"(?<=[)\]\d])or(?=[(\[\d\\-])", " or "),
        ("and", r"(?<=[)\]\d])and(?=[(\[\d\\-])", " and "),
        ("又", r"(?<=\d)\s*又\s*(?=[\d\\])", " "),  # 2又1/2
        ("infinity", r"\b(?:positive )?infinity\b", "∞"),
        ("'", r"('\s*\d+(?:\.\d+)?)\"", r"\1''"),  # 30°15'20"
        ("'", r"\^\s*(?:\{\s*('+)\s*\}|('))", r"\1\2"),  # ^{\prime}
    )
)


@functools.lru_cache(maxsize=2048)
def normalise(text: str) -> str:
    """The text in the alphabet above, without what surrounds an answer. Text over MAX_LENGTH is cut off."""
    if text.isascii() and (text.isdigit() or text.isalpha()):
        return "∞" if text.casefold() == "infinity" else text
    text = _unicode(text[:MAX_LENGTH])[:MAX_LENGTH]
    if "\\\\" in text and "\\begin" not in text:
        text = _ESCAPED.sub(r"\\", text)
    text = text.replace("`", "")
    if "*" in text or "_" in text or "#" in text:
        text = _BOLD.sub(r"\2", text).replace("****", "")
        text = re.sub(r"^\s*(?:#{1,6} +(?=\S)|\*{1,3}([^*\n]+)\*{1,3}\s*$)", lambda m: m[1] or "", text)
    text = _mathematics(text.replace("\\$", _MARK)).replace(_MARK, "$")
    for old, new in (
        ("\\\\", "\n"),
        ("\\{", "⦃"),
        ("\\}", "⦄"),
        ("\\%", "%"),
        ("\\|", "|"),
        ("\\#", "#"),
        ("\\&", "&"),
    ):
        text = text.replace(old, new)
    text = _thousands(text)
    if "\\" in text or "~" in text:
        text = re.sub(r"\\[,;:! ]|~(?=\d)", lambda m: " " if m[0] != "\\!" else "", text)
        text = re.sub(r"\\[cl]?dots(?![a-z])", "...", _environments(text))
    text = _commands(_REPEATING.sub(_fraction, text)) if "." in text or "\\" in text else text
    text = _DEGREE.sub("°", text) if "°" in text or "textdegree" in text else text
    text = text.replace("≤=", "≤").replace("<=", "≤").replace(">=", "≥").replace("!=", "≠").replace("+-", "±")
    for sign, pattern, new in _REWRITTEN:
        if sign in text:
            text = pattern.sub(new, text)
    text = _CHOOSE.sub(_count, text) if "_" in text and "^" in text else text
    text = re.sub(r"[^\S\n]+", " ", text)
    text = trim(re.sub(r" ?\n\s*", "\n", text) if "\n" in text else text)
    return text.translate(_ROUND) if _LISTS.fullmatch(text) else text


_CHOOSE = re.compile(r"(?<![A-Za-z\\])([CA])\s*_\s*\{?\s*(\d{1,3}|[nm])\s*\}?\s*\^\s*\{?\s*(\d{1,3}|[kmr])\s*\}?")


def _count(match: re.Match[str]) -> str:
    """C_5^2 and A_5^2: how many combinations and permutations; of n things, only the combinations."""
    if not (match[2].isdigit() and match[3].isdigit()):
        return f"\\binom{{{match[2]}}}{{{match[3]}}}" if match[1] == "C" else match[0]
    n, k = int(match[2]), int(match[3])
    if n < k:
        return match[0]
    return f"\\binom{{{n}}}{{{k}}}" if match[1] == "C" else f"({n}!/{n - k}!)"


def trim(text: str) -> str:
    """Without space and the full stops, commas and quotation marks that end or surround an answer."""
    text = text.strip()
    while text and not text.endswith("...") and (text[-1] in ".,;:?\"' " or text[0] in '" '):
        if text[-1] in "'" and text[0] not in "\"'":
            break  # A' is a point
        text = text.strip('" ').rstrip(".,;:? ")
        if text[:1] == "'" and text[-1:] == "'":
            text = text[1:-1]
    return text


def _raised_or_lowered(table: Mapping[str, str], sign: str, match: re.Match[str]) -> str:
    """x² is x^{2}, x₂ is x_{2}."""
    return f"{sign}{{{''.join(table[character] for character in match[0])}}}"


def _unicode(text: str) -> str:
    if text.isascii():
        return text
    text = re.sub("(?<=[0-9])([½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞])", r" \1", text)
    for table, sign in ((_SUPERSCRIPTS, "^"), (_SUBSCRIPTS, "_")):
        text = re.sub(f"[{''.join(table)}]+", functools.partial(_raised_or_lowered, table, sign), text)
    text = unicodedata.normalize("NFKC", text.translate(_BEFORE_NFKC)).translate(_AFTER_NFKC)
    return _ACCENTED.sub(_without_accent, text)


_ACCENTED = re.compile("(?<![^\\W\\d_])[^\\W\\d_][\u0302\u0304\u20d7]?(?![^\\W\\d_])")


def _without_accent(match: re.Match[str]) -> str:
    """ŷ, x̄ and a⃗ as y, x and a, as \\hat{y} is; in a word, accents count."""
    letter = unicodedata.normalize("NFD", match[0])
    return letter[0] if letter[1:] in ("\u0302", "\u0304", "\u20d7") else match[0]


def _mathematics(text: str) -> str:
    """Without ``$``, ``\\(``, ``\\[``. A formula that directly follows another one, or a gap, is a part of its own."""
    text = text.replace("\\(", "$").replace("\\)", "$")
    text = re.sub(r"(?<!\\)\\[\[\]]", "$", text)
    if "$" not in text or text.count("$") == 1 and re.search(r"\$\d", text):
        return text  # the dollar of a price
    pieces = _DOLLARS.split(text)
    found = pieces[0]
    for i, piece in enumerate(pieces[1:], 1):
        between = i % 2 == 0 and i < len(pieces) - 1 and not piece.strip()
        apart = i % 2 and found[-1:].isalpha() and not piece.startswith(("_", "^"))  # y$_{1}$ is one name
        found += "\n" if between and piece else f" {piece}" if apart else piece
    return found


def _thousands(text: str) -> str:
    """1,234 -> 1234 outside brackets; 1{,}234, 1,\\!234 and 1\\,234 anywhere."""
    text = re.sub(r"(?<=\d)(?: ?\{ ?, ?\} ?|,\\! ?|\\[,; ])(?=\d{3}(?!\d))", "", text)
    if "," not in text:
        return (
            text.replace(" ", "")
            if re.fullmatch(r"(?:1 ?: ?)?\d{1,3}(?: \d{3})* 000(?: \d{3})*", text.strip())
            else text
        )
    depth, found, end = 0, [], 0
    for match in re.finditer(r"[(\[{⦃]|[)\]}⦄]|(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,]|\.\d+,)", text):
        if match[0] in "([{⦃":
            depth += 1
        elif match[0] in ")]}⦄":
            depth = max(0, depth - 1)
        elif depth == 0:
            found += [text[end : match.start()], match[0].replace(",", "")]
            end = match.end()
    return "".join(found) + text[end:]


_BODY = r"([^\\]*(?:\\(?!end)[^\\]*)*)"
_ARRAY = re.compile(rf"\\left\s*([(\[|])\s*\\begin\{{array\}}\{{[clr]*\}}{_BODY}\\end\{{array\}}\s*\\right\s*[)\]|]")
_MATRIX = re.compile(rf"\\begin\{{([pbv]matrix)\}}{_BODY}\\end\{{\1\}}")


def _environments(text: str) -> str:
    """A vector becomes a tuple, a matrix a tuple of its rows, cases and aligned lines become parts."""
    if "\\begin" not in text:
        return text
    text = re.sub(r"(?:\\left\s*)?⦃\s*(?=\\begin)", " ", text)
    text = _ARRAY.sub(_as_matrix, text)
    text = re.sub(r"\\(begin|end)\s*\{(cases|array|aligned|align\*?|gathered|split)\}(?:\{[clr|]*\})?", " ", text)
    return _MATRIX.sub(_matrix, text)


def _as_matrix(match: re.Match[str]) -> str:
    kind = "vmatrix" if match[1] == "|" else "pmatrix"
    return rf"\begin{{{kind}}}{match[2]}\end{{{kind}}}"


def _matrix(match: re.Match[str]) -> str:
    rows = [row.split("&") for row in match[2].strip().split("\n") if row.strip()]
    if match[1] == "vmatrix":
        if [len(row) for row in rows] != [2, 2]:
            return match[0]
        (a, b), (c, d) = rows
        return f"(({a})*({d})-({b})*({c}))"
    lines = [",".join(row) for row in rows]
    return f"({','.join(f'({line})' for line in lines) if len(rows) > 1 and len(rows[0]) > 1 else ','.join(lines)})"


def _commands(text: str, depth: int = 0) -> str:
    if depth > _MAX_NESTED:
        return text
    found, i = [], 0
    while match := _COMMAND.search(text, i):
        found.append(text[i : match.start()])
        name, i = match[1], match.end()
        if name in _SYMBOLS:
            found.append(_SYMBOLS[name])
        elif name in _NOTHING:
            if text[i : i + 1] == "." and name in ("left", "right"):
                i += 1  # \right. closes nothing
        elif name in _SPACE:
            found.append(" ")
        elif name in ("number", "num"):
            i, content = _braced(text, i)
            found.append(content)
        elif name in _TWO:
            i, content = _braced(text, i)
            i, more = _braced(text, i)
            found += [content, " ", _commands(more, depth + 1)]
        elif name in _WORDS:
            i, content = _braced(text, i)
            content = _commands(content.replace("~", " "), depth + 1)
            found.append(content if content.isdigit() else f" {content} ")
        elif name in _CONTENT:
            i, content = _braced(text, i)
            arrow = "→" if name == "vec" and re.fullmatch("[A-Z]{2}", content) else ""
            found.append(_VECTORS.get(content, "") or arrow + _commands(content, depth + 1))
        elif name in ("overrightarrow", "overline", "overset"):
            i, content = _braced(text, i)
            content = _VECTORS.get(content, "") or _commands(content, depth + 1).strip()
            found.append(f"{'→' if name == 'overrightarrow' else ''}{content} " if len(content) > 1 else content)
        elif glued := _GLUED.fullmatch(name):
            found.append(_SYMBOLS.get(glued[1], " ") + glued[2])
        else:
            found.append(match[0])
    return "".join(found) + text[i:]


_NAMES = sorted((n for n in (*_SYMBOLS, *_SPACE) if len(n) > 2 or n == "pi"), key=len, reverse=True)
_GLUED = re.compile(rf"({'|'.join(_NAMES)})(?!e?q\Z)([A-Za-z]{{1,2}})")  # \quadx, \pir; not \simeq


def _braced(text: str, i: int) -> tuple[int, str]:
    """The group that opens at or behind ``i``: (where it ends, what is in it). Without one: what one token is."""
    while text[i : i + 1] == " ":
        i += 1
    if text[i : i + 1] != "{":
        match = _COMMAND.match(text, i)
        return (match.end(), match[0]) if match else (i + 1, text[i : i + 1])
    depth = 0
    for j in range(i, len(text)):
        depth += (text[j] == "{") - (text[j] == "}")
        if depth == 0:
            return j + 1, text[i + 1 : j]
    return len(text), text[i + 1 :]
