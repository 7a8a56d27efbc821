"""The float network on the images that quantized networks are compared on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from repvgg.quantization.calibration import BATCH, first_tensor, run
from repvgg.quantization.quality import Quality, QualityMeter

# Of logits of the float network; those of 10,000 classified images fit, maps of pixels do not.
_KEPT_BYTES = 256 * 2**20

#: Images (n, C, H, W) as the network takes them, with labels (n,) or masks (n, H, W), or None without.
Batches = Iterable[tuple[Tensor, Tensor | None]]


class ReferenceBatch(NamedTuple):
    """Images, what is known about them, and the output of the float network."""

    images: Tensor
    labels: Tensor | None
    outputs: Tensor


@final
class Reference:
    """A float network on the images that quantized networks are compared on.

    Outputs are kept where they fit into memory, so that the network runs once for any number of comparisons.

    Args:
        model: the float network, in eval mode.
        batches: the images; they are iterated over for every comparison.
    """

    def __init__(self, model: nn.Module, batches: Batches) -> None:
        self.model = model
        self._batches = batches
        self._outputs: list[Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        images, _ = next(iter(self._batches))
        return images.shape[1], images.shape[2], images.shape[3]

    def __iter__(self) -> Iterator[ReferenceBatch]:
        if self._outputs is not None:
            for (images, labels), outputs in zip(self._batches, self._outputs, strict=True):
                yield ReferenceBatch(images, labels, outputs)
            return
        kept: list[Tensor] | None = []
        for images, labels in self._batches:
            outputs = first_tensor(run(self.model, images))
            if kept is not None:
                kept.append(outputs)
                if sum(one.nbytes for one in kept) > _KEPT_BYTES:
                    kept = None
            yield ReferenceBatch(images, labels, outputs)
        self._outputs = kept

    def first(self, count: int) -> Reference:
        """Return the same network on the first ``count`` images; outputs that are kept are not computed again."""
        batches: list[tuple[Tensor, Tensor | None]] = []
        for images, labels in self._batches:
            batches.append((images[:count], None if labels is None else labels[:count]))
            count -= len(images)
            if count <= 0:
                break
        part = Reference(self.model, batches)
        if self._outputs is not None:
            pairs = zip(self._outputs, batches, strict=False)  # there are more outputs than batches
            part._outputs = [outputs[: len(images)] for outputs, (images, _) in pairs]
        return part

    def compare(self, candidate: Callable[[Tensor], Tensor]) -> Quality:
        """Compare the outputs of another network, a module or any callable, with those of the float network.

        Raises:
            UsageError: there are no images, or the outputs have another shape.
        """
        meter = QualityMeter()
        for images, labels, expected in self:
            found = first_tensor(run(candidate, images)) if isinstance(candidate, nn.Module) else candidate(images)
            meter.add(expected, found, labels)
        return meter.quality


def in_batches(images: Tensor, labels: Tensor | None = None, size: int = BATCH) -> Batches:
    """Return images in memory, and their labels, as batches."""
    parts = torch.split(images, size)
    return list(zip(parts, torch.split(labels, size) if labels is not None else [None] * len(parts), strict=True))
