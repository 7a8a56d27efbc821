import io
import os
import resource
import socket
import struct
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageFile

from repvgg.data import decode as decode_module
from repvgg.data.decode import FORMATS, CorruptImage, decode, to_channels
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


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


def other_formats():
    """The names of all formats that PIL reads and writes, and that are not listed."""
    Image.init()
    return sorted({*Image.OPEN} & {*Image.SAVE} - {*FORMATS})


@pytest.mark.filterwarnings("ignore:.*image format is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", other_formats())
def test_formats_that_are_not_listed_are_not_decoded(name):
    for mode in ("RGB", "L", "P", "1"):
        file = io.BytesIO()
        try:
            noise(0, (32, 32)).convert(mode).save(file, name)
        except (OSError, ValueError, KeyError):  # no encoder, or not for this mode
            continue
        corrupt = decode(file.getvalue(), "cat.jpg")
        assert (corrupt.kind, corrupt.reason.count("JPEG, PNG, BMP, WEBP, TIFF, PPM")) == ("not an image", 1)
        return
    pytest.skip("PIL cannot write it here")


def test_postscript_starts_no_program(tmp_path, monkeypatch):
    log = tmp_path / "log"
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f'#!/bin/sh\necho "$@" >> {log}\n[ "$1" = --version ] && echo 10.0\n')
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    (tmp_path / "cat.jpg").write_bytes(POSTSCRIPT)
    assert decode(tmp_path / "cat.jpg", "cat.jpg").kind == "not an image"
    assert not log.exists()


def bound_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)


SPECIAL = {
    "a FIFO": lambda path: os.mkfifo(path),
    "a socket": bound_socket,
    "a folder": lambda path: path.mkdir(),
    "a device": lambda path: path.symlink_to("/dev/zero"),  # endless
    "symbolic links": lambda path: path.symlink_to(path.name),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("what", SPECIAL)
def test_only_regular_files_are_read(tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    SPECIAL[what](tmp_path / "x.png")
    corrupt = decode(tmp_path / "x.png", "x.png")
    assert corrupt.kind == "unreadable"
    assert what in corrupt.reason
    (tmp_path / "link.png").symlink_to("y.png")
    noise(0).save(tmp_path / "y.png")
    assert isinstance(decode(tmp_path / "link.png", "link.png"), Image.Image)


def test_large_files_are_not_read_whole(tmp_path, monkeypatch):
    noise(0).save(tmp_path / "x.bmp")
    monkeypatch.setattr(decode_module, "MAX_FILE_BYTES", 100)
    assert decode(tmp_path / "x.bmp", "x.bmp").kind == "huge"


def test_paths_with_a_null_character(tmp_path):
    assert decode(tmp_path / "a\0b.png", "x").kind == "unreadable"


TALL = (40, 61)


@pytest.mark.parametrize("strip_pixels", [1, 100, 2**20])
def test_strips_change_no_pixel(monkeypatch, strip_pixels):
    monkeypatch.setattr(decode_module, "_STRIP_PIXELS", strip_pixels)
    values = np.arange(TALL[0] * TALL[1], dtype=np.uint16).reshape(TALL[::-1]) * 26
    deep = roundtrip(Image.fromarray(values), "PNG", channels=1)
    np.testing.assert_array_equal(np.asarray(deep), np.round(values / 257).astype(np.uint8))
    clear = noise(2, TALL).convert("RGBA")
    clear.putalpha(noise(3, TALL, 1))
    white = Image.new("RGBA", TALL, (255, 255, 255, 255))
    np.testing.assert_array_equal(
        np.asarray(roundtrip(clear)), np.asarray(Image.alpha_composite(white, clear).convert("RGB"))
    )
    palette = noise(4, TALL).quantize(16)
    whole = Image.alpha_composite(white, made_transparent(palette).convert("RGBA")).convert("RGB")
    np.testing.assert_array_equal(np.asarray(to_channels(made_transparent(palette), 3, "x")), np.asarray(whole))


def made_transparent(palette):
    copy = palette.copy()
    copy.info["transparency"] = 3
    return copy


SIDE = 1500  # 9 MB at 4 bytes a pixel
MODES = {
    "RGB": lambda: Image.new("RGB", (SIDE, SIDE)),
    "RGBA": lambda: Image.new("RGBA", (SIDE, SIDE)),
    "LA": lambda: Image.new("LA", (SIDE, SIDE)),
    "P": lambda: made_transparent(Image.new("P", (SIDE, SIDE))),
    "CMYK": lambda: Image.new("CMYK", (SIDE, SIDE)),
    "I;16": lambda: Image.new("I;16", (SIDE, SIDE)),
    "I": lambda: Image.new("I", (SIDE, SIDE)),
}


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_converted_in_little_memory(monkeypatch, mode, channels):
    """No mode needs more than two further images of 4 bytes a pixel; 16-bit greyscale used to need nine."""
    monkeypatch.setattr(decode_module, "_STRIP_PIXELS", 2**12)
    image = MODES[mode]()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with open("/proc/self/statm") as statm:
                used = int(statm.read().split()[0]) * resource.getpagesize()
            bound = used + 2 * 4 * SIDE * SIDE + 2**21
            resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
            status = int(to_channels(image, channels, "x").size != (SIDE, SIDE))
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
