"""Named data sets over local files or hub ids: MM-K12, MMK12, what the policy learns from, and the benchmarks.

for item in sources.read("geo170k", "Luckyjhg/Geo170K@REVISION", "train"):
    ...  # an Item, or Refused with the reason: a bad row never ends the reading
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmprm_jax.data import sources_files, step_labels
from mmprm_jax.data.benchmarks import BENCHMARKS
from mmprm_jax.data.prompts import PLACEHOLDER, match_image_tags
from mmprm_jax.data.sources_base import (
    LETTERS,
    Item,
    Picture,
    Refused,
    Source,
    grading,
    identity,
    optional,
    own_choices,
    picture,
    pictures_of,
    replace_fields,
    shown,
    text,
    with_choices,
)
from mmprm_jax.data.sources_files import Located
from mmprm_jax.data.steps import restructure
from mmprm_jax.records import Problem, SFTExample, UserError, to_json

_CHATS = ("messages", "conversations", "prompt")
_ANYTHING = ("*.jsonl", "*.json", "*.parquet", "*.tsv")


def problem(row: Mapping[str, Any], split: str) -> Item:
    """MMK12 (Parquet), and MM-K12's seed schema ``{id, question, correct_answer or answer, image_path}``.

    The question may be a ``problem``, or a chat of one turn (``messages``, ``prompt``, ``conversations``).
    """
    if any(row.get(key) is not None for key in ("question", "problem")) or not any(key in row for key in _CHATS):
        question, pictures = text(row, "question", "problem"), pictures_of(row, "image_path", "image", "images")
    else:
        said, pictures = _chat(row)
        if [role for role, _ in said] not in (["human"], ["user"]):
            raise UserError(f"{len(said)} turns; one question is expected, and its answer in answer")
        question = said[0][1]
    answer = text(row, "correct_answer", "answer")
    question, options = with_choices(question, own_choices(row))
    options = options or _chosen(question, answer)
    judged = grading(options, optional(row, "unit"), row.get("precision"), "choice" if options else None)
    return Item(
        Problem(identity(row, "id", "index"), match_image_tags(question, len(pictures)), answer, grading=judged),
        pictures,
    )


def _chosen(question: str, answer: str) -> tuple[str, ...]:
    """The choices that a question shows, if the answer is the letter of one."""
    options = shown(question)
    return options if answer.strip(" ().") in list(LETTERS[: len(options)]) else ()


def mm_k12(row: Mapping[str, Any], split: str) -> Item:
    """MM-K12; its test problems are a benchmark, officially scored by a judge (here: of the unknowns only)."""
    item = problem(row, split)
    scoring = {"prompt": item.record.question, "mode": "mm_k12", "gold": item.record.answer}
    return Item(item.record, item.pictures, scoring if split == "test" else None)


def _demonstration(id_: str, question: str, solution: str, pictures: tuple, answer: str | None = None) -> Item:
    """An SFT example. Raises UserError when the solution has no final answer that could be found."""
    response = restructure(solution, answer)
    if response is None:
        raise UserError("no final answer found in the response (a box, Answer:, The answer is, ####)")
    return Item(
        SFTExample(id_, match_image_tags(question.strip(), len(pictures)), response), pictures, solution=solution
    )


def conversation(row: Mapping[str, Any], split: str) -> Item:
    """A chat of one question and one answer.

    LLaVA's ``{id, image, conversations: [{from, value}, …]}``, or ``messages: [{role, content}, …]`` whose content is a
    text or a list of its parts. The images are in ``image`` or ``images``, or in those parts.
    """
    said, pictures = _chat(row)
    if [role for role, _ in said] not in (["human", "gpt"], ["user", "assistant"]):
        raise UserError(f"{len(said)} turns; one question and one answer are expected")
    if PLACEHOLDER in said[1][1]:
        raise UserError("the answer shows an image, which no policy can write")
    return _demonstration(identity(row, "id"), said[0][1], said[1][1], pictures)


def _chat(row: Mapping[str, Any]) -> tuple[list[tuple[str, str]], tuple[Picture, ...]]:
    """(role, text) of the turns without the system's, and the images. Raises UserError."""
    key = next((key for key in _CHATS if key in row), "conversations")
    who, what = ("from", "value") if key == "conversations" else ("role", "content")
    turns = row.get(key)
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise UserError(f"no list {key} of {{{who}, {what}}}")
    said, pictures = [], pictures_of(row, "image", "images")
    for turn in turns:
        if turn.get(who) != "system":
            words, seen = _parts(turn, what)
            said.append((str(turn.get(who)), words))
            pictures += seen
    return said, pictures


def _parts(turn: Mapping[str, Any], key: str) -> tuple[str, tuple[Picture, ...]]:
    """What a turn says, with ``<image>`` where its parts have an image, and the images that stand in it."""
    parts = turn.get(key)
    if not isinstance(parts, list):
        return text(turn, key), ()
    words = ""
    pictures: tuple[Picture, ...] = ()
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            words += text(part, "text", empty=True)
        elif kind in ("image", "image_url"):
            words += PLACEHOLDER
            pictures += picture(
                next((part[name] for name in ("image_url", "image", "url", "path") if part.get(name)), None)
            )
        else:
            raise UserError(f"a part of {key} is no text and no image: {part!r:.60}")
    return text({key: words}, key), pictures


def mavis(row: Mapping[str, Any], split: str) -> Item:
    """MAVIS: conversations, or MAVIS-Geometry's own rows, of which the text-dominant English form is taken."""
    if any(key in row for key in _CHATS):
        return conversation(row, split)
    said = row.get("text_en")
    if not isinstance(said, Mapping):
        raise UserError("neither conversations nor text_en")
    choices, index = row.get("choices"), row.get("answer_index")
    answer = None
    if isinstance(choices, list) and choices and isinstance(index, int):
        if not 0 <= index < min(len(choices), 26):
            raise UserError(f"answer_index {index} of {len(choices)} choices")
        answer = chr(ord("A") + index)
    pictures = picture(row.get("image_text_dominant") or row.get("image"))
    question = text(said, "text_dominant_question", "question")
    return _demonstration(identity(row, "id"), question, text(said, "CoT_reasoning"), pictures, answer)


def _written(question: str, solution: str) -> Callable[[Mapping[str, Any], str], Item]:
    """Rows of a question and a solution, text only; the names of their keys."""

    def parse(row: Mapping[str, Any], split: str) -> Item:
        asked = text(row, question).replace(PLACEHOLDER, "")
        return _demonstration(identity(row, "id"), asked, text(row, solution), ())

    return parse


def _splits(*patterns: str, test: bool = False) -> dict[str, tuple[str, ...]]:
    """train (and test): files that are called so, else the given ones."""
    found = {"train": ("*train*.jsonl", "*train*.json", "*train*.parquet", *patterns)}
    return found | ({"test": ("*test*.jsonl", "*test*.json", "*test*.parquet", *patterns)} if test else {})


_TRAINING = (
    Source("mm_k12", "problem", "Cierra0506/MM-K12", _splits(*_ANYTHING, test=True), mm_k12),
    Source("mmk12", "problem", "FanqingM/MMK12", _splits("*.parquet", *_ANYTHING, test=True), problem),
    Source(
        "mathv360k", "sft", "Zhiqiang007/MathV360K", {"train": ("train_samples_all_tuning.json", *_ANYTHING)},
        conversation, ("", "data_images", "images"),
    ),
    Source("mavis", "sft", "CaraJ/MAVIS-Geometry", _splits(*_ANYTHING), mavis),
    Source("rcot", "sft", "dle666/R-CoT", {"train": ("GeoMM.json", *_ANYTHING)}, conversation, ("", "images", "GeoMM")),
    Source("geo170k", "sft", "Luckyjhg/Geo170K", {"train": ("qa_tuning*", "geo170k*.json", *_ANYTHING)}, conversation),
    Source("numina_math_cot", "sft", "AI-MO/NuminaMath-CoT", _splits(*_ANYTHING), _written("problem", "solution")),
    Source("dart_math", "sft", "hkust-nlp/dart-math-hard", _splits(*_ANYTHING), _written("query", "response")),
)  # fmt: skip
_LABELS = step_labels.sources(_ANYTHING, BENCHMARKS["processbench"].files)
SOURCES = {**{source.name: source for source in (*_TRAINING, *_LABELS)}, **BENCHMARKS}


def find(name: str) -> Source:
    """The source of that name. Raises UserError with the nearest names."""
    if name not in SOURCES:
        nearest = difflib.get_close_matches(name, SOURCES, n=2, cutoff=0)
        raise UserError(f"{name!r}: no such source; did you mean {' or '.join(nearest)}? All: {', '.join(SOURCES)}")
    return SOURCES[name]


def locate(source: Source, path_or_id: str, split: str, output: Path | None = None) -> Located:
    """The files of a split; what is below ``output`` is none of them. Raises UserError when there are none."""
    if split not in source.files:
        raise UserError(f"{source.name} has no split {split!r}, only {', '.join(source.files)}")
    return sources_files.locate(path_or_id, source.files[split], output)


def read(name: str, path_or_id: str, split: str) -> Iterator[Item | Refused]:
    """The rows of a source in order, each an Item or Refused; streams. Raises UserError when there is no such source.

    Records have the source's name in ``source``, if they have that, and unique ids: "" becomes NAME-FILE-ROW, an id
    seen before with other content gets "~2", "~3" … behind it, and the same content under the same id is refused.
    """
    source = find(name)
    yield from items(source, locate(source, path_or_id, split), split)


def items(source: Source, located: Located, split: str) -> Iterator[Item | Refused]:
    """``read`` for files that were located."""
    seen: dict[str, list[bytes]] = {}  # what was under each id, 8 bytes a row
    for row in sources_files.read_rows(located):
        if row.value is None:
            yield Refused(row.file, row.number, None, row.error)
            continue
        given = identity(row.value, "id", "pid", "sample_index") or None
        try:
            found = source.parse(row.value, split)
        except UserError as error:
            yield Refused(row.file, row.number, given, str(error))
            continue
        for item in [found] if isinstance(found, Item) else found:
            yield _named(source, row, given, item, seen)


def _named(
    source: Source, row: sources_files.Row, given: str | None, item: Item, seen: dict[str, list[bytes]]
) -> Item | Refused:
    """The item with the id and the source of its record. given: the row's own id; seen: as in ``items``."""
    id_ = item.record.id or f"{source.name}-{row.file}-{row.number}"
    content = (to_json(item.record) + repr(item.pictures)).encode(errors="surrogatepass")
    digest = hashlib.blake2b(content, digest_size=8).digest()
    same = seen.setdefault(id_, [])
    if digest in same:
        return Refused(row.file, row.number, given, "the same row, id included, came before")
    same.append(digest)
    if len(same) > 1:
        next_one = f"{id_}~{len(same)}"
        id_ = f"{id_}~{digest.hex()}" if next_one in seen else next_one  # a row may be called so
        seen[id_] = [digest]
    named = {"id": id_} if source.kind == "labels" else {"id": id_, "source": source.name}
    return dataclasses.replace(item, record=replace_fields(item.record, **named), file=row.file, row=row.number)
