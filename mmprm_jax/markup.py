"""HTML of records, for the report and for notebooks: ``Tree``, ``Problem`` and scored solutions show themselves.

Whatever comes from data or a model is escaped, so that hostile text stays text.
"""

from __future__ import annotations

import base64
import html
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath

from mmprm_jax import io

_MAGIC = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}
_MOST_BYTES = 50 * 2**20  # of an image file, as for models (data/images.py)

CSS = """
.picture{min-width:min(14rem,100%);max-width:100%;max-height:28rem;object-fit:contain;image-rendering:pixelated;
border:1px solid var(--line);border-radius:6px}
.missing{display:inline-block;padding:2rem;border:1px dashed var(--line);border-radius:6px;color:var(--soft)}
.tree ul{list-style:none;margin:.2rem 0;padding-left:min(1.1rem,3vw);border-left:2px solid var(--line)}
.tree{overflow-wrap:anywhere;font-size:.92rem}.tree li{margin:.3rem 0}
.text{white-space:pre-wrap;unicode-bidi:isolate}
.mc,.seg{border-radius:5px;padding:.05rem .35rem;background:hsl(var(--h) 85% 80%);color:#16191d;
-webkit-box-decoration-break:clone;box-decoration-break:clone}
.mc{font-weight:700;font-variant-numeric:tabular-nums}.none{background:#c3c8ce}
.rollouts{font-size:.85rem;color:var(--soft)}.right::before{content:"\\2713  right: ";color:#2a9d5c;font-weight:700}
.wrong::before{content:"\\2717  wrong: ";color:#e5484d;font-weight:700}
""".removeprefix("\n")


def escape(text: Any) -> str:
    return html.escape(str(text), quote=True)


def image(folder: epath.PathLike, name: str) -> str:
    """The image as a data URI in a tag; a placeholder if it cannot be read or is no PNG, JPEG, GIF or WebP."""
    try:
        data = io.read_at_most(epath.Path(folder) / name, _MOST_BYTES)
    except (OSError, ValueError):
        data = b""
    kind = next((kind for magic, kind in _MAGIC.items() if data.startswith(magic)), None)
    if kind is None or len(data) > _MOST_BYTES:
        return f'<span class="missing">image not found: {escape(name)}</span>'
    return f'<img class="picture" alt="" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def _colour(value: float | None) -> str:
    """The end of a class, and a hue: red at 0, yellow at 1/2, green at 1; grey without a value."""
    return ' none"' if value is None else f'" style="--h:{120 * value:.0f}"'


def _segment(text: str, colour: str) -> str:
    return f'<span class="seg text{colour}>{escape(text)}</span>'


def _rollouts(rollouts: Sequence[Any], count: int = 3) -> str:
    right, wrong = [r for r in rollouts if r.correct], [r for r in rollouts if not r.correct]
    # a mixed node shows both kinds
    shown = (right[: max(count - 1, count - len(wrong))] + wrong)[:count]
    items = []
    for r in shown:
        text = escape("\n".join(r.segments)) if r.segments else "<i>nothing could be parsed</i>"
        items.append(f'<li class="{"right" if r.correct else "wrong"}"><span class="text">{text}</span></li>')
    if not items:
        return ""
    title = f"{len(shown)} of {len(rollouts)} rollouts"
    return f'<details class="rollouts"><summary>{title}</summary><ul>{"".join(items)}</ul></details>'


def tree(found: Any) -> str:
    """A ``Tree`` as nested lists, walked with a stack: a deep tree needs no deep recursion."""
    children: list[list[int]] = [[] for _ in found.nodes]
    for i, node in enumerate(found.nodes):
        if node.parent >= 0:
            children[node.parent].append(i)
    parts: list[str] = []
    stack: list[int | str] = [i for i, node in enumerate(found.nodes) if node.parent < 0]
    while stack:
        entry = stack.pop()
        if isinstance(entry, str):
            parts.append(entry)
            continue
        node = found.nodes[entry]
        colour = _colour(node.k / node.n if node.n else None)
        text = " ".join(_segment(s, colour) for s in node.segments)
        summary = f'<span class="mc{colour}>{node.k}/{node.n}</span> {text or "<i>start</i>"}'
        parts.append(f"<li><details open><summary>{summary}</summary>{_rollouts(node.rollouts)}<ul>")
        stack += ["</ul></details></li>", *reversed(children[entry])]
    return f'<div class="tree"><ul>{"".join(parts)}</ul></div>'


def problem(found: Any, folder: epath.PathLike = "") -> str:
    """A ``Problem``: images, question and gold answer. folder: that its images are relative to."""
    return (
        "".join(image(folder, name) for name in found.images)
        + f'<p class="text">{escape(found.question)}</p>'
        + f'<p>Gold answer: <b class="text">{escape(found.answer)}</b></p>'
    )


def solution(steps: Iterable[str], scores: Iterable[float]) -> str:
    """The steps of a solution, one below the other, each coloured by its score in [0, 1]; grey without one."""
    items = []
    for text, score in itertools.zip_longest(steps, scores):
        colour = _colour(None if score is None or math.isnan(score) else score)
        shown = "no score" if score is None else f"{score:.2f}"
        step = _segment("" if text is None else text, colour)
        items.append(f'<li><span class="mc{colour}>{shown}</span> {step}</li>')
    return f'<div class="tree"><ul>{"".join(items)}</ul></div>'


def scoped(body: str) -> str:
    """``body`` with its style, for a page that has others: nothing outside of it is styled.

    Half a surrogate pair, which a model can write and UTF-8 cannot hold, becomes a question mark.
    """
    text = f'<div class="mmprm"><style>.mmprm{{--line:#b9c0c8;--soft:#7b8490;\n{CSS}}}</style>{body}</div>'
    return text.encode("utf-8", "replace").decode()
