"""How feature maps lie in memory: NHWC with channels rounded up to whole vectors, or NCHW; with a border of zeros."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from repvgg.engine.layers import Pair


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple that is not below ``number``."""
    return -(-number // multiple) * multiple


@final
@dataclass(frozen=True)
class Images:
    """The layout of feature maps of one size.

    Channels beyond the last are zeros, and so is the border; kernels write neither, or write zeros again.

    Attributes:
        channels: that mean something.
        size: height and width, without the border.
        border: pixels of zeros above and below, and to the left and the right.
        pitch: floats from one pixel to the next, at least ``channels``.
        more: pixels of zeros below and to the right, beyond the border, for tiles that stick out.
        planar: whether one channel lies after the other (NCHW), and the pitch is 1.
    """

    channels: int
    size: Pair
    border: Pair
    pitch: int
    more: Pair = (0, 0)
    planar: bool = False

    @property
    def row(self) -> int:
        """Floats from one row to the next."""
        return (self.size[1] + 2 * self.border[1] + self.more[1]) * self.pitch

    @property
    def plane(self) -> int:
        """Floats of all rows."""
        return (self.size[0] + 2 * self.border[0] + self.more[0]) * self.row

    @property
    def channel(self) -> int:
        """Floats from one channel of a pixel to the next."""
        return self.plane if self.planar else 1

    @property
    def image(self) -> int:
        """Floats from one image to the next."""
        return self.channels * self.plane if self.planar else self.plane

    @property
    def inside(self) -> int:
        """Floats from the corner of the border to the first pixel."""
        return self.border[0] * self.row + self.border[1] * self.pitch
