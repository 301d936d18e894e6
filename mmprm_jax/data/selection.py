"""Which rows and steps of others' step labels are kept: Balanced-Information scores, and certain labels only."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mmprm_jax.data.sources_base import Item, Refused, replace_fields
from mmprm_jax.records import StepExample, UserError

Rows = Iterable[Item | Refused]


@dataclasses.dataclass(frozen=True)
class Selection:
    """bis: the share of each file's rows with the highest scores that is kept; 0: all. alpha: of the score.

    certain: (low, high): labels between them are uncertain; such a step has none, or, with ``whole``, its row is left
    out. None: every label counts. Raises UserError.
    """

    bis: float = 0.0
    alpha: float = 0.05
    certain: tuple[float, float] | None = None
    whole: bool = False

    def __post_init__(self) -> None:
        if not (0 <= self.bis <= 1 and 0 <= self.alpha < float("inf")):
            raise UserError(f"bis {self.bis} must be a share from 0 to 1, and its alpha {self.alpha} at least 0")
        if self.certain and not 0 <= self.certain[0] < self.certain[1] <= 1:
            raise UserError(f"certain {self.certain[0]},{self.certain[1]}: two numbers 0 <= low < high <= 1")
        if self.whole and not self.certain:
            raise UserError("whole rows are left out by their uncertain labels: say which labels are certain")

    def __bool__(self) -> bool:
        return bool(self.bis or self.certain)


def bis(example: StepExample, alpha: float) -> float:
    """(p (1 - p) + alpha) R: p is the share of labels above 0, R their mean, 1 where none is above 0.

    Balanced-Information score, arXiv 2602.04145; steps without a label do not count.
    """
    labels = [k / n for k, n in zip(example.k, example.n, strict=True) if n]
    right = [label for label in labels if label > 0]
    share = len(right) / len(labels)
    return (share * (1 - share) + alpha) * (sum(right) / len(right) if right else 1.0)


def select(read: Callable[[], Rows], chosen: Selection, counted: collections.Counter) -> Iterator[Item | Refused]:
    """The items that are kept, and what was refused. read: the rows, the same ones each time it is called.

    counted: how many rows were left out by "bis" and by "certain", and of how many steps the label was.
    """
    kept = _highest(read(), chosen) if chosen.bis else None
    for row in read():
        if isinstance(row, Refused):
            yield row
        elif kept is not None and row.record.id not in kept:
            counted["rows_bis"] += 1
        else:
            yield from _certain(row, chosen, counted)


def _highest(rows: Rows, chosen: Selection) -> set[str]:
    """The ids of the rows with the highest scores of each file; of equal ones the first, and one at least."""
    by_file: dict[str, list[tuple[float, str]]] = collections.defaultdict(list)
    for row in rows:
        if isinstance(row, Item):
            by_file[row.file].append((bis(row.record, chosen.alpha), row.record.id))
    kept: set[str] = set()
    for scored in by_file.values():
        scored.sort(key=lambda pair: -pair[0])  # a stable sort
        kept.update(id_ for _, id_ in scored[: max(1, int(len(scored) * chosen.bis))])
    return kept


def _certain(item: Item, chosen: Selection, counted: collections.Counter) -> Iterator[Item]:
    """The item without its uncertain labels, unless it is left out."""
    if not chosen.certain:
        yield item
        return
    low, high = chosen.certain
    labels = list(zip(item.record.k, item.record.n, strict=True))
    sure: list[tuple[Any, int]] = [(k, n) if n and (k / n <= low or k / n >= high) else (0, 0) for k, n in labels]
    lost = sum(n > 0 for _, n in labels) - sum(n > 0 for _, n in sure)
    if not any(n for _, n in sure) or (lost and chosen.whole):
        counted["rows_certain"] += 1
        return
    counted["steps_certain"] += lost
    k, n = zip(*sure, strict=True)
    yield dataclasses.replace(item, record=replace_fields(item.record, k=k, n=n))
