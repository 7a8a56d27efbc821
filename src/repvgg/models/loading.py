"""From a model to a checkpoint and back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from repvgg.checkpoints import Checkpoint, Form, Metadata, read_checkpoint, save_checkpoint
from repvgg.errors import CheckpointError, UnknownModelError
from repvgg.models.builder import RepVGG, create_model
from repvgg.models.spec import SPECS, spec_of


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model in eval mode, rebuilt from a file, and what is known about it."""

    model: RepVGG
    metadata: Metadata


def describe_model(model: RepVGG, form: Form, **more: Any) -> Metadata:
    """The header for a checkpoint of ``model``; ``more`` are further fields of :class:`Metadata`."""
    from repvgg import __version__

    spec = model.spec
    base = Metadata(spec.name, form, model.num_classes, model.in_channels, spec.input_size, version=__version__)
    return replace(base, **more)


def save(path: str | os.PathLike[str], model: RepVGG, metadata: Metadata, *, overwrite: bool = False) -> None:
    """Write the weights of ``model`` and its header. See :func:`repvgg.checkpoints.save_checkpoint`."""
    save_checkpoint(path, model.state_dict(), metadata, overwrite=overwrite)


def load(path: str | os.PathLike[str], model: str | None = None) -> Loaded:
    """Rebuild the model in a checkpoint, in the form that it was saved in, in eval mode.

    A file without a header is recognized by the names and shapes of its tensors.

    Args:
        path: a safetensors file, or a torch file of tensors.
        model: the name that the file must be of; None takes whatever it says.

    Raises:
        CheckpointError: the file cannot be read, is of another model, or fits no row of the table.
        UnknownModelError: ``model`` is no row of the table.
    """
    if model is not None:
        spec_of(model)
    checkpoint = read_checkpoint(path)
    metadata = checkpoint.metadata or _recognized(checkpoint)
    if model is not None and metadata.model != model:
        raise CheckpointError(f"{str(path)!r} is a checkpoint of {metadata.model}, not of {model}.")
    return Loaded(_rebuilt(checkpoint, metadata), metadata)


def _rebuilt(checkpoint: Checkpoint, metadata: Metadata) -> RepVGG:
    try:
        with torch.device("meta"):
            model = create_model(metadata.model, metadata.num_classes, metadata.in_channels, metadata.form == "plain")
    except UnknownModelError as error:
        raise CheckpointError(f"{str(checkpoint.path)!r} is of a model that is not known here. {error}") from error
    problem = _difference(_shapes(model.state_dict()), _shapes(checkpoint.tensors)) or _mixture(model, checkpoint)
    if problem:
        raise CheckpointError(
            f"{str(checkpoint.path)!r} says it is {metadata.model} in the {metadata.form} form, but {problem}."
        )
    model.load_state_dict(checkpoint.tensors, assign=True)
    return model.eval()


def _mixture(model: RepVGG, checkpoint: Checkpoint) -> str | None:
    """What is wrong with the types of the tensors, in words: weights have one floating point type."""
    wanted = [name for name, tensor in model.state_dict().items() if tensor.is_floating_point()]
    dtypes = sorted({str(checkpoint.tensors[name].dtype).removeprefix("torch.") for name in wanted})
    if len(dtypes) > 1:
        return f"its weights are of several types, {' and '.join(dtypes)}"
    return None if checkpoint.tensors[wanted[0]].is_floating_point() else f"its weights are of type {dtypes[0]}"


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _difference(wanted: dict[str, tuple[int, ...]], given: dict[str, tuple[int, ...]]) -> str | None:
    """What does not fit, in words, the first of each kind."""
    missing, extra = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    shapes = [name for name in wanted if name in given and wanted[name] != given[name]]
    parts = [f"it lacks {_listed(missing)}"] if missing else []
    parts += [f"it has {_listed(extra)} too many"] if extra else []
    parts += [f"{shapes[0]!r} has the shape {given[shapes[0]]} instead of {wanted[shapes[0]]}"] if shapes else []
    return " and ".join(parts) or None


def _listed(names: list[str]) -> str:
    """The first name and how many there are, in words."""
    return repr(names[0]) if len(names) == 1 else f"{len(names)} tensors, {names[0]!r} first,"


def _recognized(checkpoint: Checkpoint) -> Metadata:
    """Find the row and the form whose names and shapes are those of the file."""
    given = _shapes(checkpoint.tensors)
    stem = next((shape for name, shape in given.items() if name.startswith("stem.") and len(shape) == 4), ())
    head = given.get("head.weight", ())
    if not stem or len(head) != 2 or not all((*stem, *head)):
        raise CheckpointError(f"{str(checkpoint.path)!r} holds no RepVGG as this library names its parts.")
    forms: tuple[Form, Form] = ("train", "plain")
    for spec in SPECS.values():
        if (spec.stem.channels, spec.stages[-1].channels) != (stem[0], head[1]):
            continue
        for form in forms:
            with torch.device("meta"):
                model = create_model(spec, head[0], stem[1], form == "plain")
            if _shapes(model.state_dict()) == given:
                return describe_model(model, form)
    raise CheckpointError(f"{str(checkpoint.path)!r} fits no model of this library: see 'repvgg list'.")
