"""``repvgg list``."""

from __future__ import annotations

from typing import Any

from repvgg._progress import busy
from repvgg.cli._options import JsonFlag
from repvgg.cli._output import write_json, write_table

_TITLES = ("model", "input", "params, train", "params, plain", "GMACs", "Wino GMULs")


def list_models(as_json: JsonFlag = False) -> None:
    """List the models with their sizes and costs.

    Parameters are those of the train form and of the plain form. Multiply-adds (one counts 1, as in the paper) and
    Winograd multiplications are those of the plain form, for one image of the model's own size.

    Args:
        as_json: print JSON, with exact numbers and the source of each model.
    """
    from repvgg.models import list_models

    with busy("Counting"):
        models = [_describe(name) for name in list_models()]
    if as_json:
        write_json(models)
    else:
        write_table([_TITLES, *map(_cells, models)])


def _describe(name: str) -> dict[str, Any]:
    import torch

    from repvgg.measure import count
    from repvgg.models import create_model, spec_of

    size = spec_of(name).input_size
    with torch.device("meta"):  # shapes are enough to count
        train, plain = create_model(name), create_model(name, plain=True)
    counts = count(plain, (1, train.in_channels, size, size))
    return {
        "name": name,
        "input_size": size,
        "params_train": sum(p.numel() for p in train.parameters()),
        "params_plain": counts.params,
        "macs": counts.macs,
        "winograd_muls": counts.winograd_muls,
        "source": spec_of(name).source,
    }


def _cells(model: dict[str, Any]) -> tuple[str, ...]:
    params = f"{model['params_train'] / 1e6:.2f} M", f"{model['params_plain'] / 1e6:.2f} M"
    costs = f"{model['macs'] / 1e9:.3f}", f"{model['winograd_muls'] / 1e9:.3f}"
    return (model["name"], str(model["input_size"]), *params, *costs)
