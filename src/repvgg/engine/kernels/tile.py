"""The inner loop of every product: a tile of sums in registers, fed by vectors of weights and broadcast inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from repvgg.engine.ir import Function, Value


@final
@dataclass(frozen=True)
class Tile:
    """What is summed in registers at once: so many pixels times so many vectors of output channels."""

    pixels: int
    vectors: int

    def __str__(self) -> str:
        return f"{self.pixels}x{self.vectors} registers"

    @property
    def registers(self) -> int:
        """Vectors that it takes: the sums, a step of weights, and an input."""
        return self.pixels * self.vectors + self.vectors + 1

    @property
    def cycles(self) -> float:
        """About how long one step takes.

        A processor does two multiply-adds and two loads a cycle, and the next addition to a sum waits four cycles.
        Weights are loaded twice, those to come ahead of their use; wide panels crowd the first cache.
        """
        return max(self.pixels * self.vectors / 2, (self.pixels + 2 * self.vectors) / 2, 4.0) + 0.02 * self.vectors**2


def multiply_add(
    write: Function, inputs: Value, pitch: int, weights: Value, sums: Sequence[Value], vectors: int
) -> list[Value]:
    """Add one input channel to all sums of a tile, which lie as (pixel, vector).

    Args:
        write: the function.
        inputs: address of the channel of the first pixel.
        pitch: floats from there to that of the next pixel.
        weights: address of the weights of the channel.
        sums: as they are.
        vectors: of the tile.
    """
    lanes = [write.load(weights, vector * write.width) for vector in range(vectors)]
    out: list[Value] = []
    for pixel in range(len(sums) // vectors):
        value = write.broadcast(inputs, pixel * pitch)
        out += [write.fma(value, lane, sums[pixel * vectors + at]) for at, lane in enumerate(lanes)]
    return out


def equal_tiles(count: int, tile: Tile) -> list[tuple[int, Tile]]:
    """So many pixels as tiles that are about equal, and at most as large: how many, and of which size."""
    number = -(-count // tile.pixels)
    size, more = divmod(count, number)
    pairs = (more, size + 1), (number - more, size)
    return [(many, Tile(pixels, tile.vectors)) for many, pixels in pairs if many]
