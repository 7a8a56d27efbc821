"""Open a dataset URI (:func:`open_source`), and check that its splits fit together (:func:`check_splits`)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from repvgg.data.config import DataConfig, DataUri, parse_uri
from repvgg.data.counter_rng import epoch_order
from repvgg.data.sources.hf import open_hf
from repvgg.data.sources.local import open_digits, open_fake, open_folder, open_torchvision
from repvgg.data.sources.webdataset import open_webdataset
from repvgg.data.splits import JoinedSplit, MapSplit, Source, Split, num_images
from repvgg.errors import DataError, UsageError

EvalSplit = Literal["train", "val", "all"]

_VAL_FRACTION = 0.1


def open_source(config: DataConfig) -> Source:
    """Open the URIs of ``config``; the result has a training and a validation split.

    Where a URI holds a single split and ``config.val`` is None, a tenth of each class becomes the validation split,
    always the same images, and a note says so.

    Raises:
        UsageError: a URI is malformed.
        MissingDependencyError: an extra is not installed.
        DataError: the dataset does not exist, or cannot be split.
    """
    source = _open(parse_uri(config.uri), config)
    if config.val is None:
        return source if source.val is not None else _with_val_split(source, config.uri)
    other = _open(parse_uri(config.val), config)
    notes = source.notes
    if source.val is not None:
        notes = (f"The validation split of {config.uri!r} is ignored: {config.val!r} is used.",)
    # A URI that holds a single split is used completely.
    return replace(source, val=other.train if other.val is None else other.val, notes=notes)


def open_evaluation_source(config: DataConfig, split: EvalSplit | None = None) -> Source:
    """Open the URI of ``config`` to evaluate a model on it: the images are the validation split of the result.

    Args:
        config: its ``uri`` matters.
        split: "train" or "val" as :func:`open_source` splits the images, or "all"; None takes the validation split of
            a dataset that has one, and all images of any other.

    Returns:
        A source with an empty training split. Its first note says which images these are.

    Raises:
        UsageError: a URI is malformed, or ``split`` is "all" of two streams.
        MissingDependencyError: an extra is not installed.
        DataError: the dataset does not exist, has no images, or cannot be split.
    """
    uri = config.uri
    source = _open(parse_uri(uri), config)
    if source.val is None and split in ("train", "val"):
        source = _with_val_split(source, uri)
    train, val = source.train, source.val
    if val is None:
        chosen, which = train, "all images"
    elif split == "all":
        if not (isinstance(train, MapSplit) and isinstance(val, MapSplit)):
            raise UsageError(f"The splits of {uri!r} are streams: evaluate one after the other, as train and val.")
        _check_same_classes(train, val, uri)
        chosen, which = JoinedSplit(train, val), "all training and validation images"
    else:
        chosen, which = (train, "the training images") if split == "train" else (val, "the validation images")
    _check_split(chosen, uri, "images")
    nothing = chosen.select(torch.empty(0, dtype=torch.int64)) if isinstance(chosen, MapSplit) else chosen
    return replace(source, train=nothing, val=chosen, notes=(f"{which} of {uri}", *source.notes))


def _open(uri: DataUri, config: DataConfig) -> Source:
    match uri.scheme:
        case "imagefolder":
            return open_folder(uri)
        case "digits":
            return open_digits(uri, config.train_size, config.test_size)
        case "fake":
            return open_fake(uri, config.train_size)
        case "torchvision":
            return open_torchvision(uri)
        case "hf":
            return open_hf(uri)
        case _:
            return open_webdataset(uri, config.allow_commands)


def _with_val_split(source: Source, uri: str) -> Source:
    """Split the only split of a source in two, stratified by class."""
    split = source.train
    if not isinstance(split, MapSplit):
        raise DataError(
            f"{uri!r} is a stream with a single split; name a validation set with --val URI (val in a config)."
        )
    train, val = _stratified(split, uri)
    note = (
        f"{uri!r} holds a single split: {len(val)} of its {len(split)} images, always the same ones and stratified by "
        f"class, are the validation images."
    )
    return replace(source, train=split.select(train), val=split.select(val), notes=(*source.notes, note))


def _stratified(split: MapSplit, uri: str) -> tuple[Tensor, Tensor]:
    """Return ascending indices of both parts: a tenth of each class, and at least one image, for validation."""
    # Seed and epoch are fixed: runs with different seeds must be evaluated on the same images.
    shuffled = epoch_order(0, 0, len(split))
    labels = split.labels[shuffled]
    is_val = torch.zeros(len(split), dtype=torch.bool)
    for label, name in enumerate(split.classes):
        members = shuffled[labels == label]
        if len(members) == 1:
            raise DataError(
                f"Class {name!r} of {uri!r} has one image, which is too few for two splits; name a validation set with "
                f"--val URI (val in a config)."
            )
        is_val[members[: max(1, round(_VAL_FRACTION * len(members))) if len(members) else 0]] = True
    return (~is_val).nonzero().flatten(), is_val.nonzero().flatten()


def check_splits(source: Source, uri: str) -> None:
    """Check that a classifier can be trained on one split and evaluated on the other.

    Raises:
        DataError: see :func:`repvgg.data.open_data`.
    """
    train, val = source.train, source.val
    assert val is not None
    _check_split(train, uri, "training images")
    _check_split(val, uri, "validation images")
    if len(train.classes) < 2:
        raise DataError(f"{uri!r} has one class, {train.classes[0]!r}: a classifier needs at least two.")
    _check_same_classes(train, val, uri)
    _check_no_empty_class(train, uri, "training")
    _check_no_empty_class(val, uri, "validation")


def _check_same_classes(train: Split, val: Split, uri: str) -> None:
    # Labels are indices into the classes of their own split: they mean the same only if the classes are equal.
    missing = sorted(set(train.classes) - set(val.classes))
    extra = sorted(set(val.classes) - set(train.classes))
    if missing:
        raise DataError(f"{_list(missing)} of {uri!r} has no validation images: add some, or remove the class.")
    if extra:
        raise DataError(f"{_list(extra)} of {uri!r} has validation images but no training images: add or remove some.")
    if train.classes != val.classes:
        raise DataError(f"The validation split of {uri!r} has the same classes in another order.")


def _check_split(split: Split, uri: str, name: str) -> None:
    if num_images(split) == 0 or not split.classes:
        raise DataError(f"{uri!r} has no {name}.")
    if not isinstance(split, MapSplit):  # labels of a stream are checked as they arrive
        return
    invalid = (split.labels < 0) | (split.labels >= len(split.classes))
    if invalid.any():
        index = int(invalid.nonzero()[0])
        raise DataError(
            f"{split.location(index)!r} has label {int(split.labels[index])}, but the classes of {uri!r} are "
            f"0 … {len(split.classes) - 1}."
        )


def _check_no_empty_class(split: Split, uri: str, name: str) -> None:
    if isinstance(split, MapSplit):
        counts = torch.bincount(split.labels, minlength=len(split.classes))
        empty = [label for label, count in zip(split.classes, counts.tolist(), strict=True) if count == 0]
        if empty:
            raise DataError(f"{_list(empty)} of {uri!r} has no {name} images: add some, or remove the class.")


def _list(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"Class {', '.join(map(repr, names[:3]))}{more}"
