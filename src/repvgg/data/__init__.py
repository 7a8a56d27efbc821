"""Datasets by URI, and loaders whose batches do not depend on the number of workers or ranks.

The configs are imported at once. Loaders and transforms are imported on first use: PIL and torchvision take longer to
import than all of repvgg, and come with the extra ``train``.
"""

import importlib
from typing import TYPE_CHECKING, Any

from repvgg.data.config import AffineJitter, Augment, DataConfig, MaskAugment, is_mask_uri
from repvgg.errors import require

if TYPE_CHECKING:
    from repvgg.data.check import CheckReport, check_data
    from repvgg.data.dataset import (
        ImageData,
        list_images,
        read_images,
        read_usable_images,
        read_whole_image,
    )
    from repvgg.data.decode import CorruptImage, CorruptImageLog
    from repvgg.data.loaders import TrainLoader, ValLoader
    from repvgg.data.mask_check import MaskReport, check_masks
    from repvgg.data.opening import open_data, open_evaluation_data, open_image_data, open_image_evaluation_data
    from repvgg.data.segmentation import MaskExample, SegmentationData

    BadImages = CorruptImageLog
    HeldOutLoader = ValLoader
    OpenedData = ImageData

_LAZY = {
    "CheckReport": "check",
    "CorruptImage": "decode",
    "CorruptImageLog": "decode",
    "ImageData": "dataset",
    "MaskExample": "segmentation",
    "MaskReport": "mask_check",
    "SegmentationData": "segmentation",
    "TrainLoader": "loaders",
    "ValLoader": "loaders",
    "check_data": "check",
    "check_masks": "mask_check",
    "list_images": "dataset",
    "open_data": "opening",
    "open_evaluation_data": "opening",
    "open_image_data": "opening",
    "open_image_evaluation_data": "opening",
    "read_images": "dataset",
    "read_usable_images": "dataset",
    "read_whole_image": "dataset",
}
_ALIASES = {"BadImages": "CorruptImageLog", "HeldOutLoader": "ValLoader", "OpenedData": "ImageData"}  # former names

__all__ = [
    "AffineJitter",
    "Augment",
    "BadImages",
    "CheckReport",
    "CorruptImage",
    "CorruptImageLog",
    "DataConfig",
    "HeldOutLoader",
    "ImageData",
    "MaskAugment",
    "MaskExample",
    "MaskReport",
    "OpenedData",
    "SegmentationData",
    "TrainLoader",
    "ValLoader",
    "check_data",
    "check_masks",
    "is_mask_uri",
    "list_images",
    "open_data",
    "open_evaluation_data",
    "open_image_data",
    "open_image_evaluation_data",
    "read_images",
    "read_usable_images",
    "read_whole_image",
]


def __getattr__(name: str) -> Any:
    target = _ALIASES.get(name, name)
    if target not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require("PIL", "train")  # the modules below import it at their top
    return getattr(importlib.import_module(f"repvgg.data.{_LAZY[target]}"), target)
