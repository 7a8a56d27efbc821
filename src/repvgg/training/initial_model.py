"""The model that a run starts from: new, from a checkpoint, or a plain checkpoint expanded into branches.

A segmentation network may also start from a classification checkpoint of its backbone.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import final

from torch import nn

from repvgg._contexts import seeded
from repvgg.checkpoints import read_checkpoint
from repvgg.errors import UsageError
from repvgg.expansion import expand
from repvgg.models import (
    PSPNETS,
    SPECS,
    Model,
    PSPNetSpec,
    RepVGG,
    create_model,
    load,
    load_weights,
    resolve,
    set_backbone,
)
from repvgg.training.config import TrainConfig
from repvgg.training.tasks import TrainingData, check_task
from repvgg.training.whitening import whiten_stem

_EXPANSION_BATCHES = 4
_PLAIN_WARNING = "warning: trains a plain model, without branches and batch norms; "
_EXPAND_ADVICE = "set expand to train an equivalent branched one"
_TRAIN_FORM_ADVICE = "start from its train form to train those"


@final
@dataclass(frozen=True, eq=False)
class InitialModel:
    """A model ready to train, and one line for the user on each thing that was done to it."""

    model: Model
    notes: tuple[str, ...] = field(default=())


def build_initial_model(config: TrainConfig, data: TrainingData, spec: PSPNetSpec | None = None) -> InitialModel:
    """Build the model of ``config`` for the classes and channels of ``data``; random weights follow from the seed.

    The classifier of a checkpoint is replaced if its classes differ from those of ``data``. If the model is a
    segmentation network and the checkpoint a classifier, the backbone gets its weights, and the heads are new.

    Args:
        config: the run.
        data: the images that it trains on.
        spec: a segmentation network that is not registered, in place of ``config.model``; it starts from a classifier.

    Raises:
        UsageError: no model is named, it is not for the task of the data, the checkpoint takes images with other
            channels, or it cannot be expanded.
        CheckpointError: the checkpoint cannot be read, or is of another model.
    """
    channels = data.input_shape[0]
    if config.init is None:
        if not config.model and spec is None:
            raise UsageError("There is no model to train: name one of 'repvgg list', or give a checkpoint as init.")
        with seeded("model", config.seed):
            model = create_model(spec or config.model, len(data.classes), channels)
        check_task(model, model.spec.name, data)
        if not config.whiten_stem:
            return InitialModel(model)
        if not isinstance(model, RepVGG):
            raise UsageError(f"The stem of {model.spec.name} cannot be whitened: leave out whiten_stem.")
        return InitialModel(model, (whiten_stem(model, data),))
    if spec is not None or (config.model in PSPNETS and not _is_segmentation_checkpoint(config.init)):
        return _with_backbone_of(config.init, spec or PSPNETS[config.model], config, data)
    loaded = load(config.init, config.model or None)
    model, metadata = loaded.model, loaded.metadata
    check_task(model, metadata.model, data)
    _check_channels(config.init, model.in_channels, data)
    notes = [f"starts from {config.init}, {metadata.model} in the {metadata.form} form"]
    with seeded("model", config.seed):
        if config.expand and metadata.form != "plain":
            raise UsageError(f"{config.init!r} has its branches already: leave out expand.")
        if config.expand:
            if not isinstance(model, RepVGG):
                raise UsageError(
                    f"{config.init!r} is plain, and segmentation networks are not expanded: start from its train form."
                )
            model, note = _expand(model, data, min(64, config.batch_size))
            notes.append(note)
        elif metadata.form == "plain":
            notes.append(_PLAIN_WARNING + (_EXPAND_ADVICE if isinstance(model, RepVGG) else _TRAIN_FORM_ADVICE))
        if model.num_classes != len(data.classes) or metadata.classes != data.classes:
            notes.append(f"new classifier for {len(data.classes)} classes in place of {model.num_classes}")
            model.replace_classifier(len(data.classes))  # inside the seeded context: its weights are drawn here
    return InitialModel(model, tuple(notes))


def _check_channels(path: str, channels: int, data: TrainingData) -> None:
    if channels != data.input_shape[0]:
        raise UsageError(
            f"{path!r} takes images of {channels} channels, but {data.uri} has {data.input_shape[0]}: "
            f"set data.channels to {channels}."
        )


def _is_segmentation_checkpoint(path: str) -> bool:
    metadata = read_checkpoint(path).metadata
    return metadata is not None and (metadata.model in PSPNETS or "bins" in (metadata.spec or {}))


def _with_backbone_of(path: str, spec: PSPNetSpec, config: TrainConfig, data: TrainingData) -> InitialModel:
    """Build a segmentation network with new heads, and the weights of a classification checkpoint in its backbone."""
    with seeded("model", config.seed):
        model = create_model(spec, len(data.classes), data.input_shape[0])
    check_task(model, spec.name, data)
    notes: tuple[str, ...] = ()
    if spec.backbone not in SPECS:
        classifier, what = _torchvision_classifier(path, spec.backbone), f"{spec.backbone} with torchvision's names"
    else:
        loaded = load(path, spec.backbone)
        classifier, what = loaded.model, f"{loaded.metadata.model} in the {loaded.metadata.form} form"
        _check_channels(path, loaded.model.in_channels, data)
        if loaded.metadata.form == "plain":  # a plain backbone would train without batch norms
            assert isinstance(loaded.model, RepVGG)
            classifier, note = _expand(loaded.model, data, min(64, config.batch_size))
            notes = (note,)
        elif config.expand:
            raise UsageError(f"{path!r} has its branches already: leave out expand.")
    set_backbone(model, classifier)
    return InitialModel(model, (f"the backbone starts from {path}, {what}; the heads are new", *notes))


def _torchvision_classifier(path: str, name: str) -> nn.Module:
    """Return a ResNet of torchvision with the weights of a file."""
    head = read_checkpoint(path).tensors.get("fc.weight")
    classifier = resolve(f"torchvision:{name}", num_classes=None if head is None else len(head)).model
    load_weights(classifier, path, name)
    return classifier


def _expand(plain: RepVGG, data: TrainingData, batch_size: int) -> tuple[RepVGG, str]:
    # The new batch norms start with the statistics of real batches, so that the first training steps compute nearly
    # what eval mode does.
    batches = itertools.islice(data.train_batches(batch_size), _EXPANSION_BATCHES)
    model, report = expand(plain, data=[data.prepare(images) for images, _ in batches])
    # 1x1 convolutions (squeeze-excite) stay plain in the branched form too.
    unexpanded = [skipped for skipped in report.left if max(_kernel_size(plain, skipped.name)) > 1]
    if not isinstance(model, RepVGG) or unexpanded:
        first = (unexpanded or report.left)[0]
        raise UsageError(f"{first.name} cannot be expanded, {first.reason}: leave out expand.")
    return model, f"expanded {len(report.expanded)} convolutions into branches that compute the same"


def _kernel_size(model: nn.Module, name: str) -> tuple[int, ...]:
    conv = model.get_submodule(name)
    assert isinstance(conv, nn.Conv2d)
    return conv.kernel_size
