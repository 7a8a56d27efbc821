"""``imagefolder:PATH``: a folder a class, with the images of that class below it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from repvgg.data.parts import FilesPart, Source
from repvgg.data.uri import DataUri
from repvgg.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
TRAIN = "train"
HELD_OUT = ("val", "validation", "valid", "test")  # the first that is there is judged by
_JUNK = ("__MACOSX", "__pycache__")


def open_folder(uri: DataUri) -> Source:
    """The images below ``PATH/train`` and ``PATH/val`` (or validation, valid, test), or below ``PATH`` itself.

    Classes are the names of the folders, sorted. Names that start with a dot are passed over, and so are files of
    other extensions than jpg, jpeg, png, bmp, webp, tif, tiff, ppm in any case.

    Raises:
        DataError: there is no such folder, or it holds no folder a class.
    """
    root = Path(os.path.expanduser(uri.rest))
    if not uri.rest or not root.is_dir():
        raise DataError(f"There is no folder {str(root) if uri.rest else ''!r}: give one as imagefolder:PATH.")
    if not (root / TRAIN).is_dir():
        return Source(read_part(root), None)
    present = [name for name in HELD_OUT if (root / name).is_dir()]
    if not present:
        return Source(read_part(root / TRAIN), None)
    notes = [f"{name}/ is there too, and is left alone: {present[0]}/ is judged by." for name in present[1:]]
    return Source(read_part(root / TRAIN), read_part(root / present[0]), notes=tuple(notes))


def read_part(folder: Path) -> FilesPart:
    """The images in the class folders of ``folder``.

    Raises:
        DataError: there are no class folders, or they cannot be looked into.
    """
    from torchvision.datasets.folder import make_dataset

    try:
        classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and is_visible(entry.name))
        if not classes:
            raise DataError(f"{str(folder)!r} holds no folders: images lie in one folder a class.")
        indices = {name: index for index, name in enumerate(classes)}
        found = make_dataset(str(folder), indices, is_valid_file=is_image_name, allow_empty=True)
    except OSError as error:
        raise DataError(f"{str(folder)!r} cannot be looked into: {error.strerror or error}.") from error
    start = len(os.path.join(folder, ""))
    labels = torch.tensor([label for _, label in found], dtype=torch.int64)
    return FilesPart(folder, [path[start:] for path, _ in found], labels, tuple(classes))


def is_image_name(path: str) -> bool:
    """Whether a file has the name of an image."""
    name = os.path.basename(path)
    return not name.startswith(".") and name.lower().endswith(EXTENSIONS)


def is_visible(name: str) -> bool:
    """Whether a folder is one that somebody made for a class."""
    return not name.startswith(".") and name not in _JUNK


def passed_over(folder: Path) -> list[str]:
    """Files in the class folders of ``folder`` that do not have the name of an image, but are not hidden either."""
    found = []
    for name in sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and is_visible(entry.name)):
        for below, _, files in sorted(os.walk(folder / name, followlinks=True)):
            paths = (os.path.join(below, file) for file in sorted(files) if is_visible(file))
            found += [path for path in paths if not is_image_name(path)]
    return found
