"""The model that a run starts with: fresh, out of a checkpoint, or a plain one that gets its branches back."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import final

from torch import nn

from repvgg.data import OpenedData
from repvgg.errors import UsageError
from repvgg.expansion import expand
from repvgg.models import RepVGG, create_model, load
from repvgg.training.config import TrainConfig
from repvgg.training.seeding import seeded


@final
@dataclass(frozen=True, eq=False)
class Start:
    """A model in the form that it will be trained in, and what was done to get there, in words."""

    model: RepVGG
    notes: tuple[str, ...] = field(default=())


def starting_model(config: TrainConfig, data: OpenedData) -> Start:
    """Build the model of ``config`` for the classes and channels of ``data``, seeded.

    Raises:
        UsageError: no model is named, or the checkpoint takes images with other channels.
        CheckpointError: the checkpoint cannot be read, or is of another model.
    """
    if config.init is None:
        if not config.model:
            raise UsageError("There is no model to train: name one of 'repvgg list', or give a checkpoint as init.")
        with seeded("model", config.seed):
            return Start(create_model(config.model, len(data.classes), data.input_shape[0]))
    loaded = load(config.init, config.model or None)
    model, metadata = loaded.model, loaded.metadata
    if model.in_channels != data.input_shape[0]:
        raise UsageError(
            f"{config.init!r} takes images of {model.in_channels} channels, but {data.uri} has {data.input_shape[0]}: "
            f"set data.channels to {model.in_channels}."
        )
    notes = [f"starts from {config.init}, {metadata.model} in the {metadata.form} form"]
    with seeded("model", config.seed):
        if metadata.form == "plain":
            model, note = _with_branches(model, data, min(64, config.batch_size)) if config.expand else (model, _PLAIN)
            notes.append(note)
        elif config.expand:
            raise UsageError(f"{config.init!r} has its branches already: leave out expand.")
        if model.num_classes != len(data.classes) or metadata.classes != data.classes:
            notes.append(f"new classifier for {len(data.classes)} classes in place of {model.num_classes}")
            model.head = nn.Linear(model.head.in_features, len(data.classes))
    return Start(model, tuple(notes))


_BATCHES = 4
_PLAIN = "warning: trains a plain model, without branches and batch norms; expand gives them back"


def _with_branches(plain: RepVGG, data: OpenedData, batch: int) -> tuple[RepVGG, str]:
    """The branches back, with statistics of a few training batches, so that the first steps see what eval mode does."""
    images = [data.prepare(images) for images, _ in itertools.islice(data.train_batches(batch), _BATCHES)]
    model, report = expand(plain, data=images)
    if not isinstance(model, RepVGG) or any(max(_kernel(plain, row.name)) > 1 for row in report.left):
        raise UsageError(
            f"Not every convolution can be expanded: {report.left[0].name} stays, {report.left[0].reason}."
        )
    return model, f"{len(report.expanded)} convolutions got their branches back, computing the same"


def _kernel(model: nn.Module, name: str) -> tuple[int, ...]:
    conv = model.get_submodule(name)
    assert isinstance(conv, nn.Conv2d)
    return conv.kernel_size
