"""The final answer that a free-form response commits to. Every pass is linear in the length of the response."""

from __future__ import annotations

import collections
import dataclasses
import re

MAX_RESPONSE = 2**20  # characters; of a longer one only the end is read
_MAX_BOXES = 64
_BARE_WORDS = 12  # a response of so few words is an answer and nothing else

_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,9}(?=\{)|\\boxed\s{1,9}(?=[^\s{])")
PHRASE = re.compile(  # what says that an answer follows
    r"(?:final answers?(?:\s{1,9}(?:is|are))?\s{0,9}[:：]|final answers? (?:is|are)\b"
    r"|\b(?:the|our|correct) (?:correct )?(?:answers?|option|choice) (?:is|are|should be)\b"
    r"|(?:^|(?<=[\s.,;:(*†#]))(?:final )?answer\s{0,9}(?:is\s{0,9})?(?:\*\*)?\s{0,9}[:：]"
    r"|^#{1,6} ?(?:final )?answers?\s{0,9}$|^####(?=[^\n]{1,60}\s{0,9}\Z)"
    r"|(?:最终|正确)?(?:答案|结果)(?:应该)?[为是]|(?:最终|正确)?答案\s{0,9}[:：]"
    r"|故选|因此选|所以选|应选|故答案[为是]|^[^\w\n]{0,9}答\s{0,9}[:：])"
    r"\s{0,9}(?:\*\*)?\s{0,9}[:：]?",
    re.IGNORECASE | re.MULTILINE,
)
_THEREFORE = re.compile(
    r"(?:\b(?:therefore|hence|thus|so)\b,?|∴|因此|所以|故)[^\n.。]{0,120}?"
    r"(?:\b(?:is|are|equals|fill in)\b|[为是=])\s*[:：]?",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.。](?=\s|$)|\n\s*\n")


@dataclasses.dataclass(frozen=True)
class Extracted:
    """``text``: the last committed answer. ``earlier``: different ones that were committed in the same way before."""

    text: str
    how: str  # tag, box, phrase
    earlier: tuple[str, ...] = ()


def committed(response: str) -> Extracted | None:
    """The last answer that is marked as one: in <answer>, in \\boxed, or behind a phrase. None: nothing is marked."""
    response = response[-MAX_RESPONSE:]
    lowered = response.casefold() if "<" in response else ""
    if "<answer>" in lowered and "</answer>" in lowered:
        start = lowered.rfind("<answer>", 0, lowered.rfind("</answer>"))
        if start >= 0 and len(lowered) == len(response):
            inside = response[start + len("<answer>") : lowered.find("</answer>", start)].strip()
            return committed(inside) or Extracted(inside, "tag")
    boxes = _boxes(response)
    if boxes:
        last = boxes[-1]
        return Extracted(last, "box", tuple(dict.fromkeys(box for box in boxes[:-1] if box != last)))
    found = _last(PHRASE, response)
    if found and (text := _rest(response[found.end() :])):
        return Extracted(text, "phrase")
    return None


def answer(response: str) -> str | None:
    """The committed answer, or a response of a few bare words, without full stop, emphasis and dollars. None: none."""
    found = committed(response)
    if found:
        return _bare(found.text) or None
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
_FORMULA = re.compile(r"\$\$?([^$]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.S)


def only_formula(sentence: str) -> str | None:
    """The only formula of a short sentence that states it: "Therefore $x > 5$ is the solution". None: no such one."""
    if len(sentence) > 300 or not ("$" in sentence or "\\" in sentence):
        return None
    found = _FORMULA.findall(sentence)
    around = _FORMULA.sub(" ", sentence)
    if len(found) != 1 or "$" in around or not _CONCLUDES.search(around) or _HEDGES.search(around):
        return None
    text = "".join(found[0]).strip()
    return text if not re.search(r"\d", around) and not re.fullmatch("[A-Za-z]", text) else None


_STATED = re.compile(r"[^.。,，;；\n]{3,200}?(?:\b(?:is|are|equals)\b|等于|[为是])(?P<said>[^,，;；\n]{1,80}?)[.。]?")


def stated(sentence: str) -> str | None:
    """What a single sentence says that something is: "The sum of the first 10 terms is 55". None: another sentence."""
    match = _STATED.fullmatch(sentence.strip()) if len(sentence) < 300 else None
    if not match or _HEDGES.search(sentence) or re.search(r"\band\b|\bis\b|\bare\b|[和是]", match["said"]):
        return None
    said = match["said"].strip()
    return said if re.search(r"[\d\\]", said) else None


def therefore(sentence: str) -> str | None:
    """As ``concluded``, of a single sentence without a doubt."""
    one = len(sentence) < 300 and not _SENTENCE_END.search(sentence.rstrip(".。 ")) and not _HEDGES.search(sentence)
    return concluded(sentence) if one else None


def concluded(text: str) -> str | None:
    """What the last "therefore … is" of a line leads to, if that ends the line; None otherwise."""
    found = _last(_THEREFORE, text[-2000:])
    if not found:
        return None
    rest = text[-2000:][found.end() :].strip()
    return rest if rest and len(rest) < 60 and not _SENTENCE_END.search(rest.rstrip(".。")) else None


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(collections.deque(pattern.finditer(text), maxlen=1)), None)


def _rest(text: str) -> str:
    """What follows a phrase, to the end of its sentence; on the next line if the phrase ends its own."""
    text = text.lstrip(" \t*:：\n")[:2000]
    end = _SENTENCE_END.search(text)
    text = text[: end.start()] if end else text
    lines = text.strip().split("\n")
    return (
        text.strip().strip("*").strip() if len(lines) < 12 and "\\" in text[:2] else lines[0].strip().strip("*").strip()
    )


def _boxes(text: str) -> list[str]:
    """What is in each \\boxed{…}, braces balanced; the last _MAX_BOXES. A box that is never closed does not count."""
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
    return [content for _, content in sorted(found) if content]
