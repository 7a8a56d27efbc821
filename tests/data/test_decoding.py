import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from repvgg.data.decoding import Bad, decode, to_channels
from tests.data.helpers import encoded, noise, truncated


def whole(image, kind_of_file="PNG", channels=3, **how):
    """Through a file and into a mode."""
    decoded = decode(encoded(image, kind_of_file, **how), "here")
    assert isinstance(decoded, Image.Image), decoded
    return to_channels(decoded, channels, "here")


@pytest.mark.parametrize("kind_of_file", ["PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM"])
def test_formats(kind_of_file):
    image = whole(noise(0), kind_of_file)
    assert (image.mode, image.size) == ("RGB", (16, 16))
    assert np.abs(np.asarray(image).astype(int) - np.asarray(noise(0))).mean() < (
        16 if kind_of_file in ("JPEG", "WEBP") else 1e-9
    )


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "RGBA", "LA"])
@pytest.mark.parametrize(("channels", "target"), [(3, "RGB"), (1, "L")])
def test_opaque_modes_become_what_pil_makes_of_them(mode, channels, target):
    image = noise(1).convert("RGBA").convert(mode) if mode != "YCbCr" else noise(1).convert(mode)
    converted = to_channels(image, channels, "here")
    expected = image.convert("RGB").convert(target) if mode == "CMYK" else image.convert(target)
    assert converted.mode == target
    difference = np.abs(np.asarray(converted).astype(int) - np.asarray(expected))
    assert difference.max() <= 1


def test_what_is_transparent_becomes_white():
    image = noise(2).convert("RGBA")
    image.putalpha(Image.fromarray(np.array([[0, 255] * 8] * 16, np.uint8)))
    pixels = np.asarray(whole(image))
    assert (pixels[:, 0::2] == 255).all()
    np.testing.assert_array_equal(pixels[:, 1::2], np.asarray(noise(2))[:, 1::2])


def test_transparency_of_a_palette():
    image = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4)).convert("P")
    image.putpalette([10, 20, 30] * 256)
    pixels = np.asarray(whole(image, transparency=3))
    assert tuple(pixels[0, 3]) == (255, 255, 255)
    assert tuple(pixels[1, 1]) == (10, 20, 30)


@pytest.mark.parametrize("kind_of_file", ["PNG", "TIFF"])
def test_sixteen_bits_of_grey_keep_their_range(kind_of_file):
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    np.testing.assert_array_equal(
        np.asarray(whole(Image.fromarray(values), kind_of_file, channels=1)), [[0, 1, 128, 255]]
    )
    assert whole(Image.fromarray(values), kind_of_file).mode == "RGB"


def test_floating_point_is_bad():
    bad = to_channels(Image.fromarray(np.ones((2, 2), np.float32)), 3, "here")
    assert bad == Bad("here", "mode", bad.why)
    assert "8 bits" in bad.why


def test_a_mode_without_a_way_is_bad():
    bad = to_channels(Image.new("La", (2, 2)), 3, "here")
    assert (bad.kind, "mode La" in bad.why) == ("mode", True)
    assert to_channels(Image.new("LAB", (2, 2)), 1, "here").mode == "L"


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb():
    """A PNG of a few bytes that says it has 20000 x 20000 pixels."""
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "empty"),
        (b"this is a web page", "not an image"),
        (encoded(noise(0, (64, 64)), "JPEG")[:-200], "truncated"),
        (encoded(noise(0, (64, 64)), "PNG")[:-200], "truncated"),
        (encoded(noise(0, (64, 64)), "JPEG")[:30], "truncated"),
        (bomb(), "huge"),
    ],
)
def test_broken_files(data, kind):
    bad = decode(data, "a/b.jpg")
    assert isinstance(bad, Bad)
    assert (bad.where, bad.kind) == ("a/b.jpg", kind)
    assert str(bad).startswith("'a/b.jpg' ")
    assert "\n" not in str(bad)


def test_a_broken_checksum():
    data = bytearray(encoded(noise(0, (64, 64))))
    data[data.index(b"IDAT") + 20] ^= 0xFF
    assert decode(bytes(data), "x").kind in ("broken", "truncated")


def test_files_that_cannot_be_read(tmp_path):
    assert decode(tmp_path / "none.png", "x").kind == "unreadable"
    assert decode(tmp_path, "x").kind == "unreadable"


def test_truncated_files_stay_errors(tmp_path):
    path = tmp_path / "half.jpg"
    noise(3, (64, 64)).save(path)
    truncated(path)
    assert decode(path, "x").kind == "truncated"
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
