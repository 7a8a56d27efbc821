"""Sources read from local files or computed: ``imagefolder:``, ``torchvision:``, ``digits:`` and ``fake:``."""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
import torch.nn.functional as F
from PIL import EpsImagePlugin, Image
from torch import Tensor

from repvgg.data.config import IMAGENET_MEAN, IMAGENET_STD, DataUri
from repvgg.data.counter_rng import random_bits
from repvgg.data.decode import CorruptImage, decode, is_image_name, to_pil, upright
from repvgg.data.splits import DEFAULT_SIZE, FileSplit, MapSplit, Source, TensorSplit
from repvgg.errors import DataError, UsageError, first_line, require

# imagefolder:

TRAIN_FOLDER = "train"
VAL_FOLDERS = ("val", "validation", "valid", "test")  # the first that exists is used
_NOT_CLASSES = ("__MACOSX", "__pycache__")  # left behind by archivers and Python


def open_folder(uri: DataUri) -> Source:
    """Open the images below ``PATH/train`` and ``PATH/val`` (or validation, valid, test), or below ``PATH`` itself.

    Classes are the names of the folders, sorted. Names that start with a dot are ignored, and so are files with other
    extensions than jpg, jpeg, png, bmp, webp, tif, tiff and ppm (in any case).

    Raises:
        DataError: the folder does not exist, or contains no class folders.
    """
    root = Path(os.path.expanduser(uri.rest))
    if not uri.rest or not root.is_dir():
        raise DataError(f"There is no folder {str(root) if uri.rest else ''!r}: give one as imagefolder:PATH.")
    notes: list[str] = []
    if not (root / TRAIN_FOLDER).is_dir():
        return Source(_read_folder(root, notes), None, notes=tuple(notes))
    train = _read_folder(root / TRAIN_FOLDER, notes)
    present = [name for name in VAL_FOLDERS if (root / name).is_dir()]
    val = _read_folder(root / present[0], notes) if present else None
    notes += [f"{name}/ is ignored: the validation images are those of {present[0]}/." for name in present[1:]]
    return Source(train, val, notes=tuple(notes))


def _read_folder(folder: Path, notes: list[str]) -> FileSplit:
    """Read the names of the images in the class folders of ``folder``; append to ``notes`` what was not read."""
    try:
        classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and _is_class_name(entry.name))
        if not classes:
            raise DataError(f"{str(folder)!r} contains no class folders: put the images of each class in a folder.")
        found: list[tuple[str, int]] = []
        repeated: list[str] = []
        for label, name in enumerate(classes):
            # The order of torchvision's ImageFolder.
            for below, files in walk(folder / name, repeated):
                found += [(os.path.join(below, file), label) for file in files if is_image_name(file)]
    except OSError as error:
        raise DataError(f"{str(folder)!r} cannot be read: {error.strerror or error}.") from error
    start = len(os.path.join(folder, ""))  # keep paths relative: the folder is the same for a million of them
    if repeated:
        more = f" and {len(repeated) - 1} more" if len(repeated) > 1 else ""
        notes.append(f"Not entered, because it leads to a folder that is read already: {repeated[0]!r}{more}.")
    labels = torch.tensor([label for _, label in found], dtype=torch.int64)
    return FileSplit(folder, [path[start:] for path, _ in found], labels, tuple(classes))


def walk(folder: Path, repeated: list[str]) -> list[tuple[str, list[str]]]:
    """Return ``folder`` and all folders below it, each with its file names, both sorted; links are followed.

    Each folder is entered once: links in a circle would have no end, and several in one folder grow exponentially.
    The others are appended to ``repeated``.
    """
    found = []
    entered = {_identity(os.stat(folder))}
    for below, folders, files in os.walk(folder, followlinks=True):
        found.append((below, sorted(files)))
        fresh = []
        # Links last: where a folder lies beside a link to it, its files get its own name.
        for name in sorted(folders, key=lambda name: (os.path.islink(os.path.join(below, name)), name)):
            path = os.path.join(below, name)
            identity = _identity(os.stat(path))
            if identity in entered:
                repeated.append(path)
            else:
                entered.add(identity)
                fresh.append(name)
        folders[:] = fresh
    return sorted(found)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _is_class_name(name: str) -> bool:
    return not name.startswith(".") and name not in _NOT_CLASSES


def ignored_files(folder: Path) -> list[str]:
    """Return the files in the class folders of ``folder`` that are not hidden and have no image extension."""
    found = []
    for name in sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and _is_class_name(entry.name)):
        for below, files in walk(folder / name, []):
            paths = (os.path.join(below, file) for file in files if _is_class_name(file))
            found += [path for path in paths if not is_image_name(path)]
    return found


# digits:

_DIGITS_SIZE = 32  # pixels
_DIGITS_VAL_FRACTION = 0.2
_DIGITS_SPLIT_STATE = 0  # fixed: the seed of a run must not move images between the splits


@final
@dataclass(frozen=True)
class Digits:
    """The digits before normalization."""

    pixels: Tensor  # (1797, 1, H, W) float32 in [0, 1]
    labels: Tensor  # (1797,) int64
    train: Tensor  # ascending indices of the training images
    val: Tensor  # ascending indices of the validation images
    mean: float  # of all training pixels
    std: float  # of all training pixels


def load_digits(size: int) -> Digits:
    """Load the 1797 digits of scikit-learn: 1437 to train and 360 to validate, stratified by class, always the same.

    The scans are 8x8 with 17 grey levels. They are scaled to [0, 1] and resized bilinearly to ``size`` x ``size``, with
    one channel in float32.

    Raises:
        UsageError: ``size`` is below 8.

    Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI (its test part), doi 10.24432/C50P49.
    """
    if size < 8:
        raise UsageError(f"The digits are scans of 8x8 pixels and are never downscaled: size {size} is below 8.")
    scans = require("sklearn.datasets", "train").load_digits()
    pixels_N1HW = torch.from_numpy(scans.images).float().div(16).unsqueeze(1)
    pixels_N1HW = F.interpolate(pixels_N1HW, size=(size, size), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(scans.target).long()
    parts = require("sklearn.model_selection", "train").train_test_split(
        range(len(labels)), test_size=_DIGITS_VAL_FRACTION, stratify=labels.numpy(), random_state=_DIGITS_SPLIT_STATE
    )
    train, val = (torch.tensor(sorted(part)) for part in parts)
    mean, std = float(pixels_N1HW[train].mean()), float(pixels_N1HW[train].std(correction=0))
    return Digits(pixels_N1HW, labels, train, val, mean, std)


def open_digits(uri: DataUri, train_size: int | None, test_size: int | None) -> Source:
    """Open the digits, see :func:`load_digits`, normalized with the statistics of the training images."""
    if uri.rest or uri.options:
        raise UsageError(f"'digits:' takes nothing after the colon, got {uri.rest!r}.")
    size = train_size or _DIGITS_SIZE
    digits = load_digits(size)
    val_digits = digits if test_size in (None, size) else load_digits(test_size or size)
    classes = tuple("0123456789")
    train = TensorSplit("digits", digits.pixels[digits.train], digits.labels[digits.train], classes)
    val = TensorSplit("digits", val_digits.pixels[val_digits.val], val_digits.labels[val_digits.val], classes)
    return Source(train, val, 1, _DIGITS_SIZE, (digits.mean,), (digits.std,))


# fake:

_FAKE_SIZE = 32  # pixels
_FAKE_IMAGES, _FAKE_CLASSES = 1000, 10
_MAX_TENSOR_BYTES = 64 * 2**20  # larger splits are computed image by image
_NOISE_STD = 40.0  # of 255


def open_fake(uri: DataUri, size: int | None) -> Source:
    """Open N synthetic training images (1000) of CLASSES classes (10), and a fifth as many for validation.

    Each class has a colour and a plane wave with its direction, frequency and phase; each image adds its contrast and
    noise. The images are always the same. Labels alternate: image i has class ``i mod CLASSES``.

    Raises:
        UsageError: the text after the colon is malformed, or there are too few classes or images.
    """
    uri.check_options()
    match = re.fullmatch(r"(\d+)?(?:x(\d+))?", uri.rest)
    if not match:
        raise UsageError(f"{uri.text!r} is malformed: write fake:IMAGESxCLASSES, as in fake:1000x10.")
    count, classes = int(match[1] or _FAKE_IMAGES), int(match[2] or _FAKE_CLASSES)
    if classes < 2 or count < classes:
        raise UsageError(f"{uri.text!r} needs at least two classes, and at least one image of each.")
    # Validation images are numbered from the next multiple of CLASSES on, so that they start with class 0, too.
    ranges = ((0, count), (math.ceil(count / classes) * classes, max(classes, count // 5)))
    train, val = (FakeSplit(first, number, classes, size or _FAKE_SIZE).in_memory() for first, number in ranges)
    return Source(train, val, 3, _FAKE_SIZE)


@final
class FakeSplit(MapSplit):
    """Synthetic images, computed on access from their number alone."""

    def __init__(self, first: int, count: int, classes: int, size: int) -> None:
        self.classes = tuple(map(str, range(classes)))
        self.labels = torch.arange(first, first + count) % classes
        self._first = first
        self._size = size

    def location(self, index: int) -> str:
        return f"fake image {self._first + index}"

    def image(self, index: int) -> Image.Image | CorruptImage:
        return to_pil(self.pixels(index))

    def pixels(self, index: int) -> Tensor:
        """Return the image (3, H, W) uint8 at ``index``."""
        generator = torch.Generator().manual_seed(self._first + index)  # the number alone: any run, any process
        clean = _class_image(int(self.labels[index]), self._size)
        contrast = 0.5 + torch.rand((), generator=generator)
        noise = torch.randn(clean.shape, generator=generator) * _NOISE_STD
        return (127.5 + contrast * clean + noise).round().clamp(0, 255).to(torch.uint8)

    def in_memory(self) -> MapSplit:
        """Return the split as one tensor if it is small, else the split itself."""
        if len(self) * 3 * self._size**2 > _MAX_TENSOR_BYTES:
            return self
        images = torch.stack([self.pixels(index) for index in range(len(self))])
        return TensorSplit("fake", images, self.labels, self.classes)


def _class_image(label: int, size: int) -> Tensor:
    """Return the noise-free image (3, H, W) of a class, centred at 0."""
    bits = random_bits(0, 0, np.arange(6, dtype=np.uint64) + np.uint64(6) * np.uint64(label))
    draws = torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53).float()
    angle, phase, waves = draws[0] * math.pi, draws[1] * 2 * math.pi, 1 + 3 * draws[2]
    colour_311 = (draws[3:] * 2 - 1).reshape(3, 1, 1)
    y, x = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing="ij")
    wave = torch.sin(2 * math.pi * waves * (x * angle.cos() + y * angle.sin()) + phase)
    return 40 * colour_311 + 35 * wave


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
            with _without_ghostscript():
                image = self._dataset[index][0]
        except (OSError, ValueError, SyntaxError) as error:
            return CorruptImage(self.location(index), "broken", f"cannot be decoded: {error}")
        if not isinstance(image, Image.Image):
            raise DataError(f"{self._name} must return images, got {type(image).__name__}.")
        return upright(image)


@contextmanager
def _without_ghostscript() -> Iterator[None]:
    """Keep PIL from running Ghostscript on a file, where torchvision opens files in all formats that PIL knows."""
    plugin: Any = EpsImagePlugin
    before, plugin.gs_binary = plugin.gs_binary, False
    try:
        yield
    finally:
        plugin.gs_binary = before
