"""The builders. Features are text, bytes and numbers: ``tfds.features.Image`` would need TensorFlow to decode."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from mmprm_jax import records
from mmprm_jax.data import images
from mmprm_jax.records import Problem, StepExample, UserError


def image(example: Mapping[str, Any]) -> Image.Image | None:
    """The RGB image of an example of these data sets; None: it has none. Raises UserError when it is damaged."""
    data = example["image"]
    return images.decode_image(data, str(example["id"])) if data else None


def _text() -> tfds.features.FeatureConnector:
    return tfds.features.Text()


def _bytes() -> tfds.features.FeatureConnector:
    """Encoded image bytes; empty: no image."""
    return tfds.features.Tensor(shape=(), dtype=np.object_)


def _image_bytes(folder: epath.Path, record: Problem | StepExample) -> bytes:
    """Raises UserError for several images."""
    if len(record.images) > 1:
        raise UserError(f"{record.id}: {len(record.images)} images; an example of these data sets has one at most")
    return (folder / record.images[0]).read_bytes() if record.images else b""


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """A builder of the files in a folder, written as ArrayRecord."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, folder: str | os.PathLike = "", **settings: Any):
        """folder: of the records and images, needed to write; settings: of tfds.core.DatasetBuilder, e.g. data_dir."""
        self._folder = epath.Path(folder)
        super().__init__(file_format="array_record", **settings)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # the files are there
        return {name: self._generate_examples(path) for name, path in self._files().items()}

    def _files(self) -> dict[str, epath.Path]:
        """The file of each split."""
        raise NotImplementedError


class MmK12(_Builder):
    """MM-K12: the splits that ``mmprm prepare mm_k12`` wrote."""

    name = "mm_k12"

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"id": _text(), "question": _text(), "answer": _text(), "image": _bytes(), "source": _text()}
        return self.dataset_info_from_configs(
            description="K-12 mathematics problems with a figure and a verifiable answer (MM-PRM, arXiv 2505.13427).",
            homepage="https://huggingface.co/datasets/Cierra0506/MM-K12",
            features=tfds.features.FeaturesDict(features),
        )

    def _files(self) -> dict[str, epath.Path]:
        found = {s: self._folder / f"{s}.jsonl" for s in ("train", "dev", "test")}
        found = {split: path for split, path in found.items() if path.exists()}
        if not found:
            raise UserError(
                f"{self._folder}: no train.jsonl, dev.jsonl or test.jsonl; mmprm prepare mm_k12 writes them"
            )
        return found

    def _generate_examples(self, path: epath.Path) -> Iterator[tuple[str, dict[str, Any]]]:
        for p in records.read(path, Problem):
            yield p.id, {
                "id": p.id, "question": p.question, "answer": p.answer, "source": p.source,
                "image": _image_bytes(self._folder, p),
            }  # fmt: skip


class StepLabels(_Builder):
    """Step labels: the StepExample records of ``examples.jsonl``, k of n rollouts per step, n = 0 without a label."""

    name = "step_labels"

    def __init__(self, *, folder: str | os.PathLike = "", examples: str | os.PathLike = "", **settings: Any):
        """folder: where image paths start; examples: the file of StepExample records. Both are needed to write."""
        self._examples = epath.Path(examples)
        super().__init__(folder=folder, **settings)

    def _info(self) -> tfds.core.DatasetInfo:
        counts = tfds.features.Tensor(shape=(None,), dtype=np.int32)
        features = {
            "id": _text(), "problem_id": _text(), "question": _text(), "segments": tfds.features.Sequence(_text()),
            "k": counts, "n": counts, "image": _bytes(),
        }  # fmt: skip
        return self.dataset_info_from_configs(
            description="Solutions with Monte Carlo counts per step: k of n rollouts from there were right.",
            features=tfds.features.FeaturesDict(features),
        )

    def _files(self) -> dict[str, epath.Path]:
        return {"train": self._examples}

    def _generate_examples(self, path: epath.Path) -> Iterator[tuple[str, dict[str, Any]]]:
        for e in records.read(path, StepExample):
            if not e.counted:
                raise UserError(f"{path}: {e.id} has a label that is no count; this data set holds counts only")
            yield e.id, {
                "id": e.id, "problem_id": e.problem_id, "question": e.question, "segments": list(e.segments),
                "k": np.array(e.k, np.int32), "n": np.array(e.n, np.int32),
                "image": _image_bytes(self._folder, e),
            }  # fmt: skip
