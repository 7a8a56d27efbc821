"""Which layers take a batch in parts: the first, whose feature maps would push each other out of the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from repvgg.engine.graph import Conv, Layer

_LARGE = 500_000  # floats of feature maps of an image that are worth it
_HELD = 5_000_000  # floats of feature maps that stay in the third cache

#: From layers and the largest batch to how many of the first layers take how many images at once.
Parts: TypeAlias = Callable[[Sequence[Layer], tuple[int, int, int, int]], tuple[int, int]]


def at_once(layers: Sequence[Layer], input_shape: tuple[int, int, int, int]) -> tuple[int, int]:
    """None of them: all layers take the whole batch."""
    return 0, input_shape[0]


def early_layers(layers: Sequence[Layer], input_shape: tuple[int, int, int, int]) -> tuple[int, int]:
    """The first convolutions, whose feature maps are too large for the cache, and how many images they take at once.

    Parts of the batch are equal, so that nothing is written behind the last image. 0 and all of it where that brings
    nothing.
    """
    batch, channels, *image = input_shape
    size, largest, early = (image[0], image[1]), 0, 0
    for layer in layers:
        after = layer.geometry.output_size(size) if isinstance(layer, Conv) else (0, 0)
        if not isinstance(layer, Conv) or min(after) < 1:
            break
        outputs = layer.weight.shape[0]
        floats = channels * size[0] * size[1] + outputs * after[0] * after[1]
        if floats < _LARGE or batch * floats < _HELD:
            break
        largest, early, size, channels = max(largest, floats), early + 1, after, outputs
    few = max(count for count in range(1, batch + 1) if batch % count == 0 and (count == 1 or count * largest <= _HELD))
    return (early, few) if early and few < batch else (0, batch)
