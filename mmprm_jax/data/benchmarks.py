"""The benchmarks: their rows as problems, with the official prompt and what the official scoring needs.

``Problem.question`` is the bare question with its options; the official prompt and the row for
``answers.official.MODES`` are in ``Item.benchmark``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmprm_jax.data.prompts import match_image_tags, without_tags
from mmprm_jax.data.sources_base import (
    LETTERS,
    Item,
    Source,
    grading,
    identity,
    listed_always,
    optional,
    picture,
    shown,
    text,
    texts,
    with_choices,
)
from mmprm_jax.records import Grading, Problem, UserError


@dataclass(frozen=True)
class StepDetectionExample:
    """A solution whose steps people judged (VisualProcessBench, ProcessBench)."""

    id: str
    question: str
    steps: tuple[str, ...]
    labels: tuple[int, ...]  # for each step 1: right, 0: neutral, -1: wrong; behind the first error -1, if not judged
    images: tuple[str, ...] = ()  # paths relative to the file of records
    first_error: int | None = None  # ProcessBench: index of the first wrong step, -1: none; None: every step was judged
    final_correct: bool | None = None  # whether the final answer is right; None: unknown
    category: str = ""  # the set that the problem is from (data_source; gsm8k, math, …)
    generator: str = ""  # the model that wrote the solution
    source: str = ""  # which benchmark


def _gold_letter(answer: str, options: Sequence[str]) -> None:
    if options and answer not in LETTERS[: len(options)]:
        raise UserError(f"the answer {answer!r:.40} is none of the letters of {len(options)} options")


def _item(
    id_: str, question: str, answer: str, pictures: tuple, prompt: str, mode: str, judged: Grading, **scoring: Any
) -> Item:
    """judged: how our own verifier compares answers; scoring: what the official rules need."""
    problem = Problem(id_, match_image_tags(question, len(pictures)), answer, grading=judged)
    needs = {key: value for key, value in scoring.items() if value not in (None, "", ())}
    return Item(problem, pictures, {"prompt": prompt, "mode": mode, "gold": answer, **needs})


_HINTS = {
    ("multi_choice", None): "provide the correct option letter, e.g., A, B, C, D, at the end.",
    ("integer", None): "requiring an integer answer and provide the final value, e.g., 1, 2, 3, at the end.",
    ("float", 1): (
        "requiring a floating-point number with one decimal place and provide the final value, e.g., 1.2, 1.3, 1.4, at"
        " the end."
    ),
    ("float", 2): (
        "requiring a floating-point number with two decimal places and provide the final value, e.g., 1.23, 1.34, 1.45,"
        " at the end."
    ),
    ("list", None): (
        "requiring a Python list as an answer and provide the final list, e.g., [1, 2, 3], [1.2, 1.3, 1.4], at the end."
    ),
}


_VISTA_KINDS = {"integer": "number", "float": "number", "list": "list", "text": "text"}


def _mathvista_prompt(question: str, options: Sequence[str], unit: str, kind: str, precision: int | None) -> str:
    """MathVista's query for a solution, without examples."""
    key = ("multi_choice", None) if options else (kind, precision if kind == "float" else None)
    hint = _HINTS.get(key)
    if hint is None:
        raise UserError(f"answer_type {kind} with precision {precision} has no official prompt")
    task = f"Question: {question}" + (f" (Unit: {unit})" if unit else "") + listed_always(options)
    return f"Hint: Please answer the question {'and ' if options else ''}{hint}\n{task}".strip()


def mathvista(row: Mapping[str, Any], split: str) -> Item:
    """MathVista: the gold answer of a multiple choice is the choice's text."""
    options, answer = texts(row.get("choices"), "choices"), text(row, "answer")
    kind, question_type = text(row, "answer_type"), text(row, "question_type")
    if question_type == "multi_choice" and answer not in options:
        raise UserError(f"the answer {answer!r:.40} is none of the choices")
    precision = row.get("precision")
    if precision is not None and not (isinstance(precision, int | float) and abs(precision) <= 100):
        raise UserError(f"precision is {precision!r:.40}, not a number of decimal places")
    precision, unit = None if precision is None else int(precision), optional(row, "unit")
    question = text(row, "origin_question", "question")
    prompt = optional(row, "query") or _mathvista_prompt(question, options, unit, kind, precision)
    bare, seen = with_choices(question + (f" (Unit: {unit})" if unit else ""), options)
    judged = grading(seen, unit, precision, "choice" if options else _VISTA_KINDS.get(kind))
    return _item(
        identity(row, "pid", "id"), bare, answer, picture(row.get("image_path") or _image(row)), prompt, "mathvista",
        judged, options=options, precision=precision, answer_type=kind, question_type=question_type, unit=unit,
    )  # fmt: skip


def _image(row: Mapping[str, Any]) -> Any:
    """The decoded image where a row has it beside a path (the Parquet files), else the path."""
    return row.get("decoded_image") or row.get("image")


_VERSE_CHOICE = re.compile(r"^[^\S\n]*\(?([A-F])\s*[:.)、]\s*(.*)", re.MULTILINE)


def mathverse(row: Mapping[str, Any], split: str) -> Item:
    """MathVerse testmini; ``category`` in the scoring row is the problem's version. Vision Only has no question."""
    version, kind = text(row, "problem_version"), text(row, "question_type")
    given = optional(row, "question")
    asked = optional(row, "question_for_eval") or given
    found = _VERSE_CHOICE.findall(asked)
    choices = kind == "multi-choice" and [letter for letter, _ in found] == list(LETTERS[: len(found)])
    options = tuple(option.strip() for _, option in found) if choices else ()
    prompt = text(row, "query_cot", "query_wo", empty=True) if row.get("query_cot") or row.get("query_wo") else given
    question = "According to the question shown in the image, answer it."
    if given.strip():
        question, _ = with_choices(given, shown(asked) or options)
    index, number = identity(row, "sample_index", "id"), identity(row, "problem_index")
    judged = grading(options, kind="choice" if kind == "multi-choice" else None)
    return _item(
        index, question, text(row, "answer"), picture(_image(row)), prompt, "mathverse", judged, options=options,
        question_type=kind, category=version, group=number,
    )  # fmt: skip


_VISION_TASK = (
    'Please solve the problem and put your answer in one "\\boxed{}". If it is a multiple choice question, only one'
    ' letter is allowed in the "\\boxed{}".\n'
)


def mathvision(row: Mapping[str, Any], split: str) -> Item:
    """MathVision: the gold answer of a multiple choice is its letter."""
    options, answer = texts(row.get("options"), "options"), text(row, "answer")
    _gold_letter(answer, options)
    question, given = text(row, "question"), listed_always(options)[len("\nChoices:\n") :]
    given = "" if list(options) == list("ABCDE") else given
    prompt = f"{_VISION_TASK}{question}\n{given}{chr(10) if given else ''}"
    bare, seen = with_choices(question, options)
    return _item(
        identity(row, "id"), bare, answer, picture(_image(row)), prompt, "mathvision",
        grading(seen, kind="choice" if options else None), options=options, category=optional(row, "subject"),
        level=optional(row, "level") and row["level"],
    )  # fmt: skip


_OLYMPIAD_TYPES = {
    "Numerical": "a numerical value", "Expression": "an expression", "Equation": "an equation",
    "Interval": "an interval",
}  # fmt: skip


_OLYMPIAD_KINDS = {
    "Numerical": "number", "Expression": "expression", "Equation": "equation", "Interval": "interval", "Tuple": "tuple",
}  # fmt: skip


def _olympiad_prompt(row: Mapping[str, Any], answer_type: str, several: bool, unit: str) -> str:
    """OlympiadBench's English prompt for an open-ended mathematics problem."""
    kinds = [_OLYMPIAD_TYPES.get(part.strip().split("-")[0], "") for part in answer_type.split(",")]
    if "" in kinds:  # Tuple, Need_human_evaluate: the official prompt does not say
        kind = ""
    elif not several:
        kind = f"The answer of The problem should be {kinds[0]}. "
    elif len(set(kinds)) == 1:
        kind = f"The problem has multiple answers, each of them should be {kinds[0]}. "
    else:
        kind = f"The problem has multiple answers, with the answers in order being {', '.join(kinds)}. "
    boxed = ("\\boxed{multiple answers connected with commas}" if several else "\\boxed{answer}") + "(unit)" * bool(
        unit
    )
    note = ", note that the unit of the answer should not be included in \\boxed{}" if unit else ""
    return (
        f"The following is an open-ended problem from an International Math competition. {kind}Please calculate the"
        " answer according to the given requirements and the information provided. Please use LaTeX format to represent"
        f' the variables and formulas used in the solution process and results. Please end your solution with "So the'
        f' final answer is {boxed}." and give the result explicitly{note}.\n{text(row, "question")}'
    )


def olympiadbench(row: Mapping[str, Any], split: str) -> Item:
    """OlympiadBench, open-ended mathematics (OE_MM_maths_en_COMP and its kin)."""
    golds = texts(row.get("final_answer"), "final_answer")
    if not golds or not golds[0].strip():
        raise UserError("no final_answer: a problem to prove has no answer to verify")
    pictures = [p for i in range(1, 10) for p in picture(row.get(f"image_{i}"))]
    pictures += picture(row.get("images"))
    kind, unit = optional(row, "answer_type"), optional(row, "unit")
    several = bool(row.get("is_multiple_answer"))
    prompt = _olympiad_prompt(row, kind, several, unit)
    judged = grading(unit=unit, kind="list" if several or "," in kind else _OLYMPIAD_KINDS.get(kind.split("-")[0]))
    return _item(
        identity(row, "id"), text(row, "question"), golds[0], tuple(pictures), prompt, "olympiadbench", judged,
        answer_type=kind, error=optional(row, "error"), unit=unit, category=optional(row, "subfield"),
    )  # fmt: skip


def visualprocessbench(row: Mapping[str, Any], split: str) -> Item:
    """VisualProcessBench: every step is judged 1, 0 or -1."""
    response = row.get("response")
    if not isinstance(response, Mapping):
        raise UserError("no object response of {steps, process_correctness}")
    steps, labels = texts(response.get("steps"), "steps"), response.get("process_correctness")
    if not steps or not isinstance(labels, list) or len(labels) != len(steps):
        raise UserError(f"{len(steps)} steps, but process_correctness is {str(labels)[:60]}")
    if any(type(label) is not int or label not in (-1, 0, 1) for label in labels):
        raise UserError("process_correctness must be 1, 0 or -1 for each step")
    pictures = picture(row.get("image"))
    example = StepDetectionExample(
        identity(row, "id"), _tags(text(row, "question"), len(pictures)), steps, tuple(labels),
        category=optional(row, "data_source"), generator=optional(row, "policy_model"),
    )  # fmt: skip
    return Item(example, pictures)


def _tags(question: str, images: int) -> str:
    """A question whose tags do not fit its images loses them: the images then stand in front."""
    try:
        return match_image_tags(question, images)
    except UserError:
        return without_tags(question).strip()


def processbench(row: Mapping[str, Any], split: str) -> Item:
    """ProcessBench: ``label`` is the index of the first wrong step, -1 when all are right. Text only."""
    steps, label = texts(row.get("steps"), "steps"), row.get("label")
    if not steps or type(label) is not int or not -1 <= label < len(steps):
        raise UserError(f"{len(steps)} steps, but the label of the first error is {label!r:.20}")
    right = len(steps) if label < 0 else label
    final = row.get("final_answer_correct")
    id_ = identity(row, "id")
    example = StepDetectionExample(
        id_, text(row, "problem"), steps, (1,) * right + (-1,) * (len(steps) - right), first_error=label,
        final_correct=final if isinstance(final, bool) else None, generator=optional(row, "generator"),
        category=re.sub(r"-\d+$", "", id_) or split,
    )  # fmt: skip
    return Item(example)


def _files(*names: str) -> tuple[str, ...]:
    return (*names, "*.jsonl", "*.json", "*.parquet")


_SUBSETS = ("gsm8k", "math", "olympiadbench", "omnimath")
_ALL = (
    Source(
        "mathvista", "problem", "AI4Math/MathVista",
        {"testmini": _files("*testmini*"), "test": _files("*test-*", "*test.*")}, mathvista,
    ),
    Source("mathverse", "problem", "AI4Math/MathVerse", {"testmini": _files("testmini.*", "testmini*")}, mathverse),
    Source(
        "mathvision", "problem", "MathLLMs/MathVision",
        {"test": _files("test.*", "test-*", "*test.*", "*test_*"), "testmini": _files("*testmini*")}, mathvision,
    ),
    Source(
        "olympiadbench", "problem", "Hothan/OlympiadBench",
        {"test": ("*OE_MM_maths_en_COMP*.parquet", "*OE_MM_maths_en_COMP*.json", "*OE_MM_maths_en_COMP*.jsonl")},
        olympiadbench,
    ),
    Source("visualprocessbench", "steps", "OpenGVLab/VisualProcessBench", {"test": _files("test.jsonl")},
           visualprocessbench),
    Source("processbench", "steps", "Qwen/ProcessBench",
           {"test": _files(), **{name: (f"*{name}.json*", f"*{name}*.parquet") for name in _SUBSETS}}, processbench),
)  # fmt: skip
BENCHMARKS: Mapping[str, Source] = {source.name: source for source in _ALL}
