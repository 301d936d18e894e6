"""Step examples as rows that other projects read: TRL's stepwise supervision, MM-PRM's and VisualPRM's training files.

    trl         prompt, completions, labels: k / n as a number, -100 (which TRL's loss leaves out) without a label
    mm_prm      Question: …\\nProcess: step<prm>\\n\\nstep<prm>, and k / n for each <prm>; a step without a label is
                joined to the next one with a label, and those behind the last one are left out: the format has no
                place for them
    visualprm   steps_with_score: k of n as num_mc_correct of num_mc_total; without a label null, 0 of 0

``prm_counts`` keeps k and n beside numbers. ``data.step_labels`` reads all three again, with the same labels. Images
are copied to ``images/`` beside the file.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmprm_jax import interruption, io
from mmprm_jax.data.image_files import ImageFiles
from mmprm_jax.data.prepare import Images
from mmprm_jax.data.prompts import PLACEHOLDER, step_text
from mmprm_jax.data.sources_files import Located
from mmprm_jax.data.step_labels import COUNTS, IGNORED, MARK, PROCESS
from mmprm_jax.records import StepExample, UserError

Row = dict[str, Any]


def _share(k: float, n: int) -> float:
    return float(k / n)


def _images(example: StepExample) -> Row:
    """The key of the images, as these projects have it: a path, several, or no key."""
    if not example.images:
        return {}
    return {"image": example.images[0] if len(example.images) == 1 else list(example.images)}


def _tagged(example: StepExample, least: int) -> str:
    """The question with a tag for each image in front, where there are ``least`` images and it has none itself."""
    count = len(example.images)
    if count < least or PLACEHOLDER in example.question:
        return example.question
    return f"{PLACEHOLDER}\n" * count + example.question


def _counts(k: Sequence[float], n: Sequence[int]) -> Row:
    return {COUNTS: {"k": list(k), "n": list(n)}}


def trl(example: StepExample) -> Row:
    """A row of TRL's stepwise supervision."""
    labels = [_share(k, n) if n else float(IGNORED) for k, n in zip(example.k, example.n, strict=True)]
    row = {"id": example.id, "prompt": example.question, "completions": list(example.segments), "labels": labels}
    images = {"images": list(example.images)} if example.images else {}
    return row | _counts(example.k, example.n) | images


def mm_prm(example: StepExample) -> Row:
    """A row of MM-PRM's training file. Raises ValueError for a text that it cannot hold."""
    steps, waiting = [], []
    for segment, estimated in zip(example.segments, example.n, strict=True):
        waiting.append(segment)
        if estimated:
            steps.append("\n\n".join(waiting))
            waiting = []
    question = _tagged(example, 2)  # a single image stands in front by itself
    for text, forbidden in ((question, PROCESS), *((step, MARK) for step in steps)):
        if forbidden in text:
            raise ValueError(f"{forbidden.strip()!r} is in {text!r:.60}")
    k, n = zip(*((k, n) for k, n in zip(example.k, example.n, strict=True) if n), strict=True)
    said = f"Question: {question}{PROCESS}" + "\n\n".join(step + MARK for step in steps)
    shares = [_share(*label) for label in zip(k, n, strict=True)]
    turns = [{"from": "human", "value": said}, {"from": "gpt", "value": shares}]
    return {"id": example.id} | _images(example) | {"conversations": turns} | _counts(k, n)


def visualprm(example: StepExample) -> Row:
    """A row as VisualPRM400K's raw form has it; only labels that are counts have counts."""
    steps = []
    for segment, k, n in zip(example.segments, example.k, example.n, strict=True):
        correct, total = (int(k), n) if k % 1 == 0 else (None, None)
        score = _share(k, n) if n else None
        steps.append({"step": segment, "score": score, "num_mc_correct": correct, "num_mc_total": total})
    rest = {"response": "\n\n".join(example.segments), "steps_with_score": steps, "num_mc_sequences": max(example.n)}
    return {"id": example.id} | _images(example) | {"question": _tagged(example, 1)} | rest


FORMATS: Mapping[str, Callable[[StepExample], Row]] = {"trl": trl, "mm_prm": mm_prm, "visualprm": visualprm}


@dataclasses.dataclass(frozen=True)
class Written:
    """How many rows were written, and the examples that were not, by reason."""

    rows: int
    left_out: Mapping[str, list[str]]  # ids


def write(
    target: Path, examples: Iterable[tuple[str, StepExample]], form: str, images: Path, tags: bool = False
) -> Written:
    """Writes examples, each with the place that it is from, to a JSONL file in a stream, whole or not at all.

    form: a name of ``FORMATS``. images: the folder that the examples' images are relative to. tags: keeps the tags
    around steps and answers. Left out: examples without any label, with an empty step, or with a text that the format
    cannot hold. Raises UserError naming the example whose labels cannot be or whose image is missing, and when nothing
    was written.
    """
    kept = Images(ImageFiles(Located(images, (), (images,))), target.parent)

    @functools.lru_cache(2**12)  # the solutions of a problem have the same ones
    def copied(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(kept.keep(*opened) for opened in kept.opened(names))

    left_out: dict[str, list[str]] = collections.defaultdict(list)
    rows = 0
    with io.replacing(target) as file:
        for place, example in examples:
            interruption.check()
            row = _row(place, _plain(example, tags), FORMATS[form], copied, left_out)
            if row is not None:
                text = json.dumps(row, ensure_ascii=False, separators=(",", ":"))
                file.write(text.encode(errors="backslashreplace") + b"\n")
                rows += 1
        if not rows:
            why = describe(left_out) or "there are no step examples (a tree needs right and wrong solutions)"
            raise UserError(f"{target}: nothing to write; {why}")
    return Written(rows, left_out)


def _plain(example: StepExample, tags: bool) -> StepExample:
    """Without the blanks around the steps and, unless ``tags``, the tags, which mean nothing to other projects."""
    return dataclasses.replace(example, segments=tuple((s if tags else step_text(s)).strip() for s in example.segments))


def _row(
    place: str, example: StepExample, build: Callable[[StepExample], Row],
    copied: Callable[[tuple[str, ...]], tuple[str, ...]], left_out: dict[str, list[str]],
) -> Row | None:  # fmt: skip
    """None: it is left out. copied: copies images and returns their new paths. Raises UserError."""
    try:
        example.check()
        paths = copied(example.images)
    except (ValueError, UserError) as error:
        raise UserError(f"{place}: {example.id}: {error}") from None
    reason = "no label" if not any(example.n) else "an empty step" if not all(example.segments) else ""
    try:
        row = build(dataclasses.replace(example, images=paths)) if not reason else None
    except ValueError as error:
        row, reason = None, f"the format cannot hold it: {error}"
    if reason:
        left_out[reason].append(example.id)
    return row


def describe(left_out: Mapping[str, Sequence[str]]) -> str:
    """What was left out, in words; empty for nothing."""
    return "; ".join(f"left out {len(ids)} ({reason}), e.g. {ids[0]}" for reason, ids in left_out.items())
