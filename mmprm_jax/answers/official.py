"""The official scoring rules of five benchmarks, as named modes. They decide what a benchmark's table says; whether an
answer is right for training is another question.

A mode takes a row ``{gold, prediction, options?, precision?, answer_type?, question_type?, unit?, error?}``; the
prediction is the whole response or the bare answer. Where the official rule asks a language model to extract or to
compare, our rules (``equivalence``) try first, and "unknown" says that only a judge could tell.

Sources: ``extract_answer.py`` and ``calculate_score.py`` of MathVista, ``score_answer_s2.py`` of MathVerse,
``evaluate.py`` and ``utils.py`` of MATH-V, ``auto_scoring_judge.py`` and ``judge.py`` of OlympiadBench.
"""

from __future__ import annotations

import contextlib
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from mmprm_jax.answers import extract, numerals
from mmprm_jax.answers import official_latex as latex
from mmprm_jax.answers.equivalence import compare, make_settings
from mmprm_jax.answers.official_olympiad import olympiadbench
from mmprm_jax.answers.verdict import Verdict, equal, unequal, unknown

MAX_RESPONSE = 100_000  # characters; of a longer response the end counts
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3})?")


def _response(row: Mapping[str, Any]) -> str:
    prediction = row.get("prediction")
    return "" if prediction is None else str(prediction)[-MAX_RESPONSE:]


def _gold(row: Mapping[str, Any]) -> str:
    return str(row["gold"])


def _options(row: Mapping[str, Any]) -> list[str]:
    given = row.get("options") or ()
    return [str(option) for option in (given.values() if isinstance(given, Mapping) else given)]


def _plain(text: str) -> str:
    """An answer without its typesetting."""
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf|mbox)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?", "°", text.replace("\\%", "%").replace("\\$", ""))
    text = text.replace("（", "(").replace("）", ")").replace("\\pi", "π").replace("**", "").strip().strip("$").strip()
    boxed = extract.marked_answer(text) if text.startswith("\\boxed") else None
    return boxed.text if boxed else re.sub(r"[.。]$", "", text).strip()


# MathVista


def levenshtein(a: str, b: str) -> int:
    """The edit distance of two texts."""
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        current = [i]
        for j, y in enumerate(b, 1):
            current.append(min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (x != y)))
        previous = current
    return previous[-1]


def _choice(extraction: str, options: Sequence[str]) -> str:
    """MathVista: a letter's choice, else the choice nearest in edits, the first of equally near ones."""
    letters = re.findall(r"\(([a-zA-Z])\)", extraction)
    said = letters[0].upper() if letters else extraction
    if len(said) == 1 and said in _LETTERS[: len(options)]:
        return options[_LETTERS.index(said)]
    return min(options, key=lambda option: levenshtein(said[:1000], option))


def _one_number(text: str) -> str | None:
    """A text's only number, without thousands separators; None: no number. Raises ValueError when it has several."""
    with contextlib.suppress(ValueError):
        return str(float(text))
    if (counted := numerals.number(text)) and counted.lstrip("-").isdigit():
        return counted  # two
    text = _POWER.sub(_power, _RAISED.sub(lambda m: f"^{{{unicodedata.normalize('NFKC', m[0])}}}", text))
    text = re.sub(r"\^\s*\{?\d\}?", "", text)  # of a unit
    numbers = {found.replace(",", "") for found in _NUMBER.findall(text)}
    if len(numbers) > 1:
        raise ValueError("several numbers")
    return numbers.pop() if numbers else None


_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_TIMES_TEN = r"(?:(\d+(?:\.\d+)?)\s*(?:\\times|\\cdot|×|·|\*)\s*(?=10\s*\^))?"
_POWER = re.compile(_TIMES_TEN + r"(?<![\d.])(\d{1,6}(?:\.\d+)?)\s*\^\s*(?:\{\s*(-?\d{1,3})\s*\}|(-?\d{1,3}))")


def _power(match: re.Match[str]) -> str:
    """2 x 10^3 as 2000: the power of a number, with a factor before it."""
    factor, exponent = Fraction(match[1] or 1), int(match[3] or match[4])
    base = Fraction(match[2])
    if not base and exponent < 0:
        raise ValueError("a power of zero")
    value = factor * base**exponent
    return str(value) if value.denominator == 1 else repr(float(value))


def mathvista(row: Mapping[str, Any]) -> Verdict:
    """Choices: the letter's text, or the nearest in edits; integers truncated; floats rounded to ``precision``."""
    gold, response, options = _gold(row), _response(row).strip(), _options(row)
    kind = row.get("answer_type")
    if not response:
        return unequal("no answer")  # officially the choice nearest to nothing
    lettered = re.match(r"\(?([A-Z])[).:]\s*(.+)", response, re.DOTALL)
    if lettered and (lettered[1], lettered[2]) in zip(_LETTERS, options, strict=False):
        response = lettered[1]
    quoted = re.search(r'The answer is "(.*)"\.', response)
    found = response if response in options else quoted[1] if quoted else extract.answer(response)
    if found is None:
        return unknown("no answer could be extracted by rules")
    if options:
        if found not in options:
            found = _plain(found)
            lettered = re.match(r"([A-Z])\s*[.:)]\s*", found + " ")
            if lettered and found not in options and lettered[1] in _LETTERS[: len(options)]:
                found = lettered[1]
        said = _choice(found, options)
    elif kind in ("integer", "float"):
        try:
            number = _one_number(_plain(found))
        except ValueError:
            return unknown(f"several numbers in {found!r:.60}")
        if number is None or not abs(float(number)) < 1e300:
            return unequal(f"no number in {found!r:.60}")
        said = str(int(float(number))) if kind == "integer" else str(round(float(number), int(row["precision"])))
    else:
        listed = re.findall(r"\[[^\[\]]*\]", _plain(found))
        said = f"[{', '.join(part.strip() for part in listed[-1][1:-1].split(','))}]" if listed else _plain(found)
    return _same(said, gold)


def _same(said: str, gold: str) -> Verdict:
    return equal(f"{said!r:.60}") if said == gold else unequal(f"{said!r:.60} is not {gold!r:.60}")


# MathVerse


def _letter(text: str, options: Sequence[str]) -> str | None:
    """The letter of a choice that a text names, by letter or by the option's text."""
    found = re.fullmatch(r"\(?([A-Za-z])\)?(?:\s*[.:)、].*)?", text, re.DOTALL) or re.match(r"\(([A-Za-z])\)", text)
    if found:
        return found[1].upper()
    same = [letter for letter, o in zip(_LETTERS, options, strict=False) if _bare(_plain(o)) == _bare(text)]
    return same[0] if len(same) == 1 else None


def _bare(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).replace("−", "-").replace("\\dfrac", "\\frac")
    return re.sub(r"\s|\$|\\left|\\right|\\[,;:! ]", "", text).casefold()


def mathverse(row: Mapping[str, Any]) -> Verdict:
    """Letters, equal texts and numbers, then our own rules; officially all of it is for the judge."""
    gold, options = _gold(row).strip(), _options(row)
    response = _response(row).strip()
    if not response:
        return unequal("no answer")
    found = response if response == gold else extract.answer(response)
    if found is None:
        return unknown("no answer could be extracted by rules")
    if found == gold or _bare(_plain(found)) == _bare(_plain(gold)):
        return equal(f"{found!r:.60}")
    if row.get("question_type") == "multi-choice" or options:
        letter = _letter(_plain(found), options)
        if letter is None:
            return compare(gold, found, make_settings(options))
        return _same(letter, _letter(_plain(gold), options) or gold)
    return _compared_all(response, found, gold)


def _compared_all(response: str, found: str, gold: str) -> Verdict:
    """The last answer; of a response with several boxes all of them as well, which the judge sees."""
    verdict = _compared(found, gold)
    committed = extract.marked_answer(response)
    if verdict or committed is None or not committed.earlier:
        return verdict
    return compare(gold, response)


def _compared(found: str, gold: str) -> Verdict:
    """Two answers as numbers without units, then by our own rules."""
    plain = [_plain(text) for text in (found, gold)]
    if all(text.endswith("°") for text in plain):
        plain = [text[:-1] for text in plain]
    try:
        a, b = (latex.value(latex.parse(text, mixed=True)) for text in plain)
    except (latex.NotMaths, latex.TooBig):
        return compare(gold, found)
    if abs(a - b) <= 1e-12 * max(1, abs(b)):
        return equal(f"{found!r:.60} has the value of {gold!r:.60}")
    return unequal(f"{found!r:.60} has another value")


def mm_k12(row: Mapping[str, Any]) -> Verdict:
    """MM-PRM's rule is a judge; our own rules come before it."""
    gold, response = _gold(row), _response(row).strip()
    if not response:
        return unequal("no answer")
    found = response if _bare(response) == _bare(gold) else extract.answer(response)
    if found is None:
        return unknown("no answer could be extracted by rules")
    if _bare(found) == _bare(gold) or _bare(_plain(found)) == _bare(_plain(gold)):
        return equal(f"{found!r:.60}")
    return _compared_all(response, found, gold)


# MathVision

_FLAGS = tuple(
    form
    for flag in ("the final answer is", "the answer is", "the correct answer is", "the answer should be")
    for form in (flag, flag.replace("the", "The"))
)


def _is_number(text: str) -> bool:
    with contextlib.suppress(ValueError):
        float(text)
        return True
    return False


def _vision_answer(response: str) -> str:
    """MATH-V's heuristics from a response to an answer: the tail, the flags, the last box, its clean-up."""
    answer = response.strip()
    for c in "ABCDE":
        if answer.endswith((f" {c}.", f" ({c}).")) or answer.startswith((f"{c}\n", f"({c})\n", f"({c}) {c}\n")):
            answer = c
    tail = answer.split("is ")[-1].rstrip(".")
    answer = tail if _is_number(tail) else answer
    if "oxed{" not in answer:
        for flag in _FLAGS:
            if flag in answer:
                answer = answer.split(flag)[-1].strip().split("\n")[0].split(". ")[0]
    elif answer.count("oxed{") > 1:
        answer = "\\boxed{" + answer.split("oxed{")[-1]
    answer = _vision_clean(answer)
    for c in "abcde":
        answer = answer.replace(f"({c})", c)
    for c in "abcde":
        answer = answer.replace(f"{{{c}}}", c)
    return answer.rstrip(".").lstrip(":").strip()


def _vision_clean(text: str) -> str:
    """``find_math_answer`` and ``_strip_string`` of MATH-V."""
    text = text.lower().replace("{}", "")
    start, end = text.find("oxed{"), text.rfind("}")
    text = text[start + 5 : end] if start >= 0 and end > start + 4 else text
    if text.find("}") != -1 and (text.find("{") == -1 or text.find("}") < text.find("{")):
        text = text.split("}")[0]
    text = text.split("=")[-1].split("\\approx")[-1]
    for gone in (" ", "\\,"):
        text = text.replace(gone, "")
    text = text.replace("∞", "\\infty").replace("+\\infty", "\\infty").replace("\\\\", "\\").replace("\n", "")
    text = text.replace("\\text", "").replace("\\mbox", "").replace("bmatrix", "pmatrix")
    for gone in ("\\left", "\\right", "^{\\circ}", "^\\circ", "{m}^3", "m^3", "{units}", "units", "{km}", "km"):
        text = text.replace(gone, "")
    text = text.replace("\\!", "").replace("tfrac", "frac").replace("dfrac", "frac")
    text = text.replace("\\$", "").replace("$", "").replace("\\%", "")
    text = text.replace("{.", "{0.")
    return "0" + text if text.startswith(".") else text


# No grammar of latex2sympy's: signs for roots and π, functions without a backslash, fractions without braces.
_UNREADABLE = re.compile(r"[√π]|(?<!\\)sqrt|\\frac\s*[^{\s]|\\!")
_BREAK = re.compile(r"[{}]|\.(?!\d)")


def _readable(text: str) -> str:
    """What latex2sympy reads of a text: it stops, without an error, at a brace too many and at a full stop."""
    depth = 0
    for match in _BREAK.finditer(text):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth < 0 or match[0] == "." and not depth:
            return text[: match.start()]
    return text


def _rounded(text: str) -> float:
    """A number to two decimals. Raises latex.NotMaths when it is none, latex.TooBig beyond the limits."""
    if re.fullmatch(r"\s*[a-e]\s*", text):
        raise latex.NotMaths("a letter")  # not Euler's number
    if _UNREADABLE.search(text):
        raise latex.NotMaths("what the official parser cannot read")
    text = _readable(text.replace("$", "").replace("\\%", "/100"))
    number = latex.value(latex.parse(text))
    try:
        return round(float(number), 2)
    except (TypeError, ValueError, OverflowError):
        raise latex.NotMaths("no real number") from None


def _vision_tuple(text: str) -> str:
    """A tuple or list whose members are rounded; any other text, or one that cannot be, as it is."""
    if len(text) < 2 or (text[0], text[-1]) not in (("(", ")"), ("[", "]")) or "," not in text:
        return text
    parts = text[1:-1].split(",")
    try:
        rounded = [p if "infty" in p or p in ("a", "-a") else f"{_rounded(p):g}" for p in parts]
    except latex.NotMaths:
        return text
    return text[0] + ",".join(rounded) + text[-1]


def _vision_equal(gold: str, answer: str) -> bool:
    """``is_equal`` of MATH-V. Raises latex.TooBig."""
    gold, answer = gold.lower(), answer.lower()
    if not gold.replace(" ", "") or not answer.replace(" ", ""):
        return False
    if gold.strip() == answer.strip() or _vision_tuple(gold) == _vision_tuple(answer):
        return True
    with contextlib.suppress(latex.NotMaths):
        return _rounded(gold) == _rounded(answer)
    return False


def mathvision(row: Mapping[str, Any]) -> Verdict:
    """The letter or the option's value, as text or as a number to two decimals."""
    gold, options = _gold(row), _options(row)
    golds = [gold]
    if options and len(gold) == 1 and gold in _LETTERS[: len(options)]:
        golds.append(options[_LETTERS.index(gold)])
    answer, too_big = _vision_answer(_response(row)), ""
    for form in golds:
        try:
            if _vision_equal(form, answer):
                return equal(f"{answer!r:.60} is {form!r:.60}")
        except latex.TooBig as error:
            too_big = str(error)
    if too_big:
        return unknown(f"{answer!r:.60} was not computed: {too_big}")
    return unequal(f"{answer!r:.60} is not {' or '.join(map(repr, golds)):.80}")


MODES: Mapping[str, Callable[[Mapping[str, Any]], Verdict]] = {
    "mathvista": mathvista, "mathverse": mathverse, "mathvision": mathvision, "olympiadbench": olympiadbench,
    "mm_k12": mm_k12,
}  # fmt: skip
