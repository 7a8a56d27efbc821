"""Build a model: a registered one by name, one from a source string such as ``timm:NAME``, or one from a checkpoint."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

from torch import nn
from torch.nn.parameter import is_lazy

from repvgg._contexts import meta_device
from repvgg.blocks import BranchSum, ConvBN, Geometry, RepVGGBlock, block_of
from repvgg.errors import BorderError, OtherBlockWarning, SourceError, UnknownModelError, UsageError, did_you_mean
from repvgg.models.backbones import build_pspnet
from repvgg.models.checkpoint import load, load_weights, set_backbone
from repvgg.models.dilation import DilationRule
from repvgg.models.hub import load_pretrained
from repvgg.models.pspnet import Model, PSPNet
from repvgg.models.registry import (
    ARCHITECTURES,
    BASELINES,
    CITYSCAPES_CLASSES,
    COMPARISONS,
    PSPNETS,
    SPECS,
    baseline_of,
    comparison_of,
    pspnet_spec_of,
    spec_of,
)
from repvgg.models.repvgg import RepVGG, require_counts
from repvgg.models.sources import DEFAULT_SHAPE, Built, Shape, build_timm, build_torchvision, model_from_file
from repvgg.models.spec import ModelSpec, PSPNetSpec
from repvgg.models.variants import move_strides_to_first_conv

_SOURCE_FORMS = "timm:NAME, torchvision:NAME, repvgg:NAME or PATH.py:FACTORY"
_DEFAULT_CLASSES, _DEFAULT_CHANNELS = 1000, 3  # ImageNet-1k


@dataclass(frozen=True, eq=False)
class ResolvedModel:
    """A model built from a source string, in eval mode."""

    source: str  # the string that was given
    model: nn.Module  # a new model, shared with nothing
    input_shape: Shape  # (C, H, W) of the image that it is designed for, as far as known
    weights: str  # where its weights come from, in words; "random" for an initialized model


@overload
def create_model(
    name: ModelSpec,
    num_classes: int = ...,
    in_channels: int = ...,
    plain: bool = ...,
    *,
    pretrained: bool = ...,
) -> RepVGG: ...
@overload
def create_model(
    name: PSPNetSpec,
    num_classes: int = ...,
    in_channels: int = ...,
    plain: bool = ...,
    *,
    pretrained: bool = ...,
) -> PSPNet: ...
@overload
def create_model(
    name: str,
    num_classes: int = ...,
    in_channels: int = ...,
    plain: bool = ...,
    *,
    pretrained: bool = ...,
    dilation: DilationRule | None = ...,
) -> Model: ...


def create_model(
    name: str | ModelSpec | PSPNetSpec,
    num_classes: int = _DEFAULT_CLASSES,
    in_channels: int = _DEFAULT_CHANNELS,
    plain: bool = False,
    *,
    pretrained: bool = False,
    dilation: DilationRule | None = None,
) -> Model:
    """Build a RepVGG or a PSPNet, initialized with PyTorch's defaults or with published weights.

    Args:
        name: a name from :func:`list_models` or :func:`list_segmentation_models`, or your own specification.
        num_classes: number of logits (of each pixel, for a PSPNet), at least 1.
        in_channels: channels of the input images, at least 1.
        plain: build the plain form, with the keys, shapes and geometry that collapsing the train form gives.
        pretrained: load the ImageNet-1k weights that timm publishes on the Hugging Face hub, through its cache. For
            another number of classes the classifier is newly initialized, for another number of channels the first
            block. A PSPNet over a RepVGG gets them in its backbone.
        dilation: how the backbone of a PSPNet is dilated, see :func:`repvgg.models.dilation.dilate_`; None takes the
            rule of the specification, which is "paper" or "fast".

    Returns:
        The model in training mode, like every new module, also with published weights: call ``eval()`` before you
        predict or collapse. :func:`repvgg.models.load_pretrained` also returns the preprocessing of the images.

    Raises:
        UnknownModelError: there is no such model.
        UsageError: a count is below 1, there are no published weights of the model, or ``dilation`` is given for a
            classifier.
        MissingDependencyError: a ResNet backbone needs torchvision.
        SourceError: the weights are not in the cache and the hub cannot be reached.
        CheckpointError: the published file is of another model.

    Warns:
        FreshWeightsWarning: some weights are newly initialized because of other classes or channels.
    """
    require_counts(num_classes, in_channels)  # before a download
    spec = _spec_of(name) if isinstance(name, str) else name
    if isinstance(spec, PSPNetSpec):
        spec = spec if dilation is None else replace(spec, dilation=dilation)
        model = build_pspnet(spec, num_classes, in_channels, plain)
        if pretrained:
            weights = load_pretrained(spec.backbone, in_channels=in_channels, plain=plain).model
            set_backbone(model, weights)
        return model
    if dilation is not None:
        raise UsageError(f"dilation is for segmentation models, such as {next(iter(PSPNETS))}.")
    if pretrained:
        loaded = load_pretrained(spec, num_classes=num_classes, in_channels=in_channels, plain=plain).model
        assert isinstance(loaded, RepVGG)  # all published weights are of classifiers
        return loaded.train()
    return RepVGG(spec, num_classes, in_channels, plain)


def _spec_of(name: str) -> ModelSpec | PSPNetSpec:
    return pspnet_spec_of(name) if name.startswith("pspnet") else spec_of(name)


def create_variant(
    spec: str | ModelSpec,
    block: str,
    num_classes: int = _DEFAULT_CLASSES,
    in_channels: int = _DEFAULT_CHANNELS,
    *,
    otherwise: str = "conv_bn",
) -> RepVGG:
    """Build a RepVGG with another block in place of each layer's three branches; activations stay.

    All entries of Tables 6 and 7 except Residual Reorg are such variants. Those with linear blocks collapse to the
    plain form of ``spec``.

    Args:
        spec: a specification, or the name of a model.
        block: a name in :data:`repvgg.blocks.BLOCKS`.
        num_classes: number of logits.
        in_channels: channels of the images.
        otherwise: the block for layers whose geometry ``block`` does not support: RepMixer cannot change shapes.

    Returns:
        The model, newly initialized, in training mode.

    Raises:
        UnknownModelError: there is no such model.
        UsageError: there is no such block, or it supports no layer; or a count is below 1.

    Warns:
        OtherBlockWarning: some layers use ``otherwise``; the text says how many, and why.
    """
    require_counts(num_classes, in_channels)
    wanted, fallback = block_of(block), block_of(otherwise)
    model = RepVGG(spec if isinstance(spec, ModelSpec) else spec_of(spec), num_classes, in_channels, plain=False)
    reasons = []
    # A list: the loop replaces submodules of what it iterates over.
    layers = [module for module in model.modules() if isinstance(module, RepVGGBlock)]
    for layer in layers:
        assert isinstance(layer.conv, BranchSum)  # the train form
        dense = layer.conv["dense"]
        assert isinstance(dense, ConvBN)
        geometry = Geometry.of(dense.conv)  # the kxk branch has the geometry of the merged convolution
        try:
            layer.conv = wanted.make(geometry)
        except (UsageError, BorderError) as error:
            reasons.append(str(error))
            layer.conv = fallback.make(geometry)
    if len(reasons) == len(layers):
        raise UsageError(f"No layer of {model.spec.name} can be a block {block!r}: {reasons[0]}")
    if reasons:
        text = f"{len(reasons)} of {len(layers)} layers are {otherwise!r} in place of {block!r}: {reasons[0]}"
        warnings.warn(text, OtherBlockWarning, stacklevel=2)
    return model


def create_baseline(name: str, num_classes: int = _DEFAULT_CLASSES, *, values: bool = True) -> nn.Module:
    """Build a baseline with random weights, in the form in which it is trained.

    Args:
        name: a name from :func:`list_baselines`.
        num_classes: number of logits, at least 1.
        values: False builds it on the meta device, for counting; see :func:`resolve`.

    Returns:
        The model in training mode, like every new module: call ``eval()`` before you predict, fold or measure. The
        paper folds the batch norms of baselines before it measures them (§4.1): see :func:`repvgg.fold_batch_norms`.

    Raises:
        UnknownModelError: there is no such baseline.
        UsageError: ``num_classes`` is below 1.
        MissingDependencyError: the library that provides the model is not installed.
        SourceError: the installed version of the library builds another network under that name.
    """
    baseline = baseline_of(name)
    model = resolve(baseline.source, num_classes=num_classes, values=values).model.train()
    if baseline.stride_in_1x1:
        move_strides_to_first_conv(model, baseline.source)
    return model


def create_comparison(
    name: str, num_classes: int = _DEFAULT_CLASSES, in_channels: int = _DEFAULT_CHANNELS
) -> nn.Module:
    """Build a network of :data:`repvgg.models.COMPARISONS`, newly initialized, in training mode.

    Raises:
        UnknownModelError: there is no such network; the text suggests the closest names, or lists all of them.
        UsageError: a count is below 1, or the network does not support ``in_channels``.
    """
    require_counts(num_classes, in_channels)
    return comparison_of(name).make(num_classes, in_channels)


def resolve(
    source: str,
    *,
    weights: str | os.PathLike[str] | None = None,
    num_classes: int | None = None,
    in_channels: int | None = None,
    values: bool = True,
) -> ResolvedModel:
    """Build the model that ``source`` names, on the CPU and in eval mode; nothing is downloaded.

    Args:
        source: ``timm:NAME`` (extra ``timm``), ``torchvision:NAME`` (extra ``train``), ``repvgg:NAME``, or
            ``PATH.py:FACTORY``: the file is imported, which runs it, and FACTORY is called without arguments.
        weights: a file to load; see :func:`repvgg.models.load_weights`. Without one the weights are random.
        num_classes: number of logits, for a model by name; None keeps the model's default.
        in_channels: channels of the images, for ``timm:`` and ``repvgg:``; None keeps the model's default.
        values: False builds the model on the meta device, for counting: it has shapes and needs no memory. A model
            from a file, or whose constructor computes with values, is built with values first.

    Raises:
        SourceError: the string has none of these forms, the file or its factory fails, or the model is unusable.
        UnknownModelError: there is no model of that name; the text suggests the closest ones.
        UsageError: ``num_classes`` is below 1, or given for a model from a file; or weights without values.
        CheckpointError: the weights cannot be read, or do not fit.
        MissingDependencyError: the library is not installed.
    """
    if num_classes is not None and num_classes < 1:
        raise UsageError(f"A model needs at least one class, not {num_classes}.")
    if weights is not None and not values:
        raise UsageError("A model on the meta device has no values: build it with values to load weights.")
    resolved = (_resolve if values else _resolve_on_meta)(source, num_classes, in_channels)
    origin = resolved.weights
    if weights is not None:
        load_weights(resolved.model, weights, source)
        origin = f"from {Path(weights).name}"
    shape = (in_channels or resolved.input_shape[0], *resolved.input_shape[1:])
    return ResolvedModel(source, resolved.model.eval(), shape, origin)


def _resolve_on_meta(source: str, num_classes: int | None, in_channels: int | None) -> ResolvedModel:
    collection, _, name = source.partition(":")
    origin = "none: it has shapes alone"
    if collection in _COLLECTIONS and name:
        try:
            with meta_device():
                model, shape = _COLLECTIONS[collection](name, num_classes, in_channels)
            # .to(): some constructors name the CPU for a buffer.
            return ResolvedModel(source, model.to("meta"), shape, origin)
        except SourceError:
            pass  # its constructor may need values; any other error recurs below
    resolved = _resolve(source, num_classes, in_channels)
    return replace(resolved, model=resolved.model.to("meta"), weights=origin)


def _resolve(source: str, num_classes: int | None, in_channels: int | None) -> ResolvedModel:
    collection, _, name = source.partition(":")
    path, _, factory = source.rpartition(":")  # the path itself may contain colons
    if collection in _COLLECTIONS and name:
        built, origin = _COLLECTIONS[collection](name, num_classes, in_channels), "random"
    elif not path or not factory.isidentifier():
        raise SourceError(f"{source!r} does not say where the model comes from: {_SOURCE_FORMS}{_hint(source)}.")
    elif not path.endswith(".py"):
        raise SourceError(f"{path!r} is neither a Python file nor a collection of models: {_SOURCE_FORMS}.")
    elif num_classes is not None:
        raise UsageError(
            f"The number of classes is that of the model which {factory}() returns: it cannot be changed from outside."
        )
    else:
        built = Built(model_from_file(path, factory), DEFAULT_SHAPE)
        origin = f"set by {factory}(), random unless it loads some"
    # Lazy modules and meta tensors would fail later, in the middle of a trace.
    for tensor_name, tensor in (*built.model.named_parameters(), *built.model.named_buffers()):
        if is_lazy(tensor) or tensor.is_meta:
            raise SourceError(f"{source} has no values in {tensor_name!r} yet: run the model once in its factory.")
    # A factory in a file may return a model on an accelerator.
    return ResolvedModel(source, built.model.cpu(), built.input_shape, origin)


def _hint(source: str) -> str:
    if source.endswith(".py"):
        return f"; name the function in the file, as in {source}:make_model"
    return f"; did you mean repvgg:{source}?" if source in SPECS else ""


def _build_repvgg(name: str, num_classes: int | None, in_channels: int | None) -> Built:
    """Build a RepVGG, a comparison network or a segmentation model."""
    classes, channels = num_classes or _DEFAULT_CLASSES, in_channels or _DEFAULT_CHANNELS
    if name.startswith("pspnet"):
        size = pspnet_spec_of(name).input_size
        return Built(create_model(name, num_classes or CITYSCAPES_CLASSES, channels), (3, size, size))
    if name in COMPARISONS:
        size = COMPARISONS[name].input_size
        return Built(create_comparison(name, classes, channels), (3, size, size))
    spec = spec_of(name)
    return Built(create_model(spec, classes, channels), (3, spec.input_size, spec.input_size))


_COLLECTIONS: dict[str, Callable[[str, int | None, int | None], Built]] = {
    "repvgg": _build_repvgg,
    "timm": build_timm,
    "torchvision": build_torchvision,
}


def named_model(name: str | os.PathLike[str], *, values: bool = True) -> ResolvedModel:
    """Build a model from any kind of name, in eval mode.

    Args:
        name: a registered architecture, a source string (see :func:`resolve`), or the path of a checkpoint (see
            :func:`load`). A registered name takes precedence over a file of that name, and a file over a source string.
        values: False puts the model on the meta device, for counting.

    Returns:
        The model; a checkpoint in the form of the file, all others in the form in which they are trained.

    Raises:
        UnknownModelError: the name is none of these; the text suggests the closest names.
        RepvggError: what :func:`resolve` and :func:`load` raise.
    """
    text = os.fspath(name)
    if text in BASELINES:
        size = BASELINES[text].input_size
        return ResolvedModel(text, create_baseline(text, values=values).eval(), (3, size, size), "random")
    if text in ARCHITECTURES:
        return replace(resolve(f"repvgg:{text}", values=values), source=text)
    if ":" in text and not Path(text).is_file():
        return resolve(text, values=values)
    if Path(text).suffix or len(Path(text).parts) > 1 or Path(text).exists():
        loaded = load(text)
        size = loaded.metadata.input_size
        model: nn.Module = loaded.model if values else loaded.model.to("meta")
        return ResolvedModel(text, model, (loaded.metadata.in_channels, size, size), f"from {Path(text).name}")
    advice = did_you_mean(text, ARCHITECTURES, "use a name from 'repvgg list', timm:NAME, or a file.")
    raise UnknownModelError(f"There is no model {text!r}: {advice}")
