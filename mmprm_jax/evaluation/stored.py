"""Candidates and their scores as files that others can make.

Layouts, told apart row by row; a file is JSONL or one JSON list:

    ours          {"candidate": {"problem_id", "segments", "answer", "correct", "logprob", "n_tokens"}, "scores": […]}
                  one row per candidate; ``problem_id``, ``correct`` and ``scores`` are enough
    the original  {"id", "question", "image_path", "solutions_splits": [[step, …], …], "labels": [0, 1, …],
                  "prm_scores": [[0.9, …], …], "answers": [text or null, …]}
                  one row per problem; ``labels`` and ``prm_scores`` are enough
    search-and-learn  {"unique_id", "problem", "answer", "completions": [text, …], "scores": [[0.9, …], …]}
                  one row per problem; the completions' answers are verified against ``answer``
    `mmprm score` {"id", "scores": [[0.9, …], …]}; all else is in the file that was scored, joined by id: "candidates",
                  and "labels" as above, or "answer", against which the candidates' answers are verified

A bad row (a candidate, or a problem of the original) is left out and named; the others are read.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from etils import epath

from mmprm_jax import io, manifest
from mmprm_jax.answers import extract
from mmprm_jax.answers.workers import Verifier
from mmprm_jax.data.prompts import final_answer, step_text
from mmprm_jax.records import Candidate, Grading, ScoredCandidate, UserError, grading_of, number_text, warn_unknown

# what a file must tell for these selectors to mean anything
NEEDS = {
    "majority": "answer",
    "prm_weighted_majority": "answer",
    "policy_logprob": "logprob",
    "unique": "segments",
}


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a file holds. ``bad``: a line for each row that was left out."""

    problems: dict[str, list[ScoredCandidate]]  # by problem id, in the order of the file
    field_counts: Counter[str]  # how many candidates have "answer", "logprob", "segments"
    rows: dict[str, dict[str, Any]]  # what else the original's rows say, by problem id
    bad: list[str]
    unjudged: list[str] = dataclasses.field(default_factory=list)  # answers that could not be verified: wrong ones

    @property
    def known(self) -> set[str]:
        """What selectors may go by. All must have a log-probability: what stands for a missing one, 0, beats any."""
        every = sum(map(len, self.problems.values()))
        return {name for name, count in self.field_counts.items() if count == every or name != "logprob"}

    @property
    def without(self) -> list[str]:
        """The selectors that the file says too little for."""
        return [name for name, need in NEEDS.items() if need not in self.known]


def iter_rows(path: epath.PathLike) -> Iterator[tuple[str, Any]]:
    """(where, row) of a JSONL file or of a JSON list; a row that is no JSON is a ValueError in its place.

    Raises UserError if there is no such file, it is not UTF-8, or not what the stage wrote in whose folder it is.
    """
    path = epath.Path(path)
    if not path.exists() or path.is_dir():
        raise UserError(f"{path}: no such file")
    manifest.check_file(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from None
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not JSON ({error})") from None
        yield from ((f"row {i}", row) for i, row in enumerate(rows))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                yield f"line {number}", ValueError(f"not JSON ({error})")


def read(path: epath.PathLike, truth: epath.PathLike | None = None) -> Stored:
    """Reads a file of any layout. truth: what `mmprm score` read, for a file that it wrote.

    Raises UserError if there is no file, no good row in it, or an id twice in ``truth``.
    """
    found, known = Stored({}, Counter(), {}, []), _by_id(truth)
    golds: dict[str, tuple[str, Grading]] = {}
    for where, row in iter_rows(path):
        try:
            if isinstance(row, ValueError):
                raise row
            if not isinstance(row, dict):
                raise ValueError(f"expected a JSON object, found {type(row).__name__}")
            if "candidate" in row:
                scored, names = _candidate(path, row)
                found.problems.setdefault(scored.candidate.problem_id, []).append(scored)
            else:
                row = _as_original(row, known)
                name = str(row["id"]) if row.get("id") is not None else where.split()[1]
                if name in found.problems:
                    raise ValueError(f"a second row of problem {name}")
                gold = row.pop("gold", None)
                found.problems[name], names = _problem(name, row)
                found.rows[name] = {k: v for k, v in row.items() if k not in _WRITTEN}
                if gold:
                    golds[name] = gold
            found.field_counts.update(names)
        except (ValueError, TypeError) as error:
            found.bad.append(f"{path}, {where}: {error}")
    if not found.problems:
        raise UserError("; ".join(found.bad[:3]) or f"{path}: is empty")
    if golds:
        _verify(found, golds)
    return found


def _by_id(truth: epath.PathLike | None) -> dict[str, dict[str, Any]] | None:
    """The rows of a file by their ids; None: there is no file. Raises UserError for an id that is there twice."""
    if truth is None:
        return None
    known: dict[str, dict[str, Any]] = {}
    for _, row in iter_rows(truth):
        if isinstance(row, dict) and row.get("id") is not None and known.setdefault(str(row["id"]), row) is not row:
            raise UserError(f"{truth}: the id {row['id']!r:.80} is there twice; rows are joined by it")
    return known


def _as_original(row: dict[str, Any], known: dict[str, dict[str, Any]] | None) -> dict[str, Any]:
    """A row per problem as the original has it. Where answers are to be verified, ``gold`` says by what, and the labels
    are all wrong. Raises ValueError.
    """
    if "prm_scores" in row:
        return dict(row)
    if "completions" in row:
        return _of_search_and_learn(row)
    if "error" in row and "scores" not in row:
        raise ValueError(f"it could not be scored: {_short(row['error'])}")
    if not {"id", "scores"} <= row.keys():
        raise ValueError("neither candidate (one row per candidate) nor prm_scores (one per problem) is there")
    if known is None:
        raise ValueError("of `mmprm score`: name the file that it read, --labels=FILE, which says what is right")
    told = known.get(str(row["id"])) if row.get("id") is not None else None
    if told is None:
        raise ValueError("the file of --labels has no row of that id")
    steps = told.get("candidates", [told["steps"]] if "steps" in told else None)
    if not isinstance(steps, list):
        raise ValueError("the row of --labels has no candidates")
    steps = [list(_texts(x, f"candidates[{i}]") or ()) for i, x in enumerate(steps)]
    if told.get("labels") is None:
        answers = [final_answer(x) or extract.answer("\n\n".join(map(step_text, x))) for x in steps]
        labelled = _to_verify(told, "candidates", answers)
    else:
        labelled = {"labels": told["labels"], "answers": told.get("answers")}
    same: dict[str, Any] = {key: told[key] for key in ("id", "question", "image_path") if key in told}
    return {**same, "solutions_splits": steps, "prm_scores": row["scores"], **labelled}


def _of_search_and_learn(row: dict[str, Any]) -> dict[str, Any]:
    """Steps are told only where all completions have as many, parted by blank lines, as scores. Raises ValueError."""
    completions, scores = _texts(row["completions"], "completions"), row.get("scores")
    if completions is None or not isinstance(scores, list) or len(scores) != len(completions):
        raise ValueError("completions and scores must be lists of one length")
    name = next((row[key] for key in ("unique_id", "id") if row.get(key) is not None), None)
    split = [text.split("\n\n") for text in completions]
    told = all(isinstance(x, list) and len(x) == len(steps) for x, steps in zip(scores, split, strict=True))
    same = {"id": name, "prm_scores": scores} | ({"question": row["problem"]} if "problem" in row else {})
    labelled = _to_verify(row, "completions", [extract.answer(text) for text in completions])
    return {**same, **labelled} | ({"solutions_splits": split} if told else {})


def _to_verify(row: dict[str, Any], key: str, answers: list[str | None]) -> dict[str, Any]:
    """The answers, and by what they are to be verified. Raises ValueError."""
    gold = _answer(row.get("answer"))
    if gold is None:
        raise ValueError(f"answer is missing: the right one, by which those of {key} are verified")
    return {"answers": answers, "labels": [0] * len(answers), "gold": (gold, grading_of(row.get("grading") or {}))}


def _verify(found: Stored, golds: dict[str, tuple[str, Grading]]) -> None:
    """Says of the candidates of these problems whether their answers are right."""
    pairs = [(s.candidate.answer, *gold) for name, gold in golds.items() for s in found.problems[name]]
    with Verifier() as verifier:
        verdicts = iter(verifier(pairs))
        unknown = verifier.unknown
    for name in golds:
        group = found.problems[name]
        judged = (dataclasses.replace(s.candidate, correct=next(verdicts)) for s in group)
        found.problems[name] = [ScoredCandidate(c, s.scores) for c, s in zip(judged, group, strict=True)]
    if unknown:
        found.unjudged.append(f"{unknown} of {len(pairs)} answers could not be verified, and count as wrong")


_WRITTEN = ("solutions_splits", "labels", "prm_scores", "answers")


def _candidate(path: epath.PathLike, row: dict[str, Any]) -> tuple[ScoredCandidate, Iterable[str]]:
    c = row["candidate"]
    if not isinstance(c, dict):
        raise ValueError("candidate must be an object")
    for key in sorted(set(c) - _CANDIDATE):
        warn_unknown(path, "candidate", key, _CANDIDATE)
    for key in sorted(set(row) - _KEYS):
        warn_unknown(path, "row", key, _KEYS)
    name = c.get("problem_id")
    if not isinstance(name, str) and type(name) is not int:
        raise ValueError("problem_id must be a text or a whole number")
    scores = parse_scores(row.get("scores"), "scores")
    segments = _texts(c.get("segments"), "segments")
    if segments is not None and len(segments) != len(scores):
        raise ValueError(f"{len(segments)} segments, but {len(scores)} scores")
    logprob = c.get("logprob")
    if logprob is not None and not (_number(logprob) and abs(logprob) <= sys.float_info.max):
        raise ValueError(f"logprob must be a finite number, found {_short(logprob)}")
    n_tokens = 0 if c.get("n_tokens") is None else c["n_tokens"]
    if type(n_tokens) is not int or n_tokens < 0:
        raise ValueError(f"n_tokens must be a whole number, found {_short(n_tokens)}")
    answer, correct = _answer(c.get("answer")), _flag(c.get("correct"), "correct")
    fields = {"answer": answer, "logprob": logprob, "segments": segments}
    candidate = Candidate(str(name), segments or (), answer, correct, logprob or 0.0, n_tokens)
    return ScoredCandidate(candidate, scores), {name for name, value in fields.items() if value is not None}


_KEYS = {"candidate", "scores"}
_CANDIDATE = {f.name for f in dataclasses.fields(Candidate)}


def _problem(name: str, row: dict[str, Any]) -> tuple[list[ScoredCandidate], Iterable[str]]:
    labels, scores = row.get("labels"), row.get("prm_scores")
    steps, answers = row.get("solutions_splits"), row.get("answers")
    for key, value in (("labels", labels), ("prm_scores", scores)):
        if not isinstance(value, list):
            raise ValueError(f"{key} must be a list")
    assert isinstance(labels, list) and isinstance(scores, list)
    for key, value in (("labels", labels), ("solutions_splits", steps), ("answers", answers)):
        if value is not None and (not isinstance(value, list) or len(value) != len(scores)):
            raise ValueError(f"{key} must be a list as long as prm_scores, {len(scores)}")
    found: list[ScoredCandidate] = []
    says: Counter[str] = Counter()
    for i, values in enumerate(scores):
        values = parse_scores(values, f"prm_scores[{i}]")
        segments = _texts(steps[i], f"solutions_splits[{i}]") if steps else None
        if segments is not None and len(segments) != len(values):
            raise ValueError(f"solutions_splits[{i}] has {len(segments)} steps, but there are {len(values)} scores")
        answer = _answer(answers[i]) if answers else final_answer(segments or ())
        says.update(key for key, value in (("answer", answer), ("segments", segments)) if value is not None)
        correct = _flag(labels[i], f"labels[{i}]")
        found.append(ScoredCandidate(Candidate(name, segments or (), answer, correct, 0.0, 0), values))
    return found, says


def _short(value: Any) -> str:
    return repr(value)[:80]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def parse_scores(values: Any, key: str) -> tuple[float, ...]:
    """Step scores from JSON. Raises ValueError naming what is no number from 0 to 1."""
    if not isinstance(values, list):
        raise ValueError(f"{key} must be a list of numbers")
    for i, value in enumerate(values):
        if not _number(value) or not 0 <= value <= 1:
            raise ValueError(f"{key}[{i}] must be a number from 0 to 1, found {_short(value)}")
    return tuple(map(float, values))


def _texts(values: Any, key: str) -> tuple[str, ...] | None:
    if values is None:
        return None
    if not isinstance(values, list) or not all(isinstance(x, str) for x in values):
        raise ValueError(f"{key} must be a list of texts")
    return tuple(values)


def _answer(value: Any) -> str | None:
    if _number(value):
        return number_text(value)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"answer must be a text, a number or null, found {_short(value)}")
    return value


def _flag(value: Any, key: str) -> bool:
    if not (isinstance(value, int) and value in (0, 1)):
        raise ValueError(f"{key} must be true or false (1 or 0), found {_short(value)}")
    return bool(value)


def write(path: epath.PathLike, stored: Stored) -> None:
    """Writes our layout (``*.jsonl``) or the original's (``*.json``), atomically; what is not known is left out.

    Raises UserError for another name, and for problems without candidates in our layout, which cannot hold them.
    """
    path = epath.Path(path)
    if path.suffix == ".jsonl":
        empty = [name for name, group in stored.problems.items() if not group]
        if empty:
            raise UserError(f"{path}: {len(empty)} problems have no candidates, e.g. {empty[0]}; only .json holds them")
        rows = [_candidate_row(s, stored.known) for group in stored.problems.values() for s in group]
        text = "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
    elif path.suffix == ".json":
        text = json.dumps([_original_row(name, group, stored) for name, group in stored.problems.items()]) + "\n"
    else:
        raise UserError(f"{path}: end the name in .jsonl (a candidate per row) or .json (as the original's files)")
    io.write(path, text)


def _has_steps(s: ScoredCandidate) -> bool:
    return len(s.candidate.segments) == len(s.scores)


def _candidate_row(s: ScoredCandidate, known: Collection[str]) -> dict[str, Any]:
    row = dataclasses.asdict(s)
    if "segments" not in known or not _has_steps(s):
        del row["candidate"]["segments"]
    if "logprob" not in known:
        del row["candidate"]["logprob"]
    return row


def _original_row(name: str, group: list[ScoredCandidate], stored: Stored) -> dict[str, Any]:
    row = stored.rows.get(name, {"id": name}) | {
        "labels": [int(s.candidate.correct) for s in group],
        "prm_scores": [s.scores for s in group],
    }
    if "segments" in stored.field_counts and all(map(_has_steps, group)):
        row["solutions_splits"] = [s.candidate.segments for s in group]
    if "answer" in stored.field_counts:
        row["answers"] = [s.candidate.answer for s in group]
    return row
