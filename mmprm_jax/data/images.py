"""Opening problem images, with limits, and turning them into model input."""

from __future__ import annotations

import contextlib
import functools
import io

import numpy as np
from etils import epath
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from mmprm_jax import io as files
from mmprm_jax.records import UserError

MAX_BYTES = 50 * 2**20
MAX_PIXELS = 50_000_000
MAX_EDGE = 65_535  # JPEG's own limit; what Pillow needs to resize grows with the longer edge, whatever the area
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)


def orientation(image: Image.Image) -> int:
    """How a camera was held, 1 to 8 as in EXIF; 1: the pixels stand as they are seen."""
    with contextlib.suppress(Exception):  # a damaged EXIF block says nothing; Pillow raises many kinds
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    return 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 bits; one of its levels may be transparent."""
    levels = np.asarray(image).astype(np.uint32)
    grey = Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.where(levels == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as a viewer shows it: turned as its EXIF data says, and on white paper where it is transparent.

    Many figures are drawn in the alpha channel alone. Raises ValueError for a mode whose numbers say no colours.
    """
    wide = image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM")
    if image.mode in ("I", "F", "LAB") and not wide:
        raise ValueError(f"the mode {image.mode}; save it as RGB or grey of 8 or 16 bits")
    image.load()  # before ``orientation``, where a truncated PNG file would not be told
    if orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if wide:
        image = _eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    page = Image.new("RGBA", image.size, "white")
    page.alpha_composite(image.convert("RGBA"))
    return page.convert("RGB")


def decode_image(data: bytes, name: str, drop_alpha: bool = False) -> Image.Image:
    """The RGB image of an encoded file's bytes (``to_rgb``). drop_alpha: as the original, which ignores transparency.

    Raises UserError, which begins with ``name``, when it is too large (MAX_BYTES, MAX_PIXELS, MAX_EDGE), damaged or no
    image.
    """
    if len(data) > MAX_BYTES:
        raise UserError(f"{name}: image file larger than {MAX_BYTES} bytes")
    try:
        with Image.open(io.BytesIO(data)) as image:  # reads the header only
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UserError(f"{name}: {width} x {height} pixels; the limit is {MAX_PIXELS} in all")
            if max(width, height) > MAX_EDGE:
                raise UserError(f"{name}: {width} x {height} pixels; the limit is {MAX_EDGE} for an edge")
            if image.format == "EPS":  # Pillow would have Ghostscript run it
                raise UserError(f"{name}: PostScript is a program, no image")
            return image.convert("RGB") if drop_alpha else to_rgb(image)
    except UserError:
        raise
    except UnidentifiedImageError:  # whose message has an address in memory
        raise UserError(f"{name}: not a readable image (of no format that is known)") from None
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise UserError(f"{name}: not a readable image ({error})") from None


def open_image(path: epath.PathLike) -> Image.Image:
    """The RGB image in a file. Raises UserError naming the file when it is missing, and as ``decode_image``."""
    path = epath.Path(path)
    try:
        data = files.read_at_most(path, MAX_BYTES)
    except FileNotFoundError:
        raise UserError(f"{path}: image not found") from None
    except OSError as error:
        raise UserError(f"{path}: not a readable image ({error})") from None
    return decode_image(data, str(path))


@functools.cache
def _grids(max_tiles: int, min_tiles: int) -> tuple[tuple[int, int], ...]:
    """Every (cols, rows) of min_tiles to max_tiles tiles, by their number."""
    grids = ((cols, rows) for cols in range(1, max_tiles + 1) for rows in range(1, max_tiles // cols + 1))
    return tuple(sorted((g for g in grids if g[0] * g[1] >= min_tiles), key=lambda g: (g[0] * g[1], g)))


def choose_grid(width: int, height: int, max_tiles: int, min_tiles: int = 1, size: int = 448) -> tuple[int, int]:
    """(cols, rows) of InternVL's dynamic tiling: the grid whose aspect ratio is nearest to the image's.

    Of equally near grids a later one (more tiles) wins if the image covers more than half of its area.
    Source: ``find_closest_aspect_ratio`` of InternVL. Raises UserError unless 1 <= min_tiles <= max_tiles.
    """
    if not 1 <= min_tiles <= max_tiles:
        raise UserError(f"tiles per image: at least {min_tiles}, at most {max_tiles}; need 1 <= least <= most")
    if min(width, height, size) < 1:
        raise ValueError(f"an image of {width} x {height} cannot be cut into tiles of {size}")
    best, best_difference = (1, 1), float("inf")
    for cols, rows in _grids(max_tiles, min_tiles):
        difference = abs(width / height - cols / rows)
        larger = difference == best_difference and width * height > 0.5 * size * size * cols * rows
        if difference < best_difference or larger:
            best, best_difference = (cols, rows), difference
    return best


def count_tiles(width: int, height: int, max_tiles: int, size: int = 448) -> int:
    """How many ``tiles`` an image of that size has, the thumbnail included. Raises as ``choose_grid``."""
    cols, rows = choose_grid(width, height, max_tiles, size=size)
    return cols * rows + (cols * rows > 1)


def _resize(image: Image.Image, width: int, height: int) -> np.ndarray:
    """Bicubic, uint8 [height, width, 3]; an image of that size is kept as it is."""
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def tiles(image: Image.Image, max_tiles: int, size: int = 448, thumbnail: bool = True) -> np.ndarray:
    """InternVL's dynamic tiles of an RGB image, row by row. uint8 [n, size, size, 3], n <= max_tiles + 1.

    With ``thumbnail``, more than one tile are followed by the whole image in one. Raises as ``choose_grid``.
    Source: ``dynamic_preprocess`` of InternVL.
    """
    cols, rows = choose_grid(*image.size, max_tiles, size=size)
    pixels = _resize(image, cols * size, rows * size).reshape(rows, size, cols, size, 3)
    out = pixels.swapaxes(1, 2).reshape(-1, size, size, 3)
    return np.concatenate([out, _resize(image, size, size)[None]]) if thumbnail and len(out) > 1 else out


def normalise(pixels: np.ndarray) -> np.ndarray:
    """uint8 [..., 3] -> float32 with ImageNet mean and standard deviation. float32 is returned as it is."""
    if pixels.dtype == np.float32:
        return pixels  # already normalised
    return ((pixels.astype(np.float32) / 255.0 - MEAN) / STD).astype(np.float32)


def augment(pixels: np.ndarray, rng: np.random.Generator, shift: int, noise: float) -> np.ndarray:
    """Moves each image by up to ``shift`` pixels and adds Gaussian noise of deviation ``noise`` (0-255)."""
    out = np.empty(pixels.shape, np.float32)
    for i, (down, right) in enumerate(rng.integers(-shift, shift + 1, (len(pixels), 2))):
        out[i] = np.roll(pixels[i], (down, right), axis=(-3, -2))
    out += noise * rng.standard_normal(out.shape[:-1] + (1,), dtype=np.float32)
    return np.clip(out, 0, 255).astype(np.uint8)
