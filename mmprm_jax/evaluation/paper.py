"""Best-of-N exactly as the original MM-PRM evaluates (eval/prm, b914fd6), its defects included; for comparisons only.

The first of tied candidates wins; a candidate without steps scores 0, which beats every sum of logarithms; the
logarithm of 0 is -9999 and the odds of 1 are 9999, but ``sum_logit`` stops at a score of 0. What it draws at random
(random, pass@k) is given here by its expectation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmprm_jax.evaluation.statistics import pass_at_k
from mmprm_jax.records import ScoredCandidate, UserError

BIG = 9999

AGGREGATORS: dict[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "last": lambda s: s[-1],
    "product": math.prod,
    "average": lambda s: sum(s) / len(s),
    "sum_logprob": lambda s: sum(math.log(x) if x else -BIG for x in s),
    "max": max,
    "sum_logit": lambda s: sum(math.log(x / (1 - x)) if x != 1 else BIG for x in s),
    "mean_odd": lambda s: sum(x / (1 - x) if x != 1 else BIG for x in s) / len(s),
}
PASS_AT = (16, 8, 4, 2)


def aggregate(name: str, scores: Sequence[float]) -> float:
    """The original's number for one candidate. Raises ValueError where the original stops (``sum_logit`` of 0)."""
    return AGGREGATORS[name](scores) if len(scores) else 0


def choose(values: Sequence[float]) -> int:
    """The first index of the largest value."""
    return max(range(len(values)), key=lambda i: values[i])


def evaluate(problems: Mapping[str, Sequence[ScoredCandidate]]) -> dict[str, Any]:
    """``{name: {"correct", "total", "accuracy"}}`` as the original prints it, and ``chosen``: {aggregator: [index]}.

    Raises UserError for a problem without candidates and for a score of 0: the original stops there.
    """
    total = len(problems)
    chosen: dict[str, list[int]] = {}
    labels = [[int(s.candidate.correct) for s in group] for group in problems.values()]
    for name, group in problems.items():
        if not group:
            raise UserError(f"problem {name}: no candidates; mode paper stops there, as the original does")
    right = {"random": sum(sum(x) / len(x) for x in labels)}
    for k in PASS_AT:
        right[f"pass@{k}"] = sum(pass_at_k(len(x), sum(x), min(k, len(x))) for x in labels)
    for name in AGGREGATORS:
        chosen[name] = []
        for problem, group in problems.items():
            try:
                values = [aggregate(name, s.scores) for s in group]
            except ValueError:
                raise UserError(
                    f"problem {problem}: a step score is 0; {name} stops there in mode paper, as the original does"
                ) from None
            chosen[name].append(choose(values))
        right[name] = sum(truth[i] for truth, i in zip(labels, chosen[name], strict=True))
    figures = {name: {"correct": n, "total": total, "accuracy": n / total} for name, n in right.items()}
    return {"accuracies": figures, "chosen": chosen}


def format_table(found: Mapping[str, Any]) -> str:
    """The lines of the original's output."""
    return "\n".join(
        f"{'prm accuracy ' if name in AGGREGATORS else ''}{name} {x['correct']:g} / {x['total']}, "
        f"rate: {100 * x['accuracy']:.4g}%"
        for name, x in found["accuracies"].items()
    )
