"""Opening images, good and bad, and turning them into model input."""

import hashlib
import json
import os
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mmprm_jax.data import images
from mmprm_jax.records import UserError


def load(path, size):
    """The one tile of an image."""
    (tile,) = images.tiles(images.open_image(path), 1, size)
    return tile


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)


def test_exact_size_is_kept(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "a.png")
    got = load(tmp_path / "a.png", 8)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, picture)


def test_resized(tmp_path):
    Image.fromarray(np.full((30, 50, 3), (10, 20, 30), np.uint8)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(load(tmp_path / "a.png", 8), np.full((8, 8, 3), (10, 20, 30)))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA"])
def test_any_mode_becomes_rgb(tmp_path, mode):
    grey = Image.new("L", (8, 8), 255)
    grey.convert(mode).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(load(tmp_path / "a.tif", 8), np.full((8, 8, 3), 255))


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "key"])
def test_what_is_transparent_is_white(tmp_path, kind):
    """As the original reads it, a drawing in the alpha channel alone is black all over."""
    pixels = np.zeros((4, 6, 4), np.uint8)
    pixels[1, 2:5, 3] = 255
    image = Image.fromarray(pixels)
    if kind == "LA":
        image = image.convert("LA")
    if kind in ("palette", "key"):
        image = Image.fromarray(pixels[..., 3] // 255, "L" if kind == "key" else None)
        if kind == "palette":
            image = image.convert("P")
            image.putpalette([0, 0, 0, 0, 0, 0])
    image.save(tmp_path / "a.png", **({"transparency": 0} if kind in ("palette", "key") else {}))
    got = images.open_image(tmp_path / "a.png")
    assert got.mode == "RGB" and got.size == (6, 4)
    want = np.full((4, 6, 3), 255)
    want[1, 2:5] = 1 if kind == "key" else 0
    np.testing.assert_array_equal(np.asarray(got), want)
    if kind == "RGBA":
        original = images.decode_image((tmp_path / "a.png").read_bytes(), "a.png", drop_alpha=True)
        assert original.getextrema() == ((0, 0),) * 3


SAVED = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}


@pytest.mark.parametrize("turned", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_picture_stands_as_its_camera_was_held(tmp_path, kind, turned):
    """Red, the left third of what is seen, is found there whichever way the pixels lie."""
    seen = Image.new("RGB", (48, 16), "white")
    seen.paste("red", (0, 0, 16, 8))
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that undoes that of the orientation
    stored = seen if turned == 1 else seen.transpose(Image.Transpose(back[turned]))
    exif = Image.Exif()
    exif[0x0112] = turned
    stored.save(tmp_path / "a", kind, exif=exif, **SAVED.get(kind, {}))
    got = images.open_image(tmp_path / "a")
    assert got.size == (48, 16)
    np.testing.assert_allclose(np.asarray(got).astype(int), np.asarray(seen), atol=4 if kind == "JPEG" else 0)


def test_exif_that_cannot_be_read_turns_nothing(tmp_path):
    Image.new("RGB", (6, 4), "red").save(tmp_path / "a.jpg", exif=b"Exif\0\0no TIFF header at all")
    assert images.open_image(tmp_path / "a.jpg").size == (6, 4)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_sixteen_bits_are_seen_as_eight(tmp_path, name):
    levels = np.linspace(0, 65535, 48).astype(np.uint16).reshape(6, 8)
    Image.fromarray(levels).save(tmp_path / name)
    want = np.round(levels / 257).astype(int)
    np.testing.assert_array_equal(np.asarray(images.open_image(tmp_path / name)), np.repeat(want[..., None], 3, -1))


def test_a_transparent_level_of_sixteen_bits_is_white(tmp_path):
    levels = np.full((4, 4), 300, np.uint16)
    levels[1, 1] = 0
    Image.fromarray(levels).save(tmp_path / "a.png", transparency=300)
    found = np.asarray(images.open_image(tmp_path / "a.png"))
    assert (found[1, 1] == 0).all() and (np.delete(found.reshape(16, 3), 5, 0) == 255).all()


@pytest.mark.parametrize("mode", ["F", "I"])
def test_numbers_that_are_no_colours_are_refused_with_the_mode(tmp_path, mode):
    image = Image.new(mode, (8, 8), 7)
    image.save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=rf"a.tif: not a readable image \(the mode {mode};"):
        images.open_image(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=f"the mode {mode}"):
        images.to_rgb(image)


def test_a_palette_and_cmyk(tmp_path):
    page = Image.new("RGB", (8, 8), (200, 40, 90))
    page.quantize(2).save(tmp_path / "a.png")
    page.convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    for name in ("a.png", "a.jpg"):
        np.testing.assert_allclose(np.asarray(images.open_image(tmp_path / name)), np.asarray(page), atol=4)


def png(width, height, data=b""):
    """A PNG file that claims a size."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_unreadable_files(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "good.png")
    good = (tmp_path / "good.png").read_bytes()
    damaged = {
        "empty": b"",
        "text": b"This is not an image.",
        "header": good[:30],
        "truncated": good[: len(good) // 2],
        "flipped": good[:60] + bytes([good[60] ^ 255]) + good[61:],
        "8000 x 8000": png(8000, 8000),  # above our limit
        "11000 x 11000": png(11000, 11000),  # above Pillow's warning
        "60000 x 60000": png(60000, 60000),  # above Pillow's error
        "1 x 70000": png(1, 70000),  # few pixels, but Pillow would need gigabytes to widen such columns
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            load(tmp_path / name, 8)
        with pytest.raises(UserError, match="^row 7, image 'x.png': "):
            images.decode_image(content, "row 7, image 'x.png'")
    with pytest.raises(UserError, match="8000 x 8000.*limit"):
        load(tmp_path / "8000 x 8000", 8)
    with pytest.raises(UserError, match="1 x 70000.*limit is 65535 for an edge"):
        load(tmp_path / "1 x 70000", 8)
    with pytest.raises(UserError, match="nothing.png: image not found"):
        load(tmp_path / "nothing.png", 8)
    with pytest.raises(UserError, match="not a readable image"):
        load(tmp_path, 8)


def test_postscript_is_not_run(tmp_path, monkeypatch):
    """Pillow hands an EPS file to Ghostscript where there is one: a program from a data set."""
    page = Image.new("RGB", (8, 8), "red")
    page.save(tmp_path / "a.eps")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: page.im)
    with pytest.raises(UserError, match="a.eps: PostScript is a program, no image"):
        images.open_image(tmp_path / "a.eps")


def test_too_many_bytes(tmp_path, picture, monkeypatch):
    Image.fromarray(picture).save(tmp_path / "a.png")
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    monkeypatch.setattr(images.epath.Path, "read_bytes", None)  # it is not read to find that out
    with pytest.raises(UserError, match="a.png: image file larger than 100 bytes"):
        images.open_image(tmp_path / "a.png")
    with pytest.raises(UserError, match="^page 3: image file larger than 100 bytes"):
        images.decode_image(bytes(101), "page 3")


@pytest.mark.parametrize("name", ["pipe", "/dev/zero", "."])
def test_what_has_no_end_is_not_read(tmp_path, name):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="not a readable image"):
        images.open_image(tmp_path / name)


def test_normalise():
    got = images.normalise(np.array([[0, 0, 0], [255, 255, 255], [124, 116, 104]], np.uint8))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got[0], [-2.1179, -2.0357, -1.8044], atol=1e-4)
    np.testing.assert_allclose(got[1], [2.2489, 2.4286, 2.64], atol=1e-4)
    assert np.all(np.abs(got[2]) < 0.02)


def test_normalised_stays():
    pixels = np.array([[0.5, -2, 3]], np.float32)
    assert images.normalise(pixels) is pixels


def sha(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def settings(entry):
    """(max_num, what is expected) of an image's golden entry."""
    return [(int(key.removeprefix("max_num_")), value) for key, value in entry.items() if key.startswith("max_num_")]


def test_grids_are_the_originals(golden):
    expected = json.loads((golden / "images" / "grid_table.json").read_text())
    names = expected["columns"]
    limits = [int(re.fullmatch(r"grid max_num=(\d+) \[cols,rows\]", name)[1]) for name in names[2:]]
    assert names[:2] == ["width", "height"] and limits and expected["table"]
    for max_num in limits:
        candidates = [tuple(grid) for grid in expected["target_ratios_in_order"][str(max_num)]]
        got = images._grids(max_num, 1)
        assert set(got) == set(candidates) and len(got) == len(candidates)
        assert [a * b for a, b in got] == [a * b for a, b in candidates]  # among equal areas the order does not matter
    for width, height, *grids in expected["table"]:
        got = [list(images.choose_grid(width, height, max_num)) for max_num in limits]
        assert got == grids, (width, height)


def test_tiles_are_the_originals(golden):
    expected = json.loads((golden / "images" / "images.json").read_text())
    size = expected["image_size"]
    sampled = np.load(golden / "images" / "tiles.npz")
    checked = set()
    for entry in expected["images"]:
        name = entry["file"]
        image = images.decode_image((golden / "images" / "png" / name).read_bytes(), name, drop_alpha=True)
        assert image.size == (entry["width"], entry["height"]) and sha(image) == entry["rgb_sha256"]
        assert settings(entry)
        for max_num, want in settings(entry):
            got = images.tiles(image, max_num, size, expected["use_thumbnail"])
            assert got.dtype == np.uint8 and got.shape == (want["num_tiles"], size, size, 3)
            assert images.choose_grid(*image.size, max_num, size=size) == tuple(want["grid"])
            assert [sha(tile) for tile in got] == want["uint8_tile_sha256"]
            floats = images.normalise(got).transpose(0, 3, 1, 2)
            assert floats.dtype == np.float32
            assert [sha(tile) for tile in floats] == want["float32_tile_sha256"]
            for key in sampled:  # the same once more as numbers: a hash does not tell how far off it is
                match = re.fullmatch(re.escape(f"{entry['file'][:-4]}.max{max_num}.") + r"(avgpool|stride)(\d+)", key)
                if match is None:
                    continue
                checked.add(key)
                step = int(match[2])
                if match[1] == "stride":
                    np.testing.assert_array_equal(floats[:, :, step // 2 :: step, step // 2 :: step], sampled[key])
                else:
                    pooled = floats.reshape(len(got), 3, step, size // step, step, size // step).mean((3, 5))
                    np.testing.assert_allclose(pooled, sampled[key], atol=1e-5)
    assert {key for key in sampled if ".max" in key} == checked != set()


def test_no_tiling_is_the_originals(golden):
    expected = json.loads((golden / "images" / "images.json").read_text())
    for name, digest in expected["no_dynamic_float32_sha256"].items():
        tile = load(golden / "images" / "png" / name, expected["image_size"])
        assert sha(images.normalise(tile).transpose(2, 0, 1)) == digest


def test_tiles_in_order():
    quarters = np.zeros((16, 16, 3), np.uint8)
    quarters[:8, 8:], quarters[8:, :8], quarters[8:, 8:] = 10, 20, 30
    got = images.tiles(Image.fromarray(quarters), 4, 8)
    assert [np.unique(tile).tolist() for tile in got[:4]] == [[0], [10], [20], [30]]
    assert got.shape == (5, 8, 8, 3)
    np.testing.assert_array_equal(images.tiles(Image.fromarray(quarters), 4, 8, thumbnail=False), got[:4])
    assert len(images.tiles(Image.fromarray(quarters), 1, 8)) == 1  # one tile is its own thumbnail


@pytest.mark.parametrize(
    "width, height, max_tiles, min_tiles, grid",
    [
        (448, 448, 1, 1, (1, 1)),
        (448, 448, 12, 1, (1, 1)),
        (448, 449, 12, 1, (1, 1)),
        (634, 634, 12, 1, (2, 2)),  # 401,956 pixels: more than half of 2 x 2 tiles, less than half of 3 x 3
        (633, 633, 12, 1, (1, 1)),  # 400,689: less than half of 2 x 2 tiles
        (9999, 1, 6, 1, (6, 1)),
        (1, 9999, 6, 1, (1, 6)),
        (448, 448, 6, 2, (2, 2)),
        (448, 448, 6, 5, (2, 3)),
    ],
)
def test_grid(width, height, max_tiles, min_tiles, grid):
    assert images.choose_grid(width, height, max_tiles, min_tiles) == grid


def test_grid_depends_on_the_tile_size():
    assert images.choose_grid(30, 30, 4, size=14) == (2, 2)
    assert images.choose_grid(30, 30, 4) == (1, 1)


def test_bad_tilings(picture):
    for max_tiles, min_tiles in ((0, 1), (-1, 1), (3, 4), (3, 0)):
        with pytest.raises(UserError, match="tiles per image"):
            images.choose_grid(10, 10, max_tiles, min_tiles)
    with pytest.raises(UserError, match="tiles per image"):
        images.tiles(Image.fromarray(picture), 0)
    for width, height, size in ((0, 5, 8), (5, 0, 8), (5, 5, 0)):
        with pytest.raises(ValueError, match="cannot be cut"):
            images.choose_grid(width, height, 6, size=size)


def test_absurd_shapes_stay_small():
    for shape in ((images.MAX_EDGE, 1), (1, images.MAX_EDGE)):
        got = images.tiles(Image.new("RGB", shape, (1, 2, 3)), 6, 8)
        assert got.shape == (7, 8, 8, 3)
        np.testing.assert_array_equal(got, np.broadcast_to(np.uint8([1, 2, 3]), got.shape))


def test_augment(picture):
    rng = np.random.default_rng
    batch = np.broadcast_to(picture, (200, 1, 8, 8, 3))
    before = batch.copy()
    np.testing.assert_array_equal(images.augment(batch, rng(0), 0, 0.0), batch)
    moved = images.augment(batch, rng(0), 1, 0.0)
    allowed = {np.roll(picture, (i, j), (0, 1)).tobytes() for i in (-1, 0, 1) for j in (-1, 0, 1)}
    assert {tile.tobytes() for tile in moved} == allowed
    np.testing.assert_array_equal(images.augment(batch, rng(0), 1, 4.0), images.augment(batch, rng(0), 1, 4.0))
    np.testing.assert_array_equal(batch, before)


def test_augmentation_noise():
    got = images.augment(np.full((50, 1, 8, 8, 3), 100, np.uint8), np.random.default_rng(0), 0, 8.0)
    noise = got.astype(float) - 100
    assert noise.std() == pytest.approx(8, rel=0.05) and abs(noise.mean()) < 1
    assert np.all(np.ptp(got, axis=-1) <= 1)  # grey stays grey
    ends = images.augment(np.full((9, 1, 8, 8, 3), 255, np.uint8), np.random.default_rng(0), 0, 50.0)
    assert ends.min() > 20  # no overflow wraps round
