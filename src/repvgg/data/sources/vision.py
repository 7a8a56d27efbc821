"""``torchvision:NAME:PATH[:download]``: any of torchvision's classification data sets."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from PIL import Image
from torch import Tensor

from repvgg.data.config import IMAGENET_MEAN, IMAGENET_STD
from repvgg.data.decoding import Bad
from repvgg.data.parts import ArrayPart, IndexedPart, Source
from repvgg.data.uri import DataUri
from repvgg.errors import DataError, UsageError, first_line

_TRAIN_SPLITS = ("train", "trainval")
_HELD_OUT_SPLITS = ("val", "valid", "validation", "test")
_LABELS = ("targets", "labels", "_labels", "y")
_SAMPLES = ("_samples", "samples", "_image_files", "_images")
_USUAL = {  # mean and std of the training pixels, rounded as most people use them
    "CIFAR10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "CIFAR100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "MNIST": ((0.1307,), (0.3081,)),
    "FashionMNIST": ((0.2860,), (0.3530,)),
    "SVHN": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
}


def open_vision(uri: DataUri) -> Source:
    """A data set of torchvision with its own parts, chosen by ``train=`` or ``split=``, whichever it takes.

    Raises:
        UsageError: no such data set, or no path.
        DataError: it is not there and ``:download`` is not given, or its labels are not classes.
    """
    name, path, download = _split(uri)
    kind = _kind(name)
    parameters = inspect.signature(kind).parameters
    options: dict[str, Any] = {"download": True} if download and "download" in parameters else {}
    make = _maker(kind, path, options, uri)
    train, held_out = _parts(make, "train" in parameters, "split" in parameters, uri)
    images = _part(kind.__name__, train)
    judged = None if held_out is None else _part(kind.__name__, held_out)
    channels, size = _shape(images)
    mean, std = _USUAL.get(kind.__name__, (IMAGENET_MEAN, IMAGENET_STD))
    return Source(images, judged, channels, size, mean, std)


def _split(uri: DataUri) -> tuple[str, str, bool]:
    name, _, path = uri.rest.partition(":")
    download = path.endswith(":download")
    path = path.removesuffix(":download")
    uri.check_options()
    if not name or not path:
        raise UsageError(f"{uri.text!r} lacks a part: write torchvision:NAME:PATH, as in torchvision:CIFAR10:data.")
    return name, path, download


def _kind(name: str) -> Callable[..., Any]:
    from torchvision import datasets

    known = {key.lower(): key for key in datasets.__all__ if inspect.isclass(vars(datasets).get(key))}
    if name.lower() not in known:
        raise UsageError(f"torchvision has no data set {name!r}: see torchvision.datasets for their names.")
    kind: Callable[..., Any] = vars(datasets)[known[name.lower()]]
    return kind


def _maker(kind: Callable[..., Any], path: str, options: dict[str, Any], uri: DataUri) -> Callable[..., Any]:
    def make(**which: Any) -> Any:
        try:
            return kind(path, **which, **options)
        except (RuntimeError, OSError, ImportError, TypeError) as error:
            hint = "" if options else f" (to fetch it: {uri.text}:download)"
            raise DataError(f"{uri.text!r} cannot be opened{hint}: {first_line(error)}.") from error

    return make


def _parts(make: Callable[..., Any], by_train: bool, by_split: bool, uri: DataUri) -> tuple[Any, Any | None]:
    if by_train:
        return make(train=True), make(train=False)
    if not by_split:
        return make(), None
    return _first(make, _TRAIN_SPLITS, uri), _first(make, _HELD_OUT_SPLITS, uri)


def _first(make: Callable[..., Any], names: Sequence[str], uri: DataUri) -> Any:
    """The first split that the data set knows: it raises ValueError for others."""
    for name in names:
        try:
            return make(split=name)
        except ValueError:
            continue
    raise DataError(f"{uri.text!r} has none of the splits {', '.join(names)}.")


def _part(name: str, dataset: Any) -> IndexedPart:
    values = {name: value for kind in reversed(type(dataset).__mro__) for name, value in vars(kind).items()}
    values |= vars(dataset)
    labels = _labels(name, dataset, values)
    classes = _classes(values.get("classes"), labels)
    data = values.get("data")
    array = torch.from_numpy(data) if type(data).__module__ == "numpy" else data
    if isinstance(array, Tensor) and array.dtype == torch.uint8 and len(array) == len(labels):
        return ArrayPart(name, _channels_first(array), labels, classes)
    return VisionPart(name, dataset, labels, classes, _paths(values, len(labels)))


def _labels(name: str, dataset: Any, values: dict[str, Any]) -> Tensor:
    found = next((values[key] for key in _LABELS if isinstance(values.get(key), (list, tuple, Tensor))), None)
    if found is None:
        found = next((values[key] for key in _LABELS if type(values.get(key)).__module__ == "numpy"), None)
    if found is None and isinstance(values.get("_samples"), list):
        found = [sample[1] for sample in values["_samples"]]
    try:
        if found is None:
            found = [dataset[index][1] for index in range(len(dataset))]
        return torch.as_tensor(found).to(torch.int64).reshape(len(dataset))
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{name} does not give one class an image: it is no classification data set.") from error


def _classes(names: Any, labels: Tensor) -> tuple[str, ...]:
    """Names, of which ImageNet has several a class; or else numbers."""
    if names is None or isinstance(names, property):
        return tuple(map(str, range(int(labels.max()) + 1 if len(labels) else 0)))
    return tuple(name if isinstance(name, str) else ", ".join(name) for name in names)


def _channels_first(array: Tensor) -> Tensor:
    if array.ndim == 3:
        return array.unsqueeze(1)
    return array if array.shape[1] in (1, 3) else array.permute(0, 3, 1, 2).contiguous()


def _paths(values: dict[str, Any], length: int) -> list[str] | None:
    for key in _SAMPLES:
        rows = values.get(key)
        if isinstance(rows, list) and len(rows) == length:
            return [str(row[0] if isinstance(row, tuple) else row) for row in rows]
    return None


def _shape(part: IndexedPart) -> tuple[int, int]:
    """Channels, and height and width of training images."""
    if isinstance(part, ArrayPart):
        return part.pixels.shape[1], part.pixels.shape[2]
    return 3, Source.size


@final
class VisionPart(IndexedPart):
    """A data set of torchvision that reads an image when it is asked for."""

    def __init__(
        self, name: str, dataset: Any, labels: Tensor, classes: tuple[str, ...], paths: list[str] | None
    ) -> None:
        self.classes = classes
        self.labels = labels
        self._name = name
        self._dataset = dataset
        self._paths = paths

    def where(self, index: int) -> str:
        """See :meth:`IndexedPart.where`."""
        return self._paths[index] if self._paths else f"{self._name} image {index}"

    def image(self, index: int) -> Image.Image | Bad:
        """See :meth:`IndexedPart.image`."""
        if self._paths:
            from pathlib import Path

            from repvgg.data.decoding import decode

            return decode(Path(self._paths[index]), self.where(index))
        try:
            image = self._dataset[index][0]
        except (OSError, ValueError, SyntaxError) as error:
            return Bad(self.where(index), "broken", f"cannot be decoded: {error}")
        if not isinstance(image, Image.Image):
            raise DataError(f"{self._name} gives no images but {type(image).__name__}.")
        return image
