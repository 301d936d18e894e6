"""TFDS builders of prepared folders: ArrayRecord files that ``tfds.data_source`` and Grain read, without TensorFlow.

MmK12(folder=FOLDER, data_dir=DATA).download_and_prepare()  # once; FOLDER is what mmprm prepare wrote
source = tfds.data_source("mm_k12", split="train", data_dir=DATA)  # random access; grain.MapDataset.source(source)
source[0]["question"].decode(), mmprm_jax.data.tfds.image(source[0])
"""

from mmprm_jax.data.tfds.builders import MmK12, StepLabels, image

__all__ = ["MmK12", "StepLabels", "image"]
