"""Save models to checkpoints, rebuild models from checkpoints, and load weights into models built elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repvgg import __version__
from repvgg._arguments import check_model
from repvgg._contexts import meta_device
from repvgg._html import table as html_table
from repvgg.checkpoints import (
    Account,
    Checkpoint,
    Form,
    Metadata,
    Naming,
    common_prefix,
    identity_naming,
    is_plain_form,
    read_checkpoint,
    recognize_names,
    rename_to,
    save_checkpoint,
    save_torch,
    translate,
)
from repvgg.collapse import reparameterize
from repvgg.errors import CheckpointError, UnknownModelError, UsageError, first_line
from repvgg.models.backbones import build_pspnet
from repvgg.models.infer_spec import MAX_BLOCKS, Shape, infer_spec
from repvgg.models.pspnet import Model, PSPNet
from repvgg.models.registry import ARCHITECTURES, PSPNETS, pspnet_spec_of, spec_of
from repvgg.models.repvgg import RepVGG
from repvgg.models.spec import ModelSpec, PSPNetSpec, pspnet_spec_from_data, spec_from_data, spec_to_data

_COUNTER = "num_batches_tracked"  # counts training steps; inference ignores it, and older files do not have it
_TORCH_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_MAX_LISTED = 2  # names in a message


@dataclass(frozen=True, eq=False, repr=False)
class LoadedModel:
    """A model rebuilt from a file."""

    model: Model  # in eval mode
    metadata: Metadata  # what is known about it
    account: Account  # what became of each tensor in the file

    def __repr__(self) -> str:
        return f"LoadedModel({self._summary})"

    def _repr_html_(self) -> str:
        about = self.metadata
        rows: list[tuple[object, ...]] = [
            ("model", about.model),
            ("form", about.form),
            ("classes", about.num_classes),
            ("images", f"{about.in_channels} x {about.input_size} x {about.input_size}"),
            ("parameters", sum(parameter.numel() for parameter in self.model.parameters())),
            ("tensor names", self.account.layout),
            *(("metric", f"{name}: {value:g}") for name, value in about.metrics.items()),
            *(("not used", f"{name}: {reason}") for name, reason in self.account.dropped.items()),
            *(("note", note) for note in self.account.notes),
        ]
        return html_table(self._summary, ("", ""), rows)

    @property
    def _summary(self) -> str:
        about = self.metadata
        dropped = f", {len(self.account.dropped)} tensors not used" if self.account.dropped else ""
        size = f"{about.in_channels} x {about.input_size} x {about.input_size}"
        return f"{about.model}, {about.form} form, {about.num_classes} classes, images of {size}{dropped}"


def describe_model(model: Model, form: Form, **more: Any) -> Metadata:
    """Return the header for a checkpoint of ``model``; ``more`` are further fields of :class:`Metadata`."""
    return replace(_metadata(model.spec, form, model.num_classes, model.in_channels), **more)


def _metadata(spec: ModelSpec | PSPNetSpec, form: Form, num_classes: int, in_channels: int) -> Metadata:
    # A registered model is identified by its name; any other one needs its specification in the header.
    data = None if ARCHITECTURES.get(spec.name) == spec else spec_to_data(spec)
    return Metadata(spec.name, form, num_classes, in_channels, spec.input_size, version=__version__, spec=data)


def form_of(model: Model) -> Form:
    """Return "train" if a model has branches or batch norms, "plain" if each block has one convolution."""
    if isinstance(model, PSPNet):
        return "plain" if model.auxiliary is None and not _has_norms(model) else "train"
    return "plain" if is_plain_form(model.state_dict()) else "train"


def _has_norms(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def save(
    path: str | os.PathLike[str],
    model: Model,
    metadata: Metadata,
    *,
    layout: str = "repvgg",
    without: Collection[str] = (),
    overwrite: bool = False,
) -> None:
    """Write the weights of ``model`` and its header atomically.

    Args:
        path: ends in .safetensors, or in .pth, .pt, .ckpt or .bin for a torch file. In another library's layout a torch
            file is a bare state dict without a header.
        model: in either form.
        metadata: the header; see :func:`describe_model`.
        layout: which names to give the tensors: "repvgg", "upstream", "timm" or "mmpretrain".
        without: tensors to omit, by our names.
        overwrite: replace an existing file.

    Raises:
        OutputExistsError: ``path`` exists and ``overwrite`` is not set.
        OutputError: the file cannot be written.
        UsageError: a field of the header is invalid, or the layout does not support the model.
    """
    check_model(model, "save")
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in without}
    if isinstance(model, RepVGG):
        gate = model.spec.squeeze_excite  # the authors name the gates of RepVGGplus differently
        tensors = rename_to(layout, tensors, gate.place if gate else None)
    elif layout != "repvgg":
        raise UsageError(f"The layout {layout!r} has no names for a {model.spec.name}: take the layout 'repvgg'.")
    if Path(path).suffix not in _TORCH_SUFFIXES:
        save_checkpoint(path, tensors, metadata, overwrite=overwrite)
    elif invalid := metadata.invalid_field():
        raise UsageError(f"{getattr(metadata, invalid)!r} is not a valid {invalid!r} in the header of a checkpoint.")
    else:
        save_torch(path, tensors, metadata if layout == "repvgg" else None, overwrite=overwrite)


def load(path: str | os.PathLike[str], model: str | None = None, *, plain: bool | None = None) -> LoadedModel:
    """Rebuild the model in a checkpoint, in eval mode.

    Supported are files of this library, of the paper's authors (RepVGGplus, too), of timm and of mmpretrain, in the
    train form and in the plain form. The tensor names identify the library and the shapes identify the model. A header
    provides more, and must agree. Prefixes and dictionaries that training scripts wrap around weights are removed; if
    a file has two copies of the weights, the averaged one is used. Every tensor is either used, or listed in the
    account with the reason.

    Args:
        path: a safetensors file, or a torch file of tensors, which is unpickled without running code.
        model: the name of the model that the file must contain; None accepts any.
        plain: True collapses a train-form model and verifies the result; False rejects a plain-form file; None keeps
            the form of the file.

    Raises:
        CheckpointError: the file cannot be read, contains another model or form, or its tensors do not form a model.
        UnknownModelError: there is no model named ``model``.
        EquivalenceError: the collapsed model is not equal to the one in the file.

    Limits: shapes do not determine strides and image size. A file without a header whose model is not registered gets
    strides of 2 and 224 pixels, and a note in its account.
    """
    if model is not None and model not in PSPNETS:
        spec_of(model)  # reject a misspelled name before reading the file
    loaded = _rebuild(read_checkpoint(path))
    metadata = loaded.metadata
    # A specification in the header means a model that differs from the registered one of the same name.
    if model is not None and (metadata.model != model or metadata.spec is not None):
        raise CheckpointError(f"{str(path)!r} is a checkpoint of {metadata.model}, not of {model}.")
    if plain is False and metadata.form == "plain":
        raise CheckpointError(
            f"{str(path)!r} is in the plain form, which has no branches: load it without plain=False, then create "
            "new branches with repvgg.expand."
        )
    return collapse_loaded(loaded) if plain and metadata.form == "train" else loaded


def collapse_loaded(loaded: LoadedModel) -> LoadedModel:
    """Convert a loaded model from the train form to the plain form, and verify that both are equal.

    Raises:
        EquivalenceError: they are not.
        CheckpointError: blocks of the result have branches, because they cannot be merged.
    """
    plain, report = reparameterize(loaded.model)
    if not isinstance(plain, RepVGG | PSPNet) or form_of(plain) != "plain" or _has_norms(plain):
        left = f": {report.left[0].name}: {report.left[0].reason}" if report.left else ""
        raise CheckpointError(f"The {loaded.metadata.model} in this file cannot be converted to the plain form{left}.")
    account = loaded.account
    # The collapse removes auxiliary heads, which eval mode never calls: say so instead of losing them silently.
    heads = {file: ours for file, ours in account.used.items() if ours.startswith("auxiliary.")}
    account = replace(
        account,
        used={file: ours for file, ours in account.used.items() if file not in heads},
        dropped={**account.dropped, **dict.fromkeys(heads, "an auxiliary head serves training only")},
        notes=(*account.notes, f"collapsed from the train form: {len(report.folded)} blocks"),
    )
    return LoadedModel(plain, replace(loaded.metadata, form="plain"), account)


def _rebuild(checkpoint: Checkpoint) -> LoadedModel:
    """Rebuild the model in a file, in the form of the file."""
    path = str(checkpoint.path)
    if checkpoint.metadata is not None and _names_pspnet(checkpoint.metadata):
        return _rebuild_pspnet(checkpoint, checkpoint.metadata)
    tensors, account, naming = _translate(checkpoint)
    if checkpoint.metadata is not None:
        metadata, claim = checkpoint.metadata, "says it is"
        spec = _spec_in_header(metadata, checkpoint)
    else:
        try:
            found = infer_spec(_shapes(tensors), naming.layout.gate, naming.layout.halves)
        except CheckpointError as error:
            raise CheckpointError(f"{path!r} holds {error}.") from error
        spec, account = found.spec, replace(account, notes=found.notes)
        metadata = _metadata(spec, found.form, found.num_classes, found.in_channels)
        metadata = replace(metadata, ema=checkpoint.averaged)
        claim = "looks like" if naming.layout.name == "repvgg" else f"looks like, by the names of {naming.layout.name},"
    try:
        with meta_device():  # no memory for weights that the file replaces
            model = RepVGG(spec, metadata.num_classes, metadata.in_channels, metadata.form == "plain")
    except (UsageError, ValueError, RuntimeError) as error:  # groups that do not divide the channels, for example
        reason = str(error).rstrip(".")
        raise CheckpointError(f"{path!r} is of a model that cannot be built: {reason}.") from error
    expected = _shapes(model.state_dict())
    # Older files lack the counters of batch norms; everything else must be in the file.
    filled = tuple(name for name in expected if name.endswith(_COUNTER) and name not in tensors)
    tensors |= {name: torch.zeros((), dtype=torch.int64) for name in filled}
    # Nothing is ignored silently: a name outside the layout is either a known extra (dropped) or an error.
    leftover = [name for name in naming.unrecognized if name not in account.dropped]
    problem = _mismatch(expected, _shapes(tensors), naming.in_file, leftover) or _dtype_mismatch(model, tensors)
    if problem:
        raise CheckpointError(f"{path!r} {claim} {metadata.model} in the {metadata.form} form, but {problem}.")
    model.load_state_dict(tensors, assign=True)  # meta parameters have no storage to copy into
    account = replace(account, filled=filled, header=checkpoint.metadata is not None)
    return LoadedModel(model.eval(), metadata, account)


def _names_pspnet(metadata: Metadata) -> bool:
    """Return whether a header names a PSPNet; a specification in it has precedence over a registered name."""
    return metadata.model in PSPNETS if metadata.spec is None else "bins" in metadata.spec


def _rebuild_pspnet(checkpoint: Checkpoint, metadata: Metadata) -> LoadedModel:
    """Rebuild the PSPNet that a header names; files without a header of ours are not recognized."""
    path, form = str(checkpoint.path), metadata.form
    try:
        if metadata.spec is None:
            spec = pspnet_spec_of(metadata.model)
        else:
            spec = pspnet_spec_from_data({**metadata.spec, "name": metadata.model})
        with meta_device():  # no memory for weights that the file replaces
            model = build_pspnet(spec, metadata.num_classes, metadata.in_channels, form == "plain")
    except (UsageError, UnknownModelError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path!r} is of a model that cannot be built: {first_line(error)}.") from error
    expected, tensors = _shapes(model.state_dict()), dict(checkpoint.tensors)
    if problem := _mismatch(expected, _shapes(tensors)) or _dtype_mismatch(model, tensors):
        raise CheckpointError(f"{path!r} says it is {metadata.model} in the {form} form, but {problem}.")
    model.load_state_dict(tensors, assign=True)  # meta parameters have no storage to copy into
    account = Account("repvgg", used={name: name for name in tensors}, header=True)
    return LoadedModel(model.eval(), metadata, account)


def set_backbone(model: PSPNet, classifier: nn.Module) -> None:
    """Copy the weights of a classifier into the backbone of a segmentation model, in place; heads stay as they are.

    Args:
        model: the segmentation model.
        classifier: a RepVGG of the same architecture, channels and form, or a ResNet with torchvision's names; its
            classifier and auxiliary heads are not used.

    Raises:
        CheckpointError: the weights do not fit the backbone.
    """
    expected = model.backbone.state_dict()
    given = {name: tensor for name, tensor in classifier.state_dict().items() if _is_of_backbone(name)}
    if problem := _mismatch(_shapes(expected), _shapes(given)):
        raise CheckpointError(
            f"The weights do not fit the backbone of {model.spec.name}, {model.spec.backbone}: {problem}."
        )
    model.backbone.load_state_dict(given)


def _is_of_backbone(name: str) -> bool:
    return not name.startswith(("head.", "auxiliary.", "fc."))


def _translate(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], Account, Naming]:
    """Return the tensors of a file by our names.

    Raises:
        CheckpointError: the names belong to no layout, and there is no header of ours; or to several networks.
    """
    try:
        naming = recognize_names(checkpoint.tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{str(checkpoint.path)!r} holds {error}.") from error
    if naming is None and checkpoint.metadata is None:
        raise CheckpointError(
            f"{str(checkpoint.path)!r} holds no RepVGG: its names are not ours, nor upstream's, timm's or mmpretrain's."
        )
    naming = naming or identity_naming(checkpoint)
    return *translate(checkpoint, naming), naming


def _spec_in_header(metadata: Metadata, checkpoint: Checkpoint) -> ModelSpec:
    """Return the registered specification that a header names, or the one that it contains."""
    try:
        if metadata.spec is None:
            return spec_of(metadata.model)
        spec = spec_from_data({**metadata.spec, "name": metadata.model})
    except UnknownModelError as error:
        raise CheckpointError(f"{str(checkpoint.path)!r} is of a model that is not known here. {error}") from error
    except UsageError as error:
        raise CheckpointError(f"{str(checkpoint.path)!r} has a header with an invalid 'spec': {error}") from error
    # Building a model takes time per block, even without weights: a header must not cause more than the file has.
    depth = sum(stage.depth for stage in spec.stages)
    if depth > len(checkpoint.tensors):
        raise CheckpointError(f"{str(checkpoint.path)!r} has a header that names more blocks than it has tensors.")
    if depth > MAX_BLOCKS:
        raise CheckpointError(f"{str(checkpoint.path)!r} has a header that names {depth:,} blocks.")
    return spec


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _mismatch(
    expected: Mapping[str, Shape],
    given: Mapping[str, Shape],
    in_file: Callable[[str], str] = str,
    leftover: Sequence[str] = (),
) -> str:
    """Describe missing, unexpected and wrongly shaped tensors by their names in the file; an empty string if all fit.

    ``leftover`` are names in the file that the layout does not have.
    """
    missing = [repr(in_file(key)) for key in expected if key not in given]
    unexpected = [repr(key) for key in (*(in_file(key) for key in given if key not in expected), *leftover)]
    misshapen = [
        f"{in_file(key)!r} {given[key]} instead of {shape}"
        for key, shape in expected.items()
        if given.get(key, shape) != shape
    ]
    problems = (
        _counted(missing, "is missing", "are missing"),
        _counted(unexpected, "is unexpected", "are unexpected"),
        _counted(misshapen, "has another shape", "have other shapes"),
    )
    return "; ".join(filter(None, problems))


def _counted(names: Sequence[str], one: str, many: str) -> str:
    """Return the number of names and the first of them, or an empty string for none."""
    if not names:
        return ""
    shown = ", ".join(names[:_MAX_LISTED]) + (", …" if len(names) > _MAX_LISTED else "")
    return f"{len(names)} {f'key {one}' if len(names) == 1 else f'keys {many}'} ({shown})"


def _dtype_mismatch(model: Model, tensors: Mapping[str, Tensor]) -> str | None:
    """Describe weights that are not of one floating-point dtype of convolutions; None if they are."""
    weights = [name for name, tensor in model.state_dict().items() if tensor.is_floating_point()]
    dtypes = sorted({str(tensors[name].dtype).removeprefix("torch.") for name in weights})
    if len(dtypes) > 1:
        return f"its weights are of several types, {' and '.join(dtypes)}"
    dtype = tensors[weights[0]].dtype
    if dtype in _DTYPES:
        return None
    advice = ", which has no convolution: save them as float16 or float32" if dtype.is_floating_point else ""
    return f"its weights are of type {dtypes[0]}{advice}"


def load_weights(model: nn.Module, path: str | os.PathLike[str], name: str = "the model") -> None:
    """Load the tensors of a file into ``model``, in place; all of them fit, or nothing is loaded.

    Wrapping dictionaries are opened. Prefixes that wrappers put before every name (``module.``, ``_orig_mod.``,
    ``model.``) may differ between file and model. A RepVGG accepts the files of other libraries as :func:`load` does;
    if it is in the plain form and the file is not, the model in the file is collapsed first.

    Args:
        model: the model to change; it keeps its dtypes.
        path: a safetensors file, or a torch file of tensors, which is unpickled without running code.
        name: of the model, for messages.

    Raises:
        CheckpointError: the file cannot be read, or a tensor is missing, unexpected, or of another shape; the text
            counts each kind and names the first two. Or the file is plain and the model has branches.
    """
    check_model(model, "load_weights")
    checkpoint = read_checkpoint(path)
    # get_extra_state() may put objects other than tensors into a state dict.
    expected = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    leftover: list[str] = []
    if isinstance(model, RepVGG):
        given, leftover = _tensors_for(model, checkpoint)
    else:
        # Replace the wrappers of the file by those of the model: DataParallel, torch.compile, Lightning, …
        ours, theirs = common_prefix(expected), common_prefix(checkpoint.tensors)
        given = {ours + key.removeprefix(theirs): tensor for key, tensor in checkpoint.tensors.items()}
    required = {key: tensor for key, tensor in expected.items() if key in given or not key.endswith(_COUNTER)}
    if problem := _mismatch(_shapes(required), _shapes(given), leftover=leftover):
        raise CheckpointError(f"The weights in {str(path)!r} do not fit {name}: {problem}.")
    model.load_state_dict(given, strict=False)  # all that may still be missing are counters of batches


def _tensors_for(model: RepVGG, checkpoint: Checkpoint) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of a file by our names in the form of ``model``, and the names that the layout lacks."""
    given, account, naming = _translate(checkpoint)
    if is_plain_form(given) == (form_of(model) == "plain"):
        return given, [key for key in naming.unrecognized if key not in account.dropped]
    if is_plain_form(given):
        raise CheckpointError(
            f"{str(checkpoint.path)!r} is in the plain form, which has no branches: load it into the plain form, then "
            "create new branches with repvgg.expand."
        )
    return collapse_loaded(_rebuild(checkpoint)).model.state_dict(), []
