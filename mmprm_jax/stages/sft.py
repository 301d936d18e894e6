"""The stage ``sft``: supervised fine-tuning of the policy on demonstrations."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
from etils import epath

from mmprm_jax import convert, records
from mmprm_jax.data import encode
from mmprm_jax.data.encode import Language
from mmprm_jax.data.training_files import Encoded, TrainingSet
from mmprm_jax.records import SFTExample
from mmprm_jax.settings import SFT
from mmprm_jax.stages import training
from mmprm_jax.training import losses


def sft(
    config: SFT, job: training.Job, data: epath.Path, language: Language, start: Callable[[], convert.Start]
) -> dict[str, Any]:
    """Trains the policy on the demonstrations in ``data``. Returns the stage's figures.

    start: makes what the training begins with.
    """

    def load(number: int, path: epath.Path) -> TrainingSet:
        def examples(tiles: encode.TileCount) -> Iterable[Encoded]:
            return (language.demonstration(e, tiles) for e in records.read(path, SFTExample))

        return training.training_set(job, f"{number}-{path.stem}", "policy", language, [path], path.parent, examples)

    sets = [load(number, data / name) for number, name in enumerate(config.files)]
    params = training.train(job, language, start(), losses.policy_loss, sets, config.weights)
    left_out = [examples.summary["left_out"] for examples in sets]
    parameters = sum(x.size for x in jax.tree.leaves(params))
    return {"examples": sum(map(len, sets)), "left_out": left_out, "parameters": parameters}
