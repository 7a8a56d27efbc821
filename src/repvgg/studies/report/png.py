"""A grayscale image as a PNG data URI, written with nothing but zlib."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence


def data_uri(pixels: Sequence[Sequence[int]]) -> str:
    """Rows of gray values 0..255 as ``data:image/png;base64,...``, 8 bits a pixel (PNG specification, §11)."""
    height, width = len(pixels), len(pixels[0])
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = b"".join(b"\0" + bytes(row) for row in pixels)
    body = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows, 9)) + _chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + body).decode("ascii")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
