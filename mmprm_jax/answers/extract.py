"""The final answer that a free-form response commits to. Every pass is linear in the length of the response."""

from __future__ import annotations

import collections
import dataclasses
import re

MAX_RESPONSE = 2**20  # characters; of a longer one only the end is read
_MAX_BOXES = 64
_MAX_PHRASES = 3  # the last ones
_BARE_WORDS = 12  # a response of so few words is an answer and nothing else

_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,9}(?=\{)|\\boxed\s{1,9}(?=[^\s{])")
_TAGS = (("<answer>", "</answer>"), ("<|begin_of_box|>", "<|end_of_box|>"))
# An option's letter, or several, and nothing behind it: no point A as in 选择A点.
_LETTER = r"\s{0,3}[:：]?\s{0,3}[(（]?[A-H][A-H、,，和 )）]{0,12}(?:[.。．;；!！*\s]|\Z)"
# Marks of a chat template; those of a box say something.
_SPECIAL = re.compile(r"<\|(?!(?:begin|end)_of_box\|)[A-Za-z_0-9]{1,30}\|>|</?s>|<(?:eos|bos|pad)>")
PHRASE = re.compile(  # what says that an answer follows
    r"(?:final answers?(?:\s{1,9}(?:is|are))?\s{0,9}[:：]|final answers? (?:is|are)\b"
    r"|\b(?:the|our|correct) (?:correct )?(?:answers?|option|choice) (?:is|are|should be)\b"
    r"|(?:^|(?<=[\s.,;:(*†#]))(?:final )?answer\s{0,9}(?:is\s{0,9})?(?:\*\*)?\s{0,9}[:：]"
    r"|^(?:#{1,6} ?)?\*{0,2}(?:the )?(?:final )?answers?\*{0,2}\s{0,9}$|^####(?=[^\n]{1,60}\s{0,9}\Z)"
    r"|【\s?(?:参考|正确)?答案\s?】|(?:最终|正确)?(?:答案|结果)(?:应该)?[为是]|(?:最终|正确)?答案\s{0,9}[:：]"
    r"|(?<!不)(?:故|因此|所以|应)选(?!项)|选项[为是](?=" + _LETTER + r")"
    r"|(?<![不没别若果])(?<!不[应能该可])(?:本题|此题)?应?选择?(?=" + _LETTER + r")"
    r"|故答案[为是]|^[^\w\n]{0,9}答\s{0,9}[:：])"
    r"\s{0,9}(?:\*\*)?\s{0,9}[:：]?",
    re.IGNORECASE | re.MULTILINE,
)
_HINTS = ("answer", "option", "choice", "####")  # without any of them there is no such phrase in English
_CORRECT = re.compile(  # an option that is said to be right, of which the letter comes first
    r"选项\s?[(（]?([A-H](?:\s?[、,，和与及]?\s?[A-H])*)[)）]?\s?[都均才是为]{0,2}正确"
    r"|(?<![A-Za-z])([A-H])\s?选?项[都均才是为]{0,2}正确"
    r"|\b(?i:option|choice|answer) \(?([A-H])\)? is (?:the )?(?:correct|right)\b"
)
_THEREFORE = re.compile(
    r"(?:\b(?:therefore|hence|thus|so)\b,?|∴|因此|所以|故)[^\n.。]{0,120}?"
    r"(?:\b(?:is|are|equals|fill in)\b|[为是=])\s*[:：]?",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.](?=\s|$)|。|\n\s*\n")
# A formula as a whole, or what ends a line or a sentence outside of one.
_PIECE = re.compile(r"\$\$.*?\$\$|\$[^$\n]*\$|\\\[.*?\\\]|\\\(.*?\\\)|(?P<end>\.(?=\s|$)|。|\n)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Extracted:
    """``text``: the last committed answer. ``earlier``: different ones that were committed in the same way before."""

    text: str
    how: str  # tag, box, phrase
    earlier: tuple[str, ...] = ()
    start: int = 0  # where in the response what says it begins


def strip_special_tokens(response: str) -> str:
    """A response without the special tokens that a server left in it; what stands behind one is apart."""
    return _SPECIAL.sub("\n", response) if "<" in response else response


def marked_answer(response: str) -> Extracted | None:
    """The last answer that is marked as one: in <answer>, in \\boxed, or behind a phrase. None: nothing is marked."""
    skipped, response = max(0, len(response) - MAX_RESPONSE), response[-MAX_RESPONSE:]
    lowered = response.casefold() if "<" in response else ""
    for opened, closed in _TAGS if len(lowered) == len(response) else ():
        if opened in lowered and closed in lowered:
            start = lowered.rfind(opened, 0, lowered.rfind(closed))
            if start >= 0:
                inside = response[start + len(opened) : lowered.find(closed, start)].strip()
                found = marked_answer(inside) or Extracted(inside, "tag")
                return dataclasses.replace(found, start=skipped + start)
    boxes = _boxes(response)
    if boxes:
        at, last = boxes[-1]
        return Extracted(last, "box", tuple(dict.fromkeys(box for _, box in boxes[:-1] if box != last)), skipped + at)
    if response.isascii() and not any(hint in response.lower() for hint in _HINTS):
        return None
    # The last phrase with something behind it: responses break off behind "The answer is".
    for phrase in reversed(collections.deque(PHRASE.finditer(response), maxlen=_MAX_PHRASES)):
        if text := _rest(response[phrase.end() :]):
            return Extracted(text, "phrase", start=skipped + phrase.start())
    said = {"".join(filter(None, match.groups())): match.start() for match in _CORRECT.finditer(response)}
    if len(said) != 1:  # of several, one does not know which
        return None
    ((text, at),) = said.items()
    return Extracted(text, "phrase", start=skipped + at)


def answer(response: str, marked: bool = False) -> str | None:
    """The committed answer, or a response of a few bare words, without full stop, emphasis and dollars. None: none.

    marked: bare words are no answer.
    """
    response = strip_special_tokens(response)
    found = marked_answer(response)
    if found or marked:
        return _bare(found.text) or None if found else None
    whole = response[-MAX_RESPONSE:].strip()
    is_bare = "\n" not in whole and "boxed{" not in whole and len(whole[:1000].split()) <= _BARE_WORDS
    return _bare(whole) or None if is_bare and len(whole) <= 1000 else None


def _bare(text: str) -> str:
    text = text.strip().strip("*").strip()
    if text.endswith((".", "。")) and not text.endswith("..."):
        text = text[:-1].rstrip()
    if len(text) > 2 and text[0] == text[-1] == "$" and text.count("$") == 2:
        text = text[1:-1].strip()
    return text.strip("*").strip()


_CONCLUDES = re.compile(
    r"\b(?:therefore|thus|hence|so|is|are|equals|gets?|finds?|obtains?|have|gives?|solutions?|answers?)\b", re.I
)
_HEDGES = re.compile(
    r"\b(?:not?|never|nor|if|when|where|or|but|except|unless|either|perhaps|maybe|might|could|guess|wrong|let|suppose"
    r"|assume|given|cannot|without|impossible|invalid|reject\w*|extraneous|false|incorrect|excluded?|fails?"
    r"|discard\w*|contradict\w*)\b|n't\b|[不非没或若如设]",
    re.I,
)
_LEADS_ELSEWHERE = re.compile(  # "x is at least", and then a formula: not its value
    r"(?:\b(?:not|never|least|most|than|above|below|under|over|minus|plus|times|or|and|if|about|around|between|up to"
    r"|exceeds?)|[-+/<>≤≥≠]|[不非于过])[\s:：,*]*(?:\$\$|\\\[)?\s*\Z",
    re.IGNORECASE,
)
_FORMULA = re.compile(r"\$\$?([^$]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.S)


def only_formula(sentence: str) -> str | None:
    """The only formula of a short sentence that states it: "Therefore $x > 5$ is the solution". None: no such one."""
    if len(sentence) > 300 or not ("$" in sentence or "\\" in sentence):
        return None
    found = _FORMULA.findall(sentence)
    around = _FORMULA.sub(" ", sentence)
    if len(found) != 1 or "$" in around or not _CONCLUDES.search(around) or _HEDGES.search(around):
        return None
    if _LEADS_ELSEWHERE.search(_FORMULA.split(sentence)[0]):
        return None
    text = "".join(found[0]).strip()
    return text if not re.search(r"\d", around) and not re.fullmatch("[A-Za-z]", text) else None


_STATED = re.compile(r"[^.。,，;；\n]{3,200}?(?:\b(?:is|are|equals)\b|等于|[为是])(?P<said>[^,，;；\n]{1,80}?)[.。]?")
_MEASURED = re.compile(r"(?<=\w) (?:long|wide|high|tall|deep|old|in (?:length|width|height|area|volume|total|all))$")


def stated_value(sentence: str) -> str | None:
    """What a single sentence says that something is: "The sum of the first 10 terms is 55". None: another sentence."""
    match = _STATED.fullmatch(sentence.strip()) if len(sentence) < 300 else None
    if not match or _HEDGES.search(sentence) or re.search(r"\band\b|\bis\b|\bare\b|[和是]", match["said"]):
        return None
    said = _MEASURED.sub("", match["said"].strip())
    return said if re.search(r"[\d\\]", said) else None


_HENCE = re.compile(r"(?:(?:therefore|thus|hence|so)\b|∴|因此|所以|故)[,，]?\s*(.{1,200}?)[.。]?", re.I | re.S)
_BEHIND = re.compile(r"\((?:or|not unique)\b[^()]*\)$")


def value_after_therefore(sentence: str) -> str | None:
    """What directly follows "Therefore,", if that is a value and no sentence; None otherwise."""
    match = _HENCE.fullmatch(sentence.strip())
    if not match:
        return None
    words = _WORDS.findall(_BEHIND.sub("", match[1]))
    return match[1] if len(words) < 2 or _kind(match[1]) else None


def single_conclusion(sentence: str) -> str | None:
    """As ``conclusion``, of a single sentence without a doubt."""
    one = len(sentence) < 300 and not _SENTENCE_END.search(sentence.rstrip(".。 ")) and not _HEDGES.search(sentence)
    return conclusion(sentence) if one else None


def conclusion(text: str) -> str | None:
    """What the last "therefore … is" of a line leads to, if that ends the line; None otherwise."""
    found = _last(_THEREFORE, text[-2000:])
    if not found:
        return None
    rest = text[-2000:][found.end() :].strip()
    return rest if rest and len(rest) < 60 and not _SENTENCE_END.search(rest.rstrip(".。")) else None


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(collections.deque(pattern.finditer(text), maxlen=1)), None)


def _rest(text: str) -> str:
    """What follows a phrase, to the end of its sentence; on the next lines if the phrase ends its own."""
    lines = _lines(text[:2000].lstrip(" \t*:：\n"))
    found, kind = lines[:1], _kind(lines[0][0]) if lines else ""
    for line in lines[1:] if kind else []:
        if found[-1][1] != "\n" or _kind(line[0]) != kind:
            break
        found.append(line)  # 8 and 4 in two lines: the answer has two parts
    return "\n".join(_unmarked(line) for line, _ in found)


def _lines(text: str) -> list[tuple[str, str]]:
    """Lines and sentences, each with what ends it; a formula is in one, whatever is in it."""
    found, start = [], 0
    for match in _PIECE.finditer(text):
        if end := match["end"]:
            found.append((text[start : match.start()], end))
            start = match.end()
    return [*found, (text[start:], "")] if start < len(text) else found


_WORDS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}|[\u4e00-\u9fff]")
_SHAPES = (
    ("choice", re.compile(r"\(?[A-H]\)?")),
    ("measure", re.compile(r"-?\d[\d.,/]*(?: ?[A-Za-z]+){1,3}")),
    ("words", re.compile(r"[a-z]+(?: [a-z]+){0,2}")),
)


def _kind(line: str) -> str:
    """What a line is if it can be one of several parts of an answer, such as a formula; empty: it cannot."""
    line = _unmarked(line)
    for kind, shape in _SHAPES:
        if shape.fullmatch(line):
            return kind
    if _WORDS.search(line) or not re.search(r"[\d\\]", line) or re.match(r"=|\(\d\)\s", line):
        return ""
    return "equation" if re.search("[=<>≤≥]", line) else "formula"


_BOLD_END = re.compile(r"(?:\A|\n)\s*\*\*(?=\S)([^*]{1,120})(?<=\S)\*\*[.。]?\Z")
_DISPLAY_END = re.compile(r"(?:\$\$|\\\])\Z")


def final_values(response: str) -> tuple[str, str]:
    """(the values that stand alone at a response's end, or a bold line there; its last sentence), or empty texts."""
    text = response[-2000:].strip()
    bold = _BOLD_END.search(text)
    text = text.rstrip("*.。 ")
    paragraph = text if _DISPLAY_END.search(text) else re.split(r"\n\s*\n", text)[-1]
    lines = [(_unmarked(line), end) for line, end in _lines(paragraph)] or [("", "")]
    *before, (last, _) = lines
    if _LEADS_ELSEWHERE.search(text[: text.rfind(last)][-80:]):
        return "", last
    if bold:  # whatever its words, somebody set it apart
        return _unmarked(bold[1]), last
    kind, found = _kind(last), [last]
    while before and before[-1][1] == "\n" and kind != "equation" and _kind(before[-1][0]) == kind:
        found.insert(0, before.pop()[0])
    alone = kind and (not before or before[-1][1] == "\n")
    return "\n".join(found) if alone else "", last


def _unmarked(text: str) -> str:
    return text.strip().strip("*").strip()


# What a whole answer may stand behind: a word that concludes, an empty line, the beginning of a line.
_LEADS = re.compile(r"\b(?:therefore|thus|hence|so)\b,?\s*|\n\s*\n\**|(?:\A|\n)\**", re.I)


def answer_candidates(response: str) -> list[str]:
    """What follows the phrases and the beginnings of lines of a response: one of these may be an answer in full."""
    starts = [match.end() for pattern in (PHRASE, _LEADS) for match in pattern.finditer(response)][-_MAX_BOXES:]
    return [response[start:].strip(" \t\n*") for start in starts]


def _boxes(text: str) -> list[tuple[int, str]]:
    """Where and what is in each \\boxed{…}, braces balanced; the last _MAX_BOXES. One never closed does not count."""
    opened = [match for match in _BOX.finditer(text)][-_MAX_BOXES:]
    if not opened:
        return []
    found, depth, starts, waiting = [], 0, {m.end(): m for m in opened}, []
    for match in re.finditer(r"\\.|[{}]", text[(first := opened[0].start()) :], re.DOTALL):
        at = first + match.start()
        if match[0] == "{":
            if at in starts:
                waiting.append((depth, at + 1))
            depth += 1
        elif match[0] == "}":
            depth -= 1
            if waiting and waiting[-1][0] == depth:
                _, start = waiting.pop()
                found.append((start, text[start:at].strip()))
    found += [(m.end(), re.split(r"[\s$.,]", text[m.end() : m.end() + 40])[0]) for m in opened if text[m.end()] != "{"]
    return [(start, content) for start, content in sorted(found) if content]
