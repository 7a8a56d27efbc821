"""How far an image may be changed while training: plain values, part of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from repvgg.errors import UsageError


@final
@dataclass(frozen=True)
class AffineJitter:
    """How far an image may be turned, moved and resized; every amount is drawn uniformly.

    Attributes:
        degrees: turned by −degrees … +degrees.
        translate: moved by at most this fraction of the height and of the width.
        scale: resized by 1 − scale … 1 + scale.

    Raises:
        UsageError: a negative amount, or one that moves or shrinks the image away.
    """

    degrees: float = 0.0
    translate: float = 0.0
    scale: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.degrees <= 180 and 0 <= self.translate < 1 and 0 <= self.scale < 1):
            raise UsageError(f"A jitter takes degrees in [0, 180], translate and scale in [0, 1), not {self}.")
