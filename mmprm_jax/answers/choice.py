"""Multiple choice: letters, letters with the option's text, and the text alone."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

from mmprm_jax.answers.normalise import normalise, trim
from mmprm_jax.answers.parts import strip_lead_in
from mmprm_jax.answers.verdict import Verdict, equal, unequal, unknown

_LETTERS = re.compile(r"\(?[A-K]\)?(?:\s*(?:(?:,|;|and|&|和)\s*)?\(?[A-K]\)?)*\.?")
_HEDGED = re.compile(r"\b[A-K]\b\)?\s*(?:or|/|或)\s*\(?\b[A-K]\b")
_LEADING = re.compile(
    r"\(\s*([A-Ka-k])\s*\)\s*[.:,]?\s*(?=\S)|([A-K])\s*[.):](?!\d*$)\s*(?=\S)|([A-K])\s*,?\s*(?=[\d\\(-])|([A-K])\s*(?=[\u4e00-\u9fff])"
)
_POINT = re.compile(r"[A-K]\([^()]*,")  # A(1, 2)
_NAMED = re.compile(
    r"(?:i choose |choose |option|choice|答案|故)?(?:option|choice|选[项择]?|answer)?\s*:?\s*\(?([A-K])\)?"
    r"(?:\.|\s+is (?:the )?(?:correct|right|answer)(?: answer| option| choice)?)?",
    re.IGNORECASE,
)

_REFUSED = re.compile(  # B is wrong; those who chose B
    r"(?:(?:so |thus |hence |therefore )?,?(?:option|choice|answer) )?\(?[A-K]\)?\s?"
    r"(?:选?项)?(?:[也是都均显然]{0,3}(?:不|错|非|假)|的|is (?:not|wrong|incorrect|false)|isn't)",
    re.I,
)
_BECAUSE = re.compile(r"^(\(?[A-K]\)?)[.,]? (?:because|since)\b[^\n]*$")
_OPTION = re.compile(r"^(?:option|choice|选项?) ?(?=\(?[A-K]\)? ?[.:)] ?\S)", re.I)
_SO = re.compile(  # A and B are wrong, so D
    r"(?i:\b(?:so|thus|hence|therefore)\b,? (?:(?:the )?(?:correct )?(?:answer|option|choice) (?:is|must be) )?)"
    r"\(?([A-K])\)?$"
)
_ITSELF = re.compile(r"\(?[A-K]\)\s|[A-K][.:]\s")  # a gold answer that is a letter and its text

Same = Callable[[str, str], Verdict]


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The letters a text names, and the text behind a single one."""

    letters: frozenset[str]
    text: str = ""


def chosen(text: str) -> Chosen | None:
    """What a normalised text chooses; None: it names no letter."""
    text = re.sub("^(?:故|应|答案)?选[项择]?:? ?(?=[A-K])", "", text)
    text = _OPTION.sub("", _BECAUSE.sub(r"\1", strip_lead_in(text)))
    if re.match(r"\(I\)[^\n]*\(II\)|\(a\)[^\n]*\(b\)", text):
        return None  # the parts of an answer
    if so := _SO.search(text):
        return Chosen(frozenset(so[1]))
    if _REFUSED.match(text):
        return None
    named = _NAMED.fullmatch(text)
    if named and len(text) > 1 and named[1].isupper():
        return Chosen(frozenset(named[1].upper()))
    if twice := re.fullmatch(r"\(([A-K])\) ?\1", text):  # an option whose text is its letter
        return Chosen(frozenset(twice[1]))
    if re.fullmatch(r"\(?[a-e]\)", text):
        return Chosen(frozenset(text.strip("()").upper()))
    if _LETTERS.fullmatch(text):
        letters = re.findall("[A-K]", text)
        return Chosen(frozenset(letters)) if len(set(letters)) == len(letters) else None
    if _HEDGED.search(text):
        return Chosen(frozenset(re.findall(r"\b[A-K]\b", text)))
    match = _LEADING.match(text)
    if match and not _POINT.match(text):
        rest = text[match.end() :]
        others = re.findall(r"(?:^|[\s,;])\(?([A-K])[.)](?=\s|$)", rest)
        letter = next(group for group in match.groups() if group).upper()
        return Chosen(frozenset((letter, *others)), trim(rest))
    return None


def parse_options(options: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """letter -> normalised text, without the letter before it."""
    if isinstance(options, Mapping):
        items = [(str(k).strip("(). ").upper(), v) for k, v in options.items()]
    else:
        items = [(chr(ord("A") + i), v) for i, v in enumerate(options)]
    return {k: re.sub(rf"^\(?{re.escape(k)}\s*[.):]\s*", "", normalise(str(v))) for k, v in items}


def compare(gold: str, prediction: str, options: Mapping[str, str], same: Same) -> Verdict | None:
    """Normalised gold and prediction as choices; None: this is no multiple choice.

    options: letter -> text, empty where they are not known. same: compares two texts that are no choices.
    """
    if options and any(_SEGMENT.fullmatch(text) for text in options.values()):
        by_text = _segment(gold, prediction, options, same)
        if by_text is not None:
            return by_text
    right, hedged = chosen(gold), bool(_HEDGED.search(prediction))
    if right is not None and right.text and not options and _ITSELF.match(gold):
        return _with_text(right, prediction, same)
    if right is None or right.text and not options:
        if not options:
            return None
        letter = _letter_of(gold, options, same)
        if letter is None:
            return None
        right = Chosen(frozenset(letter))
    if options and not right.letters <= options.keys():
        return None  # the gold answer is a letter by chance
    given = chosen(prediction)
    if given is None and len(right.letters) == 1 and prediction.upper() in right.letters:
        given = Chosen(right.letters)
    if given is None or options and not given.letters <= options.keys():
        return _by_text(right, prediction, options, same)
    if hedged:
        return unequal(f"the prediction names {' and '.join(sorted(given.letters))}")
    if given.text and options and len(given.letters) == 1:
        (letter,) = given.letters
        if same(options[letter], given.text).kind == "unequal":
            if right.letters != given.letters and not same(options.get(min(right.letters), ""), given.text):
                return unequal(f"the prediction is {letter}")
            return unknown(f"the prediction says {letter}, but not with the text of that option")
    if given.letters == right.letters:
        return equal("the same choice")
    return unequal(f"the prediction chooses {', '.join(sorted(given.letters))}")


_SEGMENT = re.compile(r"[A-Z]{2,3}")
_NAMES_SEGMENT = re.compile(r"(?:(?:the )?(?:(?:line )?segments?|sides?|edges?|lines?) )?([A-Z]{2,3})")


def _segment(gold: str, prediction: str, options: Mapping[str, str], same: Same) -> Verdict | None:
    """Options that are segments: CD is that segment, not the options C and D. None: neither side is a segment."""
    letters = []
    for text in (gold, prediction):
        named = _NAMES_SEGMENT.fullmatch(text)
        letters.append(named and _letter_of(named[1], options, same) or "")
    if not any(letters):
        return None
    sides = [letter or text for letter, text in zip(letters, (gold, prediction), strict=True)]
    return compare(sides[0], sides[1], {k: "" if _SEGMENT.fullmatch(v) else v for k, v in options.items()}, same)


def _with_text(right: Chosen, prediction: str, same: Same) -> Verdict:
    given = chosen(prediction)
    if given is None:
        return same(right.text, prediction)
    if given.letters != right.letters:
        return unequal(f"the prediction chooses {', '.join(sorted(given.letters))}")
    if not given.text or same(right.text, given.text):
        return equal("the same choice")
    return unknown("the same letter with another text")


def _letter_of(text: str, options: Mapping[str, str], same: Same) -> str | None:
    """The only option with that text."""
    exact = [letter for letter, option in options.items() if option.casefold() == text.casefold()]
    found = exact or [letter for letter, option in options.items() if same(option, text)]
    return found[0] if len(found) == 1 else None


def _by_text(right: Chosen, prediction: str, options: Mapping[str, str], same: Same) -> Verdict:
    if not options:
        return unknown("the gold answer is a choice, the prediction names none, and the options are not known")
    letter = _letter_of(strip_lead_in(prediction), options, same)
    if letter is None:
        return unknown("the prediction is the text of no option, or of several")
    if right.letters == {letter}:
        return equal(f"the text of option {letter}")
    return unequal(f"the text of option {letter}")
