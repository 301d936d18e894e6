"""The report of a run: one HTML page that needs nothing but itself, and a table for the terminal.

Everything that comes from data or a model is escaped, and the page's content security policy forbids scripts and any
connection, so that hostile model output stays text. Absent keys of ``metrics`` skip their section.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmprm_jax import io as files
from mmprm_jax import markup
from mmprm_jax.records import Tree

_SELECTORS = {
    "random": "random",
    "unique": "random distinct text",
    "greedy": "greedy (temperature 0)",
    "majority": "majority vote",
    "policy_logprob": "policy log-prob",
    "prm": "PRM",
    "prm_weighted_majority": "PRM-weighted vote",
    "oracle": "oracle (any right: pass@N)",
}
_OUTCOME = "last"  # the score of the last step: what an outcome reward model says
_CONTROLS = {
    "blank_image": "PRM with a blank image",
    "shuffled_image": "PRM with another problem's image",
    "policy_shuffled_image": "policy with another problem's image",
}
_COLOURS = ("#8a8f98", "#d98a00", "#9b5de5", "#e5484d", "#2f7de1", "#2a9d5c")

_CSS = """
:root{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#1b1f24;--soft:#5d6672;--line:#dfe3e8;--mark:#fff3c9}
@media(prefers-color-scheme:dark){
:root{--bg:#14171b;--card:#1d2127;--ink:#e6e9ed;--soft:#9aa4b0;--line:#343a43;--mark:#463c14}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
main{max-width:62rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.8rem;line-height:1.2;margin:.5rem 0}h2{font-size:1.2rem;margin:0 0 .6rem}
p{margin:.4rem 0 .8rem}.soft{color:var(--soft);font-size:.9rem}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:1rem 1.2rem;margin:1rem 0}
.wide{overflow-x:auto}.plot img{width:100%;max-width:40rem;display:block;margin:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem;white-space:nowrap}
th,td{padding:.28rem .7rem;text-align:right;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left}tr.chosen{background:var(--mark);font-weight:600}
td small{color:var(--soft);font-weight:400}
pre{overflow-x:auto;font-size:.8rem}summary{cursor:pointer}
"""
_HEAD = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>MM-PRM report</title><style>{_CSS}{markup.CSS}</style></head><body><main>
"""


# ------------------------------------------------------------------------------------------------- numbers


def _columns(metrics: Mapping[str, Any]) -> list[int]:
    return sorted(int(n) for n in metrics.get("best_of_n", {}))


def _rows(metrics: Mapping[str, Any]) -> Iterator[tuple[str, bool, list[dict]]]:
    """(label, is it the PRM chosen on dev, one result per N) of each selector."""
    results = [metrics["best_of_n"][str(n)] for n in _columns(metrics)]
    for key, label in _SELECTORS.items():
        first = results[0].get(key) if results else None
        if first is None:
            continue
        if "accuracy" in first:
            yield label, False, [r[key] for r in results]
        else:
            for name in first:
                chosen = key == "prm" and name == metrics.get("prm_selected")
                yield _label(f"{key}.{name}"), chosen, [r[key][name] for r in results]


def _label(selector: str) -> str:
    """How people call ``random``, ``prm.min`` and so on."""
    key, _, name = selector.partition(".")
    label = f"{_SELECTORS.get(key, key)} {name}".strip()
    return f"{label} (outcome)" if selector == f"prm.{_OUTCOME}" else label


def _percent(result: dict, mean: str = "accuracy", stderr: str = "stderr", sign: str = "") -> str:
    return f"{100 * result[mean]:{sign}.1f} ± {100 * result.get(stderr, math.nan):.1f}"


def _findings(metrics: Mapping[str, Any]) -> list[str]:
    """One line per control, the step AUC and each paired difference."""
    lines = []
    for key, control in metrics.get("controls", {}).items():
        line = f"Control, {_CONTROLS.get(key, key)}: {_percent(control)} %"
        if "difference_to_random" in control:
            difference = _percent(control, "difference_to_random", "difference_stderr", "+")
            line += f" ({difference} points against random choice)"
        if "chance" in control:
            line += f" (chance: {100 * control['chance']:.1f} %)"
        lines.append(line)
    if metrics.get("step_auc") is not None:
        lines.append(f"Step AUC (PRM score against the true state of the step): {metrics['step_auc']:.3f}")
    for key, pair in metrics.get("paired", {}).items():
        low, high = (100 * v for v in pair["ci95"])
        difference = _percent(pair, "difference", "stderr", "+")
        name = "its last step's score (outcome)" if key == "outcome" else _SELECTORS.get(key, key)
        line = f"PRM minus {name}, same problems: {difference} points"
        p = f", p: {_p(pair['p_value'])}" if "p_value" in pair else ""
        lines.append(f"{line} (95% interval {low:+.1f} to {high:+.1f}{p})")
    if found := metrics.get("calibration"):
        lines.append(
            f"Calibration of {found['steps']} step scores against Monte Carlo estimates: ECE {found['ece']:.3f} "
            f"(a perfect PRM: {found['ece_perfect']:.3f}), Brier {found['brier']:.3f} (a perfect PRM: "
            f"{found['brier_perfect']:.3f})"
        )
    return lines


def _p(value: float) -> str:
    return "<0.0001" if value < 1e-4 else f"{value:.4f}"


def _versus_majority(metrics: Mapping[str, Any], chosen_only: bool = False) -> list[tuple[str, str, str, str]]:
    """(selector, accuracy with interval, minus majority with interval, p) at the largest N.

    chosen_only: leaves out the aggregators that were not chosen on dev, if one was.
    """
    found = metrics.get("against_majority")
    if not found or not _columns(metrics):
        return []
    row = metrics["best_of_n"][str(_columns(metrics)[-1])]
    rows = []
    for selector, pair in found.items():
        key, _, name = selector.partition(".")
        result = row.get(key, {}).get(name) if name else row.get(key)
        if result is None or (chosen_only and name and name != metrics.get("prm_selected", name)):
            continue
        low, high = (100 * x for x in result.get("ci95", (math.nan, math.nan)))
        under, over = (100 * x for x in pair["ci95"])
        rows.append((
            _label(selector),
            f"{100 * result['accuracy']:.1f} [{low:.1f}, {high:.1f}]",
            f"{100 * pair['difference']:+.1f} [{under:+.1f}, {over:+.1f}]",
            _p(pair["p_value"]),
        ))  # fmt: skip
    return rows


def format_table(metrics: Mapping[str, Any]) -> str:
    """Plain text: a row per selector, a column per N, accuracy in % ± standard error.

    ``>`` marks the PRM chosen on dev. Then one line for each control, the step AUC and each paired difference.
    """
    lines = []
    if columns := _columns(metrics):
        rows = list(_rows(metrics))
        title = "Best of N, accuracy in %"
        width = max(len(title), *(len(label) for label, _, _ in rows))
        lines.append("  " + title.ljust(width) + "".join(f"{f'N={n}':>14}" for n in columns))
        for label, chosen, results in rows:
            cells = "".join(f"{_percent(r):>14}" for r in results)
            lines.append(("> " if chosen else "  ") + label.ljust(width) + cells)
        legend = "> chosen on the development problems; " if metrics.get("prm_selected") else ""
        lines.append(f"{legend}{metrics.get('n_problems', '?')} test problems")
    if versus := _versus_majority(metrics, chosen_only=True):
        width = max(len(row[0]) for row in versus)
        lines.append(
            f"\n  {f'N={columns[-1]}, 95% intervals'.ljust(width)}{'accuracy':>22}{'minus majority':>24}{'p':>10}"
        )
        lines += [f"  {a.ljust(width)}{b:>22}{c:>24}{d:>10}" for a, b, c, d in versus]
        lines.append("")
    return "\n".join(lines + _findings(metrics)) + "\n"


# ------------------------------------------------------------------------------------------------- plots


def _svg(draw: Callable[[Axes], None], height: float, ink: str) -> str:
    """The plot as a data URI, transparent, with lines and text in colour ``ink``. Equal plots give equal bytes."""
    keys = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    style: dict[Any, Any] = dict.fromkeys(keys, ink)
    style |= {"svg.hashsalt": "mmprm", "font.size": 10, "legend.frameon": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.8, height), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _plot(draw: Callable[[Axes], None], alt: str, height: float = 3.2) -> str:
    light, dark = _svg(draw, height, "#2b3138"), _svg(draw, height, "#cfd5dc")
    source = f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
    return f'<picture class="plot">{source}<img src="{light}" alt="{markup.escape(alt)}"></picture>'


def _plot_best_of_n(metrics: Mapping[str, Any]) -> str:
    columns, chosen = _columns(metrics), metrics.get("prm_selected")
    rows = {label: results for label, _, results in _rows(metrics)}
    keys = ("random", "majority", "policy_logprob", "prm", "prm_weighted_majority", "oracle")
    labels = [f"{_SELECTORS[k]} {chosen}" if k.startswith("prm") else _SELECTORS[k] for k in keys]

    def draw(axes: Axes) -> None:
        for label, colour in zip(labels, _COLOURS, strict=True):
            if label in rows:
                y = [100 * r["accuracy"] for r in rows[label]]
                error = [100 * r["stderr"] for r in rows[label]]
                axes.errorbar(columns, y, error, label=label, color=colour, marker="o", ms=4, capsize=3)
        axes.set_xscale("log", base=2)
        axes.set_xticks(columns, [str(n) for n in columns])
        axes.set(xlabel="N, candidates per problem", ylabel="accuracy, %")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize=9)

    return _plot(draw, "Accuracy of the selectors over N", 4)


def _plot_labels(histogram: Sequence[int]) -> str:
    bins = len(histogram)

    def draw(axes: Axes) -> None:
        colours = matplotlib.colormaps["RdYlGn"]([(i + 0.5) / bins for i in range(bins)])
        axes.bar([(i + 0.5) / bins for i in range(bins)], histogram, width=0.92 / bins, color=colours)
        axes.set(xlabel="share of right rollouts, k / n", ylabel="steps", xlim=(0, 1))

    return _plot(draw, "Histogram of the step labels")


def _plot_calibration(found: dict) -> str:
    bins = found["diagram"]

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=_COLOURS[0], linestyle="--", linewidth=1)
        x, y = [b["score"] for b in bins], [b["value"] for b in bins]
        # the interval need not hold its own mean where a bin has one step
        error = [[max(0, b["value"] - b["ci95"][0]) for b in bins], [max(0, b["ci95"][1] - b["value"]) for b in bins]]
        axes.errorbar(x, y, error, color=_COLOURS[4], marker="o", ms=4, capsize=3, linewidth=1)
        axes.set(xlabel="PRM score", ylabel="share of right rollouts, k / n", xlim=(0, 1), ylim=(0, 1))

    return _plot(draw, "Reliability diagram: Monte Carlo value over PRM score", 3.6)


def _plot_seconds(seconds: dict[str, float]) -> str:
    stages = [name for name in seconds if name != "total"]

    def draw(axes: Axes) -> None:
        bars = axes.barh(range(len(stages)), [seconds[s] for s in stages], color=_COLOURS[4])
        axes.bar_label(bars, [f"{seconds[s]:.0f} s" for s in stages], padding=3)
        axes.set_yticks(range(len(stages)), stages, parse_math=False)
        axes.invert_yaxis()
        axes.set(xlabel="seconds")
        axes.margins(x=0.12)

    return _plot(draw, "Seconds per stage", 0.9 + 0.36 * len(stages))


# ------------------------------------------------------------------------------------------------- trees


def choose_trees(trees: Sequence[Tree], count: int = 3) -> list[Tree]:
    """The trees with the most nodes, those first that have a node with k = 0 and one with k > 0."""

    def rank(tree: Tree) -> tuple[bool, int]:
        estimated = [node.k > 0 for node in tree.nodes if node.n]
        return any(estimated) and not all(estimated), len(tree.nodes)

    return sorted(trees, key=rank, reverse=True)[:count]


def _example(tree: Tree, image_dir: epath.PathLike) -> str:
    problem = tree.problem
    return (
        f"<section><h2>Tree of problem {markup.escape(problem.id)}</h2>"
        + markup.problem(problem, image_dir)
        + f'<p class="soft">{len(tree.nodes)} nodes, {len(tree.searches)} searches. k/n: k of the n completions '
        + "sampled from this prefix reached the gold answer.</p>"
        + f"{markup.tree(tree)}</section>"
    )


# ------------------------------------------------------------------------------------------------- page


def _introduction(metrics: Mapping[str, Any], n_trees: int) -> str:
    labels, rollouts = metrics.get("labels", {}), metrics.get("rollouts", {})
    facts = [f"{n_trees} search trees"] if n_trees else ["no search tree: step labels of files"]
    named = {"steps": "labelled steps", "examples": "training examples", "problems": "annotated problems"}
    facts += [f"{labels[key]} {name}" for key, name in named.items() if key in labels]
    facts += [f"{count} rollouts in {markup.escape(stage)}" for stage, count in rollouts.items()]
    facts += [f"{metrics['n_problems']} test problems"] if "n_problems" in metrics else []
    return f"""<h1>MM-PRM report</h1>
<p>A policy model wrote step-by-step solutions. A Monte Carlo tree search cut them into prefixes and sampled completions
from each; the share that reaches the gold answer labels a step, with no human in the loop. A process reward model (PRM)
learned these labels, and here chooses the best of N fresh solutions of problems that it has not seen.</p>
<p class="soft">{" · ".join(facts)}</p>"""


def _table(metrics: Mapping[str, Any]) -> str:
    head = "".join(f"<th>N = {n}</th>" for n in _columns(metrics))
    body = ""
    for label, chosen, results in _rows(metrics):
        cells = ""
        for result in results:
            mean, stderr = _percent(result).split(" ± ")
            cells += f"<td>{mean} <small>± {stderr}</small></td>"
        row = '<tr class="chosen">' if chosen else "<tr>"
        body += f"{row}<td>{markup.escape(label)}</td>{cells}</tr>"
    return f'<div class="wide"><table><tr><th>selector</th>{head}</tr>{body}</table></div>'


def _rows_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join("<tr>" + "".join(f"<td>{markup.escape(x)}</td>" for x in row) + "</tr>" for row in rows)
    titles = "".join(f"<th>{markup.escape(x)}</th>" for x in head)
    return f'<div class="wide"><table><tr>{titles}</tr>{cells}</table></div>'


def _groups_table(groups: dict, selected: str | None) -> str:
    """Accuracies by group at the largest N: a row per group, a column per selector."""
    first = next(iter(groups.values()))
    keys = [k for k in first if k.partition(".")[2] in ("", selected) and k != "n_problems"]
    rows = [[name, str(found["n_problems"]), *(_percent(found[k]) for k in keys)] for name, found in groups.items()]
    return _rows_table(["group", "problems", *map(_label, keys)], rows)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>"


def write_report(
    path: epath.PathLike, metrics: dict, trees: Sequence[Tree], image_dir: epath.PathLike, config_text: str
) -> None:
    """Writes the page to ``path``.

    ``metrics``: what `evaluate` writes to metrics.json, every key optional. ``image_dir``: the folder that the images
    of the problems are relative to. Equal arguments give equal bytes. Raises OSError if ``path`` cannot be written.
    """
    parts = [_HEAD, _introduction(metrics, len(trees))]
    if _columns(metrics):
        note = (
            '<p class="soft">Accuracy in % ± one standard error, over all sets of N of the candidates. The highlighted '
            "aggregator was chosen on separate development problems.</p>"
        )
        parts.append(_section("Best of N", note + _table(metrics) + _plot_best_of_n(metrics)))
    if versus := _versus_majority(metrics):
        head = ("selector", "accuracy", "minus majority", "p")
        note = (
            '<p class="soft">95 % bootstrap intervals over problems; p: paired test (McNemar, or permutation where '
            "ties make fractions), not corrected for the number of rows.</p>"
        )
        parts.append(_section(f"At N = {_columns(metrics)[-1]}", note + _rows_table(head, versus)))
    for key, title in (("by_category", "By category"), ("by_length", "By length of the solutions")):
        if groups := metrics.get(key):
            parts.append(_section(title, _groups_table(groups, metrics.get("prm_selected"))))
    if found := metrics.get("calibration"):
        parts.append(_section("Calibration", _plot_calibration(found)))
    if findings := _findings(metrics):
        items = "".join(f"<li>{markup.escape(line)}</li>" for line in findings)
        parts.append(_section("Controls and differences", f"<ul>{items}</ul>"))
    if histogram := metrics.get("labels", {}).get("histogram"):
        parts.append(_section("Step labels", _plot_labels(histogram)))
    if seconds := metrics.get("seconds"):
        total = f'<p class="soft">{seconds["total"]:.0f} seconds in total.</p>' if "total" in seconds else ""
        parts.append(_section("Time per stage", _plot_seconds(seconds) + total))
    parts += [_example(tree, image_dir) for tree in choose_trees(trees)]
    if config_text:
        parts.append(
            f"<section><details><summary>Configuration</summary><pre>{markup.escape(config_text)}</pre></details>"
        )
        parts.append("</section>")
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # a model can emit lone surrogates, which UTF-8 cannot encode
    files.write(path, ("".join(parts) + "</main></body></html>\n").encode("utf-8", "replace"))
