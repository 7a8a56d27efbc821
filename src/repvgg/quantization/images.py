"""The images of a quantization: some to calibrate on, others to select settings on, others to evaluate on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor

from repvgg.data import DataConfig, is_mask_uri
from repvgg.errors import UsageError
from repvgg.quantization.reference import Batches, in_batches

if TYPE_CHECKING:
    from repvgg.data import ImageData, SegmentationData

_SEED = 0  # of the choice of images
_STREAM_BATCH = 64
Shape = tuple[int, int, int]


@final
@dataclass(frozen=True, eq=False)
class QuantizationImages:
    """Images as a network takes them; no image is in two of the sets.

    Attributes:
        calibration: (N, C, H, W), of the training split.
        selection: other images of the training split, on which granularity and bits are compared.
        evaluation: images of the validation split, with labels or masks.
        shape: (C, H, W) of them all.
        task: whether the images have labels or masks.
    """

    calibration: Tensor
    selection: Batches
    evaluation: Batches
    shape: Shape
    task: Literal["classification", "segmentation"]


def open_quantization_images(
    config: DataConfig,
    shape: Shape | None,
    *,
    calibration: int = 128,
    selection: int = 128,
    evaluation: int | None = None,
) -> QuantizationImages:
    """Choose images at random, always the same ones.

    Args:
        config: the data; the size of its images is that of ``shape``.
        shape: (C, H, W) of the images. None: that of the first validation image, of images with masks only. Images
            with masks that have another size are resized, and their masks, too.
        calibration: number of images to calibrate on.
        selection: number of images to select settings on.
        evaluation: number of images to evaluate on; None takes all.

    Raises:
        UsageError: labelled images are not square, or the training split has too few images.
        DataError: see :func:`repvgg.data.open_data`.
    """
    if is_mask_uri(config.uri):
        return _with_masks(config, shape, calibration, selection, evaluation)
    assert shape is not None
    return _with_labels(config, shape, calibration, selection, evaluation)


def open_evaluation_images(config: DataConfig, shape: Shape | None, count: int | None = None) -> Batches:
    """Choose images of the validation split at random, always the same ones, with their labels or masks.

    Args:
        config: as for :func:`open_quantization_images`.
        shape: likewise.
        count: how many; None takes all.

    Raises:
        UsageError: labelled images are not square.
        DataError: see :func:`repvgg.data.open_data`.
    """
    if is_mask_uri(config.uri):
        from repvgg.data import open_evaluation_data

        data = cast("SegmentationData", open_evaluation_data(config, "val"))
        wanted = shape or cast("Shape", data.test_shape)
        return _MaskBatches(data, _order(data.num_val)[:count].tolist(), wanted)
    from repvgg.data import open_image_evaluation_data

    assert shape is not None
    return in_batches(*_labelled(open_image_evaluation_data(_of_size(config, shape), "val"), count))


def _with_labels(
    config: DataConfig, shape: Shape, calibration: int, selection: int, evaluation: int | None
) -> QuantizationImages:
    from repvgg.data import open_image_evaluation_data

    train = open_image_evaluation_data(_of_size(config, shape), "train")
    images, labels = _labelled(train, calibration + selection)
    _check_count(len(images), calibration, selection, config.uri)
    chosen = in_batches(images[calibration:], labels[calibration:])
    test = open_evaluation_images(config, shape, evaluation)
    return QuantizationImages(images[:calibration], chosen, test, shape, "classification")


def _of_size(config: DataConfig, shape: Shape) -> DataConfig:
    _, height, width = shape
    if height != width:
        raise UsageError(f"Data sets give square images: set --input-size N N, the network has {height} x {width}.")
    # Without a cache, which would decode all images for the sake of a few.
    return replace(config, train_size=height, test_size=height, cache="none")


def _labelled(data: ImageData, count: int | None) -> tuple[Tensor, Tensor]:
    """Return ``count`` random images, or all; the first ones of a stream, which cannot be indexed."""
    if data.num_val is not None:
        return data.val_images(_order(data.num_val)[:count])
    found: list[tuple[Tensor, Tensor]] = []
    for batch in data.val_batches(_STREAM_BATCH):
        found.append(batch)
        if count is not None and sum(len(labels) for _, labels in found) >= count:
            break
    if not found:
        raise UsageError("The data has no images to quantize with: check it with 'repvgg data check'.")
    images, labels = (torch.cat(parts)[:count] for parts in zip(*found, strict=True))
    prepared: Tensor = data.prepare(images)
    return prepared, labels


def _with_masks(
    config: DataConfig, shape: Shape | None, calibration: int, selection: int, evaluation: int | None
) -> QuantizationImages:
    from repvgg.data import open_evaluation_data

    train = cast("SegmentationData", open_evaluation_data(config, "train"))
    if shape is None:
        shape = cast("Shape", cast("SegmentationData", open_evaluation_data(config, "val")).test_shape)
    order = _order(train.num_val)[: calibration + selection].tolist()
    _check_count(len(order), calibration, selection, config.uri)
    images = torch.cat([one for one, _ in _MaskBatches(train, order[:calibration], shape)])
    return QuantizationImages(
        images,
        _MaskBatches(train, order[calibration:], shape),
        open_evaluation_images(config, shape, evaluation),
        shape,
        "segmentation",
    )


@final
class _MaskBatches:
    """Images with masks, one at a time, read whenever they are iterated over: they may not fit into memory."""

    def __init__(self, data: SegmentationData, indices: Sequence[int], shape: Shape) -> None:
        self._data = data
        self._indices = indices
        self._size = shape[1:]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        for index in self._indices:
            example = self._data.val_example(index)
            images: Tensor = self._data.prepare(example.pixels[None])
            masks = example.mask[None]
            if images.shape[2:] != self._size:
                images = F.interpolate(images, self._size, mode="bilinear", align_corners=False, antialias=True)
                masks = F.interpolate(masks[None], self._size, mode="nearest-exact")[0]
            yield images, masks


def _order(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(_SEED))


def _check_count(found: int, calibration: int, selection: int, uri: str) -> None:
    if found < calibration + min(selection, 1):
        raise UsageError(
            f"{uri!r} has {found} training images, too few to calibrate on {calibration} and to select settings on "
            "others: lower --calibration-images."
        )
