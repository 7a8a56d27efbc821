"""Decode one image file, or report why it cannot be used."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

Problem = Literal["unreadable", "empty", "not an image", "truncated", "broken", "huge", "mode", "unlabelled", "mask"]

# PIL recognizes formats by content, and knows formats whose decoders run other programs: EPS starts Ghostscript.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM")
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
MAX_FILE_BYTES = 2**30  # an image of PIL's largest size takes 716 MB without compression (16-bit RGBA)

_STRIP_PIXELS = 2**20  # conversions work on strips of this size, so that their intermediate results are small
_SPECIAL_FILES = {
    stat.S_IFDIR: "is a folder",
    stat.S_IFIFO: "is a FIFO and not a regular file",
    stat.S_IFSOCK: "is a socket and not a regular file",
    stat.S_IFCHR: "is a device and not a regular file",
    stat.S_IFBLK: "is a device and not a regular file",
}


def is_image_name(path: str) -> bool:
    """Return whether a file name has an image extension, in any case, and is not hidden."""
    name = os.path.basename(path)
    return not name.startswith(".") and name.lower().endswith(IMAGE_EXTENSIONS)


@final
@dataclass(frozen=True)
class CorruptImage:
    """An image that cannot be used."""

    location: str  # path of the file, or of the archive and the entry in it
    kind: Problem  # "huge": a decompression bomb; "mode": a pixel format that cannot be converted; "mask": its labels
    reason: str  # the problem as a clause, as in "is empty: it has 0 bytes"
    remedy: str = "fix or remove it, or set on_bad='skip' to skip corrupt images"

    @property
    def advice(self) -> str:
        """The problem and what to do about it, as one sentence."""
        return f"{self}: {self.remedy}."

    def __str__(self) -> str:
        return f"{self.location!r} {self.reason}"


@final
class CorruptImageLog:
    """The corrupt images that were skipped, each once, in the order in which they were found.

    Workers send what they skipped along with each batch, so an image is counted when its batch is delivered.
    """

    def __init__(self) -> None:
        self._found: dict[str, CorruptImage] = {}

    @property
    def count(self) -> int:
        return len(self._found)

    def first(self, number: int) -> list[tuple[str, str]]:
        """Return location and reason of the first ``number`` images."""
        return [(image.location, image.reason) for image in list(self._found.values())[:number]]

    def add(self, found: Iterable[CorruptImage]) -> None:
        """Record images; those that are recorded already are ignored."""
        for image in found:
            self._found.setdefault(image.location, image)


def decode(source: Path | bytes, location: str) -> Image.Image | CorruptImage:
    """Decode all pixels of an image, in the mode in which it is stored, if it has one of the :data:`FORMATS`.

    Only regular files are read, of at most :data:`MAX_FILE_BYTES`. Images of more than ``PIL.Image.MAX_IMAGE_PIXELS``
    pixels are corrupt, and so are truncated files (PIL's ``LOAD_TRUNCATED_IMAGES`` stays off). Of an animation the
    first frame is used. The EXIF orientation is applied, see :func:`upright`; torchvision's
    ``ImageFolder`` ignores it.

    Memory: decoding and :func:`to_channels` together need at most the file, three times 4 bytes a pixel, and what the
    decoder of the format needs.
    """
    data = source if isinstance(source, bytes) else _read(source, location)
    if isinstance(data, CorruptImage):
        return data
    if not data:
        return CorruptImage(location, "empty", "is empty: it has 0 bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        # PIL only warns between one and two times MAX_IMAGE_PIXELS: treat that as an error, too.
        if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError
        image.load()  # Image.open reads the header only
    except MemoryError:
        raise
    except Exception as error:  # PIL's decoders raise anything: SyntaxError, struct.error, KeyError, …
        return _corrupt(error, location)
    return upright(image)


def stored_size(path: Path) -> tuple[int, int] | None:
    """Return width and height from the header of an image file, before any EXIF orientation; None if it has none."""
    try:
        if _special(os.stat(path)):
            return None
        with Image.open(path, formats=FORMATS) as image:
            return image.size
    except MemoryError:
        raise
    except Exception:  # as in decode(), which reports the problem
        return None


def upright(image: Image.Image) -> Image.Image:
    """Rotate and flip an image as its EXIF orientation says, as viewers do: phones store pictures sideways.

    An image without an orientation, or with EXIF data that cannot be read, is returned unchanged.
    """
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
            return image
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:  # the parser of EXIF data raises anything, too
        return image


def _read(path: Path, location: str) -> bytes | CorruptImage:
    try:
        # Before it is opened, which waits for a writer (FIFO) or acts on a device.
        if problem := _special(os.stat(path)):
            return CorruptImage(location, "unreadable", problem)
        with open(path, "rb", opener=_open_nonblocking) as file:
            if problem := _special(os.fstat(file.fileno())):  # it may have been replaced meanwhile
                return CorruptImage(location, "unreadable", problem)
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        return CorruptImage(location, "unreadable", f"cannot be read: {error.strerror or error}")
    except ValueError as error:  # a null character in a path that a dataset contains
        return CorruptImage(location, "unreadable", f"cannot be read: {error}")
    if len(data) > MAX_FILE_BYTES:
        return CorruptImage(location, "huge", f"has more than {MAX_FILE_BYTES:,} bytes")
    return data


def _open_nonblocking(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _special(status: os.stat_result) -> str | None:
    """Describe what is not a regular file; None if it is."""
    if stat.S_ISREG(status.st_mode):
        return None
    return _SPECIAL_FILES.get(stat.S_IFMT(status.st_mode), "is not a regular file")


def _corrupt(error: Exception, location: str) -> CorruptImage:
    text = " ".join(str(error).split()) or type(error).__name__
    match error:
        case Image.DecompressionBombWarning() | Image.DecompressionBombError():
            return CorruptImage(
                location, "huge", f"has more than {Image.MAX_IMAGE_PIXELS:,} pixels, which may be a decompression bomb"
            )
        case UnidentifiedImageError():
            return CorruptImage(location, "not an image", f"is not an image in one of the formats {', '.join(FORMATS)}")
        case OSError() if "truncated" in text.lower() or "unrecognized data stream" in text:
            return CorruptImage(location, "truncated", f"is truncated: {text}")
        case EOFError():
            return CorruptImage(location, "truncated", f"is truncated: {text}")
        case _:
            return CorruptImage(location, "broken", f"cannot be decoded: {text}")


def to_channels(image: Image.Image, channels: int, location: str) -> Image.Image | CorruptImage:
    """Convert an image of any mode to 8-bit RGB (3 channels) or greyscale (1 channel).

    16-bit greyscale is divided by 257 (65535 maps to 255) and rounded. Transparent pixels are blended with white.
    Palettes, CMYK and YCbCr become RGB; RGB becomes grey by ITU-R 601 luma. Floating-point images are corrupt, because
    their range is not defined.
    """
    mode = "L" if channels == 1 else "RGB"
    if image.mode == mode and "transparency" not in image.info:
        return image
    if image.mode == "F":
        return CorruptImage(location, "mode", "holds floating-point pixels of unknown range: convert it to 8 bits")
    try:
        return _opaque_8bit(image).convert(mode)
    except (ValueError, OSError) as error:
        return CorruptImage(location, "mode", f"has pixels of mode {image.mode}, which has no path to {mode}: {error}")


def _opaque_8bit(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        # PIL's own conversion to "L" clips at 255 instead of rescaling.
        pixels_HW = np.empty((image.height, image.width), np.uint8)
        for box in _strips(image):
            grey = np.asarray(image.crop(box)).astype(np.int64).clip(0, 65535)
            pixels_HW[box[1] : box[3]] = (grey + 128) // 257
        return Image.fromarray(pixels_HW)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        # PIL's conversion to RGB drops alpha and shows the hidden colour of transparent pixels.
        opaque = Image.new("RGB", image.size)
        for box in _strips(image):
            strip = image.crop(box).convert("RGBA")
            white = Image.new("RGBA", strip.size, (255, 255, 255, 255))
            opaque.paste(Image.alpha_composite(white, strip).convert("RGB"), box[:2])
        return opaque
    return image if image.mode in ("1", "L", "RGB") else image.convert("RGB")


def _strips(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """Yield boxes (left, top, right, bottom) of complete rows that cover an image."""
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield 0, top, image.width, min(top + rows, image.height)


def to_pil(pixels_CHW: Tensor) -> Image.Image:
    """Convert uint8 pixels of 3 channels or 1 to an RGB or greyscale image."""
    array = pixels_CHW.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
