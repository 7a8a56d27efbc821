"""Weights trained on ImageNet-1k, published on the Hugging Face hub by timm in the train form.

The shas of the files' commits could not be learned where this table was written, so no row pins one; what is checked is
the structure, tensor by tensor. Pin by ``revision``, with the commit that :func:`load_pretrained` has found.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, replace

from torch import Tensor

from repvgg.data.config import IMAGENET_MEAN, IMAGENET_STD
from repvgg.errors import FreshWeightsWarning, UsageError
from repvgg.models.builder import RepVGG, create_model
from repvgg.models.hub import fetch
from repvgg.models.loading import Loaded, load
from repvgg.models.spec import ModelSpec, spec_of


@dataclass(frozen=True)
class Pretrained:
    """Where the weights of a row are, and what is known of them.

    Attributes:
        model: name of the row.
        repository: OWNER/NAME on the hub; the file is ``model.safetensors``.
        top1: accuracy on the ImageNet-1k validation images in percent, as published there.
        input_size: height and width in pixels at which it was measured.
        crop: the centre crop, as a fraction of the shorter side.
        licence: of the weights.
        revision: the commit; None takes the newest.
    """

    model: str
    repository: str
    top1: float
    input_size: int = 224
    crop: float = 0.875
    licence: str = "mit"
    revision: str | None = None


_TOP1 = {
    "repvgg_a0": 72.426,
    "repvgg_a1": 74.474,
    "repvgg_a2": 76.488,
    "repvgg_b0": 75.158,
    "repvgg_b1": 78.370,
    "repvgg_b1g4": 77.608,
    "repvgg_b2": 78.788,
    "repvgg_b2g4": 79.396,
    "repvgg_b3": 80.528,
    "repvgg_b3g4": 80.224,
}
PRETRAINED: dict[str, Pretrained] = {
    **{name: Pretrained(name, f"timm/{name}.rvgg_in1k", top1) for name, top1 in _TOP1.items()},
    "repvgg_d2se": Pretrained("repvgg_d2se", "timm/repvgg_d2se.rvgg_in1k", 83.550, input_size=320, crop=1.0),
}


def load_pretrained(
    name: str | ModelSpec,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    plain: bool = False,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Loaded:
    """The published weights of a row, in eval mode, with how they are to be used.

    Args:
        name: of a row of the table, or the row.
        num_classes: logits, 1000 if None; with another number the classifier is freshly initialized.
        in_channels: of the images, 3 if None; with another number the first block is freshly initialized.
        plain: collapse the model and prove the outcome equal.
        revision: the commit of the repository; None takes the row's, which is the newest where the row pins none.
        cache_dir: where downloads are kept; None takes the cache of huggingface_hub.

    Returns:
        The model, and as metadata its repository and commit (``source``), the normalization of its pixels, the size and
        crop of its images, and its published top-1 accuracy as long as nothing is fresh.

    Raises:
        UnknownModelError: no row has that name.
        UsageError: nobody published weights for it, or a count below 1.
        SourceError: the file is not in the cache and the hub cannot be reached; the text says where it was looked for.
        CheckpointError: the file is not of that row.

    Warns:
        FreshWeightsWarning: weights are not from the file; the text says which.
    """
    row = _row(name)
    found = fetch(row.repository, revision=revision or row.revision, cache_dir=cache_dir)
    loaded = load(found.path, row.model, plain=plain or None)
    crop = {"dataset": "ImageNet-1k", "interpolation": "bilinear", "test_crop": row.crop}
    metadata = replace(
        loaded.metadata,
        input_size=row.input_size,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        recipe=crop,
        metrics={"top1": row.top1 / 100},
        source=found.source,
    )
    loaded = replace(loaded, metadata=metadata)
    classes = metadata.num_classes if num_classes is None else num_classes
    channels = metadata.in_channels if in_channels is None else in_channels
    same = (classes, channels) == (metadata.num_classes, metadata.in_channels)
    return loaded if same else _refitted(loaded, classes, channels, plain)


def _row(name: str | ModelSpec) -> Pretrained:
    spec = name if isinstance(name, ModelSpec) else spec_of(name)
    if spec.name not in PRETRAINED or spec != spec_of(spec.name):
        known = ", ".join(PRETRAINED)
        raise UsageError(f"There are no published weights of {spec.name!r} to take: there are of {known}.")
    return PRETRAINED[spec.name]


def _refitted(loaded: Loaded, num_classes: int, in_channels: int, plain: bool) -> Loaded:
    """The same weights in a model for other classes or channels; what does not fit is fresh."""
    about = loaded.metadata
    model = create_model(loaded.model.spec, num_classes, in_channels, plain)
    fresh = ["head"] * (num_classes != about.num_classes) + ["stem.conv"] * (in_channels != about.in_channels)
    model.load_state_dict({**model.state_dict(), **_without(loaded.model, fresh)})
    model = model.to(next(loaded.model.parameters()).dtype)
    warnings.warn(
        f"{' and '.join(map(repr, fresh))} of {about.model} have fresh weights, as the published ones are for "
        f"{about.num_classes} classes and {about.in_channels} channels: train the model before you use it.",
        FreshWeightsWarning,
        stacklevel=4,
    )
    other = in_channels != about.in_channels
    about = replace(about, num_classes=num_classes, in_channels=in_channels, metrics={})
    return replace(loaded, model=model.eval(), metadata=replace(about, mean=(), std=()) if other else about)


def _without(model: RepVGG, parts: list[str]) -> dict[str, Tensor]:
    """The state of a model but for some of its parts."""
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not any(name.startswith(f"{part}.") for part in parts)
    }
