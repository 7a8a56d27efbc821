"""How pixels become the input of a network: as a value, in the metadata of a file, and as layers of its graph."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from repvgg._serde import to_json
from repvgg.checkpoints import Metadata
from repvgg.data.config import IMAGENET_MEAN, IMAGENET_STD
from repvgg.errors import UsageError

KEY = "preprocessing"  # name of the note in a file
PIXEL_MAX = 255.0


@final
@dataclass(frozen=True)
class Preprocessing:
    """``input = (pixel / 255 − mean) / std`` per channel, of RGB images (N, C, H, W) with pixels in [0, 255].

    Attributes:
        mean: per channel, of pixels in [0, 1].
        std: per channel, above 0.
        size: height and width of an image.
        classes: names, in the order of the logits; empty if unknown.
        assumed: whether the source does not say the statistics, so that those of ImageNet were taken.
        in_graph: whether the file computes it itself, and takes pixels.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]
    classes: tuple[str, ...] = ()
    assumed: bool = False
    in_graph: bool = False

    def note(self) -> str:
        """Return the text that is stored in a file."""
        takes = "pixels in [0, 255]" if self.in_graph else "(pixel / 255 - mean) / std, pixels in [0, 255]"
        about = {
            "input": f"float32 (N, {len(self.mean)}, {self.size[0]}, {self.size[1]}), RGB, {takes}",
            "mean": self.mean,
            "std": self.std,
            "size": self.size,
            "classes": self.classes,
            "in_graph": self.in_graph,
        }
        if self.assumed:
            about["assumed"] = "the source does not say how images were normalized: these are ImageNet's statistics"
        return to_json(about, indent=None)

    def apply(self, pixels: Tensor) -> Tensor:
        """Return the input of the network for pixels in [0, 255], (N, C, H, W)."""
        mean, std = (pixels.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (pixels / PIXEL_MAX - mean) / std


def preprocessing_of(model: nn.Module, metadata: Metadata | None, input_shape: tuple[int, int, int]) -> Preprocessing:
    """Return the preprocessing of a network: that of its checkpoint, of timm, or of ImageNet.

    Raises:
        UsageError: the source has statistics for another number of channels.
    """
    channels, *size = input_shape
    config = getattr(model, "pretrained_cfg", None) or {}
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    classes: tuple[str, ...] = ()
    assumed = False
    if metadata is not None:
        mean, std, classes = metadata.mean, metadata.std, metadata.classes
    elif isinstance(config, Mapping) and config.get("mean") and config.get("std"):
        mean, std = tuple(map(float, config["mean"])), tuple(map(float, config["std"]))
    if not mean or not std:
        mean, std, assumed = IMAGENET_MEAN, IMAGENET_STD, True
        if channels != len(mean):  # as repvgg.data does: their average, for grey images
            mean, std = (tuple([sum(values) / len(values)] * channels) for values in (mean, std))
    if {len(mean), len(std)} != {channels}:
        raise UsageError(
            f"The network takes {channels} channels, and its source has the statistics of {len(mean)}: "
            "export it for images of as many channels."
        )
    return Preprocessing(tuple(mean), tuple(std), (size[0], size[1]), tuple(classes), assumed)


def read_preprocessing(notes: Mapping[str, str]) -> Preprocessing | None:
    """Return the preprocessing that a file was written with; None if it has no such note, or an unreadable one."""
    try:
        found = json.loads(notes[KEY])
        mean, std = (tuple(map(float, found[name])) for name in ("mean", "std"))
        size, classes = tuple(map(int, found["size"])), tuple(map(str, found["classes"]))
        if len(size) != 2 or len(mean) != len(std) or min(std) <= 0:
            return None
        return Preprocessing(mean, std, (size[0], size[1]), classes, "assumed" in found, bool(found["in_graph"]))
    except (KeyError, TypeError, ValueError):
        return None


def notes_of(notes: Mapping[str, str], preprocessing: Preprocessing | None) -> dict[str, str]:
    """Return the notes of a file: those given and the preprocessing.

    Where the preprocessing is in the graph, the header of the checkpoint among the notes is changed to a mean of 0 and
    a deviation of 1/255, so that what normalizes by the header (``repvgg predict``) passes pixels.
    """
    if preprocessing is None:
        return dict(notes)
    found = {**notes, KEY: preprocessing.note()}
    metadata = Metadata.from_header(dict(notes), "the source")
    if metadata is not None and preprocessing.in_graph:
        channels = len(preprocessing.mean)
        found |= replace(metadata, mean=(0.0,) * channels, std=(1.0 / PIXEL_MAX,) * channels).to_header()
    return found


@final
class Preprocessed(nn.Module):
    """``model((pixels / 255 − mean) / std)``, as one product and one sum per channel: ``pixels · scale + shift``.

    It is not merged into the first convolution: that pads with zeros, which are not ``shift``.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model = model
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (preprocessing.mean, preprocessing.std))
        # Computed in float64 and rounded once.
        self.register_buffer("scale", (1.0 / (PIXEL_MAX * std)).float().view(-1, 1, 1))
        self.register_buffer("shift", (-mean / std).float().view(-1, 1, 1))

    def forward(self, pixels: Tensor) -> Any:
        return self.model(pixels * self.scale + self.shift)


@final
class ReferenceOfPixels(nn.Module):
    """The same by its definition, in the dtype of the pixels: an exported :class:`Preprocessed` is compared with it."""

    def __init__(self, model: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.model, self.preprocessing = model, preprocessing

    def forward(self, pixels: Tensor) -> Any:
        return self.model(self.preprocessing.apply(pixels))
