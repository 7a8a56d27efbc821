"""A part and a config → the data set that the loaders read: what is kept in memory, and what is done when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch

from repvgg.data.batch_ops import BatchOps
from repvgg.data.batching import HeldOutImages, TrainingImages
from repvgg.data.config import DataConfig
from repvgg.data.keeping import BaseImages, DecodedImages, KeptImages, decode_all, is_worth_keeping, keep_raw
from repvgg.data.parts import ArrayPart, IndexedPart, Part, StreamPart
from repvgg.data.streaming import StreamOps
from repvgg.errors import UsageError

if TYPE_CHECKING:
    from repvgg.data.image_ops import CentreCrop, PolicyOps, RandomCrop

Shape = tuple[int, int, int]


@final
@dataclass(frozen=True)
class Assembly:
    """Builds both data sets of a config.

    Attributes:
        config: what is asked for.
        mean: one number a channel.
        std: one number a channel.
        seed: of the run.
    """

    config: DataConfig
    mean: tuple[float, ...]
    std: tuple[float, ...]
    seed: int

    def training(self, part: Part, shape: Shape) -> TrainingImages | tuple[StreamPart, StreamOps]:
        """Images of ``shape`` to learn from.

        Raises:
            UsageError: they are too small to be reflected, or cannot be kept in memory as asked.
            DataError: an image that is to be kept is bad.
        """
        augment, config = self.config.augment, self.config
        if augment.crop == "pad" and augment.crop_padding >= shape[1]:
            raise UsageError(f"Images of {shape[1]} pixels cannot be reflected {augment.crop_padding} pixels wide.")
        if isinstance(part, StreamPart):
            ops = StreamOps(self._train_crop(shape), self._batch_ops(torch.uint8), self._policy(), config.on_bad)
            return part, ops
        base = self._random_crops(part, shape) if augment.crop == "random-resized" else self._whole(part, shape)
        dtype = base.images.dtype if isinstance(base, KeptImages) else torch.uint8
        return TrainingImages(base, part.labels, self._batch_ops(dtype), self._policy(), config.on_bad)

    def held_out(self, part: Part, shape: Shape) -> HeldOutImages | tuple[StreamPart, StreamOps]:
        """Images of ``shape`` to judge by.

        Raises:
            DataError: an image that is to be kept is bad.
        """
        if isinstance(part, StreamPart):
            return part, StreamOps(self._centre_crop(shape), None, None, self.config.on_bad)
        base = self._as_array(part, shape) or self._decoded(part, shape)
        return HeldOutImages(base, part.labels, self.config.on_bad)

    def _whole(self, part: IndexedPart, shape: Shape) -> BaseImages:
        """Training images that are cut out as those to judge by are."""
        kept = self._as_array(part, shape)
        if kept is None or (kept.images.is_floating_point() and self.config.augment.policy != "none"):
            return self._decoded(part, shape)
        return kept

    def _as_array(self, part: IndexedPart, shape: Shape) -> KeptImages | None:
        """Images that lie in memory at the right size already."""
        if not isinstance(part, ArrayPart) or part.pixels.shape[2:] != shape[1:]:
            return None
        if part.pixels.dtype == torch.uint8:
            return KeptImages(part.pixels) if part.pixels.shape[1] == shape[0] else None
        pixels = part.pixels.expand(-1, shape[0], -1, -1)
        mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in (self.mean, self.std))
        return KeptImages((pixels - mean) / std)

    def _decoded(self, part: IndexedPart, shape: Shape) -> BaseImages:
        """Cut out and kept in memory, or cut out when asked for."""
        crop = self._centre_crop(shape)
        if self._keeps(part, shape, shape[0]):
            kept = decode_all(part, crop, self.config.on_bad, self.config.workers)
            assert kept is not None  # the crop makes one size of them
            return KeptImages(*kept)
        return DecodedImages(part, crop)

    def _random_crops(self, part: IndexedPart, shape: Shape) -> BaseImages:
        config = self.config
        if not isinstance(part, ArrayPart) and self._keeps(part, None, shape[0]):
            part = keep_raw(part, shape[0], config.on_bad, config.workers, insist=config.cache == "memory")
        return DecodedImages(part, self._train_crop(shape))

    def _keeps(self, part: IndexedPart, shape: Shape | None, channels: int) -> bool:
        if self.config.cache == "auto":
            return is_worth_keeping(part, shape, channels)
        return self.config.cache == "memory"

    def _centre_crop(self, shape: Shape) -> CentreCrop:
        from repvgg.data.image_ops import CentreCrop

        return CentreCrop(self.config, shape[1], shape[0])

    def _train_crop(self, shape: Shape) -> CentreCrop | RandomCrop:
        from repvgg.data.image_ops import RandomCrop

        if self.config.augment.crop != "random-resized":
            return self._centre_crop(shape)
        return RandomCrop(self.config, shape[1], shape[0], self.seed)

    def _policy(self) -> PolicyOps | None:
        if self.config.augment.policy == "none":
            return None
        from repvgg.data.image_ops import PolicyOps

        return PolicyOps(self.config.augment, self.config.interpolation, self.seed)

    def _batch_ops(self, dtype: torch.dtype) -> BatchOps:
        if dtype == torch.uint8:
            black, grey = (0.0,) * len(self.mean), tuple(float(round(255 * mean)) for mean in self.mean)
        else:
            black, grey = tuple(-m / s for m, s in zip(self.mean, self.std, strict=True)), (0.0,) * len(self.mean)
        return BatchOps(self.config.augment, self.seed, black, grey)
