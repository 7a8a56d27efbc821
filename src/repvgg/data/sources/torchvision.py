"""``torchvision:NAME:PATH[:download]``: any classification dataset of torchvision."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, final

import torch
from PIL import Image
from torch import Tensor

from repvgg.data.config import IMAGENET_MEAN, IMAGENET_STD, DataUri
from repvgg.data.decode import CorruptImage, decode
from repvgg.data.splits import DEFAULT_SIZE, MapSplit, Source, TensorSplit
from repvgg.errors import DataError, UsageError, first_line, require

_TRAIN_SPLITS = ("train", "trainval")
_VAL_SPLITS = ("val", "valid", "validation", "test")
# torchvision's datasets share no interface for labels and paths: these are the attributes in use, most common first.
_LABELS = ("targets", "labels", "_labels", "y")
_SAMPLES = ("_samples", "samples", "_image_files", "_images")
_STATISTICS = {  # mean and std of the training pixels, as commonly rounded
    "CIFAR10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "CIFAR100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "MNIST": ((0.1307,), (0.3081,)),
    "FashionMNIST": ((0.2860,), (0.3530,)),
    "SVHN": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
}


def open_torchvision(uri: DataUri) -> Source:
    """Open a dataset with its own splits, selected by ``train=`` or ``split=``, whichever its constructor takes.

    Raises:
        UsageError: the dataset is unknown, or the path is missing.
        DataError: it does not exist on disk and ``:download`` is not given, or its labels are not classes.
        MissingDependencyError: torchvision is not installed.
    """
    uri.check_options()
    name, _, path = uri.rest.partition(":")
    download = path.endswith(":download")
    path = path.removesuffix(":download")
    if not name or not path:
        raise UsageError(f"{uri.text!r} is incomplete: write torchvision:NAME:PATH, as in torchvision:CIFAR10:data.")
    kind = _dataset_class(name)
    parameters = inspect.signature(kind).parameters
    options: dict[str, Any] = {"download": True} if download and "download" in parameters else {}

    def make(**which: Any) -> Any:
        try:
            return kind(path, **which, **options)
        except (RuntimeError, OSError, ImportError, TypeError) as error:
            hint = "" if options else f" (to download it: {uri.text}:download)"
            raise DataError(f"{uri.text!r} cannot be opened{hint}: {first_line(error)}.") from error

    if "train" in parameters:
        train, val = make(train=True), make(train=False)
    elif "split" in parameters:
        train, val = _first_split(make, _TRAIN_SPLITS, uri), _first_split(make, _VAL_SPLITS, uri)
    else:
        train, val = make(), None
    split = _split(kind.__name__, train)
    # Arrays have one size, so it is the default; files have many.
    tensor = split.pixels if isinstance(split, TensorSplit) else None
    channels, size = (3, DEFAULT_SIZE) if tensor is None else (tensor.shape[1], tensor.shape[2])
    mean, std = _STATISTICS.get(kind.__name__, (IMAGENET_MEAN, IMAGENET_STD))
    return Source(split, None if val is None else _split(kind.__name__, val), channels, size, mean, std)


def _dataset_class(name: str) -> Any:
    datasets = require("torchvision.datasets", "train")
    known = {key.lower(): key for key in datasets.__all__ if inspect.isclass(vars(datasets).get(key))}
    if name.lower() not in known:
        raise UsageError(f"torchvision has no dataset {name!r}: see torchvision.datasets for the names.")
    return vars(datasets)[known[name.lower()]]


def _first_split(make: Callable[..., Any], names: Sequence[str], uri: DataUri) -> Any:
    for name in names:
        try:
            return make(split=name)
        except ValueError:  # torchvision's answer to a split that the dataset does not have
            continue
    raise DataError(f"{uri.text!r} has none of the splits {', '.join(names)}.")


def _split(name: str, dataset: Any) -> MapSplit:
    # Attributes of the instance and of its classes, without running properties (some read the whole dataset).
    values = {name: value for kind in reversed(type(dataset).__mro__) for name, value in vars(kind).items()}
    values |= vars(dataset)
    labels = _labels(name, dataset, values)
    classes = _classes(values.get("classes"), labels)
    data = values.get("data")
    array = torch.from_numpy(data) if type(data).__module__ == "numpy" else data
    if isinstance(array, Tensor) and array.dtype == torch.uint8 and len(array) == len(labels):
        return TensorSplit(name, _channels_first(array), labels, classes)
    return TorchvisionSplit(name, dataset, labels, classes, _paths(values, len(labels)))


def _labels(name: str, dataset: Any, values: dict[str, Any]) -> Tensor:
    found = next((values[key] for key in _LABELS if isinstance(values.get(key), (list, tuple, Tensor))), None)
    if found is None:
        found = next((values[key] for key in _LABELS if type(values.get(key)).__module__ == "numpy"), None)
    if found is None and isinstance(values.get("_samples"), list):
        found = [sample[1] for sample in values["_samples"]]
    try:
        if found is None:  # last resort: decodes every image
            found = [dataset[index][1] for index in range(len(dataset))]
        return torch.as_tensor(found).to(torch.int64).reshape(len(dataset))
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{name} is not a classification dataset: it does not give one class per image.") from error


def _classes(names: Any, labels: Tensor) -> tuple[str, ...]:
    """Return the names of the classes (ImageNet has several per class, joined by commas), or their numbers."""
    if names is None or isinstance(names, property):
        return tuple(map(str, range(int(labels.max()) + 1 if len(labels) else 0)))
    return tuple(name if isinstance(name, str) else ", ".join(name) for name in names)


def _channels_first(array: Tensor) -> Tensor:
    if array.ndim == 3:
        return array.unsqueeze(1)
    return array if array.shape[1] in (1, 3) else array.permute(0, 3, 1, 2).contiguous()


def _paths(values: dict[str, Any], length: int) -> list[str] | None:
    for key in _SAMPLES:
        samples = values.get(key)
        if isinstance(samples, list) and len(samples) == length:
            return [str(sample[0] if isinstance(sample, tuple) else sample) for sample in samples]
    return None


@final
class TorchvisionSplit(MapSplit):
    """A dataset of torchvision that reads images on access."""

    def __init__(
        self, name: str, dataset: Any, labels: Tensor, classes: tuple[str, ...], paths: list[str] | None
    ) -> None:
        self.classes = classes
        self.labels = labels
        self._name = name
        self._dataset = dataset
        self._paths = paths

    def location(self, index: int) -> str:
        return self._paths[index] if self._paths else f"{self._name} image {index}"

    def image(self, index: int) -> Image.Image | CorruptImage:
        if self._paths:  # our decoder: torchvision's loader converts to RGB and does not name the file in its errors
            return decode(Path(self._paths[index]), self.location(index))
        try:
            image = self._dataset[index][0]
        except (OSError, ValueError, SyntaxError) as error:
            return CorruptImage(self.location(index), "broken", f"cannot be decoded: {error}")
        if not isinstance(image, Image.Image):
            raise DataError(f"{self._name} must return images, got {type(image).__name__}.")
        return image
