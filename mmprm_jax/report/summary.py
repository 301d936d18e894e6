"""One table over several finished runs, e.g. of the same configuration with different seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from etils import epath

from mmprm_jax import manifest
from mmprm_jax.records import UserError

_SELECTORS = ("random", "unique", "majority", "policy_logprob", "oracle")


def _read(workdir: epath.PathLike) -> dict[str, Any]:
    path = epath.Path(workdir) / "report" / "metrics.json"
    if not path.exists():
        raise UserError(f"{path}: not there; run `mmprm pipeline` with this --workdir first")
    manifest.check_file(path)
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: damaged, not JSON ({error}); run `mmprm report` again") from None


def pool(differences: Sequence[dict[str, float]]) -> tuple[float, float, float]:
    """The mean of independent paired differences and its 95 % interval (normal, from their standard errors)."""
    mean = sum(d["difference"] for d in differences) / len(differences)
    stderr = math.sqrt(sum(d["stderr"] ** 2 for d in differences)) / len(differences)
    return mean, mean - 1.96 * stderr, mean + 1.96 * stderr


def summarise(workdirs: Sequence[epath.PathLike]) -> str:
    """A Markdown table: accuracy per selector and run, then the PRM's paired differences. Raises UserError."""
    runs = [_read(workdir) for workdir in workdirs]
    n = max(runs[0]["best_of_n"], key=int)
    names = [epath.Path(workdir).name for workdir in workdirs]
    lines = [f"| Best of {n}, % | " + " | ".join(names) + " | mean |", "|---" * (len(runs) + 2) + "|"]
    lines[1] = "|---" + "|---:" * (len(runs) + 1) + "|"

    def row(title: str, results: Sequence[dict[str, float]]) -> None:
        cells = [f"{100 * r['accuracy']:.1f} ± {100 * r['stderr']:.1f}" for r in results]
        mean = 100 * sum(r["accuracy"] for r in results) / len(results)
        lines.append(f"| {title} | " + " | ".join(cells) + f" | {mean:.1f} |")

    best = [run["best_of_n"][n] for run in runs]
    for name in _SELECTORS[:-1]:
        row(name, [b[name] for b in best])
    chosen = [run["prm_selected"] for run in runs]
    row(
        "**PRM** (" + ", ".join(sorted(set(chosen))) + "; chosen on dev)",
        [b["prm"][c] for b, c in zip(best, chosen, strict=True)],
    )
    row("PRM-weighted majority", [b["prm_weighted_majority"][c] for b, c in zip(best, chosen, strict=True)])
    row("oracle", [b["oracle"] for b in best])
    for control in ("blank_image", "shuffled_image"):
        row(f"control: PRM with {control.replace('_', ' ')}", [run["controls"][control] for run in runs])
    lines.append("")
    for other in ("random", "majority", "policy_logprob"):
        mean, low, high = pool([run["paired"][other] for run in runs])
        each = ", ".join(f"{100 * run['paired'][other]['difference']:+.1f}" for run in runs)
        lines.append(
            f"PRM minus {other}: {100 * mean:+.1f} points "
            f"(95 % interval {100 * low:+.1f} to {100 * high:+.1f}; by run {each})  "
        )
    return "\n".join(lines)
