"""``hf:NAME``: a data set of the Hugging Face hub, or one in the same format on a disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info

from repvgg.data.decoding import Bad, decode
from repvgg.data.drawing import hashed
from repvgg.data.parts import Example, IndexedPart, Part, Source, StreamPart
from repvgg.data.uri import DataUri
from repvgg.errors import DataError, UsageError, first_line, require

_TRAIN = "train"
_HELD_OUT = ("validation", "val", "valid", "test")
_BUFFER = 1000


def open_hub(uri: DataUri) -> Source:
    """``hf:NAME[:CONFIG]`` on the hub, or ``hf:PATH`` for a folder that ``datasets`` reads or ``save_to_disk`` wrote.

    Options: ``?split=NAME`` takes one part only; ``?streaming`` reads from front to back, without a copy on the disk;
    ``?image=COLUMN&label=COLUMN`` where there are several; ``?classes=N`` and ``?length=N`` for streams that do not
    say; ``?buffer=N`` examples of a stream are shuffled at a time.

    Raises:
        UsageError: an option that is not known.
        MissingDependencyError: datasets is not installed.
        DataError: there is no such data set, split or column.
    """
    uri.check_options("split", "streaming", "image", "label", "classes", "length", "buffer")
    splits = _load(uri)
    wanted = uri.options.get("split")
    if wanted is not None:
        return Source(_part(uri, _one(splits, wanted, uri), wanted), None)
    if _TRAIN not in splits:
        raise DataError(f"{uri.text!r} has no split 'train' but {', '.join(splits)}: choose one with ?split=NAME.")
    present = [name for name in _HELD_OUT if name in splits]
    train = _part(uri, splits[_TRAIN], _TRAIN)
    if not present:
        return Source(train, None)
    notes = [f"Split {name!r} is there too, and is left alone: {present[0]!r} is judged by." for name in present[1:]]
    return Source(train, _part(uri, splits[present[0]], present[0], train.classes), notes=tuple(notes))


def _load(uri: DataUri) -> dict[str, Any]:
    """Every split by its name."""
    datasets = require("datasets", "data")
    name, config = _name(uri)
    if not name:
        raise UsageError(f"{uri.text!r} names no data set: write hf:NAME, hf:NAME:CONFIG or hf:PATH.")
    streaming = "streaming" in uri.options
    try:
        if any((Path(name) / mark).is_file() for mark in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(name)
            if streaming:
                loaded = _streamed(loaded, datasets)
        else:
            loaded = datasets.load_dataset(name, config, streaming=streaming)
    except Exception as error:  # files, network, formats: whatever can go wrong
        raise DataError(f"{uri.text!r} cannot be opened: {first_line(error)}.") from error
    return dict(loaded) if isinstance(loaded, dict) else {_TRAIN: loaded}


def _streamed(loaded: Any, datasets: Any) -> Any:
    if isinstance(loaded, dict):
        return {name: split.to_iterable_dataset() for name, split in loaded.items()}
    return loaded.to_iterable_dataset()


def _name(uri: DataUri) -> tuple[str, str | None]:
    """The name, and the configuration behind a colon; a path may hold colons."""
    if Path(uri.rest).exists():
        return uri.rest, None
    name, colon, config = uri.rest.rpartition(":")
    return (name, config) if colon and "/" not in config and "\\" not in config else (uri.rest, None)


def _one(splits: dict[str, Any], name: str, uri: DataUri) -> Any:
    if name not in splits:
        raise DataError(f"{uri.text!r} has no split {name!r} but {', '.join(splits)}.")
    return splits[name]


def _part(uri: DataUri, split: Any, name: str, classes: tuple[str, ...] | None = None) -> Part:
    datasets = require("datasets", "data")
    if split.features is None:
        raise DataError(f"{uri.text!r} does not say which columns it has: load it without ?streaming.")
    image = _column(uri, split.features, "image", lambda feature: isinstance(feature, datasets.Image))
    label = _column(uri, split.features, "label", lambda feature: isinstance(feature, datasets.ClassLabel))
    split = split.select_columns([image, label]).cast_column(image, datasets.Image(decode=False))
    names = _class_names(uri, split.features[label]) or classes
    where = f"{uri.rest}/{name}"
    if "streaming" not in uri.options:
        values = split.with_format(None)[label]
        labels, names = _numbers(list(values), names)
        return RowsPart(split, where, image, labels, names)
    if names is None:
        raise DataError(f"Nothing says which classes {uri.text!r} has: add ?classes=N, or load it without ?streaming.")
    return RowStreamPart(split, where, (image, label), names, _length(uri, split, name), uri.number("buffer"))


def _column(uri: DataUri, features: Any, role: str, fits: Any) -> str:
    """The column that is asked for, or the only one of the right kind, or the one that bears the name."""
    if role in uri.options:
        if uri.options[role] not in features:
            raise DataError(f"{uri.text!r} has no column {uri.options[role]!r} but {', '.join(features)}.")
        return uri.options[role]
    found: list[str] = [name for name, feature in features.items() if fits(feature)]
    if len(found) == 1:
        return found[0]
    if role in (found or features):
        return role
    what = f"several columns that may be the {role}" if found else f"no column that is the {role}"
    raise DataError(f"{uri.text!r} has {what}: choose one of {', '.join(found or features)} with ?{role}=COLUMN.")


def _class_names(uri: DataUri, feature: Any) -> tuple[str, ...] | None:
    if isinstance(feature, require("datasets", "data").ClassLabel):
        return tuple(feature.names)
    number = uri.number("classes")
    return None if number is None else tuple(map(str, range(number)))


def _numbers(values: list[Any], names: tuple[str, ...] | None) -> tuple[Tensor, tuple[str, ...]]:
    """Labels as numbers, whatever they are stored as."""
    if values and isinstance(values[0], str):
        names = names or tuple(sorted(set(values)))
        index = {name: number for number, name in enumerate(names)}
        return torch.tensor([index.get(value, -1) for value in values], dtype=torch.int64), names
    labels = torch.tensor([-1 if value is None else int(value) for value in values], dtype=torch.int64)
    return labels, names or tuple(map(str, range(int(labels.max()) + 1 if len(labels) else 0)))


def _length(uri: DataUri, split: Any, name: str) -> int | None:
    given = uri.number("length")
    known = split.info.splits or {}
    return given if given is not None or name not in known else known[name].num_examples or None


@final
class RowsPart(IndexedPart):
    """Rows of a table, read when they are asked for."""

    def __init__(self, rows: Any, name: str, image: str, labels: Tensor, classes: tuple[str, ...]) -> None:
        self.classes = classes
        self.labels = labels
        self._rows = rows
        self._name = name
        self._image = image

    def where(self, index: int) -> str:
        """See :meth:`IndexedPart.where`."""
        return _where(self._rows[index][self._image], f"{self._name} row {index}")

    def image(self, index: int) -> Image.Image | Bad:
        """See :meth:`IndexedPart.image`."""
        entry = self._rows[index][self._image]
        return decode(_file(entry), _where(entry, f"{self._name} row {index}"))


@final
class RowStreamPart(StreamPart):
    """Rows of a table that come one after the other; shards and shares are those of ``datasets``."""

    def __init__(
        self,
        rows: Any,
        name: str,
        columns: tuple[str, str],
        classes: tuple[str, ...],
        length: int | None,
        buffer: int | None,
    ) -> None:
        self.classes = classes
        self.length = length
        self._rows = rows
        self._name = name
        self._image, self._label = columns
        self._buffer = buffer or _BUFFER

    def shards(self) -> int:
        """See :meth:`StreamPart.shards`."""
        return int(self._rows.num_shards)

    def examples(self, shuffle: tuple[int, int] | None, share: int, shares: int) -> Iterator[Example | Bad]:
        """See :meth:`StreamPart.examples`; ``datasets`` itself splits among the loading processes."""
        split_by_node = require("datasets.distributed", "data").split_dataset_by_node
        here = get_worker_info()
        processes = 1 if here is None else here.num_workers
        rows = self._rows
        if shuffle is not None:
            bits = int(hashed(*shuffle, torch.zeros(1, dtype=torch.int64).numpy().astype("uint64"))[0])
            rows = rows.shuffle(seed=bits & 0xFFFF_FFFF, buffer_size=self._buffer)
        rows = split_by_node(rows, rank=share // processes, world_size=shares // processes)
        for number, row in enumerate(rows):
            entry = row[self._image]
            where = _where(entry, f"{self._name} share {share} of {shares}, row {number}")
            data = _file(entry)
            if isinstance(data, bytes):
                yield Example(where, data, self._number(row[self._label]))
            else:
                yield Bad(where, "unreadable", "has no bytes in the stream")

    def _number(self, label: Any) -> int:
        if isinstance(label, str):
            return self.classes.index(label) if label in self.classes else -1
        return -1 if label is None else int(label)


def _file(entry: dict[str, Any] | None) -> Path | bytes:
    if entry is None:
        return b""
    return entry["bytes"] if entry.get("bytes") is not None else Path(entry["path"] or "")


def _where(entry: dict[str, Any] | None, otherwise: str) -> str:
    path = entry.get("path") if entry else None
    return f"{path} ({otherwise})" if path else otherwise
