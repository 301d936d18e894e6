"""The stage ``data``: the embedded problem set, or a look at a folder with a data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from mmprm_jax import records
from mmprm_jax.data import digits
from mmprm_jax.models.tokenizer import Tokenizer
from mmprm_jax.processes import is_first
from mmprm_jax.records import Problem, SFTExample, UserError
from mmprm_jax.schema import from_config
from mmprm_jax.settings import Config


def generate(config: Config, folder: epath.Path) -> dict[str, Any]:
    """Generates the embedded problem set into ``folder``. Returns the stage's figures."""
    settings = from_config(digits.Settings, config.data, seed=config.seed)
    _check_labels(config, folder)
    if is_first():
        digits.generate(folder, settings)
    return {"problems": {split: getattr(settings, split) for split in digits.SPLITS}}


def _check_labels(config: Config, data: epath.Path) -> None:
    """Raises UserError for a file of step labels that is not there."""
    for name in config.train_prm.files:
        if not (data / name).exists():
            raise UserError(f"{data / name}: no such file; train_prm.files names it")


def take(config: Config, data: epath.Path, folder: epath.Path) -> dict[str, Any]:
    """Counts the problems of the data set in ``data``. Returns the stage's figures.

    If it has no tokenizer.json, one is learned from its texts and written to ``folder``, unless the policy has one.
    Raises UserError for demonstrations that are not there.
    """
    problems = {split: len(records.read_problems(data / f"{split}.jsonl")) for split in digits.SPLITS}
    figures: dict[str, Any] = {"problems": problems}
    for name in config.sft.files if config.sft.steps else ():  # found before anything is trained
        if not (data / name).exists():
            raise UserError(f"{data / name}: no such file; sft.files names it")
    _check_labels(config, data)
    if is_first() and not config.policy and not (data / "tokenizer.json").exists():
        tokenizer = Tokenizer.train_bpe(_texts(data, config.sft.files), config.data.vocab)
        tokenizer.save(folder / "tokenizer.json")
        figures["vocabulary"] = len(tokenizer)
    return figures


def _texts(data: epath.Path, demonstrations: Sequence[str]) -> Iterator[str]:
    """What a tokenizer is learned from: the demonstrations, and the questions of the training problems."""
    for name in demonstrations:
        for example in records.read(data / name, SFTExample):
            yield example.question
            yield example.response
    for problem in records.read(data / "train.jsonl", Problem):
        yield problem.question
