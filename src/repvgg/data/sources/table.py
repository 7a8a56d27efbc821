"""URI → source, the fixed split where there is only one part, and whether both parts belong together."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from repvgg.data.config import DataConfig
from repvgg.data.drawing import fixed_order
from repvgg.data.parts import IndexedPart, Part, Source
from repvgg.data.uri import DataUri, parse_uri
from repvgg.errors import DataError

HELD_OUT = 0.1


def open_source(config: DataConfig) -> Source:
    """Open the URIs of ``config``; the outcome has both parts.

    Where a URI holds one part and ``config.val`` is None, a tenth of every class is held out, always the same images,
    and a note says so.

    Raises:
        UsageError: a URI is not understood.
        MissingDependencyError: an extra is not installed.
        DataError: nothing is there, or it cannot be split.
    """
    source = _open(parse_uri(config.uri), config)
    if config.val is not None:
        return _with_val(source, _open(parse_uri(config.val), config), config.val)
    return source if source.held_out is not None else _split(source, config.uri)


def _open(uri: DataUri, config: DataConfig) -> Source:
    match uri.scheme:
        case "imagefolder":
            from repvgg.data.sources.folder import open_folder

            return open_folder(uri)
        case "torchvision":
            from repvgg.data.sources.vision import open_vision

            return open_vision(uri)
        case "hf":
            from repvgg.data.sources.hub import open_hub

            return open_hub(uri)
        case "webdataset":
            from repvgg.data.sources.shards import open_shards

            return open_shards(uri)
        case "digits":
            from repvgg.data.sources.synthetic import open_digits

            return open_digits(uri, config.train_size, config.test_size)
        case _:
            from repvgg.data.sources.synthetic import open_fake

            return open_fake(uri, config.train_size)


def _with_val(source: Source, val: Source, uri: str) -> Source:
    """The training part of one source with the held-out part of another, or with all of it."""
    held_out = val.train if val.held_out is None else val.held_out
    notes = source.notes
    if source.held_out is not None:
        notes = (f"The held-out part of its own is left alone: {uri!r} is judged by.",)
    return replace(source, held_out=held_out, notes=notes)


def _split(source: Source, uri: str) -> Source:
    whole = source.train
    if not isinstance(whole, IndexedPart):
        raise DataError(f"{uri!r} is a stream and holds one part only: say with val what to judge by.")
    train, held_out = _stratified(whole, uri)
    note = (
        f"{uri!r} holds one part only: {len(held_out)} of its {len(whole)} images, the same ones every time, "
        f"are held out of every class."
    )
    return replace(source, train=whole.select(train), held_out=whole.select(held_out), notes=(*source.notes, note))


def _stratified(part: IndexedPart, uri: str) -> tuple[Tensor, Tensor]:
    """Indices of both parts, in ascending order: of every class a tenth, but at least one image."""
    mixed = fixed_order(len(part))
    labels = part.labels[mixed]
    held_out = torch.zeros(len(part), dtype=torch.bool)
    for label, name in enumerate(part.classes):
        members = mixed[labels == label]
        if len(members) == 1:
            raise DataError(f"Class {name!r} of {uri!r} has 1 image, and none can be held out: say with val which.")
        held_out[members[: max(1, round(HELD_OUT * len(members))) if len(members) else 0]] = True
    return (~held_out).nonzero().flatten(), held_out.nonzero().flatten()


def agree(source: Source, uri: str) -> None:
    """Check that there is something to learn, and that it can be judged by the held-out part.

    Raises:
        DataError: a part is empty, fewer than two classes, classes that differ, a class without images, or a label
            that is no class.
    """
    train, held_out = source.train, source.held_out
    assert held_out is not None
    _check_part(train, uri, "to train")
    _check_part(held_out, uri, "held out")
    if len(train.classes) < 2:
        raise DataError(f"{uri!r} has one class, {train.classes[0]!r}: there is nothing to tell apart.")
    missing = sorted(set(train.classes) - set(held_out.classes))
    extra = sorted(set(held_out.classes) - set(train.classes))
    if missing:
        raise DataError(f"{_names(missing)} of {uri!r} has no held-out images: add some, or take it out of training.")
    if extra:
        raise DataError(
            f"{_names(extra)} of {uri!r} has held-out images but none to train: take them out, or add some."
        )
    if train.classes != held_out.classes:
        raise DataError(f"The held-out part of {uri!r} has the same classes in another order.")
    _check_coverage(train, uri, "training")
    _check_coverage(held_out, uri, "held-out")


def _check_part(part: Part, uri: str, what: str) -> None:
    empty = len(part) == 0 if isinstance(part, IndexedPart) else False
    if empty or not part.classes:
        raise DataError(f"{uri!r} has no images {what}.")
    if isinstance(part, IndexedPart) and not 0 <= int(part.labels.min()) <= int(part.labels.max()) < len(part.classes):
        index = int(((part.labels < 0) | (part.labels >= len(part.classes))).nonzero()[0])
        raise DataError(
            f"{part.where(index)!r} has label {int(part.labels[index])}, but {uri!r} has the classes "
            f"0 … {len(part.classes) - 1}."
        )


def _check_coverage(part: Part, uri: str, what: str) -> None:
    if isinstance(part, IndexedPart):
        counts = torch.bincount(part.labels, minlength=len(part.classes))
        empty = [name for name, count in zip(part.classes, counts.tolist(), strict=True) if count == 0]
        if empty:
            raise DataError(f"{_names(empty)} of {uri!r} has no {what} images: add some, or remove it.")


def _names(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"Class {', '.join(map(repr, names[:3]))}{more}"
