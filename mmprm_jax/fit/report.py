"""What ``mmprm fit`` says: does it fit, how long does it take at least, and what to change."""

from __future__ import annotations

import math
from typing import Any

from mmprm_jax.fit import chips, hlo

Found = dict[str, Any]  # from compile.measure


def fits(found: Found) -> bool:
    """Whether every program fits into a chip's memory, as far as it was counted."""
    limit = found["chip"]["bytes"]
    return all("exceeded" not in p and p.get("peak", p["arguments"]) <= limit for p in found["programs"])


def roofline(found: Found) -> dict[str, float] | None:
    """Seconds of a step on one chip: compute, memory, network; ``step``: at least, with everything overlapped.

    Collectives at the speed of the links that one of them can use. On CUDA, where nothing was compiled, compute is by
    formula and the others are not known. None when a program was not compiled.
    """
    chip, programs = found["chip"], found["programs"]
    if not chip["tpu"]:
        seconds = found["flops"] / found["chips"] / chip["flops"]
        return {"compute": seconds, "step": seconds}
    if any("flops" not in p for p in programs):
        return None
    parts = [
        {
            "compute": p["flops"] / chip["flops"],
            "memory": p["bytes"] / chip["hbm"],
            "network": sum(p["sent"].values()) / (chip["link"] * chip["links"]),
        }
        for p in programs
    ]
    total = {key: sum(part[key] for part in parts) for key in parts[0]}
    return {**total, "step": sum(max(part.values()) for part in parts)}


def advice(found: Found) -> list[str]:
    """What to change when it does not fit, the surest first."""
    s, chip, count = found["settings"], found["chip"], found["chips"]
    worst = max(found["programs"], key=_need)
    trains = s["job"] in ("sft", "train_prm")
    said = []
    arguments = worst["arguments"] > 0.9 * chip["bytes"]
    if not arguments and trains:
        rows = s["rows"] * s["tensor"] // count
        if s["remat"] != "full":
            said.append("remat=full: only the input of each layer is kept for the backward pass")
        if rows > s["microbatches"]:
            said.append(f"microbatches={rows}: one row at a time on each chip, instead of {rows // s['microbatches']}")
        elif s["tensor"] * 2 <= 8:
            said.append(f"tensor={2 * s['tensor']}: {2 * s['tensor']} chips share each row, and its activations")
        said.append(f"row_tokens={s['row_tokens'] // 2} tiles={s['tiles'] // 2} rows={2 * s['rows']}: smaller rows")
    if trains and s["moments"] == "float32":
        said.append("moments=bfloat16: the optimizer's two moments in half of the memory (4 bytes less per parameter)")
    if s["job"] == "decode":
        said.append(f"slots={s['slots'] // 2} prefixes={max(1, s['prefixes'] // 2)}: smaller caches")
    if s["job"] == "score" and not arguments:
        said.append(f"solutions={max(1, s['solutions'] // 2)}: fewer solutions at a time")
    here = chips.TOPOLOGIES[s["topology"]]
    others = [
        *chips.larger(here),
        *(t for t in chips.TOPOLOGIES.values() if t.chip.tpu and t.chip.bytes > chip["bytes"]),
    ]
    enough = [t for t in others if _need(worst) * count <= 0.8 * t.count * t.chip.bytes]
    same = next((t for t in enough if t.chip == here.chip), None)
    other = min((t for t in enough if t.chip != here.chip), key=lambda t: t.count, default=None)
    more = [f"{t.name} ({t.count} chips of {t.chip.bytes / 1e9:.0f} GB)" for t in (same, other) if t]
    if more:
        said.append(f"--topology={' or '.join(more)}: more memory in all")
    return said


def _need(program: dict[str, Any]) -> float:
    """Bytes that a program wants on a chip."""
    if "exceeded" in program:
        return program["exceeded"]["used"] or program["arguments"]
    return program.get("peak", program["arguments"])


def describe(found: Found) -> str:
    """The report, for people."""
    s, chip, count = found["settings"], found["chip"], found["chips"]
    mesh = " x ".join(f"{name} {size}" for name, size in found["mesh"].items()) or "one chip"
    lines = [
        f"{s['job']} of {s['model']} on {s['topology']}: {count} chips of {chip['bytes'] / 1e9:.1f} GB ({mesh})",
        f"{_sizes(s)}; {found['parameters'] / 1e9:.2f} billion parameters",
    ]
    for p in found["programs"]:
        lines += _program(p, chip, p["name"] if len(found["programs"]) > 1 else "")
    counted = sum(p.get("flops", 0) for p in found["programs"]) * count
    if counted and all("flops" in p for p in found["programs"]):
        lines.append(f"FLOPs over the model's own: {counted / found['flops']:.2f}")
    if found["fewest_bytes"] and counted:
        lines.append(
            f"bytes over the fewest there can be (weights and caches once):"
            f" {found['programs'][0]['bytes'] / found['fewest_bytes']['total']:.2f}"
        )
    lines += _time(found)
    if fits(found):
        lines.append("it fits" if chip["tpu"] else "the arguments fit; temporaries are not counted on CUDA")
    else:
        lines += ["it does NOT fit. What to change, any of:", *(f"  {text}" for text in advice(found))]
    return "\n".join(lines)


def _sizes(s: dict[str, Any]) -> str:
    if s["job"] in ("sft", "train_prm"):
        return (
            f"a step: {s['rows']} rows of {s['row_tokens']:,} tokens with {s['tiles']} image tiles, microbatches="
            f"{s['microbatches']}, remat={s['remat']}, {s['optimizer']} with {s['moments']} moments"
        )
    if s["job"] == "decode":
        return f"a step: a token for {s['slots']} samples behind {s['prefixes']} prefixes of {s['width']:,} tokens"
    return (
        f"a step: a prompt of {s['prompt_tokens']:,} tokens with {s['prompt_tiles']} image tiles for each shard, and"
        f" {s['solutions']} solutions of {s['solution_tokens']} tokens"
    )


def _program(p: dict[str, Any], chip: dict[str, Any], name: str) -> list[str]:
    gb = 1e9
    prefix = f"{name}: " if name else ""
    if "exceeded" in p:
        e = p["exceeded"]
        used = f"{e['used'] / gb:.2f} of {e['available'] / gb:.2f} GB" if e["used"] else "more than there is"
        largest = [f"  {b['bytes'] / gb:6.2f} GB {b['what'][:110]}" for b in e["largest"]]
        return [
            f"{prefix}each chip would need {used}: arguments {p['arguments'] / gb:.2f} GB; the largest buffers:",
            *largest,
        ]
    if "peak" not in p:
        return [f"{prefix}each chip: arguments {p['arguments'] / gb:.2f} of {chip['bytes'] / gb:.2f} GB; not compiled"]
    sent = ", ".join(f"{kind} {p['sent'][kind] / gb:.2f}" for kind in hlo.KINDS if p["sent"][kind])
    return [
        f"{prefix}each chip: arguments {p['arguments'] / gb:.2f} GB, temporaries {p['temporaries'] / gb:.2f} GB, peak"
        f" {p['peak'] / gb:.2f} of {chip['bytes'] / gb:.2f} GB ({p['peak'] / chip['bytes']:.0%})",
        f"{prefix}each chip: {p['flops']:.3e} FLOPs, {p['bytes'] / gb:.1f} GB to and from memory, GB sent:"
        f" {sent or 'none'} (compiled in {p['compile_seconds']:.0f} s)",
    ]


def _time(found: Found) -> list[str]:
    seconds, s = roofline(found), found["settings"]
    if seconds is None:
        return []
    parts = ", ".join(f"{key} {_duration(value)}" for key, value in seconds.items() if key != "step")
    rate = found["tokens"] / seconds["step"]
    lines = [f"a step takes at least {_duration(seconds['step'])} ({parts}): at most {rate:,.0f} tokens/s"]
    if s["examples"]:
        steps = math.ceil(s["examples"] / found["examples"])
        whole = _duration(steps * seconds["step"])
        lines.append(f"{s['examples']:,} examples, {steps:,} steps: at least {whole}, twice that at half of the peak")
    return lines


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
