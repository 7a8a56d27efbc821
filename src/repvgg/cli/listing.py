"""``repvgg list``."""

from __future__ import annotations

from typing import Annotated, Any

import tyro

_TITLES = ("model", "input", "params, train", "params, plain", "GMACs", "Wino GMULs")


def list_(as_json: Annotated[bool, tyro.conf.arg(name="json")] = False) -> None:
    """List the models with what they hold and what they cost.

    Parameters are given in the train form and in the plain form; multiply-adds (one counts 1, as in the paper) and
    Winograd multiplications are those of the plain form, for one image of the size that the model is made for.

    Args:
        as_json: print JSON, with exact numbers and where each model comes from.
    """
    from repvgg.cli.terminal import busy, write_json, write_table
    from repvgg.models import list_models

    with busy("Counting"):
        rows = [_row(name) for name in list_models()]
    if as_json:
        write_json(rows)
    else:
        write_table([_TITLES, *map(_cells, rows)])


def _row(name: str) -> dict[str, Any]:
    import torch

    from repvgg.measure import count
    from repvgg.models import create_model, spec_of

    size = spec_of(name).input_size
    with torch.device("meta"):
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


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    params = f"{row['params_train'] / 1e6:.2f} M", f"{row['params_plain'] / 1e6:.2f} M"
    costs = f"{row['macs'] / 1e9:.3f}", f"{row['winograd_muls'] / 1e9:.3f}"
    return (row["name"], str(row["input_size"]), *params, *costs)
