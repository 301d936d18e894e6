"""``mmprm split``: problems held out for development and test, where a data set has one file only.

    mmprm split FOLDER/all.jsonl --dev=50 --test=200

writes FOLDER/{train,dev,test}.jsonl. Problems that share an image (or, without any, a question) stay together.
Which are held out depends on their ids and texts and the seed, not on their order: a hash decides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from mmprm_jax import records
from mmprm_jax.records import Problem, UserError

PARTS = ("test", "dev", "train")  # filled in this order


def groups(problems: Sequence[Problem]) -> list[list[Problem]]:
    """Problems that an image joins, or without any the same question."""
    found: dict[tuple[str, str], list[Problem]] = {}
    for problem in problems:
        # the same words about different figures are different problems
        question = " ".join(problem.question.split()).casefold()
        keys = [("image", name) for name in problem.images] or [("question", question)]
        group = found.setdefault(keys[0], [])
        for key in keys[1:]:
            other = found.setdefault(key, group)
            if other is not group:
                group += other
                found |= {name: group for name, some in found.items() if some is other}
        group.append(problem)
    return list({id(group): group for group in found.values()}.values())


def split(problems: Sequence[Problem], dev: int, test: int, seed: int = 0) -> dict[str, list[Problem]]:
    """The problems of each part, in their order: about ``test`` and ``dev`` (groups stay whole), the others: training.

    Raises UserError when none would be left.
    """

    def number(group: Sequence[Problem]) -> bytes:
        text = "\x1f".join(sorted(f"{p.id}\x1e{p.question}" for p in group))
        return hashlib.sha256(f"{seed}\x1f{text}".encode(errors="surrogatepass")).digest()

    sizes = {"test": test, "dev": dev, "train": len(problems)}
    part_of: dict[str, str] = {}
    counts = dict.fromkeys(PARTS, 0)
    for group in sorted(groups(problems), key=number):
        part = next(name for name in PARTS if counts[name] + len(group) <= sizes[name])
        counts[part] += len(group)
        part_of |= {p.id: part for p in group}
    empty = [name for name in PARTS if not counts[name]]
    if empty:
        raise UserError(f"{len(problems)} problems, of which {test} for test and {dev} for dev: none for {empty[0]}")
    return {name: [p for p in problems if part_of[p.id] == name] for name in PARTS}


def split_file(file: Path, dev: int, test: int, seed: int = 0) -> str:
    """Writes the parts of a file of problems beside it; returns what to tell. Raises UserError."""
    if file.stem in PARTS:
        raise UserError(f"{file}: would be replaced; prepare it under another name (mmprm prepare … --name=all)")
    parts = split(records.read_problems(file), dev, test, seed)
    for name, part in parts.items():
        records.write(file.with_name(f"{name}.jsonl"), part)
    return ", ".join(f"{file.parent / name}.jsonl: {len(parts[name])}" for name in reversed(PARTS))
