"""What was measured on this machine, kept on the disk beside the machine code.

A file says how one convolution is computed. What it says is only looked up among the ways that there are: a file that
somebody else made, or another version, can at worst choose a slow one.
"""

from __future__ import annotations

import json
from dataclasses import astuple
from pathlib import Path
from typing import Any

from repvgg.engine.choice import LOSSES, Choice, every_cover, every_part
from repvgg.engine.codegen.disk_cache import CHOICE, cache_folder, digest, keep, read_kept
from repvgg.engine.layers import ConvGeometry
from repvgg.engine.part import Machine, Part, Rectangle, Size

_DIRECT = "direct"


def recall(geometry: ConvGeometry, size: Size, machine: Machine) -> tuple[Choice | None] | None:
    """How a convolution is computed the fastest, in a tuple; None where that was not measured."""
    place = _place(geometry, size, machine)
    kept = read_kept(*place) if place else None
    try:
        said: Any = None if kept is None else json.loads(kept)
    except ValueError:
        return None
    if said == _DIRECT:
        return (None,)
    stride = geometry.stride[0]
    for rectangles in every_cover(size, stride, machine) if isinstance(said, list) else ():
        if len(said) == len(rectangles):
            pairs = zip(rectangles, said, strict=True)
            parts = [_found(rectangle, entry, size, stride, machine) for rectangle, entry in pairs]
            if all(parts):
                return (Choice(tuple(part for part in parts if part)),)
    return None


def remember(geometry: ConvGeometry, size: Size, machine: Machine, choice: Choice | None) -> None:
    """Keep how a convolution is computed the fastest, for :func:`recall`."""
    place = _place(geometry, size, machine)
    if place:
        said = _DIRECT if choice is None else [_entry(part.rectangle, part) for part in choice.parts]
        keep(*place, json.dumps(said).encode())


def _place(geometry: ConvGeometry, size: Size, machine: Machine) -> tuple[Path, bytes] | None:
    """The file, and what it begins with."""
    folder = cache_folder()
    if folder is None:
        return None
    asked = astuple(geometry), astuple(size), astuple(machine), LOSSES[machine.precision]
    key = digest(*map(str, asked))
    return folder / f"{key.hex()}{CHOICE}", key


def _found(rectangle: Rectangle, entry: Any, size: Size, stride: int, machine: Machine) -> Part | None:
    """The way for some tiles that an entry stands for."""
    if not isinstance(entry, list) or entry[:2] != [list(run) for run in rectangle]:
        return None
    every = every_part(rectangle, size, stride, machine)
    return next((part for part in every if _entry(rectangle, part) == entry), None)


def _entry(rectangle: Rectangle, part: Part) -> list[Any]:
    """A way for some tiles, as JSON has it."""
    runs, tile = (list(run) for run in rectangle), part.tile
    return [*runs, part.way, part.late, part.splits, tile.pixels, tile.vectors, part.tiling.piece]
