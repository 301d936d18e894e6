"""Opening problem images, with limits, and turning them into model input."""

from __future__ import annotations

import io
import warnings

import numpy as np
from etils import epath
from PIL import Image

from mmprm_jax.records import UserError

MAX_BYTES = 50 * 2**20
MAX_PIXELS = 50_000_000
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)


def load_image(path: epath.PathLike, size: int) -> np.ndarray:
    """One tile: the image as RGB, resized (bicubic) to ``size`` x ``size``. uint8 [size, size, 3].

    Raises UserError naming the file when it is missing, too large (MAX_BYTES, MAX_PIXELS), truncated or no image.
    """
    path = epath.Path(path)
    try:
        if path.stat().length > MAX_BYTES:
            raise UserError(f"{path}: image file larger than {MAX_BYTES} bytes")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(path.read_bytes())) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UserError(f"{path}: {image.width} x {image.height} pixels; the limit is {MAX_PIXELS} in all")
                rgb = image.convert("RGB")
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: image not found") from None
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise UserError(f"{path}: not a readable image ({error})") from None
    if rgb.size != (size, size):
        rgb = rgb.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(rgb)


def load_images(folder: epath.PathLike, names: list[str | None], size: int) -> np.ndarray:
    """uint8 [len(names), 1, size, size, 3]; a name of None gives a black tile (a text-only problem)."""
    folder = epath.Path(folder)
    blank = np.zeros((size, size, 3), np.uint8)
    tiles = {name: load_image(folder / name, size) for name in set(names) if name is not None}
    return np.stack([blank if name is None else tiles[name] for name in names])[:, None]


def normalise(pixels: np.ndarray) -> np.ndarray:
    """uint8 [..., 3] -> float32 with ImageNet mean and standard deviation."""
    return ((pixels.astype(np.float32) / 255.0 - MEAN) / STD).astype(np.float32)


def augment(pixels: np.ndarray, rng: np.random.Generator, shift: int, noise: float) -> np.ndarray:
    """Moves each image by up to ``shift`` pixels and adds Gaussian noise of deviation ``noise`` (0-255)."""
    out = np.empty(pixels.shape, np.float32)
    for i, (down, right) in enumerate(rng.integers(-shift, shift + 1, (len(pixels), 2))):
        out[i] = np.roll(pixels[i], (down, right), axis=(-3, -2))
    out += noise * rng.standard_normal(out.shape[:-1] + (1,), dtype=np.float32)
    return np.clip(out, 0, 255).astype(np.uint8)
