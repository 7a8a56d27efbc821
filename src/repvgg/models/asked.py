"""A model by whatever a person calls it: a row of our table, a baseline, a checkpoint, or a source string."""

from __future__ import annotations

import difflib
from pathlib import Path

from repvgg.errors import UnknownModelError
from repvgg.models.baselines import BASELINES, baseline_of, create_baseline
from repvgg.models.builder import create_model, list_models
from repvgg.models.loading import load
from repvgg.models.sources import Sourced, resolve
from repvgg.models.spec import spec_of


def find_model(name: str) -> Sourced:
    """Build or load what ``name`` says, on the CPU and in eval mode.

    Names come first: a file that is called as a model is reached by ./NAME.

    Args:
        name: a name from :func:`list_models` or :func:`list_baselines`, which get random weights; a source string of
            :func:`resolve`, such as ``timm:mobileone_s0`` or ``net.py:make_model``; or the path of a checkpoint.

    Raises:
        UnknownModelError: no model of that name; the text tells the nearest.
        SourceError: the source fails.
        CheckpointError: the file is not there or cannot be read.
        MissingDependencyError: the library that builds it is not installed.
    """
    if name in list_models():
        size = spec_of(name).input_size
        return Sourced(name, create_model(name).eval(), (3, size, size), "random")
    if name in BASELINES:
        size = baseline_of(name).input_size
        return Sourced(name, create_baseline(name).eval(), (3, size, size), "random")
    if _is_source(name):
        return resolve(name)
    if not _is_path(name):
        raise _unknown(name)
    loaded = load(name)
    about = loaded.metadata
    return Sourced(name, loaded.model, (about.in_channels, about.input_size, about.input_size), f"from {name}")


def check_name(name: str) -> None:
    """Refuse at once a name that can only be a mistake, before anything is built.

    Raises:
        UnknownModelError: it is no name of a model, no path and no source string.
    """
    if name not in list_models() and name not in BASELINES and not _is_source(name) and not _is_path(name):
        raise _unknown(name)


def _is_source(name: str) -> bool:
    return ":" in name and not Path(name).exists()


def _is_path(name: str) -> bool:
    path = Path(name)
    return bool(path.suffix) or len(path.parts) > 1 or path.exists()


def _unknown(name: str) -> UnknownModelError:
    close = difflib.get_close_matches(name.lower(), [*list_models(), *BASELINES], n=3)
    known = f"did you mean {' or '.join(close)}?" if close else "'repvgg list' names ours; others go by timm:NAME."
    return UnknownModelError(f"There is no model {name!r}: {known}")
