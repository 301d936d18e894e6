"""``mmprm guide``: searches guided by the PRM on the test problems of a finished run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from mmprm_jax import io, manifest, records
from mmprm_jax.evaluation import guided
from mmprm_jax.evaluation.guided import METHODS, Guided
from mmprm_jax.evaluation.pieces import Pieces
from mmprm_jax.manifest import Depth
from mmprm_jax.metrics import progress
from mmprm_jax.records import UserError
from mmprm_jax.stages import evaluate
from mmprm_jax.stages.run import Run

CHUNK = 64  # problems searched together


def run(run: Run, names: Sequence[str]) -> dict[str, Any]:
    """Searches the test problems with the named methods and compares each with Best-of-N; figures by name.

    ``guided/<name>.jsonl`` keep what was found (``Guided``); an interrupted search goes on. Raises UserError if the
    evaluation has not finished; Interrupted.
    """
    c, figures, folder = run.config.guided, run.figures("evaluate"), run.folder("guided")
    if figures is None:
        raise UserError(f"{run.workdir}: its evaluation has not finished; run `mmprm evaluate` there first")
    manifest.check(run, ["data", "sft", "train_prm", "evaluate"], Depth.ALL)
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise UserError(f"{unknown[0]}: no such search; there are {', '.join(METHODS)}")
    methods = {name: METHODS[name](c.beams, c.width, c.ahead) for name in names}
    inputs, aggregator = evaluate.make_inputs(run), figures["prm_selected"]
    folder.mkdir(parents=True, exist_ok=True)
    with jax.set_mesh(inputs.mesh), evaluate.lazy_sampler(inputs) as sampler:
        value = evaluate.values(inputs, aggregator)
        for name, method in methods.items():
            pieces = Pieces(folder / f"{name}.jsonl")
            if pieces.path.exists():
                continue
            with pieces, progress(len(inputs.test), name, "problem", len(pieces.done)) as bar:
                left = [p for p in inputs.test if p.id not in pieces.done]
                for start in range(0, len(left), CHUNK):
                    steps = evaluate.stepwise(sampler(), f"guided {name}")
                    greedy = evaluate.stepwise(sampler(), f"guided {name} ahead", temperature=0.0)
                    chunk = left[start : start + CHUNK]
                    for found in guided.search(chunk, method, steps, greedy, value, c.depth):
                        pieces.add(found.problem_id, dataclasses.asdict(found))
                    bar.update(len(chunk))
                pieces.finish(records.from_dict(Guided, pieces.done[p.id]) for p in inputs.test)
    scored = evaluate.stored(inputs, "test")
    for name in names:
        io.check(folder / f"{name}.jsonl")
    return {
        name: guided.compare(records.read_all(folder / f"{name}.jsonl", Guided), scored, aggregator) for name in names
    }
