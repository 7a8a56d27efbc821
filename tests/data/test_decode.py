import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from repvgg.data.decode import CorruptImage, decode, to_channels
from tests.data.helpers import encoded, noise, truncate


def roundtrip(image, file_format="PNG", channels=3, **options):
    """Encode, decode and convert an image."""
    decoded = decode(encoded(image, file_format, **options), "x.png")
    assert isinstance(decoded, Image.Image), decoded
    return to_channels(decoded, channels, "x.png")


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM"])
def test_file_formats(file_format):
    image = roundtrip(noise(0), file_format)
    assert (image.mode, image.size) == ("RGB", (16, 16))
    assert np.abs(np.asarray(image).astype(int) - np.asarray(noise(0))).mean() < (
        16 if file_format in ("JPEG", "WEBP") else 1e-9
    )


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "RGBA", "LA"])
@pytest.mark.parametrize(("channels", "target"), [(3, "RGB"), (1, "L")])
def test_opaque_modes_are_converted_as_by_pil(mode, channels, target):
    image = noise(1).convert("RGBA").convert(mode) if mode != "YCbCr" else noise(1).convert(mode)
    converted = to_channels(image, channels, "x.png")
    expected = image.convert("RGB").convert(target) if mode == "CMYK" else image.convert(target)
    assert converted.mode == target
    difference = np.abs(np.asarray(converted).astype(int) - np.asarray(expected))
    assert difference.max() <= 1


def test_transparent_pixels_become_white():
    image = noise(2).convert("RGBA")
    image.putalpha(Image.fromarray(np.array([[0, 255] * 8] * 16, np.uint8)))
    pixels = np.asarray(roundtrip(image))
    assert (pixels[:, 0::2] == 255).all()
    np.testing.assert_array_equal(pixels[:, 1::2], np.asarray(noise(2))[:, 1::2])


def test_transparent_palette_entry_becomes_white():
    image = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4)).convert("P")
    image.putpalette([10, 20, 30] * 256)
    pixels = np.asarray(roundtrip(image, transparency=3))
    assert tuple(pixels[0, 3]) == (255, 255, 255)
    assert tuple(pixels[1, 1]) == (10, 20, 30)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_16_bit_greyscale_is_rescaled(file_format):
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    np.testing.assert_array_equal(
        np.asarray(roundtrip(Image.fromarray(values), file_format, channels=1)), [[0, 1, 128, 255]]
    )
    assert roundtrip(Image.fromarray(values), file_format).mode == "RGB"


def test_floating_point_pixels_are_corrupt():
    corrupt = to_channels(Image.fromarray(np.ones((2, 2), np.float32)), 3, "x.png")
    assert corrupt == CorruptImage("x.png", "mode", corrupt.reason)
    assert "8 bits" in corrupt.reason


def test_modes_without_a_conversion_are_corrupt():
    corrupt = to_channels(Image.new("La", (2, 2)), 3, "x.png")
    assert (corrupt.kind, "mode La" in corrupt.reason) == ("mode", True)
    assert to_channels(Image.new("LAB", (2, 2)), 1, "x.png").mode == "L"


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def decompression_bomb():
    """Return a PNG of a few bytes whose header claims 20000 x 20000 pixels."""
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
        (decompression_bomb(), "huge"),
    ],
)
def test_corrupt_files(data, kind):
    corrupt = decode(data, "a/b.jpg")
    assert isinstance(corrupt, CorruptImage)
    assert (corrupt.location, corrupt.kind) == ("a/b.jpg", kind)
    assert str(corrupt).startswith("'a/b.jpg' ")
    assert "\n" not in str(corrupt)


def test_wrong_checksum_is_corrupt():
    data = bytearray(encoded(noise(0, (64, 64))))
    data[data.index(b"IDAT") + 20] ^= 0xFF
    assert decode(bytes(data), "x").kind in ("broken", "truncated")


def test_unreadable_files(tmp_path):
    assert decode(tmp_path / "none.png", "x").kind == "unreadable"
    assert decode(tmp_path, "x").kind == "unreadable"


def test_truncated_files_are_corrupt(tmp_path):
    path = tmp_path / "half.jpg"
    noise(3, (64, 64)).save(path)
    truncate(path)
    assert decode(path, "x").kind == "truncated"
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


# Transforms that turn what a camera stores into the upright picture, by the value of the EXIF tag.
UPRIGHT = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def sideways(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif.tobytes()} if orientation else {}


@pytest.mark.parametrize("orientation", [0, 1, 2, 3, 4, 5, 6, 7, 8, 99])
@pytest.mark.parametrize(("file_format", "channels"), [("PNG", 3), ("TIFF", 3), ("PNG", 1)])
def test_the_exif_orientation_is_applied(orientation, file_format, channels):
    stored = noise(7, (12, 8), channels)
    transform = UPRIGHT.get(orientation)
    shown = stored if transform is None else stored.transpose(transform)
    decoded = roundtrip(stored, file_format, channels, **sideways(orientation))
    assert decoded.size == shown.size
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(shown))


def test_broken_exif_data_are_ignored():
    image = noise(7, (12, 8))
    for exif in (b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", b"\0"):
        np.testing.assert_array_equal(np.asarray(roundtrip(image, exif=exif)), np.asarray(image))
