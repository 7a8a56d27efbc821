"""A config → a data set that is ready to train on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from repvgg.data.assembly import Assembly
from repvgg.data.bad import BadImages
from repvgg.data.batching import HeldOutImages, TrainingImages
from repvgg.data.config import DataConfig
from repvgg.data.loading import (
    HeldOutLoader,
    IndexedHeldOutLoader,
    IndexedTrainLoader,
    Share,
    TrainLoader,
)
from repvgg.data.parts import Source, length_of
from repvgg.data.sources import agree, open_source
from repvgg.data.streaming import StreamHeldOutLoader, StreamTrainLoader
from repvgg.errors import DataError, UsageError


def open_data(config: DataConfig, *, seed: int = 0) -> OpenedData:
    """Open a data set: look what is there, check it, and load it if it is kept in memory.

    URIs: ``imagefolder:PATH``, ``torchvision:NAME:PATH[:download]``, ``hf:NAME[:CONFIG]`` and ``webdataset:PATTERN``
    (both need the extra ``data``), ``digits:``, ``fake:[N][xCLASSES]``; the functions in ``repvgg.data.sources`` say
    more about each.

    Args:
        config: which images, and what is done to them.
        seed: of the order of the epochs and of the augmentation.

    Raises:
        UsageError: the config makes no sense for these images.
        DataError: nothing is there, a part is empty, there is one class, classes differ between the parts, a class has
            no images, a label is no class, or an image that is kept in memory cannot be read.
        MissingDependencyError: the source needs an extra.
    """
    source = open_source(config)
    agree(source, config.uri)
    return OpenedData(config, source, seed)


@final
class OpenedData:
    """Images to learn from and images to judge by, with what a model has to know about them.

    Batch t of epoch e over all ranks is ``order[t·G : (t + 1)·G]``, G being the number of images of a step over all
    ranks and ``order`` a function of seed and epoch; the augmentation of an image is a function of seed, epoch and the
    number of the image. Neither depends on workers, ranks, batches, or where a run was resumed. (Streams keep the
    second promise, and the first for a fixed number of ranks and workers.) Torch's random state stays as it is.

    Attributes:
        uri: where they come from.
        classes: one name a label.
        mean: subtracted from pixels in [0, 1], one number a channel.
        std: divided by after that.
        input_shape: (C, H, W) of training images.
        test_shape: (C, H, W) of the images to judge by.
        num_train: images to learn from; None for streams whose length nobody says.
        num_held_out: images to judge by; likewise.
        prepare: uint8 (N, C, H, W) → ``(x / 255 − mean) / std`` in float32, on whichever device it is moved to; what
            is float32 is normalized already, and passes.
        bad: what was skipped so far.
        notes: what a person should know, a sentence each.
    """

    def __init__(self, config: DataConfig, source: Source, seed: int) -> None:
        assert source.held_out is not None
        channels = config.channels or source.channels
        size = config.train_size or source.size
        test_size = config.test_size or size
        self.uri = config.uri
        self.classes = source.train.classes
        self.mean = per_channel("mean", config.mean or source.mean, channels)
        self.std = per_channel("std", config.std or source.std, channels)
        self.input_shape = (channels, size, size)
        self.test_shape = (channels, test_size, test_size)
        self.num_train = length_of(source.train)
        self.num_held_out = length_of(source.held_out)
        self.prepare: nn.Module = Normalize(self.mean, self.std)
        self.bad = BadImages()
        self.notes = source.notes
        self._workers = config.workers
        assemble = Assembly(config, self.mean, self.std, seed)
        self._train = assemble.training(source.train, self.input_shape)
        self._held_out = assemble.held_out(source.held_out, self.test_shape)

    def train_batches(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> TrainLoader:
        """Shuffled, augmented batches, without the last one if it is not full.

        Args:
            batch_size: images a batch of this process.
            rank: this process, of those that train.
            world_size: how many there are.

        Raises:
            UsageError: the images do not fill a batch, or there is no such rank.
        """
        share = Share(batch_size, rank, world_size)
        if isinstance(self._train, TrainingImages):
            return IndexedTrainLoader(self._train, share, self._workers, self.bad)
        return StreamTrainLoader(*self._train, share, self._workers, self.bad)

    def held_out_batches(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> HeldOutLoader:
        """Every image to judge by exactly once over all ranks, in order.

        Args:
            batch_size: images a batch of this process.
            rank: this process.
            world_size: how many there are.

        Raises:
            UsageError: there is no such rank.
        """
        share = Share(batch_size, rank, world_size)
        if isinstance(self._held_out, HeldOutImages):
            workers = 0 if self._held_out.in_memory else self._workers
            return IndexedHeldOutLoader(self._held_out, share, workers, self.bad)
        return StreamHeldOutLoader(*self._held_out, share, self._workers, self.bad)

    def held_out_images(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Some of the images to judge by, prepared, and their labels.

        Raises:
            DataError: one of them is bad, or not there.
        """
        wanted = torch.as_tensor(indices, dtype=torch.int64)
        if isinstance(self._held_out, HeldOutImages):
            loaded = self._held_out.at(wanted)
            if loaded.failure is not None or loaded.bad:
                raise DataError(loaded.failure or f"{loaded.bad[0]}.")
            return self.prepare(loaded.images), loaded.labels
        return self._out_of_stream(wanted)

    def to_pixels(self, images: Tensor) -> Tensor:
        """Map normalized images (…, C, H, W) back to pixels in [0, 1], to look at."""
        mean, std = (
            torch.tensor(values, dtype=images.dtype, device=images.device).reshape(-1, 1, 1)
            for values in (self.mean, self.std)
        )
        return (images * std + mean).clamp(0, 1)

    def _out_of_stream(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        assert not isinstance(self._held_out, HeldOutImages)
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for index, (images, labels) in enumerate(StreamHeldOutLoader(*self._held_out, Share(1), 0, self.bad)):
            if index > int(wanted.max()):
                break
            found[index] = images[0], labels[0]
        missing = sorted(set(wanted.tolist()) - set(found))
        if missing:
            raise DataError(f"{self.uri!r} has no held-out image {missing[0]}.")
        images = torch.stack([found[index][0] for index in wanted.tolist()])
        return self.prepare(images), torch.stack([found[index][1] for index in wanted.tolist()])


@final
class Normalize(nn.Module):
    """Pixels (N, C, H, W) uint8 → ``(x / 255 − mean) / std`` in float32; float32 passes as it is."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).reshape(-1, 1, 1), persistent=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """The images as a model takes them."""
        if x_NCHW.dtype != torch.uint8:
            return x_NCHW
        return x_NCHW.float().div_(255).sub_(self.mean).div_(self.std)


def per_channel(name: str, values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """One number a channel: grey images get the mean of three, and three channels may share one."""
    if len(values) == channels:
        return tuple(values)
    if channels == 1:
        return (sum(values) / len(values),)
    if len(values) == 1:
        return tuple(values) * channels
    raise UsageError(f"{name} holds {len(values)} numbers, and the images have {channels} channels.")
