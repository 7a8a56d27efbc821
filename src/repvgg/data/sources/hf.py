"""``hf:NAME``: a dataset of the Hugging Face hub, or a local one in the same format."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info

from repvgg.data.config import DataUri
from repvgg.data.counter_rng import random_bits
from repvgg.data.decode import CorruptImage, decode
from repvgg.data.splits import Example, IterableSplit, MapSplit, Shuffle, Source, Split
from repvgg.errors import DataError, UsageError, first_line, require

_TRAIN = "train"
_VAL_SPLITS = ("validation", "val", "valid", "test")
_BUFFER = 1000  # examples


def open_hf(uri: DataUri) -> Source:
    """Open ``hf:NAME[:CONFIG]`` on the hub, or ``hf:PATH``, a folder that ``datasets`` reads or ``save_to_disk`` wrote.

    Options: ``?split=NAME`` takes a single split; ``?streaming`` reads sequentially, without a local copy;
    ``?image=COLUMN&label=COLUMN`` selects columns; ``?classes=N`` and ``?length=N`` for streams without this metadata;
    ``?buffer=N`` is the size of a stream's shuffle buffer.

    Raises:
        UsageError: an unknown option.
        DataError: the dataset, the split or a column does not exist.
    """
    uri.check_options("split", "streaming", "image", "label", "classes", "length", "buffer")
    splits = _load(uri)
    wanted = uri.options.get("split")
    if wanted is not None:
        if wanted not in splits:
            raise DataError(f"{uri.text!r} has no split {wanted!r}: it has {', '.join(splits)}.")
        return Source(_split(uri, splits[wanted], wanted), None)
    if _TRAIN not in splits:
        raise DataError(f"{uri.text!r} has no split 'train' but {', '.join(splits)}: choose one with ?split=NAME.")
    present = [name for name in _VAL_SPLITS if name in splits]
    train = _split(uri, splits[_TRAIN], _TRAIN)
    if not present:
        return Source(train, None)
    notes = [f"Split {name!r} is ignored: the validation images are those of {present[0]!r}." for name in present[1:]]
    return Source(train, _split(uri, splits[present[0]], present[0], train.classes), notes=tuple(notes))


def _load(uri: DataUri) -> dict[str, Any]:
    """Load every split, by name."""
    datasets = require("datasets", "data")
    name, config = uri.rest, None
    if not Path(uri.rest).exists():  # a local path may contain colons
        before, colon, after = uri.rest.rpartition(":")
        if colon and "/" not in after and "\\" not in after:
            name, config = before, after
    if not name:
        raise UsageError(f"{uri.text!r} names no dataset: write hf:NAME, hf:NAME:CONFIG or hf:PATH.")
    streaming = "streaming" in uri.options
    try:
        if any((Path(name) / mark).is_file() for mark in ("dataset_dict.json", "state.json")):
            # Written by save_to_disk, which load_dataset does not read.
            loaded = datasets.load_from_disk(name)
            if streaming and isinstance(loaded, dict):
                loaded = {split: rows.to_iterable_dataset() for split, rows in loaded.items()}
            elif streaming:
                loaded = loaded.to_iterable_dataset()
        else:
            loaded = datasets.load_dataset(name, config, streaming=streaming)
    except Exception as error:  # files, network, formats: datasets has no common base class for its errors
        raise DataError(f"{uri.text!r} cannot be opened: {first_line(error)}.") from error
    return dict(loaded) if isinstance(loaded, dict) else {_TRAIN: loaded}


def _split(uri: DataUri, rows: Any, name: str, classes: tuple[str, ...] | None = None) -> Split:
    datasets = require("datasets", "data")
    if rows.features is None:
        raise DataError(f"{uri.text!r} does not declare its columns: load it without ?streaming.")
    image = _column(uri, rows.features, "image", datasets.Image)
    label = _column(uri, rows.features, "label", datasets.ClassLabel)
    # Take the encoded bytes: our decoder reports corrupt images, that of datasets raises.
    rows = rows.select_columns([image, label]).cast_column(image, datasets.Image(decode=False))
    feature, number = rows.features[label], uri.number("classes")
    names = classes
    if isinstance(feature, datasets.ClassLabel):
        names = tuple(feature.names)
    elif number is not None:
        names = tuple(map(str, range(number)))
    where = f"{uri.rest}/{name}"
    if "streaming" not in uri.options:
        # Without the format of the dataset, which may turn labels into tensors of a device.
        labels, names = _numeric_labels(list(rows.with_format(None)[label]), names)
        return HfSplit(rows, where, image, labels, names)
    if names is None:
        raise DataError(f"The classes of {uri.text!r} are unknown: add ?classes=N, or load it without ?streaming.")
    length, known = uri.number("length"), rows.info.splits or {}
    if length is None and name in known:
        length = known[name].num_examples or None
    return HfStreamSplit(rows, where, (image, label), names, length, uri.number("buffer"))


def _column(uri: DataUri, features: Any, role: str, kind: type) -> str:
    """Return the selected column, or the only one of the right type, or the one that has the role as its name."""
    if role in uri.options:
        if uri.options[role] not in features:
            raise DataError(f"{uri.text!r} has no column {uri.options[role]!r} but {', '.join(features)}.")
        return uri.options[role]
    # By type first: of columns "photo" (Image) and "image" (a URL as text), the former is right.
    found: list[str] = [name for name, feature in features.items() if isinstance(feature, kind)]
    if len(found) == 1:
        return found[0]
    if role in (found or features):
        return role
    what = f"several columns that may be the {role}" if found else f"no column that is the {role}"
    raise DataError(f"{uri.text!r} has {what}: choose one of {', '.join(found or features)} with ?{role}=COLUMN.")


def _numeric_labels(values: list[Any], names: tuple[str, ...] | None) -> tuple[Tensor, tuple[str, ...]]:
    """Convert labels to indices; −1 for a missing or unknown label, which :func:`check_splits` reports."""
    if values and isinstance(values[0], str):
        names = names or tuple(sorted(set(values)))
        index = {name: number for number, name in enumerate(names)}
        return torch.tensor([index.get(value, -1) for value in values], dtype=torch.int64), names
    labels = torch.tensor([-1 if value is None else int(value) for value in values], dtype=torch.int64)
    return labels, names or tuple(map(str, range(int(labels.max()) + 1 if len(labels) else 0)))


@final
class HfSplit(MapSplit):
    """Rows of a table, read on access."""

    def __init__(self, rows: Any, name: str, image: str, labels: Tensor, classes: tuple[str, ...]) -> None:
        self.classes = classes
        self.labels = labels
        self._rows = rows
        self._name = name
        self._image = image

    def location(self, index: int) -> str:
        return _location(self._rows[index][self._image], f"{self._name} row {index}")

    def image(self, index: int) -> Image.Image | CorruptImage:
        entry = self._rows[index][self._image]
        return decode(_content(entry), _location(entry, f"{self._name} row {index}"))


@final
class HfStreamSplit(IterableSplit):
    """Rows of a table that are streamed; ``datasets`` distributes them over ranks and workers."""

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

    def examples(self, shuffle: Shuffle | None, shard: int, num_shards: int) -> Iterator[Example | CorruptImage]:
        split_by_node = require("datasets.distributed", "data").split_dataset_by_node
        info = get_worker_info()
        workers = 1 if info is None else info.num_workers
        rows = self._rows
        if shuffle is not None:
            bits = int(random_bits(*shuffle, np.zeros(1, np.uint64))[0])
            rows = rows.shuffle(seed=bits & 0xFFFF_FFFF, buffer_size=self._buffer)  # datasets takes 32-bit seeds
        # Within a worker, datasets itself takes the worker's part: only the ranks are split here.
        rows = split_by_node(rows, rank=shard // workers, world_size=num_shards // workers)
        for number, row in enumerate(rows):
            entry = row[self._image]
            location = _location(entry, f"{self._name} shard {shard} of {num_shards}, row {number}")
            data = _content(entry)
            if isinstance(data, bytes):
                yield Example(location, data, self._index(row[self._label]))
            else:
                yield CorruptImage(location, "unreadable", "has no bytes in the stream")

    def _index(self, label: Any) -> int:
        if isinstance(label, str):
            return self.classes.index(label) if label in self.classes else -1
        return -1 if label is None else int(label)


def _content(entry: dict[str, Any] | None) -> Path | bytes:
    if entry is None:  # a null in the column; reported as an empty file
        return b""
    return entry["bytes"] if entry.get("bytes") is not None else Path(entry["path"] or "")


def _location(entry: dict[str, Any] | None, row: str) -> str:
    path = entry.get("path") if entry else None
    return f"{path} ({row})" if path else row
