"""``repvgg list``."""

from __future__ import annotations

from typing import Any

from repvgg._progress import busy
from repvgg.cli._options import JsonFlag
from repvgg.cli._output import write_json, write_line, write_table
from repvgg.errors import MissingDependencyError

_TITLES = ("model", "input", "params, train", "params, plain", "GMACs", "Wino GMULs")
_SEGMENTATION_TITLES = ("segmentation model", "input", "stride", *_TITLES[2:5])


def list_models(as_json: JsonFlag = False) -> None:
    """List the models with their sizes and costs.

    Parameters are those of the train form and of the plain form. Multiply-adds (one counts 1, as in the paper) and
    Winograd multiplications are those of the plain form, for one image of the model's own size. Segmentation models
    have the classes of Cityscapes; their stride is that of the last feature map, in pixels of the image.

    Args:
        as_json: print JSON, with exact numbers and the source of each model.
    """
    from repvgg.models import list_models, list_segmentation_models

    missing: list[str] = []
    with busy("Counting"):
        models = [_describe(name) for name in list_models()]
        segmentation = []
        for name in list_segmentation_models():
            try:
                segmentation.append(_describe_segmentation(name))
            except MissingDependencyError:  # of torchvision, which builds ResNets
                missing.append(name)
    if as_json:
        write_json(models + segmentation)
        return
    write_table([_TITLES, *map(_cells, models)])
    write_line()
    write_table([_SEGMENTATION_TITLES, *map(_segmentation_cells, segmentation)])
    if missing:
        write_line(f"\nnot counted, because torchvision is not installed: {', '.join(missing)}")


def _describe(name: str) -> dict[str, Any]:
    from repvgg.models import create_model, spec_of

    size = spec_of(name).input_size
    return {"name": name, "input_size": size, **_counts(create_model, name, size), "source": spec_of(name).source}


def _describe_segmentation(name: str) -> dict[str, Any]:
    from functools import partial

    from repvgg.models import PSPNETS, create_model
    from repvgg.models.registry import CITYSCAPES_CLASSES

    spec = PSPNETS[name]
    return {
        "name": name,
        "input_size": spec.input_size,
        "output_stride": spec.output_stride,
        **_counts(partial(create_model, num_classes=CITYSCAPES_CLASSES), name, spec.input_size),
        "source": spec.source,
    }


def _counts(create: Any, name: str, size: int) -> dict[str, int]:
    from repvgg._contexts import meta_device
    from repvgg.measure import count

    with meta_device():  # shapes are enough to count
        train, plain = create(name), create(name, plain=True)
    counts = count(plain, (1, train.in_channels, size, size))
    return {
        "params_train": sum(p.numel() for p in train.parameters()),
        "params_plain": counts.params,
        "macs": counts.macs,
        "winograd_muls": counts.winograd_muls,
    }


def _cells(model: dict[str, Any]) -> tuple[str, ...]:
    costs = f"{model['macs'] / 1e9:.3f}", f"{model['winograd_muls'] / 1e9:.3f}"
    return (model["name"], str(model["input_size"]), *_params(model), *costs)


def _segmentation_cells(model: dict[str, Any]) -> tuple[str, ...]:
    sizes = str(model["input_size"]), str(model["output_stride"])
    return (model["name"], *sizes, *_params(model), f"{model['macs'] / 1e9:.1f}")


def _params(model: dict[str, Any]) -> tuple[str, str]:
    return f"{model['params_train'] / 1e6:.2f} M", f"{model['params_plain'] / 1e6:.2f} M"
