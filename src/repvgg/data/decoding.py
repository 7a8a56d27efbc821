"""One image out of a file or its bytes, or the reason why there is none."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

import numpy as np
from PIL import Image, UnidentifiedImageError

Problem = Literal["unreadable", "empty", "not an image", "truncated", "broken", "huge", "mode", "unlabelled"]


@final
@dataclass(frozen=True)
class Bad:
    """An image that cannot be used.

    Attributes:
        where: the file, or where in which file.
        kind: what is wrong, in a word; "huge" is a decompression bomb.
        why: what is wrong, in a clause.
    """

    where: str
    kind: Problem
    why: str

    @property
    def advice(self) -> str:
        """What is wrong with the image, and what can be done about it."""
        return f"{self}: mend or remove it, or skip bad images."

    def __str__(self) -> str:
        return f"{self.where!r} {self.why}"


def decode(source: Path | bytes, where: str) -> Image.Image | Bad:
    """Decode an image wholly, in the mode that it is stored in.

    Truncated files are bad: PIL's ``LOAD_TRUNCATED_IMAGES`` is left off. So are images of more than
    ``PIL.Image.MAX_IMAGE_PIXELS`` pixels. Of several frames the first counts; an orientation in EXIF is not applied, as
    in torchvision's ``ImageFolder``.
    """
    try:
        data = source if isinstance(source, bytes) else source.read_bytes()
    except OSError as error:
        return Bad(where, "unreadable", f"cannot be read: {error.strerror or error}")
    if not data:
        return Bad(where, "empty", "is empty: it has 0 bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            image.load()
    except MemoryError:
        raise
    except Exception as error:  # the decoders of PIL raise whatever they stumble upon
        return _problem(error, where)
    return image


def _problem(error: Exception, where: str) -> Bad:
    said = " ".join(str(error).split()) or type(error).__name__
    match error:
        case Image.DecompressionBombWarning() | Image.DecompressionBombError():
            return Bad(where, "huge", f"has more than {Image.MAX_IMAGE_PIXELS} pixels, which may be an attack")
        case UnidentifiedImageError():
            return Bad(where, "not an image", "is not an image of any known kind")
        case OSError() if "truncated" in said.lower() or "unrecognized data stream" in said:
            return Bad(where, "truncated", f"is cut off: {said}")
        case EOFError():
            return Bad(where, "truncated", f"is cut off: {said}")
        case _:
            return Bad(where, "broken", f"cannot be decoded: {said}")


def to_channels(image: Image.Image, channels: int, where: str) -> Image.Image | Bad:
    """Convert an image of any mode to RGB (3 channels) or grey (1), 8 bits each.

    16 bits of grey are divided by 257, so that 65535 becomes 255; what is transparent becomes white, in proportion;
    palettes, CMYK and YCbCr become RGB; grey is ITU-R 601 luma. Floating-point images have no range that is agreed on,
    and are bad.
    """
    mode = "L" if channels == 1 else "RGB"
    if image.mode == mode and "transparency" not in image.info:
        return image
    if image.mode == "F":
        return Bad(where, "mode", "holds floating-point pixels, whose range nobody says: convert it to 8 bits")
    try:
        return _flat(image).convert(mode)
    except (ValueError, OSError) as error:
        return Bad(where, "mode", f"has pixels of mode {image.mode} that are not converted to {mode}: {error}")


def _flat(image: Image.Image) -> Image.Image:
    """The image without transparency, 8 bits a channel."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        colour = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), colour).convert("RGB")
    return image if image.mode in ("1", "L", "RGB") else image.convert("RGB")
