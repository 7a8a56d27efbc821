"""An exported C library as a runner of images, with the notes of the network that are stored next to it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from repvgg.deploy.notes import read_notes
from repvgg.engine.library.loaded import library_file, load
from repvgg.errors import ExportError, UsageError


@final
class LibraryRunner:
    """A C library that was exported with ``--to c``: ``logits = runner(images)``.

    A library of several outputs returns a dictionary of them. It takes any number of images: more than it was exported
    for run in parts.

    Args:
        path: the folder of the export, or the ``libNAME.so`` in it. It is machine code: load only files that you trust.
        threads: number of threads, including the caller's; None for that of the export.

    Attributes:
        path: the library.
        input_shape: axes of the first input; None for the number of images.
        dtype: of all inputs.
        inputs: the axes of each input by name.
        outputs: the names of the outputs.
        notes: the texts about the network, by name.
        threads: number of threads, including the caller's.

    Raises:
        ExportError: there is no such library, this machine cannot run it, or the file of its notes is broken.
        UsageError: ``threads`` below 1.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise UsageError(f"threads must be at least 1, got {threads}.")
        try:
            self.path = library_file(Path(path))
            self._library = load(self.path, threads)
        except UsageError as error:
            raise ExportError(str(error)) from error
        self.inputs: Mapping[str, tuple[int | None, ...]] = {
            f"input{number}": (None, *shape[1:]) for number, shape in enumerate(self._library.input_shapes)
        }
        self.outputs = tuple(f"output{number}" for number in range(len(self._library.output_shapes)))
        self.input_shape, self.dtype = self.inputs["input0"], torch.float32
        self.notes, self.threads = read_notes(notes_file(self.path)), self._library.threads

    def __call__(self, *images: Tensor) -> Any:
        """Return the output for inputs in order: a tensor, or a dictionary where the library has several outputs.

        Raises:
            UsageError: other inputs than the library has, or one of another shape or dtype than it takes.
        """
        found = self._library(*(x.detach() for x in images))
        return dict(zip(self.outputs, found, strict=True)) if isinstance(found, tuple) else found

    def __repr__(self) -> str:
        return f"LibraryRunner({str(self.path)!r})"


def notes_file(library: Path) -> Path:
    """Return the JSON file with the notes of a ``libNAME.so``: ``NAME.json`` in its folder."""
    return library.with_name(f"{library.stem.removeprefix('lib')}.json")
