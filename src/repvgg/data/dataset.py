"""Labelled images, opened: loaders, normalization and metadata for classification."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, final

import torch
from torch import Tensor, nn

from repvgg.data.config import IMAGENET_MEAN, IMAGENET_STD, DataConfig, per_channel
from repvgg.data.decode import CorruptImage, CorruptImageLog, decode, is_image_name, to_channels
from repvgg.data.loaders import RankShard, TrainLoader, ValLoader
from repvgg.data.map_style import (
    CachedImages,
    DecodedImages,
    ImageStore,
    MapTrainLoader,
    MapValLoader,
    TrainDataset,
    ValDataset,
    cache_uncropped,
    decode_all,
    should_cache,
)
from repvgg.data.splits import IterableSplit, MapSplit, Source, Split, TensorSplit, num_images
from repvgg.data.streaming import StreamDataset, StreamTrainLoader, StreamValLoader
from repvgg.data.transforms import BatchTransforms, CenterCrop, Crop, PolicyTransform, RandomResizedCrop, pixels_of
from repvgg.errors import DataError, UsageError

Shape = tuple[int, int, int]


@final
class ImageData:
    """Training and validation images, and what a model has to know about them.

    Batch t of epoch e over all ranks is ``order[t·G : (t + 1)·G]``, with G the number of images per step over all ranks
    and ``order`` a function of seed and epoch; the augmentation of an image is a function of seed, epoch and image.
    Neither depends on workers, ranks, batch size, or where a run was resumed. (For streams the second holds always, the
    first for a fixed number of ranks and workers.) Torch's global random state is not changed.

    Attributes:
        uri: of the dataset.
        classes: one name per label.
        mean: subtracted from pixels in [0, 1], one number per channel.
        std: divisor after that.
        input_shape: (C, H, W) of training images.
        test_shape: (C, H, W) of validation images.
        num_train: number of training images; None for a stream of unknown length.
        num_val: number of validation images; None for a stream of unknown length.
        prepare: uint8 (N, C, H, W) → ``(x / 255 − mean) / std`` in float32, on the device to which it is moved; float32
            images are normalized already, and pass unchanged.
        corrupt: the corrupt images that were skipped so far.
        notes: remarks for the user, a sentence each.
    """

    task: Literal["classification"] = "classification"

    def __init__(self, config: DataConfig, source: Source, seed: int) -> None:
        assert source.val is not None  # open_source splits a URI that has none
        channels = config.channels or source.channels
        size = config.train_size or source.size
        test_size = config.test_size or size
        self.uri = config.uri
        self.classes = source.train.classes
        self.mean = per_channel("mean", config.mean or source.mean, channels)
        self.std = per_channel("std", config.std or source.std, channels)
        self.input_shape = (channels, size, size)
        self.test_shape = (channels, test_size, test_size)
        self.num_train = num_images(source.train)
        self.num_val = num_images(source.val)
        self.prepare: nn.Module = Normalize(self.mean, self.std)
        self.corrupt = CorruptImageLog()
        self.notes = source.notes
        self._workers = config.workers
        builder = _DatasetBuilder(config, self.mean, self.std, seed)
        self._train = builder.train(source.train, self.input_shape)
        self._val = builder.val(source.val, self.test_shape)

    def train_batches(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> TrainLoader:
        """Return a loader of shuffled, augmented batches; a last batch that is not full is dropped.

        Args:
            batch_size: images per batch and rank.
            rank: of this process.
            world_size: number of ranks.

        Raises:
            UsageError: the images do not fill a batch, or the rank is out of range.
        """
        shard = RankShard(batch_size, rank, world_size)
        if isinstance(self._train, TrainDataset):
            return MapTrainLoader(self._train, shard, self._workers, self.corrupt)
        return StreamTrainLoader(replace(self._train, shard=shard), self._workers, self.corrupt)

    def val_batches(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> ValLoader:
        """Return a loader of the validation images: each exactly once over all ranks, in order.

        The arguments are those of :meth:`train_batches`.

        Raises:
            UsageError: the rank is out of range.
        """
        shard = RankShard(batch_size, rank, world_size)
        if isinstance(self._val, ValDataset):
            # Images in memory need no worker: copying them between processes takes longer than a slice.
            workers = 0 if self._val.in_memory else self._workers
            return MapValLoader(self._val, shard, workers, self.corrupt)
        return StreamValLoader(replace(self._val, shard=shard), self._workers, self.corrupt)

    def val_images(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Return some validation images, normalized, and their labels.

        Raises:
            DataError: one of them is corrupt or does not exist.
        """
        wanted = torch.as_tensor(indices, dtype=torch.int64)
        if isinstance(self._val, ValDataset):
            loaded = self._val.at(wanted)
            if loaded.failure is not None or loaded.corrupt:
                raise DataError(loaded.failure or f"{loaded.corrupt[0]}.")
            return self.prepare(loaded.images), loaded.labels
        found: dict[int, tuple[Tensor, Tensor]] = {}
        # The default batch size of 1 and no worker: the number of the batch is the index of the image.
        for index, (images, labels) in enumerate(StreamValLoader(self._val, 0, self.corrupt)):
            if index > int(wanted.max()):
                break
            found[index] = images[0], labels[0]
        missing = sorted(set(wanted.tolist()) - set(found))
        if missing:
            raise DataError(f"{self.uri!r} has no validation image {missing[0]}.")
        images = torch.stack([found[index][0] for index in wanted.tolist()])
        return self.prepare(images), torch.stack([found[index][1] for index in wanted.tolist()])

    def to_pixels(self, images: Tensor) -> Tensor:
        """Map normalized images (…, C, H, W) back to pixels in [0, 1], for display."""
        return denormalized(images, self.mean, self.std)

    # Former names.
    held_out_batches = val_batches
    held_out_images = val_images

    @property
    def num_held_out(self) -> int | None:
        return self.num_val

    @property
    def bad(self) -> CorruptImageLog:
        return self.corrupt


@final
class _DatasetBuilder:
    """Builds the datasets of both splits: decides what is cached and which transforms apply."""

    def __init__(self, config: DataConfig, mean: tuple[float, ...], std: tuple[float, ...], seed: int) -> None:
        self._config = config
        self._mean = mean
        self._std = std
        self._seed = seed

    def train(self, split: Split, shape: Shape) -> TrainDataset | StreamDataset:
        config, augment = self._config, self._config.augment
        if augment.crop == "pad" and augment.crop_padding >= shape[1]:
            raise UsageError(
                f"Images of {shape[1]} pixels cannot be padded by reflection with {augment.crop_padding} pixels: "
                f"reduce crop_padding."
            )
        if isinstance(split, IterableSplit):
            transforms = self._batch_transforms(torch.uint8)
            return StreamDataset(split, self._train_crop(shape), transforms, config.on_bad)
        store = self._train_store(split, shape)
        dtype = store.images.dtype if isinstance(store, CachedImages) else torch.uint8  # decoders return uint8
        return TrainDataset(store, split.labels, self._batch_transforms(dtype), config.on_bad)

    def val(self, split: Split, shape: Shape) -> ValDataset | StreamDataset:
        if isinstance(split, IterableSplit):
            return StreamDataset(split, CenterCrop(self._config, shape[1], shape[0]), None, self._config.on_bad)
        store = self._as_tensor(split, shape) or self._center_cropped(split, shape)
        return ValDataset(store, split.labels, self._config.on_bad)

    def _train_store(self, split: MapSplit, shape: Shape) -> ImageStore:
        config, channels = self._config, shape[0]
        if config.augment.crop == "random-resized":
            # A random crop needs the complete image: cache it at its stored size.
            if not isinstance(split, TensorSplit) and self._caches(split, None, channels):
                required = config.cache == "memory"
                split = cache_uncropped(split, channels, config.on_bad, config.workers, required=required)
            return DecodedImages(split, self._train_crop(shape))
        cached = self._as_tensor(split, shape)
        # Policies work on 8-bit images.
        if cached is None or (cached.images.is_floating_point() and config.augment.policy != "none"):
            return self._center_cropped(split, shape)
        return cached

    def _as_tensor(self, split: MapSplit, shape: Shape) -> CachedImages | None:
        """Return the images of a split that are in memory at the right size already; None for any other."""
        if not isinstance(split, TensorSplit) or split.pixels.shape[2:] != shape[1:]:
            return None
        if split.pixels.dtype == torch.uint8:
            # Other numbers of channels are converted through PIL.
            return CachedImages(split.pixels) if split.pixels.shape[1] == shape[0] else None
        # float32 pixels have no 8-bit form without a rounding error: normalize them here, once.
        pixels = split.pixels.expand(-1, shape[0], -1, -1)
        mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in (self._mean, self._std))
        return CachedImages((pixels - mean) / std)

    def _center_cropped(self, split: MapSplit, shape: Shape) -> ImageStore:
        crop = CenterCrop(self._config, shape[1], shape[0])
        if self._caches(split, shape, shape[0]):
            cached = decode_all(split, crop, self._config.on_bad, self._config.workers)
            assert cached is not None  # the crop brings all images to one size
            return cached
        return DecodedImages(split, crop)

    def _caches(self, split: MapSplit, shape: Shape | None, channels: int) -> bool:
        if self._config.cache == "auto":
            return should_cache(split, shape, channels)
        return self._config.cache == "memory"

    def _train_crop(self, shape: Shape) -> Crop:
        if self._config.augment.crop != "random-resized":
            return CenterCrop(self._config, shape[1], shape[0])
        return RandomResizedCrop(self._config, shape[1], shape[0], self._seed)

    def _batch_transforms(self, dtype: torch.dtype) -> BatchTransforms:
        """Return the batch transforms with fills in the units of the images: uint8, or normalized float32."""
        if dtype == torch.uint8:
            black, grey = (0.0,) * len(self._mean), tuple(float(round(255 * mean)) for mean in self._mean)
        else:
            black = tuple(-m / s for m, s in zip(self._mean, self._std, strict=True))
            grey = (0.0,) * len(self._mean)
        augment, policy = self._config.augment, None
        if augment.policy != "none":
            policy = PolicyTransform(augment, self._config.interpolation, self._seed)
        return BatchTransforms(augment, self._seed, black, grey, policy)


@final
class Normalize(nn.Module):
    """Pixels (N, C, H, W) uint8 → ``(x / 255 − mean) / std`` in float32; float32 images pass unchanged."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        for name, values in (("mean", mean), ("std", std)):
            # Buffers, to move with the module; not persistent, as checkpoints hold the model only.
            self.register_buffer(name, torch.tensor(values).reshape(-1, 1, 1), persistent=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        if x_NCHW.dtype != torch.uint8:
            return x_NCHW
        # In place on the fresh float32 tensor; this order of operations is bitwise torchvision's.
        return x_NCHW.float().div_(255).sub_(self.mean).div_(self.std)


def denormalized(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Map normalized images (…, C, H, W) back to pixels in [0, 1]."""
    shift, scale = (
        torch.tensor(values, dtype=images.dtype, device=images.device).reshape(-1, 1, 1) for values in (mean, std)
    )
    return (images * scale + shift).clamp(0, 1)


def list_images(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Return the given files, and for each folder the image files directly in it, sorted by name.

    Raises:
        DataError: a path does not exist, or a folder cannot be listed or holds no images.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found += _images_in(path)
        elif path.exists():
            found.append(path)
        else:
            raise DataError(f"There is no file {str(path)!r}.")
    return found


def _images_in(folder: Path) -> list[Path]:
    try:
        # A FIFO or a device stays in the list: decode() reports it.
        found = sorted(path for path in folder.iterdir() if is_image_name(path.name) and not path.is_dir())
    except OSError as error:
        raise DataError(f"{str(folder)!r} cannot be listed: {error.strerror or error}.") from error
    if not found:
        raise DataError(f"The folder {str(folder)!r} holds no images: name another folder, or files.")
    return found


def read_images(files: Sequence[Path], config: DataConfig, size: int, channels: int) -> Tensor:
    """Read images as a model takes them in validation: centre-cropped and normalized, (N, C, H, W) in float32.

    Args:
        files: the images.
        config: supplies the crop, and mean and std (default: ImageNet's).
        size: height and width.
        channels: 1 or 3.

    Raises:
        DataError: an image is corrupt.
    """
    images, _, corrupt = read_usable_images(files, config, size, channels)
    if corrupt:
        raise DataError(f"{corrupt[0]}: fix it, or leave it out.")
    return images


def read_whole_image(path: Path, config: DataConfig, channels: int) -> tuple[Tensor, Tensor] | CorruptImage:
    """Read an image as a segmentation network takes it: in its own size.

    Args:
        path: the file.
        config: supplies mean and std (default: ImageNet's).
        channels: 1 or 3.

    Returns:
        The pixels (C, H, W) uint8, and the same normalized, (1, C, H, W) in float32; or what is wrong with the file.
    """
    image = decode(path, str(path))
    converted = image if isinstance(image, CorruptImage) else to_channels(image, channels, str(path))
    if isinstance(converted, CorruptImage):
        return converted
    pixels = pixels_of(converted)
    return pixels, _normalization(config, channels)(pixels[None])


def _normalization(config: DataConfig, channels: int) -> Normalize:
    mean, std = config.mean or IMAGENET_MEAN, config.std or IMAGENET_STD
    return Normalize(per_channel("mean", mean, channels), per_channel("std", std, channels))


def read_usable_images(
    files: Sequence[Path], config: DataConfig, size: int, channels: int
) -> tuple[Tensor, list[Path], list[CorruptImage]]:
    """Read those images that can be read; see :func:`read_images`.

    Returns:
        The images, their files, and the corrupt images, each in the order of ``files``.
    """
    crop = CenterCrop(config, size, channels)
    pixels, usable, corrupt = [], [], []
    for path in files:
        image = decode(path, str(path))
        cropped = image if isinstance(image, CorruptImage) else crop(image, str(path))
        if isinstance(cropped, CorruptImage):
            corrupt.append(cropped)
        else:
            pixels.append(cropped)
            usable.append(path)
    images: Tensor = (
        _normalization(config, channels)(torch.stack(pixels)) if pixels else torch.zeros(0, channels, size, size)
    )
    return images, usable, corrupt
