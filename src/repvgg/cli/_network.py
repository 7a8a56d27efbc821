"""The SOURCE of the commands that convert and export: any network, with what is known about it."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from repvgg._files import check_output
from repvgg._progress import busy
from repvgg.cli._output import write_warning
from repvgg.errors import CheckpointError, NothingFoldedWarning, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from repvgg.checkpoints import Metadata
    from repvgg.collapse import Report
    from repvgg.data import DataConfig

_HUB = "hub:"


@dataclass(frozen=True, eq=False)
class Network:
    """A network to convert or to export."""

    model: nn.Module  # in eval mode
    shape: tuple[int, int, int]  # (C, H, W) of an image
    source: str  # as given on the command line
    weights: str  # where its weights come from, in words
    metadata: Metadata | None = None  # the header of its checkpoint; None for a model by name or factory

    @property
    def notes(self) -> dict[str, str]:
        from repvgg import __version__

        return {"source": self.source, "weights": self.weights, "version": __version__}

    @property
    def notes_in_file(self) -> dict[str, str]:
        """The notes, and the header with classes and normalization: 'repvgg predict' reads it."""
        if self.metadata is None:
            return self.notes
        _, height, width = self.shape
        size = height if height == width else self.metadata.input_size
        return {**self.notes, **replace(self.metadata, form="plain", input_size=size).to_header()}


def check_output_file(source: str, out: Path, weights: Path | None, *, overwrite: bool) -> None:
    """Check that ``out`` may be written, and that it replaces neither the SOURCE nor its weights.

    Raises:
        UsageError: it would replace them.
        OutputError: as :func:`repvgg._files.check_output`.
    """
    # First: with --overwrite the other check would let a source be replaced.
    if any(one and os.path.exists(one) and out.exists() and out.samefile(one) for one in (source, weights)):
        raise UsageError("The output would replace the trained weights, which cannot be recovered from it.")
    check_output(out, overwrite=overwrite)


def _is_checkpoint(source: str) -> bool:
    if source.startswith(_HUB) or os.path.exists(source):
        return True
    prefix, _, rest = source.rpartition(":")
    # "timm:NAME" and "net.py:make" are factories. Anything else is a path; loading reports what is wrong with it.
    return not (prefix and rest)


def load_network(
    source: str,
    model: str | None,
    weights: Path | None,
    num_classes: int | None,
    input_size: tuple[int, int] | None,
    input_shape: tuple[int, int, int] | None,
) -> Network:
    """Load a network from its SOURCE; the arguments are the options of that command.

    Raises:
        UsageError: options do not fit the source.
        RepvggError: the source cannot be loaded.
    """
    from repvgg.models import from_pretrained, load, resolve

    if not _is_checkpoint(source):
        if model is not None:
            raise UsageError("--model is for checkpoints: SOURCE names the model already.")
        channels = input_shape[0] if input_shape else None
        resolved = resolve(source, weights=weights, num_classes=num_classes, in_channels=channels)
        shape = input_shape or (resolved.input_shape[0], *(input_size or resolved.input_shape[1:]))
        return Network(resolved.model, shape, resolved.source, resolved.weights)
    if weights is not None or num_classes is not None:
        raise UsageError("--weights and --num-classes are for models by name or factory: a checkpoint has its own.")
    loaded = from_pretrained(source.removeprefix(_HUB)) if source.startswith(_HUB) else load(source, model)
    about = loaded.metadata
    if model is not None and about.model != model:  # load() has checked files, from_pretrained() takes no name
        raise CheckpointError(
            f"{source!r} is a {about.model}, not a {model}: leave out --model, or name another source."
        )
    shape = input_shape or (about.in_channels, *(input_size or (about.input_size, about.input_size)))
    return Network(loaded.model, shape, source, f"from {Path(source).name}", about)


def data_config(network: Network, uri: str) -> DataConfig:
    """Return the config of the images of a data set as the network takes them."""
    from repvgg.data import DataConfig

    if network.metadata is not None:
        return network.metadata.data_config(uri=uri)
    return DataConfig(uri=uri, channels=1 if network.shape[0] == 1 else 3)


def warn_of_random_weights(network: Network, weights: Path | None) -> None:
    """Warn where a model by name or factory was made without ``--weights``."""
    if network.metadata is None and weights is None:
        write_warning(f"no --weights were given: the weights of {network.source} are {network.weights}")


def plain_form(
    network: Network, images: Tensor, policy: Literal["cheaper", "always"] = "cheaper"
) -> tuple[nn.Module, Report]:
    """Return the plain form of a network and what was folded; the caller says so where that is nothing."""
    from repvgg.collapse import reparameterize

    with busy("Converting"), warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingFoldedWarning)
        return reparameterize(network.model, images, policy=policy)


def folded_regions(report: Report) -> str:
    """Return how many regions were folded, in words."""
    count = len(report.folded)
    return f"{count} {'region' if count == 1 else 'regions'} folded"
