"""Solutions as steps: those in ``<step>…</step>`` tags, and those of policies and people that write none.

Without tags a solution is cut by its structure: "Step N", other headings, numbered items, paragraphs, and where there
are none by lines and sentences; never inside of what ``spans`` names, nor between a heading and what it is of. The
segments of a text joined are that text, so that a policy can go on behind any of them. Demonstrations, rollouts and
candidates are cut by the same rules. Nothing is invented: a step is a part of the solution as it stands, the answer is
what the solution commits to last. Every pass is linear in the length of the text.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

from mmprm_jax.answers import extract
from mmprm_jax.data import prompts, spans
from mmprm_jax.data.prompts import SPECIAL, is_tagged, split_segments

MOST = 64  # steps of a solution that has no tags: short ones are merged until there are no more
LONGEST = 1200  # characters; a section or paragraph longer than this is cut into parts …
LONG = 400  # … of at least so many, and a solution of one line this long into its sentences

_TAGS = re.compile(r"</?(?:step|answer)>")
_TURN_END = re.compile(
    r"<\|(?:im_end|im_start|endoftext|eot_id|eom_id|end|end_of_text|return|user|assistant|observation)\|>"
    r"|</s>|<(?:eos|end_of_turn)>|<｜end▁of▁sentence｜>|\[INST\]"
)
_THOUGHTS = (
    ("<think>", "</think>"), ("<thinking>", "</thinking>"), ("◁think▷", "◁/think▷"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)  # fmt: skip
_THOUGHT_END = re.compile("|".join(re.escape(end) for _, end in _THOUGHTS))

_COUNT = r"(?:\d{1,3}|one|two|three|four|five|six|seven|eight|nine|ten)\b|[一二三四五六七八九十]"
_MARKUP = r"\\(?:textbf|(?:sub){0,2}section\*?|paragraph\*?)\{|<(?:b|strong|h[1-6])>"
_STEP = re.compile(
    rf"[#>*_+\- \t]{{0,16}}(?:{_MARKUP})?(?:(?:step|步骤)\s{{0,4}}(?:{_COUNT})|第[\d一二三四五六七八九十]{{1,3}}步)",
    re.IGNORECASE,
)
_HEADING = re.compile(r"[ \t]{0,3}#{1,6}[ \t]+\S")
_BOLD = re.compile(
    rf"[ \t]{{0,3}}(?:(?:\*\*|__)[^*_\n]{{1,120}}(?:\*\*|__)|(?:{_MARKUP})[^{{}}<>\n]{{1,120}}(?:\}}|</\w{{1,6}}>))"
    r"[ \t]{0,9}[:：.]?\s*\Z"
)
_ITEM = re.compile(r"(?:\*\*)?(?:\d{1,2}[.)）、]|[(（]\d{1,2}[)）])(?:\*\*)?[ \t]{1,9}\S")
_FORMULA = re.compile(r"[ \t]*(?:\$\$|\\\[|\\begin\{)")
_ROW = re.compile(r"[ \t]*\||[^|\n]*\S[ \t]\|[ \t]\S")
_SENTENCE = re.compile(r"[.!?。！？][\"”’)\]]{0,2}(?=[ \t]{1,9}[A-Z\u4e00-\u9fff\\$*])|[。！？](?=\S)")
_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_SPACE = re.compile(r"\s*")
_TO_NEXT_LINE = re.compile(r"\s*\n|")
_BLANKS = re.compile(r"\n\s*\n")
STEP, HEADING, BOLD, ITEM, PARAGRAPH, PLAIN = range(6)  # what a line begins
_KINDS = ((STEP, _STEP), (HEADING, _HEADING), (BOLD, _BOLD), (ITEM, _ITEM), (None, _FORMULA), (None, _THOUGHT_END))

Cut = tuple[int, int]  # where a line begins, and what it begins


# ------------------------------------------------------------------------------------------------- solutions


def split(text: str, steps: str = "tags", prefix: Sequence[str] = ()) -> tuple[str, ...]:
    """The segments of what a policy wrote behind a prefix, the segments of its solution so far.

    steps: "tags", as ``split_segments``; "structure": of all that it wrote in its turn, which the segments joined are,
    at most ``MOST`` with those of the prefix, the last one with the final answer; "auto": tags where the text has
    steps in them, else structure; behind a prefix, as the prefix. Empty: nothing was written, or nothing parses.
    """
    if steps == "tags" or steps == "auto" and (is_tagged(prefix) if prefix else _writes_tags(text)):
        return split_segments(text)
    end = _TURN_END.search(text)
    text = text[: end.start()] if end else text
    if not SPECIAL.sub("", text).strip():
        return ()
    before = "".join(prefix)
    whole, start = before + text, len(before)
    answer = len(whole) if _is_thinking(whole) else _answer_start(whole)
    cuts = [cut for cut in _cuts(whole, start, answer, max(1, MOST - len(prefix))) if cut <= answer]
    return tuple(whole[a:b] for a, b in itertools.pairwise([start, *cuts, len(whole)]))


def _writes_tags(text: str) -> bool:
    first, *others = split_segments(text) or [""]
    return bool(others) or first.startswith("<step>") or bool(first) and _packed(first) == _packed(text)


def final_answer(segments: Sequence[str]) -> str | None:
    """The final answer of a solution, or None when it has none.

    In tags: the text of the ``<answer>`` that ends it. Otherwise what ``answers.extract`` finds in it: a box, "The
    answer is", a heading "Final Answer", or all of it if that is one segment of a few words. None for a thought that
    does not end.
    """
    if is_tagged(segments):
        return prompts.final_answer(tuple(segments))
    text = "".join(segments)
    return None if _is_thinking(text) else _committed(text, marked=len(segments) > 1)


def _committed(solution: str, marked: bool = False) -> str | None:
    answer = extract.answer(solution, marked)
    if not answer or not extract.PHRASE.sub("", answer).strip(" :：*.#"):  # "The answer is", and no more
        return None
    return answer


def _answer_start(solution: str) -> int:
    found = extract.marked_answer(solution)
    return found.start if found else len(solution)


def _is_thinking(text: str) -> bool:
    return any(text.rfind(begin) > text.rfind(end) for begin, end in _THOUGHTS)


# ------------------------------------------------------------------------------------------------- demonstrations


def restructure(solution: str, answer: str | None = None) -> str | None:
    """The solution as ``<step>…</step>…<answer>…</answer>``; None when no final answer is found in it.

    answer: the final answer where the data set says it; otherwise ``extract.answer``. A solution in that format already
    is returned as it is. The result always parses: its segments are the whole text.
    """
    segments = split_segments(solution)
    if segments and prompts.final_answer(segments) and _packed("".join(segments)) == _packed(solution):
        return "".join(segments)
    solution = _TURN_END.split(solution, maxsplit=1)[0].replace("\r\n", "\n").replace("\r", "\n")
    answer = _untagged(answer or SPECIAL.sub("", _committed(solution) or ""))
    if not answer:
        return None
    solution = _untagged(solution)
    steps = [step for step in split_steps(solution) if not _only_answer(step, answer)]
    return "".join(f"<step>{step}</step>" for step in steps) + f"<answer>{answer}</answer>"


def _untagged(text: str) -> str:
    return _TAGS.sub(" ", _TAGS.sub("", text)).strip()  # the blank: "</st</step>ep>" gives a tag once, but not twice


def _packed(text: str) -> str:
    return re.sub(r"\s+", "", text)


def _only_answer(step: str, answer: str) -> bool:
    """Whether a step says nothing beside the answer, which has its own place."""
    rest = extract.PHRASE.sub("", step)
    rest = re.sub(r"\\f?boxed\b|[\s$*.。{}#†]|\\[()\[\]]", "", rest)
    return rest in ("", re.sub(r"[\s$*.。{}#†]|\\[()\[\]]", "", answer))


def split_steps(solution: str) -> list[str]:
    """The steps of a solution in order, stripped, without special tokens and empty lines before and in formulas."""
    numbered = sum(bool(_STEP.match(found[0])) for found in _LINE.finditer(solution)) >= 2
    cuts = _cuts(solution, 0, _answer_start(solution), MOST)
    parts = (SPECIAL.sub("", solution[a:b]).strip() for a, b in itertools.pairwise([0, *cuts, len(solution)]))
    found = [part if numbered else _closed_up(part) for part in parts]
    return [part for part in found if part]


def _closed_up(step: str) -> str:
    if not _BLANKS.search(step):
        return step
    step, at, parts = _BLANKS.sub(lambda found: "\n" if _FORMULA.match(step, found.end()) else found[0], step), 0, []
    for start, end in spans.displays(step):
        parts += [step[at:start], _BLANKS.sub("\n", step[start:end])]
        at = end
    return "".join([*parts, step[at:]])


# ------------------------------------------------------------------------------------------------- cuts


class _Text:
    """A text, what must not be cut in it, and the lines before which it may be cut."""

    def __init__(self, text: str):
        self.text = text
        self._spans = spans.uncuttable(text)
        self._starts = [start for start, _ in self._spans]
        self.lines = list(self._lines())

    def inside(self, at: int) -> bool:
        """Whether a place lies inside of what must not be cut."""
        i = bisect.bisect_left(self._starts, at) - 1
        return i >= 0 and at < self._spans[i][1]

    def _lines(self) -> Iterator[Cut]:
        blank, row = True, False
        for found in _LINE.finditer(self.text):
            line, at = found[0], found.start()
            if not line.strip():
                blank, row = True, False
                continue
            was_row, row = row, bool(_ROW.match(line))
            if not self.inside(at) and not (row and was_row) and (kind := _kind(line, blank)) is not None:
                yield at, kind
            blank = False

    def is_apart(self, a: int, at: int) -> bool:
        """Whether there is an empty line in front of the line that begins there; a: where to look from."""
        before = self.text[a:at]
        return before[len(before.rstrip()) :].count("\n") > 1

    def between(self, a: int, b: int, last: int = PLAIN) -> list[int]:
        """Where lines begin between a and b, of the kinds up to ``last``."""
        i, j = bisect.bisect_left(self.lines, (a + 1, -1)), bisect.bisect_left(self.lines, (b, -1))
        return [at for at, kind in self.lines[i:j] if kind <= last]

    def sentences(self, a: int, b: int) -> Iterator[int]:
        """Where sentences end between a and b; the space behind goes with the next word, as tokens have it."""
        return (found.end() for found in _SENTENCE.finditer(self.text, a, b) if not self.inside(found.end()))


def _kind(line: str, paragraph: bool) -> int | None:
    """What a line begins; None: what goes with the text before it, a formula set apart or the end of a thought."""
    for kind, pattern in _KINDS:
        if pattern.match(line):
            return kind
    return PARAGRAPH if paragraph else PLAIN


def _cuts(text: str, start: int, answer: int, most: int) -> list[int]:
    """Where a text is cut behind ``start``, into so many parts at most. answer: where the final answer begins.

    Which marks count is decided by the whole text: the same text behind the same start is cut alike.
    """
    whole, end = _Text(text), len(text)
    thoughts = (spans.end_of(_TO_NEXT_LINE, text, found.end()) for found in _THOUGHT_END.finditer(text))
    parts = itertools.pairwise(sorted({0, end, *(at for at in thoughts if not whole.inside(at))}))
    marks = itertools.pairwise(sorted({0, end}.union(*((a, *_marked(whole, a, b)) for a, b in parts))))
    cuts = [start, *(cut for a, b in marks for cut in (a, *_refined(whole, a, b)) if start < cut)]
    return _merged(_telling(text, cuts, answer), end, most)[1:]


def _marked(whole: _Text, a: int, b: int) -> list[int]:
    """The cuts between a and b by the marks that are there."""
    i, j = (bisect.bisect_left(whole.lines, (at, -1)) for at in (a, b))
    lines, first = whole.lines[i:j], spans.end_of(_SPACE, whole.text, a, b)
    kinds = [kind for _, kind in lines]
    numbered = kinds.count(STEP) >= 2
    if numbered:
        wanted = {STEP, HEADING}
    else:
        wanted = {STEP, HEADING, BOLD, PARAGRAPH} | ({ITEM} if kinds.count(ITEM) >= 2 else set())
    cuts = [at for at, kind in lines if kind in wanted and at > first]
    if numbered or len(cuts) > 1 or cuts and whole.is_apart(a, cuts[0]):
        return cuts
    cuts = [at for at, _ in lines if at > first]
    return cuts or (list(whole.sentences(a, b)) if b - a > LONG else [])


def _refined(whole: _Text, a: int, b: int) -> list[int]:
    """The cuts of a part that is too long: at paragraphs, then at lines, then at sentences."""
    if b - a <= LONGEST:
        return []
    cuts = [a]
    ways = (lambda x, y: whole.between(x, y, PARAGRAPH), whole.between, whole.sentences)
    for places in ways:
        pairs = list(itertools.pairwise([*cuts, b]))
        cuts = [at for x, y in pairs for at in (x, *(_apart(places(x, y), x, y) if y - x > LONGEST else ()))]
    return cuts[1:]


def _apart(places: Iterable[int], a: int, b: int) -> Iterator[int]:
    """Those of the places between a and b that leave parts of at least ``LONG``, the last one of a quarter of it."""
    for at in places:
        if at - a >= LONG and b - at >= LONG // 4:
            yield at
            a = at


def _telling(text: str, cuts: list[int], answer: int) -> list[int]:
    """Without the cuts behind parts that say nothing alone, such as headings; a last such part goes to the one before.

    cuts: the first is where the text begins. answer: where the answer does, which says something.
    """
    kept, nothing = cuts[:1], True
    for a, b in itertools.pairwise([*cuts, len(text)]):
        nothing = nothing and not a <= answer < b and _says_nothing(text[a:b])
        if b < len(text) and not (nothing and b - kept[-1] <= LONG):
            kept.append(b)
            nothing = True
    if nothing and len(kept) > 1:
        kept.pop()
    return kept


def _says_nothing(part: str) -> bool:
    """Whether a part is only headings, rules and special tokens."""
    return len(part) <= LONG and all(_is_title(line.strip()) for line in SPECIAL.sub("", part).split("\n"))


def _is_title(line: str) -> bool:
    if not any(map(str.isalnum, line)) or _HEADING.match(line) or _BOLD.match(line):
        return True
    return len(line) <= 80 and (line.endswith((":", "：")) or bool(_STEP.fullmatch(line.rstrip("*.: "))))


def _merged(cuts: list[int], end: int, most: int) -> list[int]:
    """At most so many of them: short parts go together."""
    if len(cuts) <= most:
        return cuts
    size, kept = -(-(end - cuts[0]) // most), cuts[:1]
    for at in cuts[1:]:
        if at - kept[-1] >= size:
            kept.append(at)
    return kept
