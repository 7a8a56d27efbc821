"""``webdataset:PATTERN``: images and labels in tar files, for what does not fit one machine."""

from __future__ import annotations

import glob
import json
import random
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

import numpy as np

from repvgg.data.decoding import Bad
from repvgg.data.drawing import epoch_order, hashed
from repvgg.data.parts import Example, Source, StreamPart
from repvgg.data.sources.folder import EXTENSIONS
from repvgg.data.uri import DataUri
from repvgg.errors import DataError, require

CLASSES_FILE, SIZES_FILE = "classes.txt", "sizes.json"
BUFFER = 1000
_IMAGES = tuple(extension.removeprefix(".") for extension in EXTENSIONS)
_LABEL_KEYS = ("label", "cls", "class")


def open_shards(uri: DataUri) -> Source:
    """Samples ``KEY.jpg`` (or another image) and ``KEY.cls`` (a number) or ``KEY.json`` (with "label") in tar files.

    ``PATTERN`` takes braces and, for local files, wildcards. Class names are the lines of ``classes.txt`` beside the
    shards, or numbers with ``?classes=N``; the number of images is the sum over the shards in ``sizes.json`` (name →
    number) beside them, or ``?length=N``, or not known. ``?buffer=N``: how many examples are shuffled at a time.

    Raises:
        UsageError: an option that is not known.
        MissingDependencyError: webdataset is not installed.
        DataError: no shards, or nothing says how many classes there are.
    """
    uri.check_options("classes", "length", "buffer")
    number, length, buffer = uri.number("classes"), uri.number("length"), uri.number("buffer")
    shards = _shards(uri)
    beside = None if _is_remote(shards[0]) else Path(shards[0]).parent
    classes = _class_names(beside) if number is None else tuple(map(str, range(number)))
    if classes is None:
        raise DataError(
            f"Nothing says which classes {uri.text!r} has: put {CLASSES_FILE} beside the shards, a name a line, "
            f"or add ?classes=N."
        )
    return Source(ShardsPart(shards, classes, length or _sizes(beside, shards), buffer or BUFFER), None)


@final
class ShardsPart(StreamPart):
    """Examples out of tar files, read from front to back.

    Shards go to shares in turn; where there are fewer shards than shares, examples do, and every share reads all.
    The order is that of the shards, drawn by seed and epoch, and then of a buffer of examples: it depends on the
    number of shares, and on nothing else.

    Args:
        urls: paths, or whatever webdataset opens.
        classes: names of the labels.
        length: number of examples, or None.
        buffer: examples that are shuffled at a time.
    """

    def __init__(self, urls: list[str], classes: tuple[str, ...], length: int | None, buffer: int) -> None:
        self.classes = classes
        self.length = length
        self._urls = urls
        self._buffer = buffer

    def shards(self) -> int:
        """See :meth:`StreamPart.shards`."""
        return len(self._urls)

    def examples(self, shuffle: tuple[int, int] | None, share: int, shares: int) -> Iterator[Example | Bad]:
        """See :meth:`StreamPart.examples`."""
        urls = self._urls
        if shuffle is not None:
            urls = [urls[index] for index in epoch_order(*shuffle, len(urls)).tolist()]
        examples = self._share(urls, share, shares)
        if shuffle is None:
            return examples
        mix = require("webdataset", "data").filters.shuffle
        seed = int(hashed(*shuffle, np.array([share], np.uint64))[0])
        mixed: Iterator[Example | Bad] = mix(self._buffer, initial=self._buffer, rng=random.Random(seed))(examples)
        return mixed

    def _share(self, urls: list[str], share: int, shares: int) -> Iterator[Example | Bad]:
        if shares <= len(urls):
            for url in urls[share::shares]:
                yield from self._examples(url)
            return
        for index, example in enumerate(one for url in urls for one in self._examples(url)):
            if index % shares == share:
                yield example

    def _examples(self, url: str) -> Iterator[Example | Bad]:
        """The examples of one shard; what cannot be read of it is one bad image."""
        try:
            for sample in _samples(url):
                yield self._example(sample, f"{url}/{sample['__key__']}")
        except (tarfile.TarError, EOFError, ValueError, zlib.error) as error:
            yield Bad(url, "truncated", f"is no whole tar file: {error.args[0] if error.args else error}")
        except OSError as error:
            yield Bad(url, "unreadable", f"cannot be read: {error.strerror or error.args[0]}")

    def _example(self, sample: dict[str, Any], where: str) -> Example | Bad:
        image = next((name for name in sample if name.rpartition(".")[2] in _IMAGES), None)
        if image is None:
            return Bad(where, "not an image", f"holds none of {', '.join(_IMAGES)}")
        label = _label(sample)
        if label is None:
            return Bad(
                where, "unlabelled", "has no label: a sample holds a .cls file with a number, or a .json with one"
            )
        return Example(f"{where}.{image}", sample[image], label)


def _samples(url: str) -> Iterator[dict[str, Any]]:
    tar = require("webdataset.tariterators", "data")
    stream = require("webdataset.gopen", "data").gopen(url)
    try:
        yield from tar.group_by_keys(tar.tar_file_expander([{"url": url, "stream": stream}]))
    finally:
        stream.close()


def _label(sample: dict[str, Any]) -> int | None:
    try:
        if "cls" in sample:
            return int(sample["cls"])
        entry = json.loads(sample.get("json", b"{}"))
        return next((int(entry[key]) for key in _LABEL_KEYS if key in entry), None)
    except (ValueError, TypeError):
        return None


def _shards(uri: DataUri) -> list[str]:
    expand = require("webdataset", "data").shardlists.expand_urls
    try:
        urls: list[str] = expand(uri.rest) if uri.rest else []
    except Exception as error:  # a brace that is not closed, a variable that is not set
        raise DataError(f"{uri.text!r} is no pattern of shards: {error}") from error
    found = [path for url in urls for path in ([url] if _is_remote(url) else sorted(glob.glob(url)) or [url])]
    missing = [path for path in found if not _is_remote(path) and not Path(path).is_file()]
    if missing or not found:
        raise DataError(f"There is no shard {(missing or [uri.rest])[0]!r}: give them as webdataset:FOLDER/*.tar.")
    return found


def _is_remote(url: str) -> bool:
    return "://" in url or url.startswith(("pipe:", "-"))


def _class_names(folder: Path | None) -> tuple[str, ...] | None:
    if folder is None or not (folder / CLASSES_FILE).is_file():
        return None
    lines = (folder / CLASSES_FILE).read_text(encoding="utf-8").splitlines()
    return tuple(line.strip() for line in lines if line.strip())


def _sizes(folder: Path | None, shards: list[str]) -> int | None:
    """The number of images in all shards together, if the file that says so knows them all."""
    if folder is None or not (folder / SIZES_FILE).is_file():
        return None
    try:
        sizes = json.loads((folder / SIZES_FILE).read_text(encoding="utf-8"))
        return sum(int(sizes[Path(shard).name]) for shard in shards)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{str(folder / SIZES_FILE)!r} does not give a number for every shard: {error}.") from error
