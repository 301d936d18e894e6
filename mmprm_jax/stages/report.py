"""The stage ``report``: ``metrics.json`` and the page ``index.html``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from etils import epath

from mmprm_jax import io
from mmprm_jax.records import UserError
from mmprm_jax.report import report as report_page
from mmprm_jax.search.store import read_trees


def write(
    figures: Mapping[str, Any], folder: epath.Path, trees: epath.Path, data: epath.Path, config_text: str
) -> None:
    """Writes the report. figures: of the other stages, None for one that has not finished, which raises UserError."""
    missing = [stage for stage, found in figures.items() if found is None]
    if missing:
        raise UserError(f"report: these stages have not finished: {', '.join(missing)}")
    seconds = {stage: found["seconds"] for stage, found in figures.items()}
    result = dict(figures["evaluate"])
    result["labels"] = figures["train_prm"]["labels"]
    annotated = {"annotate": figures["annotate"]["rollouts"]} if "annotate" in figures else {}
    result["rollouts"] = annotated | {"evaluate": result["rollouts"]}
    result.pop("environment", None)  # that of one stage
    result["seconds"] = seconds | {"total": sum(seconds.values())}
    folder.mkdir(parents=True, exist_ok=True)
    io.write_json(folder / "metrics.json", result)
    found = read_trees(trees) if annotated else []  # the labels are of files
    report_page.write_report(folder / "index.html", result, found, data, config_text)
