"""``webdataset:PATTERN``: images and labels in tar files, for datasets that do not fit on one machine."""

from __future__ import annotations

import glob
import json
import math
import os
import random
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

import numpy as np

from repvgg.data.config import DataUri
from repvgg.data.counter_rng import epoch_order, random_bits
from repvgg.data.decode import IMAGE_EXTENSIONS, MAX_FILE_BYTES, CorruptImage
from repvgg.data.splits import Example, IterableSplit, Shuffle, Source
from repvgg.errors import DataError, UsageError, require

_CLASSES_FILE, _SIZES_FILE = "classes.txt", "sizes.json"
_BUFFER = 1000  # examples
_IMAGE_KEYS = tuple(extension.removeprefix(".") for extension in IMAGE_EXTENSIONS)
_COMMAND = "pipe:"
_REMOTE = re.compile(rf"[A-Za-z][A-Za-z0-9+.-]*://|{_COMMAND}|-\Z")
_RANGE = re.compile(r"\{(-?[0-9]{1,18})\.\.(-?[0-9]{1,18})")  # {0000..0123}
_MAX_TAR_FILES = 10**6
_LABEL_KEYS = ("label", "cls", "class")


def open_webdataset(uri: DataUri, allow_commands: bool = False) -> Source:
    """Open samples ``KEY.jpg`` (or another image) and ``KEY.cls`` (a number) or ``KEY.json`` (with "label").

    ``PATTERN`` takes braces and, for local files, wildcards. Class names are the lines of ``classes.txt`` next to the
    tar files, or numbers with ``?classes=N``. The number of images is the sum over ``sizes.json`` (name → number) next
    to them, or ``?length=N``, or unknown. ``?buffer=N`` is the size of the shuffle buffer in examples.

    ``pipe:COMMAND`` in place of a path runs a shell command, so it is refused unless ``allow_commands`` is set.

    Raises:
        UsageError: an unknown option, or a command that is not allowed.
        DataError: there are no tar files, or the classes are unknown.
    """
    uri.check_options("classes", "length", "buffer")
    number, length, buffer = uri.number("classes"), uri.number("length"), uri.number("buffer")
    urls = _tar_files(uri)
    command = next((url for url in urls if url.startswith(_COMMAND)), None)
    if command is not None and not allow_commands:
        raise UsageError(
            f"{uri.text!r} runs the shell command {command.removeprefix(_COMMAND)!r}: if you trust it, say "
            "--data.allow-commands (train) or --allow-commands, or DataConfig(allow_commands=True)."
        )
    # classes.txt and sizes.json are read from local folders only.
    folder = None if _is_remote(urls[0]) else Path(urls[0]).parent
    classes = _class_names(folder) if number is None else tuple(map(str, range(number)))
    if classes is None:
        raise DataError(
            f"The classes of {uri.text!r} are unknown: put {_CLASSES_FILE} next to the tar files, one name per line, "
            f"or add ?classes=N."
        )
    return Source(WebDatasetSplit(urls, classes, length or _total_size(folder, urls), buffer or _BUFFER), None)


@final
class WebDatasetSplit(IterableSplit):
    """Examples in tar files, read sequentially.

    Tar files are dealt to the shards in turn. Where there are fewer files than shards, examples are, and every shard
    reads all files. The order is that of the files, drawn from seed and epoch, and then of a shuffle buffer; it depends
    on the number of shards.

    Args:
        urls: paths, or anything that webdataset opens.
        buffer: size of the shuffle buffer in examples.
    """

    def __init__(self, urls: list[str], classes: tuple[str, ...], length: int | None, buffer: int) -> None:
        self.classes = classes
        self.length = length
        self._urls = urls
        self._buffer = buffer

    def examples(self, shuffle: Shuffle | None, shard: int, num_shards: int) -> Iterator[Example | CorruptImage]:
        urls = self._urls
        if shuffle is not None:
            urls = [urls[index] for index in epoch_order(*shuffle, len(urls)).tolist()]
        examples = self._of_shard(urls, shard, num_shards)
        if shuffle is None:
            return examples
        shuffled = require("webdataset", "data").filters.shuffle
        seed = int(random_bits(*shuffle, np.array([shard], np.uint64))[0])
        # initial: fill the buffer before the first example, or the first ones would hardly be shuffled.
        result: Iterator[Example | CorruptImage] = shuffled(
            self._buffer, initial=self._buffer, rng=random.Random(seed)
        )(examples)
        return result

    def _of_shard(self, urls: list[str], shard: int, num_shards: int) -> Iterator[Example | CorruptImage]:
        if num_shards <= len(urls):
            for url in urls[shard::num_shards]:
                yield from self._of_file(url)
            return
        # Fewer files than shards: dealing files would leave shards empty, and ranks without data block all others.
        for index, example in enumerate(one for url in urls for one in self._of_file(url)):
            if index % num_shards == shard:
                yield example

    def _of_file(self, url: str) -> Iterator[Example | CorruptImage]:
        """Yield the examples of one tar file; an unreadable rest of it counts as one corrupt image."""
        try:
            for sample in _samples(url):
                yield _example(sample, f"{url}/{sample['__key__']}")
        except (tarfile.TarError, EOFError, ValueError, zlib.error) as error:
            reason = error.args[0] if error.args else error
            yield CorruptImage(url, "truncated", f"is not a complete tar file: {reason}")
        except OSError as error:
            yield CorruptImage(url, "unreadable", f"cannot be read: {error.strerror or error.args[0]}")


def _samples(url: str) -> Iterator[dict[str, Any]]:
    # Only webdataset's step that groups entries: its complete pipeline would also split shards and handle errors.
    group_by_keys = require("webdataset.tariterators", "data").group_by_keys
    # webdataset's gopen runs a shell command for "pipe:…", even where that is the name of a local file.
    stream = require("webdataset.gopen", "data").gopen(url) if _is_remote(url) else open(url, "rb")  # noqa: SIM115 - closed below
    try:
        yield from group_by_keys(_entries(url, stream))
    finally:
        stream.close()


def _entries(url: str, stream: Any) -> Iterator[dict[str, Any]]:
    """Yield the files in a tar file as webdataset does, but none that is larger than an image may be."""
    with tarfile.open(fileobj=stream, mode="r|*") as archive:
        for entry in archive:
            # Names between double underscores are metadata of webdataset.
            if not entry.isreg() or re.match(r"__[^/]*__($|/)", entry.name):
                continue
            if entry.size > MAX_FILE_BYTES:  # sparse or compressed, it may be small on disk
                raise tarfile.ReadError(f"{entry.name!r} has {entry.size:,} bytes")
            file = archive.extractfile(entry)
            assert file is not None  # a regular file
            yield {"fname": entry.name, "data": file.read(), "__url__": url}
            archive.members = []  # type: ignore[attr-defined] # tarfile keeps every entry that it has seen


def _example(sample: dict[str, Any], location: str) -> Example | CorruptImage:
    image = next((name for name in sample if name.rpartition(".")[2] in _IMAGE_KEYS), None)
    if image is None:
        return CorruptImage(location, "not an image", f"holds none of {', '.join(_IMAGE_KEYS)}")
    label = _label(sample)
    if label is None:
        reason = "has no label: a sample needs a .cls file with a number, or a .json file with one"
        return CorruptImage(location, "unlabelled", reason)
    return Example(f"{location}.{image}", sample[image], label)


def _label(sample: dict[str, Any]) -> int | None:
    try:
        if "cls" in sample:
            return int(sample["cls"])
        entry = json.loads(sample.get("json", b"{}"))
        return next((int(entry[key]) for key in _LABEL_KEYS if key in entry), None)
    except (ValueError, TypeError, OverflowError, RecursionError):
        return None


def _tar_files(uri: DataUri) -> list[str]:
    expand = require("webdataset", "data").shardlists.expand_urls
    expanded = math.prod(abs(int(stop) - int(start)) + 1 for start, stop in _RANGE.findall(uri.rest))
    if expanded > _MAX_TAR_FILES:
        raise DataError(f"{uri.text!r} names {expanded:,} tar files: at most {_MAX_TAR_FILES:,} are possible.")
    try:
        urls: list[str] = expand(uri.rest) if uri.rest else []
    except Exception as error:  # an unclosed brace, an unset variable
        raise DataError(f"{uri.text!r} is not a valid pattern: {error}") from error
    # A pattern without a match stays in the list, to be reported as missing.
    found = [path for url in urls for path in ([url] if _is_remote(url) else _local_files(url))]
    missing = [path for path in found if not _is_remote(path) and not Path(path).is_file()]
    if missing or not found:
        raise DataError(f"There is no file {(missing or [uri.rest])[0]!r}: give tar files as webdataset:FOLDER/*.tar.")
    return found


def _local_files(pattern: str) -> list[str]:
    # A file in the working directory may have any name, such as "pipe:rm -r *": as a path it starts with "./".
    found = sorted(glob.glob(pattern)) or [pattern]
    return [os.path.join(".", path) if _is_remote(path) else path for path in found]


def _is_remote(url: str) -> bool:
    return _REMOTE.match(url) is not None


def _class_names(folder: Path | None) -> tuple[str, ...] | None:
    if folder is None or not (folder / _CLASSES_FILE).is_file():
        return None
    try:
        lines = (folder / _CLASSES_FILE).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{str(folder / _CLASSES_FILE)!r} cannot be read as UTF-8: {error}.") from error
    return tuple(line.strip() for line in lines if line.strip())


def _total_size(folder: Path | None, urls: list[str]) -> int | None:
    """Return the number of images in all tar files, from ``sizes.json``; None where it does not exist."""
    if folder is None or not (folder / _SIZES_FILE).is_file():
        return None
    try:
        sizes = json.loads((folder / _SIZES_FILE).read_text(encoding="utf-8"))
        return sum(int(sizes[Path(url).name]) for url in urls)
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise DataError(f"{str(folder / _SIZES_FILE)!r} must give a number for every tar file: {error}.") from error
