"""From a model to a checkpoint and back."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repvgg.checkpoints import (
    Account,
    Checkpoint,
    Form,
    Metadata,
    Naming,
    identity_naming,
    is_plain_form,
    read_checkpoint,
    recognize_names,
    rename_to,
    save_checkpoint,
    save_torch,
    translate,
)
from repvgg.errors import CheckpointError, UnknownModelError, UsageError
from repvgg.models.builder import RepVGG, create_model
from repvgg.models.spec import SPECS, ModelSpec, spec_of
from repvgg.models.spec_data import spec_from_data, spec_to_data
from repvgg.models.structure import Shape, read_structure

COUNTER = "num_batches_tracked"  # counts training steps; some files lack it, and inference ignores it
_TORCH = (".pth", ".pt", ".ckpt", ".bin")
_SHOWN = 2


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model in eval mode, rebuilt from a file, what is known about it, and where each tensor of the file went."""

    model: RepVGG
    metadata: Metadata
    account: Account


def describe_model(model: RepVGG, form: Form, **more: Any) -> Metadata:
    """The header for a checkpoint of ``model``; ``more`` are further fields of :class:`Metadata`."""
    return replace(_described(model.spec, form, model.num_classes, model.in_channels), **more)


def _described(spec: ModelSpec, form: Form, num_classes: int, in_channels: int) -> Metadata:
    from repvgg import __version__

    own = None if SPECS.get(spec.name) == spec else spec_to_data(spec)
    return Metadata(spec.name, form, num_classes, in_channels, spec.input_size, version=__version__, spec=own)


def form_of(model: RepVGG) -> Form:
    """Whether a model has branches ("train") or one convolution a block ("plain")."""
    return "plain" if is_plain_form(model.state_dict()) else "train"


def save(
    path: str | os.PathLike[str],
    model: RepVGG,
    metadata: Metadata,
    *,
    layout: str = "repvgg",
    without: Collection[str] = (),
    overwrite: bool = False,
) -> None:
    """Write the weights of ``model`` and its header, wholly or not at all.

    Args:
        path: ends in .safetensors, or in .pth, .pt, .ckpt or .bin for a torch file: a state dict, bare for the layouts
            of others, which then has no header.
        model: in either form.
        metadata: the header; see :func:`describe_model`.
        layout: whose names to give to the tensors: "repvgg", "upstream", "timm" or "mmpretrain".
        without: our names of tensors to leave out.
        overwrite: replace a file at ``path``.

    Raises:
        OutputExistsError: something is at ``path`` and ``overwrite`` is not set.
        OutputError: it cannot be written.
        UsageError: a field of the header is invalid, or the layout has no such model.
    """
    gate = model.spec.squeeze_excite
    ours = {name: tensor for name, tensor in model.state_dict().items() if name not in without}
    tensors = rename_to(layout, ours, gate.place if gate else None)
    if Path(path).suffix not in _TORCH:
        save_checkpoint(path, tensors, metadata, overwrite=overwrite)
    elif invalid := metadata.invalid_field():
        raise UsageError(f"{getattr(metadata, invalid)!r} is not a valid {invalid!r} in the header of a checkpoint.")
    else:
        save_torch(path, tensors, metadata if layout == "repvgg" else None, overwrite=overwrite)


def load(path: str | os.PathLike[str], model: str | None = None, *, plain: bool | None = None) -> Loaded:
    """Rebuild the model in a checkpoint, in eval mode.

    Files of this library, of the paper's authors (RepVGGplus, too), of timm and of mmpretrain are read alike, in the
    train form and in the plain form: the names tell whose they are, the shapes tell the row of the table. A header says
    more, and must fit. Prefixes and dictionaries that training scripts put around weights are taken off; of two copies
    the averaged one is taken. Every tensor is used, or the account names the reason why not.

    Args:
        path: a safetensors file, or a torch file of tensors, which is read as data.
        model: the name that the file must be of; None takes whatever it is.
        plain: True collapses a model in the train form on the way, and proves it equal; False refuses one in the plain
            form; None takes the form of the file.

    Raises:
        CheckpointError: the file cannot be read, is of another model or form, or its tensors are not those of a model.
        UnknownModelError: ``model`` is no row of the table.
        EquivalenceError: the collapsed model is not equal to the one in the file.

    Limits: shapes do not tell strides and image size; a file without a header whose model is no row of the table gets
    strides of 2 and 224 pixels, and its account notes it.
    """
    if model is not None:
        spec_of(model)
    loaded = rebuilt(read_checkpoint(path))
    metadata = loaded.metadata
    if model is not None and (metadata.model != model or metadata.spec is not None):
        raise CheckpointError(f"{str(path)!r} is a checkpoint of {metadata.model}, not of {model}.")
    if plain is False and metadata.form == "plain":
        raise CheckpointError(
            f"{str(path)!r} is in the plain form, whose branches are gone: load it as it is, then repvgg.expand gives "
            "it new ones."
        )
    return collapsed(loaded) if plain and metadata.form == "train" else loaded


def rebuilt(checkpoint: Checkpoint) -> Loaded:
    """The model in a file, in the form of the file."""
    tensors, account, naming = translated(checkpoint)
    if checkpoint.metadata is not None:
        metadata, says = checkpoint.metadata, "says it is"
        spec = _spec_of(metadata, checkpoint)
    else:
        metadata, spec, account = _recognized(checkpoint, tensors, account, naming)
        says = "looks like" if naming.layout.name == "repvgg" else f"looks like, by the names of {naming.layout.name},"
    model = _without_values(spec, metadata, checkpoint)
    wanted = _shapes(model.state_dict())
    filled = tuple(name for name in wanted if name.endswith(COUNTER) and name not in tensors)
    tensors |= {name: torch.zeros((), dtype=torch.int64) for name in filled}
    left = [name for name in naming.unrecognized if name not in account.dropped]
    problem = _difference(wanted, _shapes(tensors), naming, left) or _mixture(model, tensors)
    if problem:
        row = f"{metadata.model} in the {metadata.form} form"
        raise CheckpointError(f"{str(checkpoint.path)!r} {says} {row}, but {problem}.")
    model.load_state_dict(tensors, assign=True)
    return Loaded(model.eval(), metadata, replace(account, filled=filled, header=checkpoint.metadata is not None))


def _without_values(spec: ModelSpec, metadata: Metadata, checkpoint: Checkpoint) -> RepVGG:
    """The model that a file should be of."""
    try:
        with torch.device("meta"):
            return create_model(spec, metadata.num_classes, metadata.in_channels, metadata.form == "plain")
    except (UsageError, ValueError, RuntimeError) as error:  # groups that do not divide the channels, for one
        why = str(error).rstrip(".")
        raise CheckpointError(f"{str(checkpoint.path)!r} is of a model that cannot be built: {why}.") from error


def translated(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], Account, Naming]:
    """The tensors of a file under our names.

    Raises:
        CheckpointError: the names are of no layout, and no header of ours says that they should be.
    """
    naming = recognize_names(checkpoint.tensors)
    if naming is None and checkpoint.metadata is None:
        raise CheckpointError(
            f"{str(checkpoint.path)!r} holds no RepVGG: its names are not ours, nor upstream's, timm's or mmpretrain's."
        )
    naming = naming or identity_naming(checkpoint)
    return *translate(checkpoint, naming), naming


def _recognized(
    checkpoint: Checkpoint, tensors: Mapping[str, Tensor], account: Account, naming: Naming
) -> tuple[Metadata, ModelSpec, Account]:
    """What the names and shapes tell where no header does."""
    try:
        found = read_structure(_shapes(tensors), naming.layout.gate, naming.layout.halves)
    except CheckpointError as error:
        raise CheckpointError(f"{str(checkpoint.path)!r} holds {error}.") from error
    about = _described(found.spec, found.form, found.num_classes, found.in_channels)
    about = replace(about, ema=checkpoint.averaged)
    return about, found.spec, replace(account, notes=found.notes)


def _spec_of(metadata: Metadata, checkpoint: Checkpoint) -> ModelSpec:
    """The row that a header names, or the spec that it holds."""
    try:
        if metadata.spec is None:
            return spec_of(metadata.model)
        spec = spec_from_data({**metadata.spec, "name": metadata.model})
    except UnknownModelError as error:
        raise CheckpointError(f"{str(checkpoint.path)!r} is of a model that is not known here. {error}") from error
    except UsageError as error:
        raise CheckpointError(f"{str(checkpoint.path)!r} has a header with an invalid 'spec': {error}") from error
    if sum(stage.depth for stage in spec.stages) > len(checkpoint.tensors):
        raise CheckpointError(f"{str(checkpoint.path)!r} has a header that names more blocks than it has tensors.")
    return spec


def collapsed(loaded: Loaded) -> Loaded:
    """The same model in the plain form, proven equal.

    Raises:
        EquivalenceError: it is not.
    """
    from repvgg.collapse import reparameterize

    plain, report = reparameterize(loaded.model)
    assert isinstance(plain, RepVGG)
    account = loaded.account
    heads = {file: ours for file, ours in account.used.items() if ours.startswith("auxiliary.")}
    account = replace(
        account,
        used={file: ours for file, ours in account.used.items() if file not in heads},
        dropped={**account.dropped, **dict.fromkeys(heads, "an auxiliary head serves training only")},
        notes=(*account.notes, f"collapsed from the train form: {len(report.folded)} blocks"),
    )
    return Loaded(plain, replace(loaded.metadata, form="plain"), account)


def _mixture(model: RepVGG, tensors: Mapping[str, Tensor]) -> str | None:
    """What is wrong with the types of the tensors, in words: weights have one floating point type."""
    wanted = [name for name, tensor in model.state_dict().items() if tensor.is_floating_point()]
    dtypes = sorted({str(tensors[name].dtype).removeprefix("torch.") for name in wanted})
    if len(dtypes) > 1:
        return f"its weights are of several types, {' and '.join(dtypes)}"
    return None if tensors[wanted[0]].is_floating_point() else f"its weights are of type {dtypes[0]}"


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _difference(
    wanted: Mapping[str, Shape], given: Mapping[str, Shape], naming: Naming, left: Sequence[str]
) -> str | None:
    """What does not fit, in words and in the names of the file; ``left`` are those that mean nothing here."""
    missing = [naming.in_file(name) for name in sorted(wanted.keys() - given.keys())]
    extra = sorted([*left, *map(naming.in_file, given.keys() - wanted.keys())])
    shapes = [name for name in wanted if name in given and wanted[name] != given[name]]
    parts = [f"it lacks {_listed(missing)}"] if missing else []
    parts += [f"it has {_listed(extra)} too many"] if extra else []
    if shapes:
        name = shapes[0]
        parts.append(f"{naming.in_file(name)!r} has the shape {given[name]} instead of {wanted[name]}")
    return " and ".join(parts) or None


def _listed(names: Sequence[str]) -> str:
    """How many there are and the first of them, in words."""
    shown = ", ".join(map(repr, names[:_SHOWN]))
    return shown if len(names) == 1 else f"{len(names)} tensors ({shown}{', …' if len(names) > _SHOWN else ''})"
