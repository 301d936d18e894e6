"""Is a final answer right?

    >>> from mmprm_jax import answers
    >>> answers.equal("\\\\frac{1}{2}", "Half of them: \\\\boxed{0.5}")
    Verdict(kind='equal', reason='equal by exact arithmetic')

``equal`` is all that most callers need. ``workers.Verifier`` does the same for many pairs, in processes with a
deadline; ``official`` has the scoring rules of benchmarks; ``extract`` finds the answer that a response commits to.

Imports go one way. ``equivalence`` compares texts: ``extract`` finds the answer in them, ``normalise`` gives them one
spelling, ``parse`` makes typed values of them. ``matching`` compares those, with a module for each kind: ``lists``,
``measures``, ``families``, and ``arithmetic`` over ``exact`` and ``numeric`` for formulas, which ``syntax`` reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmprm_jax.answers.verdict import Verdict


def equal(
    gold: str,
    prediction: str | None,
    *,
    options: Sequence[str] | Mapping[str, str] | None = None,
    unit: str | None = None,
    precision: float | None = None,
) -> Verdict:
    """The verdict on a prediction: "equal", "unequal" or "unknown", with a reason; true only when it is equal.

    Args:
      gold: the right answer, in LaTeX or plain text.
      prediction: an answer, or a whole response of which the last committed answer counts. None is unequal.
      options: of a multiple choice, the texts in order or by letter.
      unit: of a gold answer that is a bare number.
      precision: the decimals to which both sides are rounded. Without it a gold decimal says so itself.

    Bounded in time and memory; nothing in an answer is evaluated as code. Raises ValueError for a precision that is
    no number of decimals.
    """
    # Imported here: who only wants the package need not wait for the parser and its tables.
    from mmprm_jax.answers.equivalence import compare, make_settings

    return compare(gold, prediction, make_settings(options, unit, precision))
