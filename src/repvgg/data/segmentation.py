"""Images with masks, opened: loaders, normalization and metadata for semantic segmentation."""

from __future__ import annotations

from typing import Literal, NamedTuple, final

import torch
from torch import Tensor, nn

from repvgg.data.config import IMAGENET_MEAN, IMAGENET_STD, Augment, DataConfig, per_channel
from repvgg.data.dataset import Normalize, denormalized
from repvgg.data.decode import CorruptImage, CorruptImageLog
from repvgg.data.label_sets import IGNORE_INDEX
from repvgg.data.loaders import LoadedBatch, RankShard, TrainLoader, ValLoader
from repvgg.data.map_style import BatchRequest, ImageStore, MapTrainLoader, MapValLoader, TrainDataset, ValDataset
from repvgg.data.mask_files import CachedPairs, DecodedPairs, MaskSplit, PairSource, fits_in_cache
from repvgg.data.mask_transforms import MaskCrop, packed
from repvgg.data.sources.masks import MaskSource
from repvgg.data.transforms import BatchTransforms
from repvgg.errors import DataError, UsageError


class MaskExample(NamedTuple):
    """One validation image at its stored size."""

    name: str
    pixels: Tensor  # (C, H, W) uint8
    mask: Tensor  # (H, W) uint8


@final
class SegmentationData:
    """Training and validation images with masks, and what a model has to know about them.

    The batches of an epoch depend on seed, epoch and image only, as those of :class:`~repvgg.data.ImageData` do.
    Masks are uint8 classes (convert them with ``.long()`` for a loss); ignored pixels are 255.

    Attributes:
        uri: of the dataset.
        classes: one name per class.
        palette: (K, 3) uint8, a colour per class: those of the dataset where it has some.
        ignore_index: 255, whatever the files store.
        mean: subtracted from pixels in [0, 1], one number per channel.
        std: divisor after that.
        input_shape: (C, H, W) of training images.
        test_shape: (C, H, W) of the first validation image; they have various sizes.
        num_train: number of training images.
        num_val: number of validation images.
        val_names: of the validation images, in order: the file name without extension, with its folders.
        prepare: uint8 (N, C, H, W) → ``(x / 255 − mean) / std`` in float32.
        corrupt: the corrupt images that were skipped so far.
        notes: remarks for the user, a sentence each.
    """

    task: Literal["segmentation"] = "segmentation"
    ignore_index = IGNORE_INDEX

    def __init__(self, config: DataConfig, source: MaskSource, seed: int) -> None:
        assert source.val is not None  # open_mask_source splits a URI that has none
        _check_config(config)
        channels, size = config.channels or 3, config.train_size or source.size
        self.uri = config.uri
        self.classes = source.val.labels.names
        self.palette = torch.from_numpy(source.val.labels.palette.copy())
        self.mean = per_channel("mean", config.mean or IMAGENET_MEAN, channels)
        self.std = per_channel("std", config.std or IMAGENET_STD, channels)
        self.input_shape = (channels, size, size)
        self.num_train = len(source.train)
        self.num_val = len(source.val)
        self.val_names = source.val.names
        width, height = source.val.size(0) or (size, size)
        self.test_shape = (channels, height, width)
        self.prepare: nn.Module = Normalize(self.mean, self.std)
        self.corrupt = CorruptImageLog()
        self.notes = source.notes + _notes(source.train, size)
        self._workers = config.workers
        self._val_split = source.val
        fill = tuple(round(255 * value) for value in self.mean)
        crop = MaskCrop(config.augment.mask, config.augment.flip, size, fill, config.interpolation, seed)
        # The crop above augments the images. These batch transforms change nothing; they carry the seed of the order.
        unchanged = BatchTransforms(Augment(), seed, (0.0,) * channels, (0.0,) * channels)
        is_cached = config.cache == "memory" or (config.cache == "auto" and fits_in_cache(source.train, channels))
        train_store = _CroppedPairs(_pairs(source.train, config, channels, is_cached), crop)
        self._train = _MaskTrainDataset(train_store, torch.arange(self.num_train), unchanged, config.on_bad)
        # Validation reads each image once per epoch and runs the network on all of it: decoding costs little there.
        val_store = _WholePairs(_pairs(source.val, config, channels, config.cache == "memory"))
        self._val = _MaskValDataset(val_store, torch.arange(self.num_val), config.on_bad)

    def train_batches(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> TrainLoader:
        """Return a loader of shuffled, augmented batches: images (n, C, S, S) and masks (n, S, S), both uint8.

        Args:
            batch_size: images per batch and rank.
            rank: of this process.
            world_size: number of ranks.

        Raises:
            UsageError: the images do not fill a batch, or the rank is out of range.
        """
        return MapTrainLoader(self._train, RankShard(batch_size, rank, world_size), self._workers, self.corrupt)

    def val_batches(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> ValLoader:
        """Return a loader of the validation images as stored: (n, C, H, W) and masks (n, H, W), both uint8.

        Each image comes exactly once over all ranks, in order. A batch holds up to ``batch_size`` images that follow
        one another and have the same size.

        Raises:
            UsageError: the rank is out of range.
        """
        shard = RankShard(batch_size, rank, world_size)
        sizes = None if batch_size == 1 else [self._val_split.size(index) for index in range(self.num_val)]
        return MapValLoader(self._val, shard, self._workers, self.corrupt, sizes)

    def val_example(self, index: int) -> MaskExample:
        """Return one validation image.

        Raises:
            DataError: it is corrupt.
        """
        pair = self._val_split.pair(index, self.input_shape[0])
        if isinstance(pair, CorruptImage):
            raise DataError(f"{pair}.")
        both = packed(pair)
        return MaskExample(self.val_names[index], both[:-1], both[-1])

    def to_pixels(self, images: Tensor) -> Tensor:
        """Map normalized images (…, C, H, W) back to pixels in [0, 1], for display."""
        return denormalized(images, self.mean, self.std)


def _check_config(config: DataConfig) -> None:
    """Raise UsageError for settings that images with masks have no use for."""
    augment = config.augment
    plain = Augment(flip=augment.flip, mask=augment.mask)
    for name in ("crop", "policy", "erase", "jitter"):
        if getattr(augment, name) != getattr(plain, name):
            raise UsageError(
                f"augment.{name} does not apply to images with masks: set it to {getattr(plain, name)!r}, and use "
                f"augment.mask and augment.flip."
            )
    if config.test_size is not None:
        raise UsageError("test_size does not apply to images with masks, which are evaluated as stored: leave it out.")


def _notes(split: MaskSplit, size: int) -> tuple[str, ...]:
    small = [(width, height) for width, height in split.probed_sizes() if min(width, height) < size]
    if not small:
        return ()
    width, height = min(small, key=min)
    return (
        f"Crops of {size}x{size} pixels are larger than some images ({width}x{height}): the rest of a crop is the mean "
        f"colour, and ignored.",
    )


def _pairs(split: MaskSplit, config: DataConfig, channels: int, is_cached: bool) -> PairSource:
    if is_cached:
        return CachedPairs(split, channels, config.on_bad, config.workers)
    return DecodedPairs(split, channels)


@final
class _CroppedPairs(ImageStore):
    """Random crops (C + 1, S, S): the image, and its mask as the last channel."""

    def __init__(self, pairs: PairSource, crop: MaskCrop) -> None:
        self._pairs = pairs
        self._crop = crop

    def load(self, index: int, epoch: int) -> Tensor | CorruptImage:
        pair = self._pairs.pair(index)
        return pair if isinstance(pair, CorruptImage) else self._crop(pair, epoch, index)

    def load_batch(self, indices: Tensor, epoch: int) -> Tensor | None:
        return None


@final
class _WholePairs(ImageStore):
    """Images as stored (C + 1, H, W), the mask as the last channel."""

    def __init__(self, pairs: PairSource) -> None:
        self._pairs = pairs

    def load(self, index: int, epoch: int) -> Tensor | CorruptImage:
        pair = self._pairs.pair(index)
        return pair if isinstance(pair, CorruptImage) else packed(pair)

    def load_batch(self, indices: Tensor, epoch: int) -> Tensor | None:
        return None


@final
class _MaskTrainDataset(TrainDataset):
    def __getitems__(self, request: BatchRequest) -> LoadedBatch:
        return _split_mask(super().__getitems__(request))


@final
class _MaskValDataset(ValDataset):
    def at(self, indices: Tensor) -> LoadedBatch:
        return _split_mask(super().at(indices))


def _split_mask(batch: LoadedBatch) -> LoadedBatch:
    """Move the last channel of the images to the place of the labels."""
    if not len(batch.labels):  # all images are corrupt
        return batch
    both = batch.images
    return batch._replace(images=both[:, :-1].contiguous(), labels=both[:, -1].contiguous())
