"""Prompt templates as lists of ``Segment``, and the step format ``<step>…</step>…<answer>…</answer>``.

In the templates ``question`` and ``steps`` are bare text (``step_text`` takes the tags off a record's segment; those of
PRMs take steps with or without tags) and ``image_tokens`` holds the number of visual tokens of each image; empty: text
only. ``<image>`` placeholders in the question are replaced by the images in order (``match_image_tags`` knows their
spellings); a question without any has all images in front, a line each.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmprm_jax.models import tokenizer as tok
from mmprm_jax.models.tokenizer import Segment
from mmprm_jax.records import UserError

PLACEHOLDER = "<image>"
OWN = "own"  # the prompts of a model of our own sizes, which need its tokenizer's markers
INTERNVL_SYSTEM = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
QWEN_MATH_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
STRUCTURE_TASK = "Solve it in numbered steps (Step 1, Step 2, …), and put the final answer within \\boxed{}."
PAPER_TASK = (
    " Your task is to answer the question below. Give complete reasoning steps before you answer, and when you are"
    " ready to answer, use Answer: The final answer is ..\n\nQuestion: "
)

Build = Callable[[str, Sequence[str], Sequence[int]], list[Segment]]


@dataclass(frozen=True)
class PRMTemplate:
    """How a PRM reads a solution.

    build: (question, steps, image_tokens) to a prompt with exactly one score per step, in order. Raises UserError for
    images that do not fit. positive, negative: the tokens whose logits are compared there; None: the model has a head
    of two labels, of which 1 is the positive one.
    """

    name: str
    build: Build
    positive: str | None
    negative: str | None


@dataclass(frozen=True)
class PolicyTemplate:
    """How a policy is asked. build: (question, steps so far, image_tokens) to a prompt that ends where it goes on.

    task: whether it says itself how to answer.
    """

    name: str
    build: Build
    task: bool = False


def render(segments: Sequence[Segment]) -> str:
    """The prompt as text, markers and all."""
    return "".join(s.text * s.count for s in segments)


def _marker(token: str, count: int = 1, score: str = "") -> Segment:
    return Segment(token, marker=True, count=count, score=score)


def _text(text: str) -> list[Segment]:
    return [Segment(text)] if text else []


def _open(role: str) -> list[Segment]:
    return [_marker(tok.TURN_START), Segment(f"{role}\n")]


def _turn(role: str, content: Sequence[Segment]) -> list[Segment]:
    """A closed turn in ChatML."""
    return [*_open(role), *content, _marker(tok.TURN_END), Segment("\n")]


_NUMBERED = re.compile(r"(?i)<\|?image[ _]?(\d{1,6})\|?>")
_SPELLED = re.compile(
    r"(?i)<\|image\|>|<image_placeholder>|<ImageHere>|(?:<\|vision_start\|>)?<\|image_pad\|>(?:<\|vision_end\|>)?"
)
_MARKDOWN = re.compile(r"!\[[^\]\n]{0,200}\]\([^()\s]{0,1000}\)")


def match_image_tags(text: str, images: int) -> str:
    """A text whose image tags fit: as many ``<image>`` as images, or none; then the images stand in front.

    Tags in other spellings (``<|image|>``, ``![](…)``) become ``<image>``. So do numbered ones (``<image1>``, ``<image
    1>``, ``<image_1>``) where each image has one, in order; a second tag of an image, and all of them otherwise, become
    words. Raises UserError when tags and images do not fit together.
    """
    text = _SPELLED.sub(PLACEHOLDER, text)
    if images:  # else a link may be all there ever was
        text = _MARKDOWN.sub(PLACEHOLDER, text)
    numbers = [int(found) for found in _NUMBERED.findall(text)]
    firsts = list(dict.fromkeys(numbers))
    if images > 1 and firsts and max(firsts) > images:
        raise UserError(f"the text speaks of image {max(firsts)}, but there are {images} images")
    in_order = firsts in (list(range(images)), list(range(1, images + 1)))
    waiting = set(firsts) if len(numbers) == images == 1 or images > 1 and in_order else set()

    def tag(found: re.Match[str]) -> str:
        number = int(found[1])
        if number not in waiting:
            return f"(image {number})"
        waiting.remove(number)
        return PLACEHOLDER

    text = _NUMBERED.sub(tag, text)
    if text.count(PLACEHOLDER) not in (0, images):
        raise UserError(f"the text has {text.count(PLACEHOLDER)} {PLACEHOLDER} placeholders, but {images} images")
    return text


def without_tags(text: str) -> str:
    """A text without any image tags."""
    return _NUMBERED.sub("", _SPELLED.sub("", text.replace(PLACEHOLDER, "")))


def _illustrated(text: str, image_tokens: Sequence[int]) -> list[Segment]:
    """``text`` with the images where ``match_image_tags`` puts them. Raises UserError as that does."""
    images = [[_marker(tok.IMAGE_START), _marker(tok.IMAGE, count), _marker(tok.IMAGE_END)] for count in image_tokens]
    first, *others = match_image_tags(text, len(images)).split(PLACEHOLDER)
    if not others:
        return [s for image in images for s in (*image, Segment("\n"))] + _text(first)
    out = _text(first)
    for image, after in zip(images, others, strict=True):
        out += [*image, *_text(after)]
    return out


def _mm_prm(question: str, steps: Sequence[str], image_tokens: Sequence[int]) -> list[Segment]:
    """As MM-PRM was trained (its ``preprocess_internvl2_5`` on what its ``traverse.py`` writes)."""
    content = _illustrated(f"Question: {question}\nProcess: ", image_tokens)
    for i, step in enumerate(steps):
        content += [*_text("\n\n" * (i > 0) + step.strip()), _marker(tok.PRM, score="at")]
    return [*_turn("system", _text(INTERNVL_SYSTEM)), *_turn("user", []), *_turn("assistant", content)]


def _mm_prm_eval(question: str, steps: Sequence[str], image_tokens: Sequence[int]) -> list[Segment]:
    """As MM-PRM's own evaluation asks (``batch_prm`` on what its ``evaluate_*_prm.py`` write).

    Unlike in training the empty user turn stays open, nothing stands between the steps, and nothing is stripped.
    """
    content = _illustrated(f"Question: {question}\nProcess: ", image_tokens)
    for step in steps:
        content += [*_text(step), _marker(tok.PRM, score="at")]
    return [*_turn("system", _text(INTERNVL_SYSTEM)), *_open("user"), *_turn("assistant", content)]


def _visual_prm(question: str, steps: Sequence[str], image_tokens: Sequence[int]) -> list[Segment]:
    """VisualPRM-8B's chat: a user turn per step, each answered by the placeholder "+", scored in front of it.

    Source: ``generate_steps_with_soft_score`` of the released ``InternVLRewardModel``, read in a public copy of that
    code; neither the checkpoint nor its tokenizer was available to check.
    """
    first, *others = steps or [""]  # without steps the question still stands there
    head = [Segment("### Question:\n"), *_illustrated(question, image_tokens)]
    out = _turn("system", _text(INTERNVL_SYSTEM))
    out += _turn("user", [*head, Segment(f"\n\n### Solution Process:\n{first}")])
    answer = _turn("assistant", [Segment("+", score="before")]) if steps else []
    out += answer
    for step in others:
        out += [*_turn("user", _text(step)), *answer]
    return out


def _qwen_math_prm(question: str, steps: Sequence[str], image_tokens: Sequence[int]) -> list[Segment]:
    """Qwen2.5-Math-PRM: text only, ``<extra_0>`` after each step.

    Source: its model card (the chat template without a generation prompt); the checkpoint was not available to check.
    """
    if image_tokens:
        raise UserError(f"the template qwen_math_prm is for text only, but {len(image_tokens)} images come with it")
    content = [s for step in steps for s in (*_text(step), _marker("<extra_0>", score="at"))]
    return [
        *_turn("system", _text(QWEN_MATH_SYSTEM)),
        *_turn("user", _illustrated(question, ())),
        *_turn("assistant", content),
    ]


def _plain(question: str, steps: Sequence[str], image_tokens: Sequence[int]) -> list[Segment]:
    """Without a system message; the steps so far, between ``<step>`` tokens, open the assistant turn."""
    done = [s for step in steps for s in (_marker(tok.STEP), *_text(step), _marker(tok.STEP_END))]
    return [*_turn("user", _illustrated(question, image_tokens)), *_open("assistant"), *done]


def _internvl(question: str, steps: Sequence[str], image_tokens: Sequence[int]) -> list[Segment]:
    """InternVL2.5's chat; the steps so far open the assistant turn. Its tokenizer has no ``<step>``: that is text."""
    return [
        *_turn("system", _text(INTERNVL_SYSTEM)),
        *_turn("user", _illustrated(question, image_tokens)),
        *_open("assistant"),
        *_text("".join(f"{tok.STEP}{step}{tok.STEP_END}" for step in steps)),
    ]


def _paper(question: str, steps: Sequence[str], image_tokens: Sequence[int]) -> list[Segment]:
    """As MM-PRM samples its rollouts: the steps so far, stripped, end the user turn.

    A text-only problem gets no image; the original's prompt has one always.
    """
    content = _illustrated(PAPER_TASK + question, image_tokens)
    if steps:
        done = "".join(f"{tok.STEP}{step.strip()}{tok.STEP_END}" for step in steps)
        content += _text(f"\nPrevious Steps:{done}")
    return [*_turn("system", _text(INTERNVL_SYSTEM)), *_turn("user", content), *_open("assistant")]


def bare(build: Build) -> Build:
    """``build`` for steps that may stand in their tags, which are taken off, and so are a chat's special tokens."""
    return lambda question, steps, image_tokens: build(question, list(map(read_step, steps)), image_tokens)


def asking(template: PolicyTemplate, steps: str, tokens: Sequence[str] = ()) -> Build:
    """A policy's prompt for segments: the solution so far is continued.

    Segments in tags stand where the template has them; others open the assistant's turn, to the letter. steps: how the
    policy is to write, as in ``settings.Reading``; "structure" is asked for, unless the template has a task of its own.
    tokens: those that are one token in what a policy writes, such as ``<think>``.
    """

    def build(question: str, segments: Sequence[str], image_tokens: Sequence[int]) -> list[Segment]:
        if steps == "structure" and not template.task:
            question = f"{question}\n{STRUCTURE_TASK}"
        if is_tagged(segments):
            return template.build(question, [step_text(s) for s in segments], image_tokens)
        return [*template.build(question, (), image_tokens), *marked("".join(segments), tokens)]

    return build


def own_prm(markers: Sequence[str]) -> PRMTemplate:
    """How a PRM of our own sizes reads a solution: the tags of steps are tokens, ``<prm>`` stands behind each step.

    markers: the tokens that stand for their text in a step. A step without any tag gets those of a step.
    """

    def build(question: str, steps: Sequence[str], image_tokens: Sequence[int]) -> list[Segment]:
        mark = _marker(tok.PRM, score="at")
        tagged = [s if _TAG.search(s) else f"{tok.STEP}{read_step(s)}{tok.STEP_END}" for s in steps]
        return _plain(question, (), image_tokens) + [x for s in tagged for x in (*marked(s, markers), mark)]

    return PRMTemplate(OWN, build, tok.YES, tok.NO)


PRM_TEMPLATES: Mapping[str, PRMTemplate] = {
    t.name: t
    for t in (
        PRMTemplate("mm_prm", bare(_mm_prm), tok.YES, tok.NO),
        PRMTemplate("mm_prm_eval", bare(_mm_prm_eval), tok.YES, tok.NO),
        PRMTemplate("visual_prm", bare(_visual_prm), "+", "-"),
        PRMTemplate("qwen_math_prm", bare(_qwen_math_prm), None, None),
    )
}
POLICY_TEMPLATES: Mapping[str, PolicyTemplate] = {
    t.name: t
    for t in (
        PolicyTemplate("plain", _plain),
        PolicyTemplate("internvl", _internvl),
        PolicyTemplate("paper", _paper, task=True),
    )
}


def _named(templates: Mapping[str, Any], name: str, kind: str) -> Any:
    if name not in templates:
        nearest = difflib.get_close_matches(name, templates, n=2, cutoff=0)
        raise UserError(f"{name!r}: no such {kind} template; did you mean {' or '.join(nearest)}?")
    return templates[name]


def prm_template(name: str) -> PRMTemplate:
    """The PRM template of that name. Raises UserError with the nearest names."""
    return _named(PRM_TEMPLATES, name, "PRM")


def policy_template(name: str) -> PolicyTemplate:
    """The policy template of that name. Raises UserError with the nearest names."""
    return _named(POLICY_TEMPLATES, name, "policy")


def marked(text: str, tokens: Sequence[str]) -> list[Segment]:
    """``text`` with each of the ``tokens`` in it as a marker; all else is literal."""
    if not tokens:
        return _text(text)
    parts = re.split(f"({'|'.join(map(re.escape, tokens))})", text)
    return [_marker(part) if i % 2 else Segment(part) for i, part in enumerate(parts) if part]


_TAG = re.compile(r"<(/?)(step|answer)>")
_OPEN = (tok.STEP, tok.ANSWER)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def _elements(text: str) -> Iterator[tuple[re.Match, re.Match]]:
    """The two tags (group 2: step or answer) of each ``<step>…</step>`` and ``<answer>…</answer>``, from the left.

    What ``<step>.*?</step>|<answer>.*?</answer>`` finds, in linear time: a tag that is never closed is skipped at once.
    """
    last = {kind: text.rfind(f"</{kind}>") for kind in ("step", "answer")}
    opened = None
    for tag in _TAG.finditer(text):
        closes, kind = tag.groups()
        if opened is None:
            if not closes and tag.end() <= last[kind]:
                opened = tag
        elif closes and kind == opened[2]:
            yield opened, tag
            opened = None


def split_segments(text: str) -> tuple[str, ...]:
    """The complete steps and the answer of a response, in order, verbatim; text outside of them is dropped.

    Nothing after the first ``<answer>`` counts. A response cut off inside a step keeps the steps before it.
    """
    segments = []
    for opened, closed in _elements(text):
        segments.append(text[opened.start() : closed.end()])
        if closed[2] == "answer":
            break
    return tuple(segments)


def paper_segments(text: str, special_tokens: Sequence[str] = ()) -> list[str]:
    """The steps and answers of a response as MM-PRM parses it: without tags, stripped, whatever follows an answer too.

    ``special_tokens`` are taken out first (the original: all of the tokenizer's but the tags).
    """
    if special_tokens:
        text = re.sub("|".join(map(re.escape, special_tokens)), "", text)
    return [text[opened.end() : closed.start()].strip() for opened, closed in _elements(text)]


# Of chats and of thoughts; those of a box are none of them, they say something.
SPECIAL = re.compile(
    r"<\|(?!(?:begin|end)_of_box\|)\w{1,40}\|>|<｜[^｜<>\n]{1,40}｜>|</?s>|<(?:eos|bos|pad|(?:start|end)_of_turn)>"
    r"|</?think(?:ing)?>|◁/?think▷|\[/?INST\]"
)


def is_tagged(segments: Sequence[str]) -> bool:
    """Whether all segments are ``<step>…</step>`` or ``<answer>…</answer>``; so of none."""
    return all(segment.startswith(_OPEN) and step_text(segment) != segment for segment in segments)


def read_step(segment: str) -> str:
    """A step as a PRM reads it: without tags around it; without special tokens where there are no tags."""
    text = step_text(segment)
    return SPECIAL.sub("", segment) if text == segment else text


def step_text(segment: str) -> str:
    """The text between the tags of a segment, verbatim; a text that is no whole step or answer is returned as it is."""
    opened, closed = next(_elements(segment), (None, None))
    if opened is None or closed is None or (opened.start(), closed.end()) != (0, len(segment)):
        return segment
    return segment[opened.end() : closed.start()]


def final_answer(segments: tuple[str, ...]) -> str | None:
    """The text of the ``<answer>`` that ends a solution, or None when it has none."""
    match = _ANSWER.fullmatch(segments[-1]) if segments else None
    return match.group(1).strip() if match else None
