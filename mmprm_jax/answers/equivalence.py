"""Does a prediction equal the gold answer? equal, unequal, or unknown with a reason.

Texts are handled here: the answer a response commits to, alternatives, choices. What is left of both is read as typed
values (``parse``), which ``matching`` compares: types must agree or have a stated conversion. The two sides are not
alike: a gold decimal sets the place to which the prediction is rounded.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence

from mmprm_jax.answers import choice, extract, matching, remarks, units, words
from mmprm_jax.answers.arithmetic import OPEN, every
from mmprm_jax.answers.normalise import MAX_LENGTH, normalise
from mmprm_jax.answers.parse import read
from mmprm_jax.answers.values import Formula, Items, Quantity, Text, Value
from mmprm_jax.answers.verdict import VERSION, Verdict, equal, unequal, unknown
from mmprm_jax.records import Grading

Options = Sequence[str] | Mapping[str, str]

_STRANGE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
_MAX_REASON = 300  # characters; parts within parts have long ones
_BESIDE = re.compile(r" ?([^\w\s.]) ?")
_WORD = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{2,}|[\u4e00-\u9fff]")
_FIGURE = re.compile(
    r"(?:the )?(?:points?|lines?|(?:line )?segments?|rays?|edges?|sides?|planes?) ([A-Z](?:[A-Z_'\d]|, ?)*)"
)
_SENTENCES = 20  # words: more than an answer has
_SENTENCE_RULES = (extract.only_formula, extract.stated_value, extract.single_conclusion)
_RESPONSE = 3  # words: a response that leads to an answer


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a data set says about one gold answer."""

    options: tuple[tuple[str, str], ...] = ()  # letter, text
    unit: str = ""  # of a gold answer that is a bare number
    precision: int | None = None  # decimals to which both sides are rounded
    kind: str = ""  # of the answer, one of ``records.KINDS``; "": not told


NO_SETTINGS = Settings()


def make_settings(
    options: Options | None = None, unit: str | None = None, precision: float | None = None, kind: str | None = None
) -> Settings:
    """Raises ValueError for a precision that is no number of decimals, and an unknown kind."""
    found = choice.parse_options(options) if options else {}
    told = Grading.of(precision=precision, kind=kind)
    return Settings(tuple(found.items()), normalise(unit or ""), told.precision, told.kind)


@functools.lru_cache(maxsize=4096)
def graded(grading: Grading) -> Settings:
    """What a record says of its answer, as ``compare`` takes it."""
    return make_settings(dict(grading.options), grading.unit, grading.precision, grading.kind)


def compare(gold: str, prediction: str | None, settings: Settings = NO_SETTINGS) -> Verdict:
    """Whether ``prediction``, an answer or a whole response, equals ``gold``. Bounded in time and memory."""
    if prediction is None:
        return unequal("there is no prediction")
    if len(gold) > MAX_LENGTH:
        return unknown(f"the gold answer has over {MAX_LENGTH} characters")
    if len(prediction) > MAX_LENGTH:
        found = extract.marked_answer(prediction)
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
    prediction = extract.strip_special_tokens(prediction)
    found = extract.marked_answer(prediction)
    source = extract.marked_answer(gold)
    gold = ", ".join((*source.earlier, source.text)) if source else gold
    if not (found and found.earlier) and _compact(gold) == _compact(found.text if found else prediction):
        return equal("the same text")
    golds = _alternatives(gold)
    verdict = _committed(golds, found, settings) if found else _uncommitted(gold, prediction, settings)
    return equal("the same text") if not verdict and _in_full(gold, prediction, found) else verdict


def _in_full(gold: str, prediction: str, found: extract.Extracted | None) -> bool:
    """Whether a gold answer of several lines or sentences is what a response says at its end, word for word."""
    if (found and found.how != "phrase") or len(gold) < 40 and "\n" not in gold:
        return False
    wanted = _compact(gold)
    return any(len(text) >= len(wanted) and _compact(text) == wanted for text in extract.answer_candidates(prediction))


def _committed(golds: tuple[tuple[str, ...], bool], found: extract.Extracted, settings: Settings) -> Verdict:
    """A prediction that marks its answer."""
    verdict = _any(golds, found.text, settings)
    if not verdict and OPEN in verdict.reason and (said := extract.stated_value(found.text)):
        verdict = _any(golds, said, settings) or verdict
    if found.earlier:
        together = _any(golds, "\n".join((*reversed(found.earlier), found.text)), settings)
        listed = _any(golds, ", ".join((*found.earlier, found.text)), settings)
        if together or listed:
            return together or listed
        if verdict:
            return unknown("several different boxed answers, of which the last one is right")
    return verdict


def _uncommitted(gold: str, prediction: str, settings: Settings) -> Verdict:
    """A prediction that is the answer itself, or says it at its end."""
    golds = _alternatives(gold)
    verdict = _any(golds, prediction, settings)
    if verdict:
        return verdict
    count = len(_WORD.findall(prediction))
    short = max(len(_WORD.findall(gold)) for gold in golds[0]) < 3  # two sentences are about the same thing, or not
    alone, last = extract.final_values(prediction)
    said = [alone] if alone and count - len(_WORD.findall(alone)) >= _RESPONSE else []
    said += filter(None, [extract.value_after_therefore(last)])
    if count and short and verdict.kind == "unequal" or OPEN in verdict.reason:
        whole = prediction.strip()
        for sentence in [whole] if last == whole else [whole, last]:
            said += filter(None, (rule(sentence) for rule in _SENTENCE_RULES))
    for text in said:
        if _compact(text) == _compact(gold):
            return equal("the same text")
        if found := _any(golds, text, settings):
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
    if gold.replace(" ", "").isalpha() and words.equal_but_for_case(gold, prediction):
        return equal("the same words")
    if (said := words.agrees_as_yes_or_no(gold, prediction)) is not None:
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
    a, b = _as_told(read(gold), settings.kind), _as_told(read(prediction), settings.kind)
    if settings.unit and isinstance(a, Formula):
        unit = units.parse_unit(settings.unit) or units.parse_noun(settings.unit)
        a = Quantity(a, unit) if unit else a
    verdict = matching.compare(a, b, settings.precision)
    if verdict or not isinstance(a, Text) and not isinstance(b, Text):
        return verdict
    return _concluded(gold, prediction, settings) or verdict


def _as_told(value: Value, kind: str) -> Value:
    """A value that can be read in several ways, as the kind of answer says: (1, 2) is a point or an interval."""
    if not isinstance(value, Items):
        return value
    if kind == "interval":
        return value.region or value
    if kind == "tuple":
        return dataclasses.replace(value, region=None)
    if kind == "list" and value.kind in ("maybe", "tuple"):
        return dataclasses.replace(value, kind="list", region=None)
    return value


def _concluded(gold: str, prediction: str, settings: Settings) -> Verdict | None:
    """A gold answer that is a whole explanation: what its last sentence leads to."""
    end = extract.conclusion(gold.rsplit("\n", 1)[-1]) if len(gold) > 40 else None
    if not end:
        return None
    verdict = matching.compare(read(normalise(end)), read(prediction), settings.precision)
    return dataclasses.replace(verdict, reason=f"{verdict.reason}; the gold answer concludes {end!r}")
