"""How the tiles of Winograd's images are cut into pieces of work."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import final

from repvgg.engine.layers import Pair

LINE = 16  # floats of a line of the cache


@final
@dataclass(frozen=True)
class Tiling:
    """The tiles of a part of each image of a batch, in pieces, which may begin and end within an image.

    All pieces have the same length, so the last one may have tiles that stand for nothing.

    Attributes:
        grid: tiles of an image, down and across.
        piece: tiles of a piece.
        batch: images of the largest batch.
        corner: row and column of the first output of the first tile.
    """

    grid: Pair
    piece: int
    batch: int
    corner: Pair = (0, 0)

    @property
    def of_image(self) -> int:
        """Tiles of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def real(self) -> int:
        """Tiles that stand for something."""
        return self.batch * self.of_image

    @property
    def pieces(self) -> int:
        """Pieces of the largest batch."""
        return -(-self.real // self.piece)

    @property
    def tiles(self) -> int:
        """Tiles of the largest batch, those that stand for nothing among them."""
        return self.pieces * self.piece


def equal_runs(length: int, count: int) -> list[tuple[int, int]]:
    """(begin, end) of so many parts of a length, about equally long each."""
    cuts = [length * part // count for part in range(count + 1)]
    return list(itertools.pairwise(cuts))


def place_floats(tiles: int, floats: int) -> int:
    """Floats from one place of so many tiles of so many floats each to the next.

    A line more than they need: places that lie whole pages apart would all fall into one set of the cache.
    """
    return tiles * floats + LINE
