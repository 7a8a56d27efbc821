"""The model that a run starts from: new, from a checkpoint, or a plain checkpoint expanded into branches."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import final

from torch import nn

from repvgg._contexts import seeded
from repvgg.data import ImageData
from repvgg.errors import UsageError
from repvgg.expansion import expand
from repvgg.models import Model, RepVGG, create_model, load
from repvgg.training.config import TrainConfig

_EXPANSION_BATCHES = 4
_PLAIN_WARNING = (
    "warning: trains a plain model, without branches and batch norms; set expand to train an equivalent branched one"
)


@final
@dataclass(frozen=True, eq=False)
class InitialModel:
    """A model ready to train, and one line for the user on each thing that was done to it."""

    model: Model
    notes: tuple[str, ...] = field(default=())


def build_initial_model(config: TrainConfig, data: ImageData) -> InitialModel:
    """Build the model of ``config`` for the classes and channels of ``data``; random weights follow from the seed.

    The classifier of a checkpoint is replaced if its classes differ from those of ``data``.

    Raises:
        UsageError: no model is named, the checkpoint takes images with another number of channels, or it cannot be
            expanded.
        CheckpointError: the checkpoint cannot be read, or is of another model.
    """
    if config.init is None:
        if not config.model:
            raise UsageError("There is no model to train: name one of 'repvgg list', or give a checkpoint as init.")
        with seeded("model", config.seed):
            return InitialModel(create_model(config.model, len(data.classes), data.input_shape[0]))
    loaded = load(config.init, config.model or None)
    model, metadata = loaded.model, loaded.metadata
    if model.in_channels != data.input_shape[0]:
        raise UsageError(
            f"{config.init!r} takes images of {model.in_channels} channels, but {data.uri} has {data.input_shape[0]}: "
            f"set data.channels to {model.in_channels}."
        )
    notes = [f"starts from {config.init}, {metadata.model} in the {metadata.form} form"]
    with seeded("model", config.seed):
        if config.expand and metadata.form != "plain":
            raise UsageError(f"{config.init!r} has its branches already: leave out expand.")
        if config.expand:
            if not isinstance(model, RepVGG):
                raise UsageError(f"{config.init!r} is a segmentation model, which is not expanded: leave out expand.")
            model, note = _expand(model, data, min(64, config.batch_size))
            notes.append(note)
        elif metadata.form == "plain":
            notes.append(_PLAIN_WARNING)
        if model.num_classes != len(data.classes) or metadata.classes != data.classes:
            notes.append(f"new classifier for {len(data.classes)} classes in place of {model.num_classes}")
            # Inside the seeded context: its weights are drawn here.
            model.replace_classifier(len(data.classes))
    return InitialModel(model, tuple(notes))


def _expand(plain: RepVGG, data: ImageData, batch_size: int) -> tuple[RepVGG, str]:
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
