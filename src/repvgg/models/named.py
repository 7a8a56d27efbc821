"""A model by whatever a person calls it: a row of ours, a baseline, a source, or a checkpoint."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from torch import nn

from repvgg.errors import UnknownModelError, did_you_mean
from repvgg.models.baselines import BASELINES, create_baseline
from repvgg.models.loading import load
from repvgg.models.sources import Sourced, resolve
from repvgg.models.spec import SPECS


def named_model(name: str | os.PathLike[str], *, values: bool = True) -> Sourced:
    """Find out what ``name`` calls, and build it in eval mode. A name of a table wins over a file of that name.

    Args:
        name: a row of :func:`repvgg.models.list_models` or of :func:`repvgg.models.list_baselines`, a source as
            :func:`repvgg.models.resolve` takes it, or the path of a checkpoint as :func:`repvgg.models.load` reads it.
        values: False puts it on the meta device, for counting, and does not make values that nobody needs.

    Returns:
        The model; a checkpoint in the form of the file, all others in the form that they are trained in.

    Raises:
        UnknownModelError: it is none of these; the text lists the names that are closest.
        RepvggError: what those functions raise.
    """
    text = os.fspath(name)
    if text in SPECS:
        return replace(resolve(f"repvgg:{text}", values=values), source=text)
    if text in BASELINES:
        return _baseline(text, values)
    if ":" in text and not Path(text).is_file():
        return resolve(text, values=values)
    if Path(text).suffix or len(Path(text).parts) > 1 or Path(text).exists():
        return _checkpoint(text, values)
    advice = did_you_mean(text, [*SPECS, *BASELINES], "give a row of 'repvgg list', timm:NAME, or a file.")
    raise UnknownModelError(f"There is no model {text!r}: {advice}")


def _baseline(name: str, values: bool) -> Sourced:
    size = BASELINES[name].input_size
    return Sourced(name, create_baseline(name, values=values).eval(), (3, size, size), "random")


def _checkpoint(path: str, values: bool) -> Sourced:
    loaded = load(path)
    size = loaded.metadata.input_size
    model: nn.Module = loaded.model if values else loaded.model.to("meta")
    return Sourced(path, model, (loaded.metadata.in_channels, size, size), f"from {Path(path).name}")
