"""Opening images, good and bad, and turning them into model input."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mmprm_jax.data import images
from mmprm_jax.records import UserError


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)


def test_exact_size_is_kept(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "a.png")
    got = images.load_image(tmp_path / "a.png", 8)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, picture)


def test_resized(tmp_path):
    Image.fromarray(np.full((30, 50, 3), (10, 20, 30), np.uint8)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(images.load_image(tmp_path / "a.png", 8), np.full((8, 8, 3), (10, 20, 30)))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA"])
def test_any_mode_becomes_rgb(tmp_path, mode):
    grey = Image.new("L", (8, 8), 255)
    grey.convert(mode).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(images.load_image(tmp_path / "a.tif", 8), np.full((8, 8, 3), 255))


def png(width, height, data=b""):
    """A PNG file that claims a size."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


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
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            images.load_image(tmp_path / name, 8)
    with pytest.raises(UserError, match="8000 x 8000.*limit"):
        images.load_image(tmp_path / "8000 x 8000", 8)
    with pytest.raises(UserError, match="nothing.png: image not found"):
        images.load_image(tmp_path / "nothing.png", 8)
    with pytest.raises(UserError, match="not a readable image"):
        images.load_image(tmp_path, 8)


def test_too_many_bytes(tmp_path, picture, monkeypatch):
    Image.fromarray(picture).save(tmp_path / "a.png")
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    with pytest.raises(UserError, match="a.png: image file larger than 100 bytes"):
        images.load_image(tmp_path / "a.png", 8)


def test_load_images(tmp_path, picture):
    for i, name in enumerate(("a.png", "b.png")):
        Image.fromarray(np.roll(picture, i, axis=0)).save(tmp_path / name)
    got = images.load_images(tmp_path, ["b.png", None, "a.png", "b.png"], 8)
    assert got.shape == (4, 1, 8, 8, 3) and got.dtype == np.uint8
    np.testing.assert_array_equal(got[0, 0], np.roll(picture, 1, axis=0))
    np.testing.assert_array_equal(got[3], got[0])
    np.testing.assert_array_equal(got[2, 0], picture)
    assert not got[1].any()


def test_normalise():
    got = images.normalise(np.array([[0, 0, 0], [255, 255, 255], [124, 116, 104]], np.uint8))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got[0], [-2.1179, -2.0357, -1.8044], atol=1e-4)
    np.testing.assert_allclose(got[1], [2.2489, 2.4286, 2.64], atol=1e-4)
    assert np.all(np.abs(got[2]) < 0.02)


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
