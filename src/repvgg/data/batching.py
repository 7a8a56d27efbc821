"""The data sets behind the loaders: from positions in an epoch to whole batches. They go to the loading processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, final

import torch
from torch import Tensor
from torch.utils.data import Dataset

from repvgg.data.batch_ops import BatchOps
from repvgg.data.decoding import Bad
from repvgg.data.drawing import epoch_order
from repvgg.data.keeping import BaseImages, KeptImages

if TYPE_CHECKING:
    from repvgg.data.image_ops import PolicyOps


class Loaded(NamedTuple):
    """What a loading process hands over for a batch."""

    images: Tensor
    labels: Tensor
    bad: tuple[Bad, ...] = ()
    failure: str | None = None


class Request(NamedTuple):
    """Positions ``start`` … ``stop − 1`` of the order of ``epoch``."""

    epoch: int
    start: int
    stop: int


@final
class TrainingImages(Dataset[Loaded]):
    """Augmented training images by their positions in an epoch; goes to the loading processes.

    Args:
        base: the images at their size.
        labels: (N,) int64.
        ops: augmentation of whole batches.
        policy: augmentation image by image, or None.
        on_bad: "raise", or "skip": the next good image in the order of the epoch takes the place of a bad one.
    """

    def __init__(self, base: BaseImages, labels: Tensor, ops: BatchOps, policy: PolicyOps | None, on_bad: str) -> None:
        self._base = base
        self._labels = labels
        self._ops = ops
        self._policy = policy
        self._on_bad = on_bad
        self._order: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Loaded:
        return self.__getitems__(Request(0, index, index + 1))

    def __getitems__(self, request: Request) -> Loaded:
        order = self.order(request.epoch)
        indices = order[request.start : request.stop]
        images = self._base.all_of(indices, request.epoch)
        bad: list[Bad] = []
        if images is None:
            found = self._one_by_one(order, request, bad)
            if isinstance(found, str):
                return failed(found, bad)
            indices, images = found
        images = self._ops.move(images, request.epoch, indices)
        if self._policy is not None:
            images = self._policy(images, request.epoch, indices)
        images = self._ops.erase(images, request.epoch, indices)
        return Loaded(images, self._labels[indices], tuple(bad))

    def order(self, epoch: int) -> Tensor:
        """The order of ``epoch`` (N,); the last one asked for is kept."""
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, epoch_order(self._ops.seed, epoch, len(self))
        return self._order[1]

    def _one_by_one(self, order: Tensor, request: Request, bad: list[Bad]) -> tuple[Tensor, Tensor] | str:
        """Indices and images of a request, or what is wrong."""
        indices, images = [], []
        for position in range(request.start, request.stop):
            for step in range(len(order)):
                index = int(order[(position + step) % len(order)])
                image = self._base.one(index, request.epoch)
                if not isinstance(image, Bad):
                    break
                bad.append(image)
                if self._on_bad == "raise":
                    return image.advice
            else:
                return f"Not one of {len(order)} training images can be read: {bad[-1]}."
            indices.append(index)
            images.append(image)
        return torch.tensor(indices), torch.stack(images)


@final
class HeldOutImages(Dataset[Loaded]):
    """Images to judge by; those that are bad are left out if ``on_bad`` is "skip"."""

    def __init__(self, base: BaseImages, labels: Tensor, on_bad: str) -> None:
        self.in_memory = isinstance(base, KeptImages)
        self._base = base
        self._labels = labels
        self._on_bad = on_bad

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Loaded:
        return self.at(torch.tensor([index]))

    def __getitems__(self, request: Request) -> Loaded:
        return self.at(torch.arange(request.start, request.stop))

    def at(self, indices: Tensor) -> Loaded:
        """The images at ``indices``."""
        images = self._base.all_of(indices, 0)
        if images is not None:
            return Loaded(images, self._labels[indices])
        ones = [self._base.one(int(index), 0) for index in indices]
        bad = [image for image in ones if isinstance(image, Bad)]
        if bad and self._on_bad == "raise":
            return failed(bad[0].advice, bad)
        good = [image for image in ones if not isinstance(image, Bad)]
        if not good:
            return Loaded(torch.zeros(0), torch.zeros(0, dtype=torch.int64), tuple(bad))
        labels = self._labels[indices[[not isinstance(image, Bad) for image in ones]]]
        return Loaded(torch.stack(good), labels, tuple(bad))


def failed(what: str, bad: list[Bad]) -> Loaded:
    """No batch but a sentence: an exception would come out of a process with its whole traceback as its text."""
    return Loaded(torch.zeros(0), torch.zeros(0, dtype=torch.int64), tuple(bad), what)
