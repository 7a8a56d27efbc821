"""Open a dataset: from a :class:`~repvgg.data.DataConfig` to labelled images, or to images with masks."""

from __future__ import annotations

from repvgg.data.config import DataConfig, MaskAugment, is_mask_uri
from repvgg.data.dataset import ImageData
from repvgg.data.segmentation import SegmentationData
from repvgg.data.sources import EvalSplit, check_splits, open_evaluation_source, open_source
from repvgg.data.sources.masks import open_mask_evaluation_source, open_mask_source
from repvgg.errors import UsageError


def open_data(config: DataConfig, *, seed: int = 0) -> ImageData | SegmentationData:
    """Open a dataset, check its splits, and load it if it is cached in memory.

    URIs of labelled images: ``imagefolder:PATH``, ``torchvision:NAME:PATH[:download]``, ``hf:NAME[:CONFIG]`` and
    ``webdataset:PATTERN`` (both need the extra ``data``), ``digits:``, ``fake:[N][xCLASSES]``. URIs of images with
    masks: ``masks:PATH[?ignore=LABEL][&classes=N]``, ``cityscapes:PATH``, ``ade20k:PATH``, ``voc:PATH``. See the
    modules of ``repvgg.data.sources``.

    Args:
        config: the dataset and its transforms.
        seed: of the order of the epochs and of the augmentation.

    Returns:
        The data; its ``task`` is "classification" or "segmentation".

    Raises:
        UsageError: the config does not fit these images.
        DataError: the dataset does not exist, a split is empty, there is one class, the classes of the splits differ, a
            class has no images, a label is out of range, an image has no mask, or an image to be cached cannot be read.
        MissingDependencyError: the source needs an extra.
    """
    if is_mask_uri(config.uri):
        return SegmentationData(config, open_mask_source(config), seed)
    return open_image_data(config, seed=seed)


def open_image_data(config: DataConfig, *, seed: int = 0) -> ImageData:
    """Open labelled images as :func:`open_data` does, for what trains classifiers only.

    Raises:
        UsageError: the URI names images with masks.
    """
    _refuse_masks(config)
    source = open_source(config)
    check_splits(source, config.uri)
    return ImageData(config, source, seed)


def open_evaluation_data(config: DataConfig, split: EvalSplit | None = None) -> ImageData | SegmentationData:
    """Open the images of a dataset to evaluate a model on, as the validation images of the result.

    Args:
        config: the dataset and its transforms.
        split: "train" or "val", as :func:`open_data` splits the images, or "all"; None takes the validation split of a
            dataset that has one, and all images of any other, such as a folder of class folders.

    Returns:
        The data; there are no training images, and the first note says which images these are.

    Raises:
        UsageError, DataError, MissingDependencyError: see :func:`open_data`; classes may be without images.
    """
    if is_mask_uri(config.uri):
        return SegmentationData(config, open_mask_evaluation_source(config, split), seed=0)
    return open_image_evaluation_data(config, split)


def open_image_evaluation_data(config: DataConfig, split: EvalSplit | None = None) -> ImageData:
    """Open labelled images as :func:`open_evaluation_data` does.

    Raises:
        UsageError: the URI names images with masks.
    """
    _refuse_masks(config)
    return ImageData(config, open_evaluation_source(config, split), seed=0)


def _refuse_masks(config: DataConfig) -> None:
    for uri in (config.uri, config.val):
        if uri is not None and is_mask_uri(uri):
            raise UsageError(f"{uri!r} holds images with masks: this needs labelled images, as in imagefolder:PATH.")
    if config.augment.mask != MaskAugment() or config.ignore_index is not None:
        raise UsageError(f"{config.uri!r} has no masks: leave augment.mask and ignore_index out.")
