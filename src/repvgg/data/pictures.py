"""Images that a person names one by one, as a model takes the images that it is judged by."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from repvgg.data.config import IMAGENET_MEAN, IMAGENET_STD, DataConfig
from repvgg.data.decoding import Bad, decode
from repvgg.data.image_ops import CentreCrop
from repvgg.data.opening import Normalize, per_channel
from repvgg.data.sources.folder import is_image_name
from repvgg.errors import DataError


def image_files(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The files, and those of each folder that are named as images are, by name.

    Raises:
        DataError: something is not there, a folder holds no image, or cannot be listed.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found += _in_folder(path)
        elif path.exists():
            found.append(path)
        else:
            raise DataError(f"There is no file {str(path)!r}.")
    return found


def _in_folder(folder: Path) -> list[Path]:
    try:
        found = sorted(path for path in folder.iterdir() if is_image_name(path.name) and path.is_file())
    except OSError as error:
        raise DataError(f"{str(folder)!r} cannot be listed: {error.strerror or error}.") from error
    if not found:
        raise DataError(f"The folder {str(folder)!r} holds no images: name a folder that does, or files.")
    return found


def read_pictures(files: Sequence[Path], config: DataConfig, size: int, channels: int) -> Tensor:
    """Images (N, C, H, W) in float32: the centre of each, with mean and standard deviation taken out.

    Args:
        files: the images.
        config: how they are cut; its mean and std are ImageNet's if it has none.
        size: height and width.
        channels: 1 or 3.

    Raises:
        DataError: one of them is no image that can be read.
    """
    crop = CentreCrop(config, size, channels)
    pixels = torch.stack([_read(path, crop) for path in files])
    mean, std = config.mean or IMAGENET_MEAN, config.std or IMAGENET_STD
    prepared: Tensor = Normalize(per_channel("mean", mean, channels), per_channel("std", std, channels))(pixels)
    return prepared


def _read(path: Path, crop: CentreCrop) -> Tensor:
    image = decode(path, str(path))
    pixels = image if isinstance(image, Bad) else crop(image, str(path))
    if isinstance(pixels, Bad):
        raise DataError(f"{pixels}: mend it, or leave it out.")
    return pixels
