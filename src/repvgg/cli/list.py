"""``repvgg list``."""

from __future__ import annotations

import json
import sys
from typing import Any


def list_(as_json: bool = False) -> None:
    """List the models with what they hold and what they cost.

    Parameters are given in the train form and in the plain form; multiply-adds (one counts 1, as in the paper) and
    Winograd multiplications are those of the plain form, for one image of the size that the model is made for.

    Args:
        as_json: print JSON instead of a table.
    """
    from repvgg.models import list_models

    rows = [_row(name) for name in list_models()]
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
    else:
        _print(rows)


def _row(name: str) -> dict[str, Any]:
    import torch

    from repvgg.measure import count
    from repvgg.models import create_model, spec_of

    size = spec_of(name).input_size
    with torch.device("meta"):
        train, plain = create_model(name), create_model(name, plain=True)
    counts = count(plain, (1, 3, size, size))
    return {
        "name": name,
        "input_size": size,
        "params_train": sum(p.numel() for p in train.parameters()),
        "params_plain": counts.params,
        "macs": counts.macs,
        "winograd_muls": counts.winograd_muls,
        "source": spec_of(name).source,
    }


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    table.add_column("model")
    for title in ("input", "params, train", "params, plain", "GMACs", "Wino GMULs"):
        table.add_column(title, justify="right")
    table.add_column("source")
    for row in rows:
        costs = f"{row['macs'] / 1e9:.3f}", f"{row['winograd_muls'] / 1e9:.3f}"
        params = f"{row['params_train'] / 1e6:.2f} M", f"{row['params_plain'] / 1e6:.2f} M"
        table.add_row(row["name"], str(row["input_size"]), *params, *costs, row["source"])
    Console().print(table)
