"""Step labels that others made: their rows as ``StepExample`` records.

A label becomes counts k of n: k of n rollouts as they are; right or wrong as k = 1 or 0 of n = 1; a number v from 0
to 1 as k = v of n = 1, kept exactly. n = 0: the step has no label. A row none of whose steps has one is bad.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmprm_jax.data.prompts import PLACEHOLDER, match_image_tags
from mmprm_jax.data.sources_base import MAX_TEXT, Item, Picture, Source, identity, picture, pictures_of, text
from mmprm_jax.records import MOST_ROLLOUTS, StepExample, UserError

IGNORED = -100  # TRL: what the loss leaves out
COUNTS = "prm_counts"  # Beta-Binomial-PRM's key, which also our own exports have: {"k": […], "n": […]}
PROCESS = "\nProcess: "  # MM-PRM: what stands between the question and the steps
MARK = "<prm>"  # MM-PRM: what follows a step
ASKED, SOLVED = "### Question:", "### Solution Process:"  # VisualPRM: what stands in front of question and first step
MAX_STEPS = 1000  # of a solution
_TOLERANCE = 1e-3  # between a number and the counts that it comes from

Label = tuple[float, int]  # k, n
NONE: Label = (0, 0)


def share(value: Any, key: str) -> Label:
    """A label that is right, wrong, a number from 0 to 1, or none (null, -100). Raises UserError naming the key."""
    if value is None or value == IGNORED:
        return NONE
    if not isinstance(value, bool | int | float) or not 0 <= value <= 1:
        raise UserError(f"{key} is {value!r:.40}, which is neither true, false, null nor a number from 0 to 1")
    return (int(value) if value in (0, 1) else value), 1


def counts(k: Any, n: Any, key: str) -> Label:
    """A label of k of n rollouts, or a number from 0 to 1 of 1; of none there is no label. Raises UserError."""
    k, n = (int(x) if type(x) is float and x % 1 == 0 else x for x in (k, n))
    if type(k) is float and n == 1:
        return share(k, key)
    if type(k) is not int or type(n) is not int or not 0 <= k <= n:
        raise UserError(f"{key} is {k!r:.40} of {n!r:.40}, which are no counts 0 <= k <= n")
    if n > MOST_ROLLOUTS:
        raise UserError(f"{key} is of {n}, more than {MOST_ROLLOUTS}")
    return (k, n) if n else NONE


def _agree(label: Label, value: Any, key: str) -> None:
    """Raises UserError when counts are others than the number beside them says."""
    told = share(value, key)
    if label[1] and told[1] and abs(label[0] / label[1] - told[0]) > _TOLERANCE:
        raise UserError(f"{key} is {value!r:.40}, but the counts are {label[0]} of {label[1]}")


def _list(value: Any, key: str, length: int | None = None) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"{key} is {type(value).__name__}, not a list")
    if length is not None and len(value) != length:
        raise UserError(f"{key} has {len(value)} entries for {length} steps")
    return value


def _step(value: Any, key: str) -> str:
    """A step's text, without the blanks around it. Raises UserError."""
    if not isinstance(value, str):
        raise UserError(f"{key} is {type(value).__name__}, not a text")
    return text({key: value}, key).strip()


def _example(
    row: Mapping[str, Any], question: str, steps: Sequence[str], labels: Sequence[Label],
    pictures: tuple[Picture, ...] = (),
) -> Item:  # fmt: skip
    """Problems are told apart by question and images. Raises UserError for a row without a label, or too long a one."""
    if not any(n for _, n in labels):
        raise UserError("no step has a label" if steps else "there are no steps")
    length = sum(map(len, steps))
    if length > MAX_TEXT or len(steps) > MAX_STEPS:
        limits = f"{MAX_STEPS} and {MAX_TEXT}"
        raise UserError(f"its {len(steps)} steps have {length} characters; the limits are {limits}")
    question = _in_front(match_image_tags(question, len(pictures)), len(pictures)).strip()
    if not question:
        raise UserError("the question is empty")
    content = f"{question}{pictures!r}".encode(errors="surrogatepass")
    k, n = zip(*labels, strict=True)
    problem = hashlib.blake2b(content, digest_size=8).hexdigest()
    return Item(StepExample(identity(row, "id"), problem, question, tuple(steps), k, n), pictures)


def _in_front(question: str, images: int) -> str:
    """A question whose images all stand in front of it, without their tags, which say no more."""
    (lead,) = re.findall(rf"\A(?:{PLACEHOLDER}\s*)*", question)
    return question[len(lead) :] if images and lead.count(PLACEHOLDER) == images else question


def _counted(row: Mapping[str, Any], values: Sequence[Any], key: str) -> list[Label]:
    """The labels: those of ``prm_counts`` where a row has it, else of ``values``, which is called ``key``."""
    own = row.get(COUNTS)
    if own is None:
        return [share(value, f"{key}[{i}]") for i, value in enumerate(values)]
    if not isinstance(own, Mapping):
        raise UserError(f"{COUNTS} is {type(own).__name__}, not an object of k and n")
    both = (_list(own.get(name), f"{COUNTS}.{name}", len(values)) for name in "kn")
    labels = [counts(k, n, f"{COUNTS}[{i}]") for i, (k, n) in enumerate(zip(*both, strict=True))]
    for i, (label, value) in enumerate(zip(labels, values, strict=True)):
        _agree(label, value, f"{key}[{i}]")
    return labels


def trl(row: Mapping[str, Any], split: str) -> Item:
    """TRL's stepwise supervision: ``prompt``, ``completions``, ``labels`` (truth values or numbers from 0 to 1)."""
    steps = [_step(x, f"completions[{i}]") for i, x in enumerate(_list(row.get("completions"), "completions"))]
    labels = _counted(row, _list(row.get("labels"), "labels", len(steps)), "labels")
    return _example(row, text(row, "prompt"), steps, labels, pictures_of(row, "images", "image"))


def _turns(row: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(from, value) of a row's ``conversations``, without the system's. Raises UserError."""
    turns = _list(row.get("conversations"), "conversations")
    if not all(isinstance(turn, Mapping) and isinstance(turn.get("from"), str) for turn in turns):
        raise UserError("conversations has a turn that is no object of from and value")
    return [(turn["from"], turn.get("value")) for turn in turns if turn["from"] != "system"]


def mm_prm(row: Mapping[str, Any], split: str) -> Item:
    """MM-PRM's training file: ``Question: …\\nProcess: step<prm>\\n\\nstep<prm>``, and a number for each step."""
    turns = _turns(row)
    if [who for who, _ in turns] != ["human", "gpt"]:
        raise UserError(f"conversations has {len(turns)} turns; a human's and a gpt's are expected")
    said = text({"conversations": turns[0][1]}, "conversations")
    question, found, process = said.partition(PROCESS)
    if not found or not question.startswith("Question: "):
        raise UserError(f'the human says neither "Question: " nor "Process: ": {said!r:.60}')
    *parts, rest = process.split(MARK)
    if rest.strip():
        raise UserError(f"a step without {MARK} behind it: {rest.strip()!r:.60}")
    steps = [_step(part, f"step {i}") for i, part in enumerate(parts, 1)]
    labels = _counted(row, _list(turns[1][1], "the gpt's value", len(steps)), "the gpt's value")
    return _example(row, question.removeprefix("Question: "), steps, labels, pictures_of(row, "image", "images"))


_JUDGED = {"+": (1, 1), "-": (0, 1)}
_IMAGE_KEYS = ("image", "images", "image_qwen_smart_resize", "image_url")
_STEP_TAG = re.compile(r"</?step_\d{1,6}>")


def _visual_pictures(row: Mapping[str, Any]) -> tuple[Picture, ...]:
    """The images; their paths may begin with the name of the data set, which is no folder in it."""
    found = max((picture(row.get(key)) for key in _IMAGE_KEYS), key=len)
    return tuple(re.sub(r"^VisualPRM400K[^/]*/", "", x) if isinstance(x, str) else x for x in found)


def visual_prm(row: Mapping[str, Any], split: str) -> Item:
    """VisualPRM400K, and what has its form (VL-PRM300K): a turn for each step, answered by + or -.

    Rows with ``steps_with_score`` and no conversations are those of its raw form: k of n rollouts for each step. A
    step of no rollouts was not estimated.
    """
    if row.get("conversations") is None and row.get("steps_with_score") is not None:
        return _visual_prm_raw(row)
    turns = _turns(row)
    if len(turns) % 2 or [who for who, _ in turns] != ["human", "gpt"] * (len(turns) // 2):
        raise UserError(f"conversations has {len(turns)} turns that are not a human's and a gpt's in turn")
    steps, labels = [], []
    for i in range(0, len(turns), 2):
        said, judged = (text({f"turn {j}": turns[j][1]}, f"turn {j}") for j in (i, i + 1))
        if judged.strip() not in _JUDGED:
            raise UserError(f"turn {i + 1} is {judged!r:.40}, neither + nor -")
        steps.append(said)
        labels.append(_JUDGED[judged.strip()])
    question, steps[:1] = _first_turn(steps[0]) if steps else ("", [])
    steps = [_step(_STEP_TAG.sub("", said), f"step {i}") for i, said in enumerate(steps, 1)]
    return _example(row, question, steps, labels, _visual_pictures(row))


def _first_turn(said: str) -> tuple[str, list[str]]:
    """The question, and the first step. Raises UserError."""
    before, found, step = said.partition(SOLVED)
    images, asked, question = before.partition(ASKED)
    if not found or not asked or images.replace(PLACEHOLDER, "").strip():
        raise UserError(f'the first turn has not "{ASKED}" and "{SOLVED}": {said!r:.60}')
    return images.strip() + question.strip(), [step]


def _visual_prm_raw(row: Mapping[str, Any]) -> Item:
    steps, labels = [], []
    for i, step in enumerate(_list(row["steps_with_score"], "steps_with_score")):
        key = f"steps_with_score[{i}]"
        if not isinstance(step, Mapping):
            raise UserError(f"{key} is {type(step).__name__}, not an object")
        steps.append(_step(step.get("step"), f"{key}.step"))
        k, n = step.get("num_mc_correct"), step.get("num_mc_total")
        if k is None and n is None:
            labels.append(share(step.get("score"), f"{key}.score"))
            continue
        labels.append(counts(k, n, f"{key}.num_mc_correct"))
        _agree(labels[-1], step.get("score"), f"{key}.score")
    return _example(row, text(row, "question_orig", "question"), steps, labels, _visual_pictures(row))


_SHEPHERD_MARK = "ки"
_FIRST_STEP = re.compile(r"step\s*1\s*:", re.IGNORECASE)


def math_shepherd(row: Mapping[str, Any], split: str) -> Item:
    """Math-Shepherd: in ``input`` every step ends with ки, in ``label`` with + or - instead."""
    said, judged = text(row, "input"), text(row, "label")
    *parts, rest = said.split(_SHEPHERD_MARK)
    if not parts:
        raise UserError(f"input has no {_SHEPHERD_MARK}")
    if rest.strip():
        raise UserError(f"input has a step without {_SHEPHERD_MARK} behind it: {rest.strip()!r:.60}")
    steps, labels, at = [], [], 0
    for i, part in enumerate(parts, 1):
        end = at + len(part)
        if judged[at:end] != part or judged[end : end + 1] not in _JUDGED or not judged[end:]:
            raise UserError(f"label does not repeat step {i} of input with + or - behind it")
        steps.append(part)
        labels.append(_JUDGED[judged[end]])
        at = end + 1
    if judged[at:].strip():
        raise UserError("label has more than input")
    heads = list(_FIRST_STEP.finditer(steps[0]))
    if not heads:
        raise UserError('input has no "Step 1:" behind the question')
    question, steps[0] = steps[0][: heads[-1].start()], steps[0][heads[-1].start() :]
    return _example(row, question, [_step(x, f"step {i}") for i, x in enumerate(steps, 1)], labels)


_RATINGS = {1: (1, 1), -1: (0, 1), 0: NONE, None: NONE}


def prm800k(row: Mapping[str, Any], split: str) -> list[Item]:
    """PRM800K: the path that the labelers chose, and an example for each other completion that was rated.

    Rating 1 is right, -1 wrong; 0 (neutral) and null are no label. An example of another completion has the chosen
    steps before it, without their labels, which the path has; so each rating is learned from once.
    """
    asked, label = row.get("question"), row.get("label")
    if not isinstance(asked, Mapping) or not isinstance(label, Mapping):
        raise UserError("question and label must be objects")
    question = text(asked, "problem")
    steps: list[str] = []
    labels: list[Label] = []
    others: list[tuple[list[str], list[Label]]] = []
    for i, step in enumerate(_list(label.get("steps"), "label.steps")):
        chosen, rated = _alternatives(step, f"label.steps[{i}]")
        ends = chosen is None
        if ends and rated:  # nobody chose: the first one ends the path
            chosen, *rated = rated
        others += [([*steps, said], [NONE] * len(steps) + [rating]) for said, rating in rated if rating[1]]
        if len(others) > MAX_STEPS or len(steps) > MAX_STEPS:  # each repeats the steps before it
            raise UserError(f"label.steps has more than {MAX_STEPS} steps, or other completions that were rated")
        if chosen:
            steps.append(chosen[0])
            labels.append(chosen[1])
        if ends:
            break
    found = [(steps, labels)] if any(n for _, n in labels) else []
    if not found and not others:
        raise UserError("no step has a rating of 1 or -1")
    return [_example(row, question, *each) for each in [*found, *others]]


def _alternatives(step: Any, key: str) -> tuple[tuple[str, Label] | None, list[tuple[str, Label]]]:
    """The completion that was chosen, or what the labeler wrote, and the other ones, each with its label."""
    if not isinstance(step, Mapping):
        raise UserError(f"{key} is {type(step).__name__}, not an object")
    given, index, written = step.get("completions"), step.get("chosen_completion"), step.get("human_completion")
    found = [_rated(x, f"{key}.completions[{i}]") for i, x in enumerate(_list(given or [], f"{key}.completions"))]
    if index is None:
        return (None if written is None else _rated(written, f"{key}.human_completion")), found
    if type(index) is not int or not 0 <= index < len(found):
        raise UserError(f"{key}.chosen_completion is {index!r:.40} of {len(found)} completions")
    return found[index], found[:index] + found[index + 1 :]


def _rated(completion: Any, key: str) -> tuple[str, Label]:
    if not isinstance(completion, Mapping):
        raise UserError(f"{key} is {type(completion).__name__}, not an object")
    rating = completion.get("rating")
    if isinstance(rating, bool) or not isinstance(rating, int | None) or rating not in _RATINGS:
        raise UserError(f"{key}.rating is {rating!r:.40}, none of 1, 0, -1 and null")
    return _step(completion.get("text"), f"{key}.text"), _RATINGS[rating]


def processbench(row: Mapping[str, Any], split: str) -> Item:
    """ProcessBench: right before the first wrong step, which ``label`` says (-1: there is none), no label behind it."""
    steps = [_step(x, f"steps[{i}]") for i, x in enumerate(_list(row.get("steps"), "steps"))]
    first = row.get("label")
    if type(first) is not int or not -1 <= first < len(steps):
        raise UserError(f"{len(steps)} steps, but the label of the first error is {first!r:.20}")
    labels = [(1, 1) if first < 0 or i < first else (0, 1) if i == first else NONE for i in range(len(steps))]
    return _example(row, text(row, "problem"), steps, labels)


def sources(patterns: Iterable[str], benchmark: Mapping[str, tuple[str, ...]]) -> tuple[Source, ...]:
    """The sources of step labels. patterns: of files of any name; benchmark: ProcessBench's splits."""
    split = {"train": ("*train*.jsonl", "*train*.json", "*train*.parquet", *patterns)}
    folders = ("", "images", "VisualPRM400K-v1.1-Raw", "VisualPRM400K-v1.1-Raw/images")
    judged = {"train": ("*_prm.jsonl", *split["train"])}
    return (
        Source("trl_stepwise", "labels", "trl-lib/math_shepherd", split, trl),
        Source("math_shepherd", "labels", "peiyi9979/Math-Shepherd", split, math_shepherd),
        Source("prm800k", "labels", "tasksource/PRM800K", split, prm800k),
        Source("visualprm400k", "labels", "OpenGVLab/VisualPRM400K-v1.1", judged, visual_prm, folders),
        Source("visualprm400k_raw", "labels", "OpenGVLab/VisualPRM400K-v1.1-Raw", split, visual_prm, folders),
        Source("vl_prm300k", "labels", "ob11/VL-PRM300K", split, visual_prm),
        Source("mm_prm", "labels", "", split, mm_prm),
        Source("processbench_labels", "labels", "Qwen/ProcessBench", benchmark, processbench),
    )
